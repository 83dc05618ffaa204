#include "verify/tree_verifier.h"

namespace canopy {

absl::StatusOr<std::unique_ptr<TreeVerifier>> TreeVerifier::Create(const LanguageModel& target,
                                                                   int max_rows) {
  if (max_rows < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("tree verifier: max_rows is ", max_rows, "; expected 1 or more"));
  }
  ASSIGN_OR_RETURN(std::unique_ptr<Workspace> workspace, target.NewWorkspace(max_rows));
  return std::unique_ptr<TreeVerifier>(new TreeVerifier(&target, std::move(workspace)));
}

absl::Status TreeVerifier::Prefill(std::span<const TokenId> prompt, DecodeState& state) {
  if (prompt.empty()) return absl::OkStatus();
  const ForwardItem item{.state = &state,
                         .tokens = prompt,
                         .parents = {},
                         .logits = LogitsOf::kNone,
                         .commit_chain = true};
  return target_->Forward({&item, 1}, *workspace_).status();
}

absl::StatusOr<TargetScores> TreeVerifier::Score(const TokenTree& tree, DecodeState& state,
                                                 bool greatest_only) {
  if (tree.empty()) {
    return absl::InvalidArgumentError("tree verifier: the tree is empty; expected node 0 at least");
  }
  if (state.pending() != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("tree verifier: the state has ", state.pending(),
                     " pending nodes; commit or drop them before the next tree"));
  }
  const ForwardItem item{.state = &state,
                         .tokens = tree.tokens(),
                         .parents = tree.parents(),
                         .logits = LogitsOf::kAll,
                         .commit_chain = false,
                         .top = greatest_only && target_->info().prefers_top ? 1 : 0};
  ASSIGN_OR_RETURN(const ForwardResult result, target_->Forward({&item, 1}, *workspace_));
  return TargetScores{result.logits, result.top};
}

}  // namespace canopy
