#include "models/decoder.h"

#include <algorithm>
#include <climits>
#include <cstring>
#include <span>
#include <string>
#include <utility>

#include "core/ops/matmul.h"
#include "core/ops/norm.h"
#include "core/ops/rope.h"
#include "verify/tree_attention.h"
#include "verify/tree_conv.h"
#include "verify/tree_plan.h"
#include "verify/tree_scan.h"

namespace canopy {
namespace {

// Kernels read whole vectors past a vector's last element.
void Pad(std::vector<float>& values) {
  values.resize(PaddedColumns(static_cast<int>(values.size())), 0.0f);
}

ConstMatrix AsRow(const std::vector<float>& padded, int columns) {
  return {padded.data(), 1, columns, static_cast<int64_t>(padded.size())};
}

const float* OrNull(const std::vector<float>& values) {
  return values.empty() ? nullptr : values.data();
}

AttentionShape ShapeOf(const AttentionSpec& spec) {
  return {spec.heads, spec.kv_heads, spec.head_dim, spec.scale};
}

SsdShape ShapeOf(const SsdSpec& spec) {
  return {spec.heads, spec.head_dim, spec.groups, spec.d_state};
}

// Memory of passes of at most max_rows rows. Matrices have one row more than they use, since
// kernels may read whole vectors past the end of a column range.
class DecoderWorkspace final : public Workspace {
 public:
  size_t bytes() const override {
    return x.bytes() + normed.bytes() + wide.bytes() + mixed.bytes() + conv.bytes() +
           scan.dt.bytes() + scan.c.bytes() + scan.scores.bytes() + head_in.bytes() +
           logits.bytes();
  }

  int max_rows = 0;
  Tensor x;       // [rows, hidden]: the residual stream
  Tensor normed;  // [rows, hidden]
  Tensor wide;    // [rows, widest projection]
  Tensor mixed;   // [rows, widest mixer output or MLP middle]
  Tensor conv;    // [rows, channels]
  ScanScratch scan;
  Tensor head_in;               // [rows asked for, hidden]
  Tensor logits;                // [rows asked for, vocab]; grows to the most that was asked for
  std::vector<TreePlan> plans;  // one an item
  std::vector<int32_t> positions;
  std::vector<int> first_row;
};

class Decoder final : public LanguageModel {
 public:
  Decoder(CpuBackend& cpu, DecoderSpec spec) : cpu_(cpu), spec_(std::move(spec)) {}

  absl::Status Prepare();

  const ModelInfo& info() const override { return spec_.info; }
  absl::StatusOr<std::unique_ptr<DecodeState>> NewState(const StateOptions& options) const override;
  absl::StatusOr<std::unique_ptr<Workspace>> NewWorkspace(int max_rows) const override;
  absl::StatusOr<ForwardResult> Forward(std::span<const ForwardItem> items,
                                        Workspace& workspace) const override;

 private:
  absl::Status CommitRows(DecodeState& state, std::span<const NodeId> path) const override;

  absl::Status Validate(std::span<const ForwardItem> items, const DecoderWorkspace& ws) const;
  absl::Status ValidateItem(const ForwardItem& item) const;
  // All items in one pass; their rows fit the workspace.
  absl::StatusOr<ForwardResult> Pass(std::span<const ForwardItem> items,
                                     DecoderWorkspace& ws) const;
  void Embed(std::span<const ForwardItem> items, DecoderWorkspace& ws) const;
  absl::Status Attention(const AttentionSpec& spec, int layer, std::span<const ForwardItem> items,
                         int rows, DecoderWorkspace& ws) const;
  absl::Status Ssd(const SsdSpec& spec, int layer, std::span<const ForwardItem> items, int rows,
                   DecoderWorkspace& ws) const;
  absl::Status Mlp(const MlpSpec& spec, int rows, DecoderWorkspace& ws) const;
  absl::StatusOr<ForwardResult> Logits(std::span<const ForwardItem> items,
                                       DecoderWorkspace& ws) const;

