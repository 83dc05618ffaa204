// Who is an ancestor of whom in a tree, a bit a pair.

#ifndef CANOPY_TREES_ANCESTOR_MASK_H_
#define CANOPY_TREES_ANCESTOR_MASK_H_

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "trees/ids.h"

namespace canopy {

// Bit j of row i is set if node j is an ancestor of node i, or i itself: the positions that node i
// may attend to. Row i is words() words of 64 bits, bit j in word j / 64. A value.
class AncestorMask {
 public:
  AncestorMask() = default;
  // parents[i] is kPrefix or below i, as in TokenTree.
  explicit AncestorMask(std::span<const NodeId> parents) { Assign(parents); }

  // Keeps the memory.
  void Assign(std::span<const NodeId> parents);

  int size() const { return nodes_; }
  int words() const { return words_; }
  std::span<const uint64_t> row(NodeId node) const {
    return {bits_.data() + static_cast<int64_t>(node.value) * words_, static_cast<size_t>(words_)};
  }
  bool Sees(NodeId node, NodeId ancestor) const {
    return (row(node)[ancestor.value / 64] >> (ancestor.value % 64) & 1) != 0;
  }
  // A line a node, '#' where it sees, '.' where it does not.
  std::string ToString() const;

 private:
  int nodes_ = 0;
  int words_ = 0;
  std::vector<uint64_t> bits_;  // [nodes, words]
};

}  // namespace canopy

#endif  // CANOPY_TREES_ANCESTOR_MASK_H_
