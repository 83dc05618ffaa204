// What a drafter proposes: a token tree, and how each node's children were chosen.

#ifndef CANOPY_VERIFY_DRAFT_TREE_H_
#define CANOPY_VERIFY_DRAFT_TREE_H_

#include <vector>

#include "trees/token_tree.h"
#include "verify/sampling.h"

namespace canopy {

enum class DrawMethod {
  kDeterministic,       // chosen, not drawn: top-k children, n-gram look-up
  kWithReplacement,     // i.i.d. from draft_prob; a token drawn again stands again in `draws`
  kWithoutReplacement,  // one after the other from draft_prob without those drawn before (RSD,
                        // arXiv 2402.14160)
};

// How the children of one node were chosen.
struct Proposal {
  DrawMethod method = DrawMethod::kDeterministic;
  // The draft's distribution of the node's next token; unused for kDeterministic.
  Distribution draft_prob;
  // The children in the order in which they were drawn. A node may stand in it more than once for
  // kWithReplacement only. Must list every child.
  std::vector<NodeId> draws;
};

// Node 0 carries the last output token, which the target has not seen yet; everything below it is
// drafted. proposals[i] belongs to node i.
struct DraftTree {
  TokenTree tree;
  // At least one a node. Entries beyond tree.size() are memory for later rounds.
  std::vector<Proposal> proposals;

  // Keeps the memory of tree and proposals.
  void Clear();
  // Room for that many nodes with as many draws at each, so that later rounds need no allocation
  // but for draft probabilities, which grow when a node first has some.
  void Reserve(int nodes, int draws);
  // Adds a node and its (empty) proposal; the parent's `draws` gets the node.
  absl::StatusOr<NodeId> AddNode(NodeId parent, TokenId token);
  // The same with a promised token, see TokenTree::AddPromised.
  absl::StatusOr<NodeId> AddPromised(NodeId parent, TokenId token);

 private:
  void AddProposal(NodeId node);
};

// InvalidArgument if the tree is not one that `vocab` tokens and one root allow, or if a node's
// proposal does not list exactly its children, in the order of their numbers, repeated for
// kWithReplacement only.
absl::Status Validate(const DraftTree& draft, int vocab);

}  // namespace canopy

#endif  // CANOPY_VERIFY_DRAFT_TREE_H_