  CpuBackend& cpu_;
  DecoderSpec spec_;
  int widest_projection_ = 0;
  int widest_middle_ = 0;
  int widest_channels_ = 0;
  SsdShape widest_ssd_;  // the greatest of each dimension
};

absl::Status Mismatch(int layer, std::string_view what, int64_t got, int64_t expected) {
  return absl::InvalidArgumentError(
      absl::StrCat("layer ", layer, ": ", std::string(what), " is ", got, ", expected ", expected));
}

#define CHECK_DIM(what, got, expected)                             \
  if (static_cast<int64_t>(got) != static_cast<int64_t>(expected)) \
  return Mismatch(layer, what, got, expected)

absl::Status Decoder::Prepare() {
  ModelInfo& info = spec_.info;
  const int hidden = info.hidden_size;
  info.layers = static_cast<int>(spec_.blocks.size());
  info.layer_kinds.clear();
  info.weight_bytes = spec_.head.bytes() + (spec_.embedding ? spec_.embedding->bytes() : 0);
  info.layer_parameters = 0;
  const auto count_matrices = [&info](std::initializer_list<const PackedMatrix*> matrices) {
    for (const PackedMatrix* m : matrices) {
      info.layer_parameters += int64_t{m->out_features()} * m->in_features();
      info.weight_bytes += m->bytes();
    }
  };
  const auto vector_bytes = [](std::initializer_list<const std::vector<float>*> vectors) {
    size_t bytes = 0;
    for (const std::vector<float>* v : vectors) bytes += v->size() * sizeof(float);
    return bytes;
  };
  int layer = 0;
  for (BlockSpec& block : spec_.blocks) {
    CHECK_DIM("norm weight's length", block.norm.weight.size(), hidden);
    Pad(block.norm.weight);
    info.weight_bytes += vector_bytes({&block.norm.weight});
    if (auto* attention = std::get_if<AttentionSpec>(&block.mixer)) {
      info.layer_kinds.push_back("attention");
      if (attention->heads < 1 || attention->kv_heads < 1 ||
          attention->heads % attention->kv_heads != 0) {
        return absl::InvalidArgumentError(absl::StrCat("layer ", layer, ": ", attention->heads,
                                                       " heads do not divide into ",
                                                       attention->kv_heads, " KV heads"));
      }
      const int rows = (attention->heads + 2 * attention->kv_heads) * attention->head_dim;
      CHECK_DIM("qkv rows", attention->qkv.out_features(), rows);
      CHECK_DIM("qkv columns", attention->qkv.in_features(), hidden);
      CHECK_DIM("attention output rows", attention->out.out_features(), hidden);
      CHECK_DIM("attention output columns", attention->out.in_features(),
                attention->heads * attention->head_dim);
      widest_projection_ = std::max(widest_projection_, rows);
      widest_middle_ = std::max(widest_middle_, attention->heads * attention->head_dim);
      count_matrices({&attention->qkv, &attention->out});
      for (std::vector<float>* v :
           {&attention->qkv_bias, &attention->out_bias, &attention->q_norm, &attention->k_norm}) {
        Pad(*v);
        info.weight_bytes += vector_bytes({v});
      }
    } else {
      SsdSpec& ssd = std::get<SsdSpec>(block.mixer);
      info.layer_kinds.push_back("ssd");
      if (ssd.heads < 1 || ssd.groups < 1 || ssd.heads % ssd.groups != 0) {
        return absl::InvalidArgumentError(absl::StrCat(
            "layer ", layer, ": ", ssd.heads, " heads do not divide into ", ssd.groups, " groups"));
      }
      const int rows = ssd.inner() + ssd.channels() + ssd.heads;
      CHECK_DIM("in_proj rows", ssd.in_proj.out_features(), rows);
      CHECK_DIM("in_proj columns", ssd.in_proj.in_features(), hidden);
      CHECK_DIM("out_proj rows", ssd.out_proj.out_features(), hidden);
      CHECK_DIM("out_proj columns", ssd.out_proj.in_features(), ssd.inner());
      CHECK_DIM("conv weight's length", ssd.conv_weight.size(), ssd.conv_kernel * ssd.channels());
      CHECK_DIM("A_log's length", ssd.A.size(), ssd.heads);
      CHECK_DIM("D's length", ssd.D.size(), ssd.heads);
      CHECK_DIM("dt_bias's length", ssd.dt_bias.size(), ssd.heads);
      CHECK_DIM("gated norm's length", ssd.norm_weight.size(), ssd.inner());
      if (ssd.conv_bias.empty()) ssd.conv_bias.resize(ssd.channels(), 0.0f);
      CHECK_DIM("conv bias's length", ssd.conv_bias.size(), ssd.channels());
      // Rows of whole vectors.
      const int stride = PaddedColumns(ssd.channels());
      std::vector<float> padded(static_cast<size_t>(ssd.conv_kernel) * stride, 0.0f);
      for (int k = 0; k < ssd.conv_kernel; ++k) {
        std::copy_n(ssd.conv_weight.begin() + static_cast<size_t>(k) * ssd.channels(),
                    ssd.channels(), padded.begin() + static_cast<size_t>(k) * stride);
      }
      ssd.conv_weight = std::move(padded);
      for (std::vector<float>* v : {&ssd.in_proj_bias, &ssd.conv_bias, &ssd.A, &ssd.D, &ssd.dt_bias,
                                    &ssd.norm_weight, &ssd.out_proj_bias}) {
        Pad(*v);
        info.weight_bytes += vector_bytes({v});
      }
      info.weight_bytes += vector_bytes({&ssd.conv_weight});
      count_matrices({&ssd.in_proj, &ssd.out_proj});
      widest_projection_ = std::max(widest_projection_, rows);
      widest_middle_ = std::max(widest_middle_, ssd.inner());
      widest_channels_ = std::max(widest_channels_, ssd.channels());
      widest_ssd_.heads = std::max(widest_ssd_.heads, ssd.heads);
      widest_ssd_.head_dim = std::max(widest_ssd_.head_dim, ssd.head_dim);
      widest_ssd_.groups = std::max(widest_ssd_.groups, ssd.groups);
      widest_ssd_.d_state = std::max(widest_ssd_.d_state, ssd.d_state);
    }
    if (block.mlp) {
      MlpSpec& mlp = *block.mlp;
      if (!block.mlp_norm)
        return absl::InvalidArgumentError(absl::StrCat("layer ", layer, ": no MLP norm"));
      CHECK_DIM("MLP norm weight's length", block.mlp_norm->weight.size(), hidden);
      CHECK_DIM("gate and up rows", mlp.gate_up.out_features(), 2 * mlp.intermediate);
      CHECK_DIM("gate and up columns", mlp.gate_up.in_features(), hidden);
      CHECK_DIM("down rows", mlp.down.out_features(), hidden);
      CHECK_DIM("down columns", mlp.down.in_features(), mlp.intermediate);
      for (std::vector<float>* v : {&block.mlp_norm->weight, &mlp.gate_up_bias, &mlp.down_bias}) {
        Pad(*v);
        info.weight_bytes += vector_bytes({v});
      }
      count_matrices({&mlp.gate_up, &mlp.down});
      widest_projection_ = std::max(widest_projection_, 2 * mlp.intermediate);
      widest_middle_ = std::max(widest_middle_, mlp.intermediate);
    }
    ++layer;
  }
  CHECK_DIM("final norm weight's length", spec_.final_norm.weight.size(), hidden);
  Pad(spec_.final_norm.weight);
  info.weight_bytes += vector_bytes({&spec_.final_norm.weight});
  CHECK_DIM("head rows", spec_.head.out_features(), info.vocab_size);
  CHECK_DIM("head columns", spec_.head.in_features(), hidden);
  if (spec_.embedding) {
    CHECK_DIM("embedding rows", spec_.embedding->out_features(), info.vocab_size);
    CHECK_DIM("embedding columns", spec_.embedding->in_features(), hidden);
  }
  return absl::OkStatus();
}

#undef CHECK_DIM

absl::StatusOr<std::unique_ptr<DecodeState>> Decoder::NewState(
    const StateOptions& requested) const {
  StateOptions options = requested;
  if (options.max_positions == 0) options.max_positions = spec_.info.max_positions;
  if (options.max_positions < 1 || options.max_pending < 1) {
    return absl::InvalidArgumentError(absl::StrCat("a state of ", options.max_positions,
                                                   " positions and ", options.max_pending,
                                                   " pending nodes; both must be at least 1"));
  }
  if (options.max_positions > spec_.info.max_positions) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a state of ", options.max_positions, " positions; ", spec_.info.architecture, " at ",
        spec_.info.path, " has at most ", spec_.info.max_positions, " (max_position_embeddings)"));
  }
  const size_t before = cpu_.memory().bytes_in_use;
  StateMemory memory;
  std::vector<LayerState> layers(spec_.blocks.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    LayerState& layer = layers[i];
    if (const auto* attention = std::get_if<AttentionSpec>(&spec_.blocks[i].mixer)) {
      const AttentionShape shape = ShapeOf(*attention);
      ASSIGN_OR_RETURN(layer.attention, AllocateAttentionState(cpu_, shape, options.max_positions,
                                                               options.max_pending));
      const size_t row = shape.kv_heads * sizeof(float);
      memory.kv_bytes_per_position += row * (shape.head_dim + shape.padded_head_dim());
      memory.pending_bytes_per_node += row * 2 * shape.padded_head_dim();
    } else {
      const SsdSpec& ssd = std::get<SsdSpec>(spec_.blocks[i].mixer);
      const SsdShape shape = ShapeOf(ssd);
      ASSIGN_OR_RETURN(layer.recurrent, AllocateSsdState(cpu_, shape, options.max_pending));
      ASSIGN_OR_RETURN(
          layer.conv.rows,
          Tensor::Allocate(cpu_, ssd.conv_kernel - 1 + options.max_pending, ssd.channels()));
      const size_t row = sizeof(float) * (layer.recurrent.inputs.view().stride +
                                          layer.recurrent.keys.view().stride +
                                          layer.recurrent.log_decay.view().stride);
      const size_t conv_row = sizeof(float) * layer.conv.rows.view().stride;
      memory.checkpoint_bytes += layer.recurrent.checkpoints[0].bytes() +
                                 layer.recurrent.checkpoints[1].bytes() +
                                 conv_row * (ssd.conv_kernel - 1);
      memory.ring_bytes += row * kRing;
      memory.pending_bytes_per_node += row + conv_row;
    }
  }
  memory.total_bytes = cpu_.memory().bytes_in_use - before;
  return std::make_unique<DecodeState>(this, options, std::move(layers), memory);
}

