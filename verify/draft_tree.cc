#include "verify/draft_tree.h"

namespace canopy {

void DraftTree::Clear() { tree.Clear(); }

void DraftTree::Reserve(int nodes, int draws) {
  tree.Reserve(nodes);
  const size_t begin = proposals.size();
  if (begin >= static_cast<size_t>(nodes)) return;
  proposals.resize(nodes);
  for (size_t i = begin; i < proposals.size(); ++i) proposals[i].draws.reserve(draws);
}

absl::StatusOr<NodeId> DraftTree::AddNode(NodeId parent, TokenId token) {
  ASSIGN_OR_RETURN(const NodeId node, tree.AddNode(parent, token));
  AddProposal(node);
  return node;
}

absl::StatusOr<NodeId> DraftTree::AddPromised(NodeId parent, TokenId token) {
  ASSIGN_OR_RETURN(const NodeId node, tree.AddPromised(parent, token));
  AddProposal(node);
  return node;
}

void DraftTree::AddProposal(NodeId node) {
  if (const NodeId parent = tree.parent(node); parent != kPrefix) {
    proposals[parent.value].draws.push_back(node);
  }
  if (node.value == static_cast<int>(proposals.size())) proposals.emplace_back();
  Proposal& proposal = proposals[node.value];
  proposal.method = DrawMethod::kDeterministic;
  proposal.draft_prob.tokens.clear();
  proposal.draft_prob.probs.clear();
  proposal.draws.clear();
}

absl::Status Validate(const DraftTree& draft, int vocab) {
  const TokenTree& tree = draft.tree;
  const auto error = [](int node, const std::string& problem) {
    return absl::InvalidArgumentError(absl::StrCat("draft tree: node ", node, " ", problem));
  };
  if (tree.empty()) {
    return absl::InvalidArgumentError(
        "draft tree: no nodes; expected node 0 with the last output token");
  }
  if (tree.next_sibling(NodeId(0)) != kPrefix) {
    return error(tree.next_sibling(NodeId(0)).value,
                 "hangs under the prefix; expected node 0 only");
  }
  if (static_cast<int>(draft.proposals.size()) < tree.size()) {
    return absl::InvalidArgumentError(absl::StrCat("draft tree: ", draft.proposals.size(),
                                                   " proposals for ", tree.size(),
                                                   " nodes; expected one a node"));
  }
  for (int i = 0; i < tree.size(); ++i) {
    const NodeId node(i);
    if (tree.token(node).value >= vocab) {
      return error(i, absl::StrCat("has token ", tree.token(node).value,
                                   "; the target's vocabulary ends at ", vocab - 1));
    }
    const Proposal& proposal = draft.proposals[i];
    NodeId fresh = tree.first_child(node);
    for (const NodeId draw : proposal.draws) {
      if (draw == fresh && fresh != kPrefix) {
        fresh = tree.next_sibling(fresh);
        continue;
      }
      const bool known = draw.value >= 0 && draw.value < tree.size() && tree.parent(draw) == node &&
                         (fresh == kPrefix || draw < fresh);
      if (!known || proposal.method != DrawMethod::kWithReplacement) {
        return error(i, absl::StrCat("lists node ", draw.value,
                                     " as a draw; expected its children in the order of their "
                                     "numbers, each once unless drawn with replacement"));
      }
    }
    if (fresh != kPrefix) {
      return error(i, absl::StrCat("does not list its child ", fresh.value, " among its draws"));
    }
  }
  return absl::OkStatus();
}

}  // namespace canopy
