#include "tests/support/promising_model.h"

#include <algorithm>

#include "core/cuda/pass.h"
#include "models/forward_check.h"
#include "verify/sampling.h"

namespace canopy::testing {
namespace {

// The base model's state. The outer one keeps the books, with the tokens as they were given.
class InnerState final : public StateStorage {
 public:
  explicit InnerState(std::unique_ptr<DecodeState> s) : state(std::move(s)) {}
  void Clear() override { state->Reset(); }
  absl::Status CopyFrom(const StateStorage&) override {
    return absl::UnimplementedError("promising model: no copies");
  }

  std::unique_ptr<DecodeState> state;
};

DecodeState& InnerOf(DecodeState& state) {
  DecodeState& inner = *static_cast<InnerState&>(state.storage()).state;
  inner.DropPendingFrom(state.pending());
  return inner;
}

class PromisingWorkspace final : public Workspace {
 public:
  PromisingWorkspace(int rows, std::unique_ptr<Workspace> w)
      : max_rows(rows), inner(std::move(w)) {}
  size_t bytes() const override { return inner->bytes(); }

  int max_rows;
  std::unique_ptr<Workspace> inner;
  std::vector<TokenId> top;
};

}  // namespace

PromisingModel::PromisingModel(const LanguageModel& base, PassLog* log)
    : base_(base), log_(log), info_(base.info()) {
  info_.prefers_top = true;
}

absl::StatusOr<std::unique_ptr<DecodeState>> PromisingModel::NewState(
    const StateOptions& options) const {
  ASSIGN_OR_RETURN(std::unique_ptr<DecodeState> inner, base_.NewState(options));
  const StateOptions given = inner->options();
  const StateMemory memory = inner->memory();
  return std::make_unique<DecodeState>(this, given, std::make_unique<InnerState>(std::move(inner)),
                                       memory);
}

absl::StatusOr<std::unique_ptr<Workspace>> PromisingModel::NewWorkspace(int max_rows) const {
  ASSIGN_OR_RETURN(std::unique_ptr<Workspace> inner, base_.NewWorkspace(max_rows));
  return std::make_unique<PromisingWorkspace>(max_rows, std::move(inner));
}

absl::StatusOr<ForwardResult> PromisingModel::Forward(std::span<const ForwardItem> items,
                                                      Workspace& workspace) const {
  auto& ws = static_cast<PromisingWorkspace&>(workspace);
  RETURN_IF_ERROR(CheckForward(*this, items, ws.max_rows));
  std::vector<std::vector<TokenId>> tokens;
  std::vector<ForwardItem> inner_items;
  for (const ForwardItem& item : items) {
    tokens.emplace_back(item.tokens.begin(), item.tokens.end());
    for (TokenId& token : tokens.back()) {
      if (!IsPromised(token)) continue;
      const cuda::Promise promise = cuda::ToPromise(token.value);
      if (!cuda::Holds(promise, log_->launched)) {
        return absl::InvalidArgumentError("forward: a promise that no longer holds");
      }
      const PassLog::Pass& pass = log_->passes[cuda::PlaceOf(promise.pass)];
      token = pass.chosen[promise.row * pass.top + promise.k];
      if (token.value < 0 || token.value >= info_.vocab_size) token = TokenId(0);
    }
    inner_items.push_back(item);
    inner_items.back().state = &InnerOf(*item.state);
    inner_items.back().top = 0;
    inner_items.back().promise = false;
  }
  for (size_t i = 0; i < items.size(); ++i) inner_items[i].tokens = tokens[i];
  ASSIGN_OR_RETURN(ForwardResult result, base_.Forward(inner_items, *ws.inner));
  ws.top.clear();
  const int top = items[0].top;
  const bool promise = items[0].promise;
  top_calls_ += top > 0;
  promised_passes_ += promise;
  for (size_t i = 0; i < items.size(); ++i) {
    const ForwardItem& item = items[i];
    const int count = static_cast<int>(item.tokens.size());
    if (item.commit_chain) {
      item.state->Advance(count);
    } else {
      for (int k = 0; k < count; ++k) {
        item.state->AddPending(item.tokens[k],
                               item.parents.empty() ? NodeId(k - 1) : item.parents[k]);
      }
    }
    const uint32_t number = ++log_->launched;
    PassLog::Pass& pass = log_->passes[cuda::PlaceOf(number)];
    pass.top = top;
    pass.chosen.clear();
    if (top == 0 || item.logits == LogitsOf::kNone) continue;
    const int rows = item.logits == LogitsOf::kAll ? count : 1;
    CHECK(rows <= cuda::kMaxRows);
    std::vector<TokenId> best;
    for (int row = 0; row < rows; ++row) {
      const float* logits = result.logits.row(result.first_row[i] + row);
      TopK({logits, static_cast<size_t>(info_.vocab_size)}, top, &best);
      if (nan && nan(top_calls_, row)) best.assign(top, TokenId());
      for (int k = 0; k < top; ++k) {
        pass.chosen.push_back(best[k]);
        ws.top.push_back(promise ? TokenId(cuda::ToToken({number, row, k})) : best[k]);
      }
    }
  }
  if (!promise) {
    ++log_->waits;
    log_->waited_for = log_->launched;
  }
  if (top > 0) result.logits = {};
  result.top = ws.top;
  return result;
}

absl::StatusOr<double> PromisingModel::Resolve(std::span<TokenId> tokens) const {
  std::vector<TokenId> resolved(tokens.begin(), tokens.end());
  uint32_t last = 0;
  for (TokenId& token : resolved) {
    if (!IsPromised(token)) continue;
    const cuda::Promise promise = cuda::ToPromise(token.value);
    if (!promising || !cuda::Holds(promise, log_->launched)) {
      return absl::FailedPreconditionError("resolve: a promise that no longer holds");
    }
    const PassLog::Pass& pass = log_->passes[cuda::PlaceOf(promise.pass)];
    token = pass.chosen[promise.row * pass.top + promise.k];
    last = std::max(last, promise.pass);
  }
  if (last > log_->waited_for) {
    ++log_->waits;
    log_->waited_for = last;
  }
  std::copy(resolved.begin(), resolved.end(), tokens.begin());
  return 0.0;
}

absl::Status PromisingModel::CommitRows(DecodeState& state, std::span<const NodeId> path) const {
  return InnerOf(state).Commit(path);
}

}  // namespace canopy::testing