absl::StatusOr<std::unique_ptr<Workspace>> Decoder::NewWorkspace(int max_rows) const {
  if (max_rows < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("a workspace of ", max_rows, " rows; at least 1"));
  }
  auto ws = std::make_unique<DecoderWorkspace>();
  ws->max_rows = max_rows;
  const int rows = max_rows + 1;
  const int hidden = spec_.info.hidden_size;
  ASSIGN_OR_RETURN(ws->x, Tensor::Allocate(cpu_, rows, hidden));
  ASSIGN_OR_RETURN(ws->normed, Tensor::Allocate(cpu_, rows, hidden));
  ASSIGN_OR_RETURN(ws->wide, Tensor::Allocate(cpu_, rows, widest_projection_));
  ASSIGN_OR_RETURN(ws->mixed, Tensor::Allocate(cpu_, rows, widest_middle_));
  if (widest_ssd_.heads > 0) {
    ASSIGN_OR_RETURN(ws->conv, Tensor::Allocate(cpu_, rows, widest_channels_));
    ASSIGN_OR_RETURN(ws->scan, ScanScratch::Allocate(cpu_, rows, widest_ssd_));
  }
  ws->positions.reserve(rows);
  return ws;
}

absl::Status Decoder::ValidateItem(const ForwardItem& item) const {
  if (item.state == nullptr || &item.state->model() != this) {
    return absl::InvalidArgumentError("forward: the state belongs to another model");
  }
  DecodeState& state = *item.state;
  const int rows = static_cast<int>(item.tokens.size());
  if (rows == 0) return absl::InvalidArgumentError("forward: an item without tokens");
  for (int i = 0; i < rows; ++i) {
    const int32_t token = item.tokens[i].value;
    if (token < 0 || token >= spec_.info.vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat("forward: token ", token, " of node ", i,
                                                     " is not in the vocabulary of ",
                                                     spec_.info.vocab_size));
    }
  }
  const int limit = state.options().max_positions;
  const bool chain = item.commit_chain || item.parents.empty();
  if (chain && state.pending() > 0) {
    return absl::InvalidArgumentError(absl::StrCat("forward: a chain under the prefix, but ",
                                                   state.pending(),
                                                   " nodes are pending; commit or drop them"));
  }
  if (item.commit_chain) {
    if (state.position() + rows > limit) {
      return absl::InvalidArgumentError(absl::StrCat(
          "forward: ", state.position(), " + ", rows, " positions, but the state holds ", limit,
          "; raise max_positions or shorten the prompt"));
    }
    return absl::OkStatus();
  }
  if (!item.parents.empty() && item.parents.size() != item.tokens.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("forward: ", rows, " tokens, but ", item.parents.size(), " parents"));
  }
  if (state.pending() + rows > state.options().max_pending) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "forward: ", state.pending(), " + ", rows, " pending nodes, but the state holds ",
        state.options().max_pending, "; raise max_pending"));
  }
  // Depths are found by adding the nodes; undone below where they do not fit.
  const int before = state.pending();
  absl::Status status = absl::OkStatus();
  for (int i = 0; i < rows && status.ok(); ++i) {
    const NodeId parent = chain ? NodeId(before + i - 1) : item.parents[i];
    if (chain && i == 0) {
      state.AddPending(item.tokens[i], kPrefix);
    } else if (parent.value < -1 || parent.value >= before + i) {
      status = absl::InvalidArgumentError(absl::StrCat("forward: node ", before + i, " has parent ",
                                                       parent.value, "; expected -1 to ",
                                                       before + i - 1));
      break;
    } else {
      state.AddPending(item.tokens[i], parent);
    }
    const int depth = state.depth(NodeId(before + i));
    if (depth >= kMaxTreeHeight) {
      status = absl::InvalidArgumentError(absl::StrCat(
          "forward: node ", before + i, " is on level ", depth + 1, "; a tree has at most ",
          kMaxTreeHeight, " levels (commit a path first, or draft less deep)"));
    } else if (state.position() + depth >= limit) {
      status = absl::InvalidArgumentError(absl::StrCat("forward: node ", before + i,
                                                       " is at position ", state.position() + depth,
                                                       ", but the state holds ", limit));
    }
  }
  state.DropPendingFrom(before);
  return status;
}

