#include "verify/tree_plan.h"

#include <algorithm>

namespace canopy {

void TreePlan::Reserve(int max_rows) {
  positions_.reserve(max_rows);
  path_begin_.reserve(max_rows + 1);
  paths_.reserve(static_cast<size_t>(max_rows) * kMaxTreeHeight);
}

void TreePlan::BuildTree(const DecodeState& state, int first_pending, int first_row) {
  chain_ = false;
  rows_ = state.pending() - first_pending;
  first_row_ = first_row;
  prefix_ = state.position();
  first_pending_ = first_pending;
  positions_.resize(rows_);
  path_begin_.resize(rows_ + 1);
  paths_.clear();
  for (int i = 0; i < rows_; ++i) {
    const NodeId node(first_pending + i);
    const int depth = state.depth(node);
    positions_[i] = prefix_ + depth;
    const int begin = static_cast<int>(paths_.size());
    path_begin_[i] = begin;
    paths_.resize(begin + depth + 1);
    NodeId n = node;
    for (int d = depth; d >= 0; --d, n = state.parent(n)) paths_[begin + d] = n.value;
  }
  path_begin_[rows_] = static_cast<int>(paths_.size());
}

void TreePlan::BuildChain(const DecodeState& state, int rows, int first_row) {
  chain_ = true;
  rows_ = rows;
  first_row_ = first_row;
  prefix_ = state.position();
  first_pending_ = 0;
  positions_.resize(rows);
  for (int i = 0; i < rows; ++i) positions_[i] = prefix_ + i;
}

int TreePlan::PathRows(int i, int32_t* rows) const {
  const int t = positions_[i];
  const int last_committed = chain_ ? t : prefix_ - 1;
  int count = 0;
  for (int p = static_cast<int>(CheckpointFor(t)); p <= last_committed; ++p)
    rows[count++] = p % kRing;
  for (int32_t node : PendingPath(i)) {
    rows[count++] = kRing + node;
  }
  return count;
}

TreePlan::Tap TreePlan::ConvTap(int i, int back) const {
  const int position = positions_[i] - back;
  if (position < 0) return {Tap::kNone, 0};
  if (chain_) {
    if (position >= prefix_) return {Tap::kFromPass, first_row_ + position - prefix_};
    return {Tap::kFromPrefix, position};
  }
  const std::span<const int32_t> path = PendingPath(i);
  if (back >= static_cast<int>(path.size())) return {Tap::kFromPrefix, position};
  const int32_t node = path[path.size() - 1 - back];
  if (node >= first_pending_) return {Tap::kFromPass, first_row_ + node - first_pending_};
  return {Tap::kFromPending, node};
}

}  // namespace canopy
