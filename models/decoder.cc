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
#include "models/forward_check.h"
#include "verify/tree_attention.h"
#include "verify/tree_conv.h"
#include "verify/tree_plan.h"
#include "verify/tree_scan.h"

namespace canopy {
namespace {

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

std::vector<LayerState>& LayersOf(DecodeState& state) {
  return static_cast<LayerStorage&>(state.storage()).layers;
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

absl::Status Decoder::Prepare() {
  RETURN_IF_ERROR(PrepareSpec(spec_));
  for (const BlockSpec& block : spec_.blocks) {
    if (const auto* attention = std::get_if<AttentionSpec>(&block.mixer)) {
      widest_projection_ = std::max(widest_projection_, attention->qkv.out_features());
      widest_middle_ = std::max(widest_middle_, attention->heads * attention->head_dim);
    } else {
      const SsdSpec& ssd = std::get<SsdSpec>(block.mixer);
      widest_projection_ = std::max(widest_projection_, ssd.in_proj.out_features());
      widest_middle_ = std::max(widest_middle_, ssd.inner());
      widest_channels_ = std::max(widest_channels_, ssd.channels());
      widest_ssd_.heads = std::max(widest_ssd_.heads, ssd.heads);
      widest_ssd_.head_dim = std::max(widest_ssd_.head_dim, ssd.head_dim);
      widest_ssd_.groups = std::max(widest_ssd_.groups, ssd.groups);
      widest_ssd_.d_state = std::max(widest_ssd_.d_state, ssd.d_state);
    }
    if (block.mlp) {
      widest_projection_ = std::max(widest_projection_, 2 * block.mlp->intermediate);
      widest_middle_ = std::max(widest_middle_, block.mlp->intermediate);
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<DecodeState>> Decoder::NewState(
    const StateOptions& requested) const {
  ASSIGN_OR_RETURN(const StateOptions options, CheckStateOptions(spec_.info, requested));
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
  return std::make_unique<DecodeState>(this, options,
                                       std::make_unique<LayerStorage>(std::move(layers)), memory);
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

absl::StatusOr<ForwardResult> Decoder::Forward(std::span<const ForwardItem> items,
                                               Workspace& workspace) const {
  auto& ws = static_cast<DecoderWorkspace&>(workspace);
  RETURN_IF_ERROR(CheckForward(*this, items, ws.max_rows));
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
                                  LayersOf(*items[i].state)[layer].attention, mixed));
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
    LayerState& state = LayersOf(*items[i].state)[layer];
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
    LayerState& layer = LayersOf(state)[i];
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