absl::Status Decoder::Validate(std::span<const ForwardItem> items,
                               const DecoderWorkspace& ws) const {
  if (items.empty()) return absl::InvalidArgumentError("forward: no items");
  int rows = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    RETURN_IF_ERROR(ValidateItem(items[i]));
    for (size_t j = 0; j < i; ++j) {
      if (items[j].state == items[i].state) {
        return absl::InvalidArgumentError("forward: two items share a state");
      }
    }
    const bool cut = items[i].commit_chain && items[i].logits != LogitsOf::kAll;
    rows += cut ? 1 : static_cast<int>(items[i].tokens.size());
  }
  if (rows > ws.max_rows) {
    return absl::InvalidArgumentError(
        absl::StrCat("forward: ", rows, " rows, but the workspace is for ", ws.max_rows));
  }
  return absl::OkStatus();
}

absl::StatusOr<ForwardResult> Decoder::Forward(std::span<const ForwardItem> items,
                                               Workspace& workspace) const {
  auto& ws = static_cast<DecoderWorkspace&>(workspace);
  RETURN_IF_ERROR(Validate(items, ws));
  size_t rows = 0;
  for (const ForwardItem& item : items) rows += item.tokens.size();
  if (rows <= static_cast<size_t>(ws.max_rows)) return Pass(items, ws);
  // Prompts that are too long for one pass: all but their last token first, in passes of their own.
  std::vector<ForwardItem> last(items.begin(), items.end());
  for (ForwardItem& item : last) {
    if (!item.commit_chain || item.logits == LogitsOf::kAll) continue;
    while (item.tokens.size() > 1) {
      ForwardItem part = item;
      part.logits = LogitsOf::kNone;
      part.tokens = item.tokens.first(std::min<size_t>(item.tokens.size() - 1, ws.max_rows));
      RETURN_IF_ERROR(Pass(std::span(&part, 1), ws).status());
      item.tokens = item.tokens.subspan(part.tokens.size());
    }
  }
  return Pass(last, ws);
}

