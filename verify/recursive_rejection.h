// Multi-draft recursive rejection (SpecInfer, arXiv 2305.09781; RSD, arXiv 2402.14160), written
// over a source of decisions, so that the tests can walk through every outcome of the code that
// ships.
//
// At a node the target's distribution is the first residual. The node's draws are offered in the
// order in which they were drawn; a draw x from draft_prob is accepted with probability min(1,
// residual(x) / draft_prob(x)), and otherwise the residual becomes max(residual - draft_prob, 0)
// scaled to 1. When all draws are rejected the token comes from the residual.
//   * without replacement, draft_prob loses each draw and is scaled to 1 again;
//   * with replacement it stays as it is;
//   * a token that was chosen, not drawn, has a draft_prob of 1 at itself.

#ifndef CANOPY_VERIFY_RECURSIVE_REJECTION_H_
#define CANOPY_VERIFY_RECURSIVE_REJECTION_H_

#include <algorithm>
#include <concepts>
#include <cstdint>

#include "core/random.h"
#include "core/status.h"
#include "verify/acceptance.h"
#include "verify/draft_tree.h"
#include "verify/sampling.h"

namespace canopy {

// Decides the outcomes at one node: `draw` numbers the node's draws.
template <typename T>
concept NodeDecider = requires(T decider, double probability, uint32_t draw,
                               const Distribution& distribution) {
  { decider.Accept(probability, draw) } -> std::convertible_to<bool>;  // true with `probability`
  { decider.Sample(distribution) } -> std::convertible_to<TokenId>;
};

// Decisions from the request's noise, for the token at absolute position `position`.
struct NoiseDecider {
  const NoiseStream& noise;
  int64_t position;

  bool Accept(double probability, uint32_t draw) const {
    return noise.Uniform(position, Purpose::kAccept, draw) < probability;
  }
  TokenId Sample(const Distribution& distribution) const {
    return distribution.Sample(noise.Uniform(position, Purpose::kResidual));
  }
};

struct NodeOutcome {
  NodeId child = kPrefix;  // the accepted child, or kPrefix
  TokenId token;           // the token that follows the node, the child's or the target's own
};

// Decides what follows `node`. `residual` holds the target's distribution there and is overwritten;
// `draft_prob` is scratch. InvalidArgument if a draw has no draft probability.
template <NodeDecider Decider>
absl::StatusOr<NodeOutcome> DecideNode(const DraftTree& draft, NodeId node, Decider& decider,
                                       Distribution& residual, Distribution& draft_prob) {
  const Proposal& proposal = draft.proposals[node.value];
  const bool drawn = proposal.method != DrawMethod::kDeterministic;
  if (drawn && !proposal.draws.empty()) draft_prob = proposal.draft_prob;
  for (uint32_t draw = 0; draw < proposal.draws.size(); ++draw) {
    const NodeId child = proposal.draws[draw];
    const TokenId token = draft.tree.token(child);
    const NodeOutcome accepted{child, token};
    double accept_prob = residual.Probability(token);
    if (drawn) {
      const double token_draft_prob = draft_prob.Probability(token);
      if (!(token_draft_prob > 0.0)) {
        return absl::InvalidArgumentError(absl::StrCat(
            "draft tree: node ", child.value, " (token ", token.value, ") is a draw of node ",
            node.value, " but has no probability in its draft_prob"));
      }
      accept_prob /= token_draft_prob;
    }
    if (decider.Accept(accept_prob, draw)) return accepted;
    if (!drawn) {
      // All of the residual was this token and rounding alone has rejected it.
      if (residual.tokens.size() == 1 && residual.tokens.front() == token) return accepted;
      Exclude(token, &residual);
      continue;
    }
    if (!Subtract(draft_prob, &residual)) return accepted;
    if (proposal.method == DrawMethod::kWithoutReplacement) Exclude(token, &draft_prob);
  }
  return NodeOutcome{kPrefix, decider.Sample(residual)};
}

// The whole rule. `decider_at(position)` gives the decider of the token at an absolute position.
template <typename DeciderAt>
absl::Status AcceptRecursively(const DraftTree& draft, const TargetScores& scores,
                               const SamplingOptions& sampling, int64_t position,
                               DeciderAt&& decider_at, AcceptanceScratch& scratch,
                               Acceptance* out) {
  out->path.clear();
  NodeId node(0);
  while (true) {
    out->path.push_back(node);
    ++position;
    Warp(scores.row(node), sampling, &scratch.residual);
    auto&& decider = decider_at(position);
    ASSIGN_OR_RETURN(const NodeOutcome outcome,
                     DecideNode(draft, node, decider, scratch.residual, scratch.draft_prob));
    if (outcome.child == kPrefix) {
      out->next = outcome.token;
      return absl::OkStatus();
    }
    node = outcome.child;
  }
}

}  // namespace canopy

#endif  // CANOPY_VERIFY_RECURSIVE_REJECTION_H_
