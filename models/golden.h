// Comparing a model with a golden file: what another implementation computes for the same
// checkpoint.
//
// A golden file is safetensors with context_ids i32 [T]; context_logits f32 [R, vocab], at the last
// R <= T context positions; tree_parents i32 [N] (-1: child of the context's last token),
// tree_tokens i32 [N] and tree_logits f32 [N, vocab], each node's path having been run on its own;
// and perhaps greedy_ids i32 [G], the greedy continuation of the context, with greedy_top2_gap f32
// [G], the difference of the two greatest logits at each step.

#ifndef CANOPY_MODELS_GOLDEN_H_
#define CANOPY_MODELS_GOLDEN_H_

#include <optional>
#include <string>

#include "core/cpu_backend.h"
#include "core/language_model.h"
#include "core/status.h"

namespace canopy {

struct GreedyReport {
  bool equal = false;         // every id
  int first_difference = -1;  // step of the first id that differs; -1 if none
  double gap_there = 0.0;     // greedy_top2_gap at that step; 0 if none
};

struct GoldenReport {
  // Infinite where a logit is not finite.
  double context_max_abs_err = 0.0;
  double tree_max_abs_err = 0.0;
  double tree_argmax_equal = 0.0;      // fraction of nodes with the golden's argmax
  std::optional<GreedyReport> greedy;  // where the file has greedy_ids
  bool passed = false;

  // One line of JSON: context_max_abs_err, tree_max_abs_err, tree_argmax_equal and, with greedy,
  // greedy_equal, greedy_first_difference and greedy_gap_there (both null if equal). An infinite
  // error is null.
  std::string ToJson() const;
};

// A greedy id may differ where the golden's two best logits are closer than this; another order of
// sums may rightly choose the other one. With a tolerance above twice this it may where they are
// closer than half the tolerance and than twice the largest error that was found.
inline constexpr double kGreedyGap = 1e-3;

// Commits the context, scores the tree over it in one pass, and decodes as many tokens as the file
// has greedy ids, one a pass, up to the first that differs. Passes if both errors are at most
// `tolerance` and the greedy ids are equal or first differ at such a gap. NotFound or
// InvalidArgument, naming file and tensor, for a golden file that lacks a tensor, has one of
// another shape, or does not fit the model's vocabulary; errors of Forward as they are.
absl::StatusOr<GoldenReport> CompareWithGolden(const LanguageModel& model, const std::string& path,
                                               double tolerance);

}  // namespace canopy

#endif  // CANOPY_MODELS_GOLDEN_H_
