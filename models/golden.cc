#include "models/golden.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <span>
#include <vector>

#include "core/safetensors.h"
#include "nlohmann/json.hpp"
#include "verify/sampling.h"

namespace canopy {
namespace {

// Rows of a pass over the context; any number gives the same bits.
constexpr int kChunk = 64;
// Keeps sizes that a file claims inside int.
constexpr int64_t kMaxTokens = 1 << 20;

struct Golden {
  std::vector<TokenId> context;       // [T]
  std::vector<float> context_logits;  // [context_rows, vocab]
  int context_rows = 0;               // R
  std::vector<NodeId> tree_parents;   // [N]
  std::vector<TokenId> tree_tokens;   // [N]
  std::vector<float> tree_logits;     // [N, vocab]
  std::vector<TokenId> greedy;        // [G], empty without
  std::vector<float> greedy_gap;      // [G]
};

class GoldenReader {
 public:
  GoldenReader(std::string path, Safetensors tensors)
      : path_(std::move(path)), tensors_(std::move(tensors)) {}

  bool Has(const char* name) const { return tensors_.Find(name) != nullptr; }

  // i32 [n] with n from 1 to kMaxTokens.
  absl::StatusOr<std::vector<int32_t>> Ints(const char* name) const {
    ASSIGN_OR_RETURN(const SafetensorsEntry* entry, Find(name));
    if (entry->dtype != DType::kI32 || entry->shape.size() != 1 || entry->shape[0] < 1 ||
        entry->shape[0] > kMaxTokens) {
      return Unfit(name, *entry, absl::StrCat("I32 [1 to ", kMaxTokens, "]"));
    }
    std::vector<int32_t> values(entry->shape[0]);
    std::memcpy(values.data(), entry->data, entry->bytes);
    return values;
  }

  absl::StatusOr<std::vector<TokenId>> Tokens(const char* name, int vocab) const {
    ASSIGN_OR_RETURN(const std::vector<int32_t> values, Ints(name));
    std::vector<TokenId> tokens;
    for (int32_t value : values) {
      if (value < 0 || value >= vocab) {
        return absl::InvalidArgumentError(absl::StrCat(path_, ": ", name, " has the token ", value,
                                                       "; the model's vocabulary has ", vocab));
      }
      tokens.emplace_back(value);
    }
    return tokens;
  }

  // f32 [rows, columns], flat.
  absl::StatusOr<std::vector<float>> Floats(const char* name, std::vector<int64_t> shape) const {
    ASSIGN_OR_RETURN(const SafetensorsEntry* entry, Find(name));
    if (entry->dtype != DType::kF32 || entry->shape != shape) {
      SafetensorsEntry expected;
      expected.shape = std::move(shape);
      return Unfit(name, *entry, absl::StrCat("F32 ", expected.ShapeString()));
    }
    std::vector<float> values(entry->elements());
    RETURN_IF_ERROR(ReadFloats(*entry, values));
    return values;
  }

  absl::StatusOr<const SafetensorsEntry*> Find(const char* name) const {
    const SafetensorsEntry* entry = tensors_.Find(name);
    if (entry == nullptr) {
      return absl::NotFoundError(
          absl::StrCat(path_, ": tensor ", name, " is missing; is it a golden file?"));
    }
    return entry;
  }

  absl::Status Unfit(const char* name, const SafetensorsEntry& entry,
                     const std::string& expected) const {
    return absl::InvalidArgumentError(absl::StrCat(path_, ": tensor ", name, " is ",
                                                   entry.dtype_name, " ", entry.ShapeString(),
                                                   "; expected ", expected));
  }

