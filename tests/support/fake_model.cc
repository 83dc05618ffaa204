#include "tests/support/fake_model.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/random.h"

namespace canopy::testing {
namespace {

class FakeWorkspace final : public Workspace {
 public:
  explicit FakeWorkspace(int rows) : max_rows(rows) {}
  size_t bytes() const override { return 1000; }

  int max_rows;
  std::vector<float> logits;
  std::vector<int> first_row;
  std::vector<TokenId> top;
};

uint64_t Hash(std::span<const TokenId> tokens, uint64_t seed) {
  uint64_t hash = seed * 0x9E3779B97F4A7C15 + 1;
  for (const TokenId token : tokens) {
    hash = (hash ^ (static_cast<uint64_t>(token.value) + 1)) * 0xBF58476D1CE4E5B9;
    hash ^= hash >> 31;
  }
  return hash;
}

}  // namespace

FakeModel::FakeModel(const FakeModelOptions& options) : options_(options) {
  info_.architecture = "fake";
  info_.path = "nowhere";
  info_.vocab_size = options.vocab;
  info_.max_positions = options.max_positions;
  info_.weight_bytes = 12345;
  info_.prefers_top = options.prefers_top;
}

std::vector<float> FakeModel::LogitsAfter(std::span<const TokenId> tokens) const {
  const NoiseStream shared(Hash(tokens, options_.seed), 0);
  const NoiseStream own(Hash(tokens, options_.disagreement_seed), 1);
  std::vector<float> logits(options_.vocab);
  for (int token = 0; token < options_.vocab; ++token) {
    logits[token] = static_cast<float>(2.0 * shared.Gumbel(0, token) +
                                       options_.disagreement * own.Gumbel(0, token));
  }
  return logits;
}

void FakeModel::ClearCounts() const {
  passes_ = rows_ = repeated_rows_ = top_passes_ = 0;
  computed_.clear();
}

absl::StatusOr<std::unique_ptr<DecodeState>> FakeModel::NewState(
    const StateOptions& requested) const {
  StateOptions options = requested;
  if (options.max_positions == 0) options.max_positions = options_.max_positions;
  auto state = std::make_unique<DecodeState>(
      this, options, std::make_unique<LayerStorage>(std::vector<LayerState>{}),
      StateMemory{.total_bytes = 777});
  prefixes_[state.get()].clear();
  computed_[state.get()].clear();
  return state;
}

absl::StatusOr<std::unique_ptr<Workspace>> FakeModel::NewWorkspace(int max_rows) const {
  return std::make_unique<FakeWorkspace>(max_rows);
}

void FakeModel::Compute(const DecodeState& state, std::vector<TokenId> path,
                        std::vector<float>* row) const {
  const std::vector<TokenId>& prefix = prefixes_[&state];
  path.insert(path.begin(), prefix.begin(), prefix.begin() + state.position());
  *row = LogitsAfter(path);
  ++rows_;
  repeated_rows_ += !computed_[&state].insert(std::move(path)).second;
}

absl::StatusOr<ForwardResult> FakeModel::Forward(std::span<const ForwardItem> items,
                                                 Workspace& workspace) const {
  auto& ws = static_cast<FakeWorkspace&>(workspace);
  ++passes_;
  int uncut_rows = 0;
  for (const ForwardItem& item : items) {
    const DecodeState& state = *item.state;
    const int count = static_cast<int>(item.tokens.size());
    if (count == 0) return absl::InvalidArgumentError("fake: no tokens");
    if (item.top != items[0].top || item.top < 0 || item.top > std::min(kMaxTop, options_.vocab) ||
        (item.top > 0 && !info_.prefers_top)) {
      return absl::InvalidArgumentError("fake: top");
    }
    for (const TokenId token : item.tokens) {
      if (token.value < 0 || token.value >= options_.vocab) {
        return absl::InvalidArgumentError("fake: token outside the vocabulary");
      }
    }
    if (item.commit_chain) {
      if (state.pending() != 0) return absl::InvalidArgumentError("fake: pending nodes");
      if (state.position() + count > state.options().max_positions) {
        return absl::InvalidArgumentError("fake: too many positions");
      }
      uncut_rows += 1;
      continue;
    }
    if (item.parents.size() != item.tokens.size()) {
      return absl::InvalidArgumentError("fake: parents");
    }
    uncut_rows += count;
    if (state.pending() + count > state.options().max_pending) {
      return absl::InvalidArgumentError("fake: too many pending nodes");
    }
  }
  if (uncut_rows > ws.max_rows) return absl::InvalidArgumentError("fake: too many rows");

  const int64_t stride = PaddedColumns(options_.vocab);
  ws.logits.clear();
  ws.first_row.clear();
  ws.top.clear();
  top_passes_ += items[0].top > 0;
  std::vector<float> row;
  const auto emit = [&] {
    ws.logits.insert(ws.logits.end(), row.begin(), row.end());
    ws.logits.resize((ws.logits.size() + stride - 1) / stride * stride, 0.0f);
    std::vector<int> order(row.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return row[a] > row[b]; });
    for (int k = 0; k < items[0].top; ++k) ws.top.push_back(TokenId(order[k]));
  };
  for (const ForwardItem& item : items) {
    DecodeState& state = *item.state;
    ws.first_row.push_back(static_cast<int>(static_cast<int64_t>(ws.logits.size()) / stride));
    if (item.commit_chain) {
      std::vector<TokenId>& prefix = prefixes_[&state];
      for (size_t i = 0; i < item.tokens.size(); ++i) {
        Compute(state, {item.tokens[i]}, &row);
        prefix.resize(state.position());
        prefix.push_back(item.tokens[i]);
        state.Advance(1);
        const bool last = i + 1 == item.tokens.size();
        if (item.logits == LogitsOf::kAll || (item.logits == LogitsOf::kLast && last)) emit();
      }
      continue;
    }
    for (size_t i = 0; i < item.tokens.size(); ++i) {
      const NodeId parent = item.parents[i];
      if (parent.value < -1 || parent.value >= state.pending()) {
        return absl::InvalidArgumentError("fake: parent");
      }
      state.AddPending(item.tokens[i], parent);
      std::vector<TokenId> path;
      for (NodeId n(state.pending() - 1); n != kPrefix; n = state.parent(n)) {
        path.insert(path.begin(), state.token(n));
      }
      if (path.size() > kMaxTreeHeight ||
          state.position() + static_cast<int>(path.size()) > state.options().max_positions) {
        return absl::InvalidArgumentError("fake: too deep");
      }
      Compute(state, std::move(path), &row);
      if (item.logits == LogitsOf::kAll) emit();
    }
  }
  const int rows = static_cast<int>(static_cast<int64_t>(ws.logits.size()) / stride);
  ForwardResult result{.first_row = ws.first_row, .top = ws.top};
  if (items[0].top == 0) result.logits = {ws.logits.data(), rows, options_.vocab, stride};
  return result;
}

absl::Status FakeModel::CommitRows(DecodeState& state, std::span<const NodeId> path) const {
  std::vector<TokenId>& prefix = prefixes_[&state];
  prefix.resize(state.position());
  for (const NodeId node : path) prefix.push_back(state.token(node));
  return absl::OkStatus();
}

}  // namespace canopy::testing