absl::StatusOr<ForwardResult> Decoder::Pass(std::span<const ForwardItem> items,
                                            DecoderWorkspace& ws) const {
  if (ws.plans.size() < items.size()) {
    ws.plans.resize(items.size());
    for (TreePlan& plan : ws.plans) plan.Reserve(ws.max_rows);
  }
  ws.positions.clear();
  int rows = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    const ForwardItem& item = items[i];
    DecodeState& state = *item.state;
    const int count = static_cast<int>(item.tokens.size());
    if (item.commit_chain) {
      ws.plans[i].BuildChain(state, count, rows);
    } else {
      const int before = state.pending();
      for (int k = 0; k < count; ++k) {
        state.AddPending(item.tokens[k], item.parents.empty() ? NodeId(k - 1) : item.parents[k]);
      }
      ws.plans[i].BuildTree(state, before, rows);
    }
    ws.positions.insert(ws.positions.end(), ws.plans[i].positions().begin(),
                        ws.plans[i].positions().end());
    rows += count;
  }
  Embed(items, ws);
  for (size_t layer = 0; layer < spec_.blocks.size(); ++layer) {
    const BlockSpec& block = spec_.blocks[layer];
    RETURN_IF_ERROR(RmsNorm(cpu_, ws.x.Rows(rows), block.norm.weight.data(), block.norm.eps,
                            ws.normed.Rows(rows)));
    if (const auto* attention = std::get_if<AttentionSpec>(&block.mixer)) {
      RETURN_IF_ERROR(Attention(*attention, layer, items, rows, ws));
    } else {
      RETURN_IF_ERROR(Ssd(std::get<SsdSpec>(block.mixer), layer, items, rows, ws));
    }
    if (block.mlp) {
      RETURN_IF_ERROR(RmsNorm(cpu_, ws.x.Rows(rows), block.mlp_norm->weight.data(),
                              block.mlp_norm->eps, ws.normed.Rows(rows)));
      RETURN_IF_ERROR(Mlp(*block.mlp, rows, ws));
    }
  }
  for (const ForwardItem& item : items) {
    if (item.commit_chain) item.state->Advance(static_cast<int>(item.tokens.size()));
  }
  return Logits(items, ws);
}