 private:
  std::string path_;
  Safetensors tensors_;
};

absl::StatusOr<Golden> ReadGolden(const std::string& path, int vocab) {
  ASSIGN_OR_RETURN(Safetensors tensors, Safetensors::Open(path));
  const GoldenReader reader(path, std::move(tensors));
  Golden golden;
  ASSIGN_OR_RETURN(golden.context, reader.Tokens("context_ids", vocab));
  ASSIGN_OR_RETURN(const SafetensorsEntry* logits, reader.Find("context_logits"));
  const int64_t context = static_cast<int64_t>(golden.context.size());
  if (logits->shape.size() != 2 || logits->shape[0] < 1 || logits->shape[0] > context) {
    return reader.Unfit("context_logits", *logits,
                        absl::StrCat("F32 [1 to ", context, ", ", vocab, "]"));
  }
  golden.context_rows = static_cast<int>(logits->shape[0]);
  ASSIGN_OR_RETURN(golden.context_logits,
                   reader.Floats("context_logits", {golden.context_rows, vocab}));
  ASSIGN_OR_RETURN(golden.tree_tokens, reader.Tokens("tree_tokens", vocab));
  ASSIGN_OR_RETURN(const std::vector<int32_t> parents, reader.Ints("tree_parents"));
  const int64_t nodes = static_cast<int64_t>(golden.tree_tokens.size());
  if (parents.size() != golden.tree_tokens.size()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": tree_parents has ", parents.size(),
                                                   " nodes and tree_tokens ", nodes));
  }
  for (int32_t parent : parents) golden.tree_parents.emplace_back(parent);
  ASSIGN_OR_RETURN(golden.tree_logits, reader.Floats("tree_logits", {nodes, vocab}));
  if (reader.Has("greedy_ids")) {
    ASSIGN_OR_RETURN(golden.greedy, reader.Tokens("greedy_ids", vocab));
    ASSIGN_OR_RETURN(
        golden.greedy_gap,
        reader.Floats("greedy_top2_gap", {static_cast<int64_t>(golden.greedy.size())}));
  }
  return golden;
}

// The greatest difference of rows of `logits` from `expected` [logits.rows, vocab].
double MaxAbsError(ConstMatrix logits, std::span<const float> expected) {
  double error = 0.0;
  for (int r = 0; r < logits.rows; ++r) {
    const float* want = expected.data() + int64_t{r} * logits.columns;
    for (int c = 0; c < logits.columns; ++c) {
      const double difference = std::abs(double{logits.row(r)[c]} - double{want[c]});
      if (!std::isfinite(difference)) return std::numeric_limits<double>::infinity();
      error = std::max(error, difference);
    }
  }
  return error;
}

// Commits `tokens` and gives the greatest error of their logits; none are computed if `expected` is
// empty.
absl::StatusOr<double> CommitTokens(const LanguageModel& model, std::span<const TokenId> tokens,
                                    std::span<const float> expected, DecodeState& state,
                                    Workspace& workspace) {
  const size_t vocab = model.info().vocab_size;
  double error = 0.0;
  for (size_t begin = 0; begin < tokens.size(); begin += kChunk) {
    const size_t count = std::min<size_t>(kChunk, tokens.size() - begin);
    const ForwardItem item{.state = &state,
                           .tokens = tokens.subspan(begin, count),
                           .parents = {},
                           .logits = expected.empty() ? LogitsOf::kNone : LogitsOf::kAll,
                           .commit_chain = true};
    ASSIGN_OR_RETURN(const ForwardResult result, model.Forward({&item, 1}, workspace));
    if (expected.empty()) continue;
    error =
        std::max(error, MaxAbsError(result.logits, expected.subspan(begin * vocab, count * vocab)));
  }
  return error;
}

