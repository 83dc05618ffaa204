// A token tree over a committed prefix, as a value.
//
//   TokenTree tree;
//   NodeId root = *tree.AddNode(kPrefix, last_token);
//   NodeId a = *tree.AddNode(root, TokenId(17));
//   NodeId b = *tree.AddNode(root, TokenId(42));   // a sibling of a, drawn after it
//
// Invariants, kept by AddNode and Create: a parent's number is below its children's; siblings carry
// different tokens; siblings are numbered in the order in which they were drawn. Several nodes may
// hang under the prefix (a forest); the decode loop's trees have one root, the last output token.
//
// The tree's form may be known before its tokens are: AddPromised takes a promised token
// (trees/ids.h) and Resolve puts the real ones in their places, where siblings are compared again.

#ifndef CANOPY_TREES_TOKEN_TREE_H_
#define CANOPY_TREES_TOKEN_TREE_H_

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "trees/ids.h"

namespace canopy {

// Copyable value; const calls are safe from several threads.
class TokenTree {
 public:
  TokenTree() = default;

  // A tree from parallel arrays; parents[i] is kPrefix or below i.
  // InvalidArgument names the first node that breaks an invariant.
  static absl::StatusOr<TokenTree> Create(std::span<const NodeId> parents,
                                          std::span<const TokenId> tokens);

  // Reads the text form of ToString, roots separated by commas: "17(42,43(5))", "3,4(1)". Nodes are
  // numbered as they stand in the text. InvalidArgument says at which character it is wrong.
  static absl::StatusOr<TokenTree> Parse(std::string_view text);

  // InvalidArgument if parent is not in the tree (or kPrefix), if token is negative, or if a
  // sibling already carries the token.
  absl::StatusOr<NodeId> AddNode(NodeId parent, TokenId token);
  // The same with a promised token, and InvalidArgument for any other.
  absl::StatusOr<NodeId> AddPromised(NodeId parent, TokenId token);
  // Whether a node carries a promised token.
  bool promised() const { return promised_; }
  // Gives every node i tokens[i], which differs from what it had for promised ones alone.
  // InvalidArgument, with the tree as it was, if it does not, if a token is negative, or if
  // siblings carry the same.
  absl::Status Resolve(std::span<const TokenId> tokens);

  void Clear();             // keeps the capacity
  void Reserve(int nodes);  // room for that many nodes without another allocation
  int size() const { return static_cast<int>(tokens_.size()); }
  bool empty() const { return tokens_.empty(); }

  TokenId token(NodeId node) const { return tokens_[node.value]; }
  NodeId parent(NodeId node) const { return parents_[node.value]; }
  // 0 for a child of the prefix.
  int depth(NodeId node) const { return depths_[node.value]; }
  // Number of levels: 1 + the greatest depth, 0 for an empty tree.
  int height() const { return height_; }

  std::span<const TokenId> tokens() const { return tokens_; }
  std::span<const NodeId> parents() const { return parents_; }

  // Siblings as a linked list in draw order: `for (n = first_child(p); n != kPrefix; n =
  // next_sibling(n))`. first_child(kPrefix) is the first root.
  NodeId first_child(NodeId node) const;
  NodeId next_sibling(NodeId node) const { return next_sibling_[node.value]; }
  // The child of `node` (or the root, for kPrefix) that carries `token`, or kPrefix if none does.
  NodeId FindChild(NodeId node, TokenId token) const;
  // 0 for the sibling that was drawn first.
  int sibling_rank(NodeId node) const { return ranks_[node.value]; }
  // The nodes from a child of the prefix down to `node`, itself included; empty for kPrefix.
  std::vector<NodeId> Path(NodeId node) const;

  // "17(42,43(5))": tokens with their children in brackets, siblings in draw order.
  std::string ToString() const;

  friend bool operator==(const TokenTree& a, const TokenTree& b) {
    return a.tokens_ == b.tokens_ && a.parents_ == b.parents_;
  }

 private:
  absl::StatusOr<NodeId> Add(NodeId parent, TokenId token);

  std::vector<TokenId> tokens_;
  std::vector<NodeId> parents_;
  std::vector<int32_t> depths_;
  std::vector<int32_t> ranks_;
  std::vector<NodeId> first_child_;
  std::vector<NodeId> last_child_;
  std::vector<NodeId> next_sibling_;
  NodeId first_root_ = kPrefix;
  NodeId last_root_ = kPrefix;
  int height_ = 0;
  bool promised_ = false;
};

}  // namespace canopy

#endif  // CANOPY_TREES_TOKEN_TREE_H_
