// Scores a draft tree with the target in one pass.

#ifndef CANOPY_VERIFY_TREE_VERIFIER_H_
#define CANOPY_VERIFY_TREE_VERIFIER_H_

#include <memory>

#include "core/language_model.h"
#include "core/status.h"
#include "trees/token_tree.h"
#include "verify/acceptance.h"

namespace canopy {

// Owns the target's workspace. Not thread-safe. The target must outlive it.
class TreeVerifier {
 public:
  // max_rows: nodes of the largest tree, and the number of rows in which prompts are read.
  static absl::StatusOr<std::unique_ptr<TreeVerifier>> Create(const LanguageModel& target,
                                                              int max_rows);

  // Appends a prompt to the prefix of `state`, which must have no pending nodes.
  absl::Status Prefill(std::span<const TokenId> prompt, DecodeState& state);

  // Scores every node of `tree` in one pass; the nodes stay pending in `state`, numbered as in the
  // tree. The state must have no pending nodes. Valid until the next call.
  // The tree may hold promised tokens that the target takes.
  // greatest_only: the rule needs no more than the greatest logit's token at every node, which
  // spares a model with prefers_top the way of all logits to the host.
  absl::StatusOr<TargetScores> Score(const TokenTree& tree, DecodeState& state,
                                     bool greatest_only = false);

 private:
  TreeVerifier(const LanguageModel* target, std::unique_ptr<Workspace> workspace)
      : target_(target), workspace_(std::move(workspace)) {}

  const LanguageModel* target_;
  std::unique_ptr<Workspace> workspace_;
};

}  // namespace canopy

#endif  // CANOPY_VERIFY_TREE_VERIFIER_H_
