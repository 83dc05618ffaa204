// A language model whose logits are a hash of the token path, so that tests know them without
// running it.

#ifndef CANOPY_TESTS_SUPPORT_FAKE_MODEL_H_
#define CANOPY_TESTS_SUPPORT_FAKE_MODEL_H_

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <vector>

#include "core/language_model.h"

namespace canopy::testing {

struct FakeModelOptions {
  int vocab = 20;
  int max_positions = 1000;
  uint64_t seed = 1;
  // The logits are those of seed plus `disagreement` times those of another seed: two models that
  // share a seed agree the more, the smaller it is.
  double disagreement = 0.0;
  uint64_t disagreement_seed = 0;
  bool prefers_top = false;
};

// Keeps every limit that LanguageModel promises to keep, and notes what it computes. For one
// thread.
class FakeModel final : public LanguageModel {
 public:
  explicit FakeModel(const FakeModelOptions& options);

  // What Forward gives after these tokens.
  std::vector<float> LogitsAfter(std::span<const TokenId> tokens) const;

  int passes() const { return passes_; }
  int rows() const { return rows_; }
  // Rows whose path had been computed before in the same state, since the last Clear.
  int repeated_rows() const { return repeated_rows_; }
  // Passes that were asked for the best tokens instead of logits.
  int top_passes() const { return top_passes_; }
  void ClearCounts() const;

  const ModelInfo& info() const override { return info_; }
  absl::StatusOr<std::unique_ptr<DecodeState>> NewState(const StateOptions& options) const override;
  absl::StatusOr<std::unique_ptr<Workspace>> NewWorkspace(int max_rows) const override;
  absl::StatusOr<ForwardResult> Forward(std::span<const ForwardItem> items,
                                        Workspace& workspace) const override;

 private:
  absl::Status CommitRows(DecodeState& state, std::span<const NodeId> path) const override;
  void Compute(const DecodeState& state, std::vector<TokenId> path, std::vector<float>* row) const;

  FakeModelOptions options_;
  ModelInfo info_;
  // The prefix by position; a state's own position says how much of it counts.
  mutable std::map<const DecodeState*, std::vector<TokenId>> prefixes_;
  mutable std::map<const DecodeState*, std::set<std::vector<TokenId>>> computed_;
  mutable int passes_ = 0;
  mutable int rows_ = 0;
  mutable int repeated_rows_ = 0;
  mutable int top_passes_ = 0;
};

}  // namespace canopy::testing

#endif  // CANOPY_TESTS_SUPPORT_FAKE_MODEL_H_