void Decoder::Embed(std::span<const ForwardItem> items, DecoderWorkspace& ws) const {
  const PackedMatrix& embedding = spec_.embedding ? *spec_.embedding : spec_.head;
  int row = 0;
  for (const ForwardItem& item : items) {
    for (TokenId token : item.tokens) embedding.UnpackRow(token.value, ws.x.view().row(row++));
  }
}

absl::Status Decoder::Attention(const AttentionSpec& spec, int layer,
                                std::span<const ForwardItem> items, int rows,
                                DecoderWorkspace& ws) const {
  const AttentionShape shape = ShapeOf(spec);
  const int q_columns = spec.heads * spec.head_dim;
  const int kv_columns = spec.kv_heads * spec.head_dim;
  Matrix qkv = ws.wide.Rows(rows).Columns(0, q_columns + 2 * kv_columns);
  RETURN_IF_ERROR(
      MatMul(cpu_, ws.normed.Rows(rows), spec.qkv, qkv, {.bias = OrNull(spec.qkv_bias)}));
  const Matrix q = qkv.Columns(0, q_columns);
  const Matrix k = qkv.Columns(q_columns, kv_columns);
  if (!spec.q_norm.empty()) {
    RETURN_IF_ERROR(
        HeadRmsNorm(cpu_, q, spec.heads, spec.head_dim, spec.q_norm.data(), spec.qk_norm_eps));
  }
  if (!spec.k_norm.empty()) {
    RETURN_IF_ERROR(
        HeadRmsNorm(cpu_, k, spec.kv_heads, spec.head_dim, spec.k_norm.data(), spec.qk_norm_eps));
  }
  if (!spec.rope_inv_freq.empty()) {
    RETURN_IF_ERROR(
        ApplyRope(cpu_, q, spec.heads, spec.head_dim, spec.rope_inv_freq, ws.positions));
    RETURN_IF_ERROR(
        ApplyRope(cpu_, k, spec.kv_heads, spec.head_dim, spec.rope_inv_freq, ws.positions));
  }
  const Matrix mixed = ws.mixed.Rows(rows).Columns(0, q_columns);
  for (size_t i = 0; i < items.size(); ++i) {
    RETURN_IF_ERROR(TreeAttention(cpu_, ws.plans[i], shape, qkv,
                                  items[i].state->layers()[layer].attention, mixed));
  }
  return MatMul(cpu_, mixed, spec.out, ws.x.Rows(rows),
                {.bias = OrNull(spec.out_bias), .accumulate = true});
}

