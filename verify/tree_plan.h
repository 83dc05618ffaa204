// Where the new nodes of one sequence stand in a pass: made once a pass, read by every layer.

#ifndef CANOPY_VERIFY_TREE_PLAN_H_
#define CANOPY_VERIFY_TREE_PLAN_H_

#include <cstdint>
#include <span>
#include <vector>

#include "core/decode_state.h"
#include "trees/ids.h"

namespace canopy {

// New node i of the pass is row first_row + i of the activation matrices. In a tree it is pending
// node first_pending + i; in a chain that is committed as it is computed it stands at prefix
// position prefix + i.
class TreePlan {
 public:
  // Reserves for that many nodes, so that Build does not allocate.
  void Reserve(int max_rows);

  // Plans the nodes [first_pending, state.pending()) of `state` as a tree.
  void BuildTree(const DecodeState& state, int first_pending, int first_row);
  // Plans `rows` positions behind the prefix as a committed chain.
  void BuildChain(const DecodeState& state, int rows, int first_row);

  bool chain() const { return chain_; }
  int rows() const { return rows_; }
  int first_row() const { return first_row_; }
  int prefix() const { return prefix_; }  // length before the pass
  int first_pending() const { return first_pending_; }
  int position(int i) const { return positions_[i]; }
  std::span<const int32_t> positions() const { return positions_; }

  // The pending nodes on the path to new node i, itself last; empty for a chain.
  std::span<const int32_t> PendingPath(int i) const {
    if (chain_) return {};
    return std::span<const int32_t>(paths_).subspan(path_begin_[i],
                                                    path_begin_[i + 1] - path_begin_[i]);
  }

  // Row of new node i in a recurrent mixer's store.
  int StoreRow(int i) const { return chain_ ? positions_[i] % kRing : kRing + first_pending_ + i; }
  // Rows, in a recurrent mixer's store, of the positions from the checkpoint of node i to the node
  // itself, in path order. rows [kRing]. Returns their number, 1 to kRing.
  int PathRows(int i, int32_t* rows) const;

  // One input of a causal convolution.
  struct Tap {
    enum Kind : int8_t { kNone, kFromPass, kFromPrefix, kFromPending } kind;
    int32_t index;  // row of the pass, prefix position, or pending node
  };
  // The input `back` positions before new node i (0: its own).
  Tap ConvTap(int i, int back) const;

 private:
  bool chain_ = false;
  int rows_ = 0;
  int first_row_ = 0;
  int prefix_ = 0;
  int first_pending_ = 0;
  std::vector<int32_t> positions_;
  std::vector<int32_t> paths_;
  std::vector<int32_t> path_begin_;
};

}  // namespace canopy

#endif  // CANOPY_VERIFY_TREE_PLAN_H_
