// A model that gives and takes promised tokens, around one that does not: its passes run at once,
// but what they chose comes out only where a later pass uses it or Resolve tells it.

#ifndef CANOPY_TESTS_SUPPORT_PROMISING_MODEL_H_
#define CANOPY_TESTS_SUPPORT_PROMISING_MODEL_H_

#include <array>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "core/language_model.h"

namespace canopy::testing {

// What the passes of all models on one backend chose.
struct PassLog {
  const Backend* backend = nullptr;
  uint32_t launched = 0;
  struct Pass {
    int top = 0;
    std::vector<TokenId> chosen;  // [rows, top]
  };
  std::array<Pass, kPromisePasses> passes;
  // The selections of passes that were asked for without a promise are waits, and so are calls of
  // Resolve for passes that nobody has waited for.
  int waits = 0;
  uint32_t waited_for = 0;
};

// For one thread. The base model must give logits.
class PromisingModel final : public LanguageModel {
 public:
  PromisingModel(const LanguageModel& base, PassLog* log);

  // Rows whose logits are to be no numbers: of the nth call of Forward with `top`, from 1.
  std::function<bool(int call, int row)> nan;
  // Without promises: the same model, but that it waits.
  bool promising = true;

  int promised_passes() const { return promised_passes_; }

  const ModelInfo& info() const override { return info_; }
  absl::StatusOr<std::unique_ptr<DecodeState>> NewState(const StateOptions& options) const override;
  absl::StatusOr<std::unique_ptr<Workspace>> NewWorkspace(int max_rows) const override;
  absl::StatusOr<ForwardResult> Forward(std::span<const ForwardItem> items,
                                        Workspace& workspace) const override;
  const Backend* promises() const override { return promising ? log_->backend : nullptr; }
  absl::StatusOr<double> Resolve(std::span<TokenId> tokens) const override;

 private:
  absl::Status CommitRows(DecodeState& state, std::span<const NodeId> path) const override;

  const LanguageModel& base_;
  PassLog* log_;
  ModelInfo info_;
  mutable int promised_passes_ = 0;
  mutable int top_calls_ = 0;
};

}  // namespace canopy::testing

#endif  // CANOPY_TESTS_SUPPORT_PROMISING_MODEL_H_