absl::Status Decoder::Ssd(const SsdSpec& spec, int layer, std::span<const ForwardItem> items,
                          int rows, DecoderWorkspace& ws) const {
  const SsdShape shape = ShapeOf(spec);
  const int inner = spec.inner();
  const int channels = spec.channels();
  const Matrix projected = ws.wide.Rows(rows).Columns(0, inner + channels + spec.heads);
  RETURN_IF_ERROR(MatMul(cpu_, ws.normed.Rows(rows), spec.in_proj, projected,
                         {.bias = OrNull(spec.in_proj_bias)}));
  const Matrix gate = projected.Columns(0, inner);
  const Matrix conv_in = projected.Columns(inner, channels);
  const Matrix dt = projected.Columns(inner + channels, spec.heads);
  const Matrix conv_out = ws.conv.Rows(rows).Columns(0, channels);
  const Matrix mixed = ws.mixed.Rows(rows).Columns(0, inner);
  const ConstMatrix conv_weight = {spec.conv_weight.data(), spec.conv_kernel, channels,
                                   PaddedColumns(channels)};
  const SsdParams params = {spec.A.data(), spec.D.data(), spec.dt_bias.data(), spec.dt_min,
                            spec.dt_max};
  for (size_t i = 0; i < items.size(); ++i) {
    LayerState& state = items[i].state->layers()[layer];
    RETURN_IF_ERROR(TreeConvSilu(cpu_, ws.plans[i], conv_in, conv_weight,
                                 AsRow(spec.conv_bias, channels), state.conv, conv_out));
    RETURN_IF_ERROR(
        TreeScan(cpu_, ws.plans[i], shape, params, conv_out, dt, state.recurrent, ws.scan, mixed));
  }
  RETURN_IF_ERROR(GatedRmsNorm(cpu_, mixed, gate, spec.norm_weight.data(), spec.norm_eps,
                               spec.norm_groups, mixed));
  return MatMul(cpu_, mixed, spec.out_proj, ws.x.Rows(rows),
                {.bias = OrNull(spec.out_proj_bias), .accumulate = true});
}

