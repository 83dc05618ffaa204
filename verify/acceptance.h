// Acceptance rules: which path of a scored draft tree becomes output.
//
// A rule is a pure function of tree, target scores, draft probabilities and noise. Every rule here
// is lossless: the output's distribution is the target's, which tests/verify/lossless_test.cc
// proves by enumeration.

#ifndef CANOPY_VERIFY_ACCEPTANCE_H_
#define CANOPY_VERIFY_ACCEPTANCE_H_

#include <memory>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "core/random.h"
#include "core/status.h"
#include "core/tensor.h"
#include "verify/draft_tree.h"
#include "verify/sampling.h"

namespace canopy {

// The target's logits at every node of a tree: row i belongs to node i. A view; the rule may ask
// for a node's distribution, which is made on demand.
struct TargetScores {
  ConstMatrix logits;  // [nodes, vocab] f32; empty where only the greatest were asked for
  // The token with the greatest logit at every node, or empty; -1 where logits are not numbers.
  std::span<const TokenId> greatest;

  std::span<const float> row(NodeId node) const {
    return {logits.row(node.value), static_cast<size_t>(logits.columns)};
  }
  TokenId Greatest(NodeId node) const {
    return greatest.empty() ? Argmax(row(node)) : greatest[node.value];
  }
  // Whether a logit of the node is not a number.
  bool HasNan(NodeId node) const;
};

struct Acceptance {
  // Node 0 and the accepted drafted nodes below it, a path of the tree; to be committed.
  std::vector<NodeId> path;
  // The token that the target adds itself, after the path's last node.
  TokenId next;
};

// Scratch of a rule, so that a round allocates nothing once warm.
struct AcceptanceScratch {
  Distribution residual;  // begins as the target's distribution
  Distribution draft_prob;
};

class AcceptanceRule {
 public:
  virtual ~AcceptanceRule() = default;
  virtual std::string_view name() const = 0;  // as in the config: "greedy", "recursive", "gumbel"
  // Whether, with these options, the rule asks the scores for no more than Greatest.
  virtual bool NeedsGreatestOnly(const SamplingOptions& sampling) const = 0;
  // The rule keeps the target's distribution (all that exist so far do).
  virtual bool lossless() const = 0;
  // `position` is the absolute position of node 0's token; a child's is position + 1. `out` is
  // overwritten. InvalidArgument if the tree is empty or larger than the scores, if its proposals
  // do not list its children, if a draw has no draft probability, or if the sampling options do not
  // fit the rule.
  virtual absl::Status Accept(const DraftTree& draft, const TargetScores& scores,
                              const SamplingOptions& sampling, const NoiseStream& noise,
                              int64_t position, AcceptanceScratch& scratch,
                              Acceptance* out) const = 0;
};

// "greedy": follows the target's argmax. Needs temperature 0.
// "recursive": multi-draft recursive rejection in draw order, with and without replacement
// (SpecInfer, arXiv 2305.09781; RSD, arXiv 2402.14160); with one branch it is chain rejection
// (arXiv 2211.17192). "gumbel": position-keyed Gumbel coupling (arXiv 2506.05632): the token at a
// position is the argmax of log target_prob + gumbel(position, token), so the text does not depend
// on the drafter. NotFound lists the known names.
absl::StatusOr<std::unique_ptr<AcceptanceRule>> MakeAcceptanceRule(std::string_view name);
// Names with a line of help each, for `canopy list`.
std::vector<std::pair<std::string_view, std::string_view>> ListAcceptanceRules();

}  // namespace canopy

#endif  // CANOPY_VERIFY_ACCEPTANCE_H_