absl::StatusOr<GreedyReport> CompareGreedy(const LanguageModel& model, const Golden& golden,
                                           DecodeState& state, Workspace& workspace) {
  GreedyReport report;
  state.Reset();
  const std::span<const TokenId> context(golden.context);
  RETURN_IF_ERROR(
      CommitTokens(model, context.first(context.size() - 1), {}, state, workspace).status());
  TokenId last = context.back();
  for (size_t step = 0; step < golden.greedy.size(); ++step) {
    const ForwardItem item{.state = &state, .tokens = {&last, 1}, .parents = {}};
    ASSIGN_OR_RETURN(const ForwardResult result, model.Forward({&item, 1}, workspace));
    last = Argmax({result.logits.row(0), static_cast<size_t>(result.logits.columns)});
    if (last != golden.greedy[step]) {
      report.first_difference = static_cast<int>(step);
      report.gap_there = golden.greedy_gap[step];
      return report;
    }
    const NodeId node(0);
    RETURN_IF_ERROR(state.Commit({&node, 1}));
  }
  report.equal = true;
  return report;
}

nlohmann::ordered_json FiniteOrNull(double value) {
  return std::isfinite(value) ? nlohmann::ordered_json(value) : nlohmann::ordered_json(nullptr);
}

}  // namespace

std::string GoldenReport::ToJson() const {
  nlohmann::ordered_json json;
  json["context_max_abs_err"] = FiniteOrNull(context_max_abs_err);
  json["tree_max_abs_err"] = FiniteOrNull(tree_max_abs_err);
  json["tree_argmax_equal"] = tree_argmax_equal;
  if (greedy) {
    json["greedy_equal"] = greedy->equal;
    json["greedy_first_difference"] = nullptr;
    json["greedy_gap_there"] = nullptr;
    if (!greedy->equal) {
      json["greedy_first_difference"] = greedy->first_difference;
      json["greedy_gap_there"] = FiniteOrNull(greedy->gap_there);
    }
  }
  return json.dump();
}

absl::StatusOr<GoldenReport> CompareWithGolden(const LanguageModel& model, const std::string& path,
                                               double tolerance) {
  const int vocab = model.info().vocab_size;
  ASSIGN_OR_RETURN(const Golden golden, ReadGolden(path, vocab));
  const int context = static_cast<int>(golden.context.size());
  const int nodes = static_cast<int>(golden.tree_tokens.size());
  const int steps = static_cast<int>(golden.greedy.size());
  ASSIGN_OR_RETURN(const std::unique_ptr<DecodeState> state,
                   model.NewState({.max_positions = context + std::max(kMaxTreeHeight, steps + 1),
                                   .max_pending = nodes}));
  ASSIGN_OR_RETURN(const std::unique_ptr<Workspace> workspace,
                   model.NewWorkspace(std::max(kChunk, nodes)));

  GoldenReport report;
  const std::span<const TokenId> tokens(golden.context);
  const int unchecked = context - golden.context_rows;
  RETURN_IF_ERROR(CommitTokens(model, tokens.first(unchecked), {}, *state, *workspace).status());
  ASSIGN_OR_RETURN(
      report.context_max_abs_err,
      CommitTokens(model, tokens.subspan(unchecked), golden.context_logits, *state, *workspace));

  const ForwardItem tree{
      .state = state.get(), .tokens = golden.tree_tokens, .parents = golden.tree_parents};
  ASSIGN_OR_RETURN(const ForwardResult scored, model.Forward({&tree, 1}, *workspace));
  report.tree_max_abs_err = MaxAbsError(scored.logits, golden.tree_logits);
  int equal = 0;
  for (int node = 0; node < nodes; ++node) {
    const size_t columns = static_cast<size_t>(vocab);
    equal += Argmax({scored.logits.row(node), columns}) ==
             Argmax({golden.tree_logits.data() + node * columns, columns});
  }
  report.tree_argmax_equal = static_cast<double>(equal) / nodes;

  if (steps > 0) {
    ASSIGN_OR_RETURN(report.greedy, CompareGreedy(model, golden, *state, *workspace));
  }
  const double error = std::max(report.context_max_abs_err, report.tree_max_abs_err);
  report.passed =
      error <= tolerance &&
      (!report.greedy || report.greedy->equal ||
       report.greedy->gap_there < std::max(kGreedyGap, std::min(2 * error, tolerance / 2)));
  return report;
}

}  // namespace canopy