absl::Status Decoder::Mlp(const MlpSpec& spec, int rows, DecoderWorkspace& ws) const {
  const Matrix gate_up = ws.wide.Rows(rows).Columns(0, 2 * spec.intermediate);
  const Matrix middle = ws.mixed.Rows(rows).Columns(0, spec.intermediate);
  RETURN_IF_ERROR(MatMul(cpu_, ws.normed.Rows(rows), spec.gate_up, gate_up,
                         {.bias = OrNull(spec.gate_up_bias)}));
  RETURN_IF_ERROR(GatedActivation(cpu_, spec.activation, gate_up, middle));
  return MatMul(cpu_, middle, spec.down, ws.x.Rows(rows),
                {.bias = OrNull(spec.down_bias), .accumulate = true});
}

absl::StatusOr<ForwardResult> Decoder::Logits(std::span<const ForwardItem> items,
                                              DecoderWorkspace& ws) const {
  const int hidden = spec_.info.hidden_size;
  ws.first_row.clear();
  int wanted = 0;
  for (const ForwardItem& item : items) {
    ws.first_row.push_back(wanted);
    wanted += item.logits == LogitsOf::kAll    ? static_cast<int>(item.tokens.size())
              : item.logits == LogitsOf::kLast ? 1
                                               : 0;
  }
  if (wanted == 0) return ForwardResult{{}, ws.first_row};
  if (ws.logits.view().rows < wanted) {
    ASSIGN_OR_RETURN(ws.logits, Tensor::Allocate(cpu_, wanted, spec_.info.vocab_size));
    ASSIGN_OR_RETURN(ws.head_in, Tensor::Allocate(cpu_, wanted, hidden));
  }
  int from = 0;
  int to = 0;
  for (const ForwardItem& item : items) {
    const int rows = static_cast<int>(item.tokens.size());
    const int skipped = item.logits == LogitsOf::kAll    ? 0
                        : item.logits == LogitsOf::kLast ? rows - 1
                                                         : rows;
    for (int i = skipped; i < rows; ++i) {
      std::memcpy(ws.head_in.view().row(to++), ws.x.view().row(from + i), sizeof(float) * hidden);
    }
    from += rows;
  }
  const Matrix head_in = ws.head_in.Rows(wanted);
  const Matrix logits = ws.logits.Rows(wanted);
  RETURN_IF_ERROR(
      RmsNorm(cpu_, head_in, spec_.final_norm.weight.data(), spec_.final_norm.eps, head_in));
  RETURN_IF_ERROR(MatMul(cpu_, head_in, spec_.head, logits));
  return ForwardResult{logits, ws.first_row};
}

absl::Status Decoder::CommitRows(DecodeState& state, std::span<const NodeId> path) const {
  if (path.empty()) return absl::OkStatus();
  for (size_t i = 0; i < spec_.blocks.size(); ++i) {
    LayerState& layer = state.layers()[i];
    if (const auto* attention = std::get_if<AttentionSpec>(&spec_.blocks[i].mixer)) {
      CommitAttention(state, path, ShapeOf(*attention), layer.attention);
    } else {
      const SsdSpec& ssd = std::get<SsdSpec>(spec_.blocks[i].mixer);
      CommitConv(state, path, ssd.conv_kernel, layer.conv);
      RETURN_IF_ERROR(CommitSsd(cpu_, state, path, ShapeOf(ssd), layer.recurrent));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<LanguageModel>> MakeDecoder(CpuBackend& cpu, DecoderSpec spec) {
  auto decoder = std::make_unique<Decoder>(cpu, std::move(spec));
  RETURN_IF_ERROR(decoder->Prepare());
  return decoder;
}

}  // namespace canopy
