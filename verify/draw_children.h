// Drawing a node's children from a draft distribution, written over a source of draws, so that the
// tests can walk through every outcome of the code that ships.

#ifndef CANOPY_VERIFY_DRAW_CHILDREN_H_
#define CANOPY_VERIFY_DRAW_CHILDREN_H_

#include <concepts>

#include "core/status.h"
#include "verify/draft_tree.h"
#include "verify/sampling.h"

namespace canopy {

// Gives a token of the distribution, with the probability that it has there.
template <typename T>
concept TokenSampler = requires(T sample, const Distribution& distribution) {
  { sample(distribution) } -> std::convertible_to<TokenId>;
};

struct DrawOptions {
  DrawMethod method = DrawMethod::kWithoutReplacement;  // not kDeterministic
  int draws = 1;
  // Drawing stops when the tree has as many nodes. It stops before a draw and never drops one that
  // was made: what is dropped by its value would bias the rule.
  int max_tree_size = 0;
};

// Draws children of `node`, which has none yet, from the draft_prob of its proposal. Without
// replacement it stops when the support is used up. `rest` is scratch.
template <TokenSampler Sampler>
absl::Status DrawChildren(NodeId node, const DrawOptions& options, Sampler&& sample,
                          Distribution* rest, DraftTree* draft) {
  // AddNode may move the proposals, so this one is looked up anew each time.
  const auto proposal = [&]() -> Proposal& { return draft->proposals[node.value]; };
  proposal().method = options.method;
  const bool without_replacement = options.method == DrawMethod::kWithoutReplacement;
  if (without_replacement) *rest = proposal().draft_prob;
  for (int i = 0; i < options.draws && draft->tree.size() < options.max_tree_size; ++i) {
    if (without_replacement && rest->tokens.empty()) break;
    const TokenId token = sample(without_replacement ? *rest : proposal().draft_prob);
    if (const NodeId again = draft->tree.FindChild(node, token); again != kPrefix) {
      proposal().draws.push_back(again);
      continue;
    }
    RETURN_IF_ERROR(draft->AddNode(node, token).status());
    if (without_replacement) Exclude(token, rest);
  }
  return absl::OkStatus();
}

}  // namespace canopy

#endif  // CANOPY_VERIFY_DRAW_CHILDREN_H_
