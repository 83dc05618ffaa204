// The shape of a draft tree without its tokens, and its text form.
//
//   "chain:4"              a chain of 4 drafted nodes
//   "topk:8,4,2"           level 1 has the 8 best children of node 0; each node of level 1 has its
//   4
//                          best, each of level 2 its 2 best
//   "(((),()),())"         a fixed tree: a pair of brackets a drafted node, its children inside,
//   the
//                          more probable first; the outermost pair is node 0
//
// Blanks between the parts are ignored. "chain:0" and "()" draft nothing.

#ifndef CANOPY_TREES_TREE_SHAPE_H_
#define CANOPY_TREES_TREE_SHAPE_H_

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "trees/ids.h"

namespace canopy {

// Nodes of the largest shape, node 0 included: far beyond what one pass can verify, and small
// enough that no text can ask for much memory.
inline constexpr int kMaxShapeNodes = 4096;

// Node 0 is the root (the last output token); every other node has a parent and a rank among its
// siblings. Nodes are in breadth-first order, so a level's nodes are consecutive.
class TreeShape {
 public:
  // InvalidArgument says at which character the text is wrong, and what was expected.
  static absl::StatusOr<TreeShape> Parse(std::string_view text);
  // 0 <= drafted < kMaxShapeNodes.
  static TreeShape Chain(int drafted);
  // Each number is at least 1, and there are at most kMaxShapeNodes nodes in all.
  static TreeShape TopK(std::span<const int> children_by_level);

  int size() const { return static_cast<int>(parents_.size()); }  // node 0 included
  // Levels, node 0's included.
  int height() const { return depths_.back() + 1; }
  NodeId parent(NodeId node) const { return parents_[node.value]; }
  int rank(NodeId node) const { return ranks_[node.value]; }
  int depth(NodeId node) const { return depths_[node.value]; }
  int children(NodeId node) const { return children_[node.value]; }
  // The most children that a node has.
  int max_children() const;
  // The child of that rank; rank is below children(node).
  NodeId child(NodeId node, int rank) const {
    return NodeId(first_child_[node.value].value + rank);
  }
  // The bracket form.
  std::string ToString() const;

  friend bool operator==(const TreeShape& a, const TreeShape& b) {
    return a.parents_ == b.parents_;
  }

 private:
  TreeShape() = default;
  void Add(NodeId parent);

  std::vector<NodeId> parents_;
  std::vector<int> ranks_;
  std::vector<int> depths_;
  std::vector<int> children_;
  std::vector<NodeId> first_child_;
};

}  // namespace canopy

#endif  // CANOPY_TREES_TREE_SHAPE_H_
