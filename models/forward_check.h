// What every LanguageModel checks before a pass.

#ifndef CANOPY_MODELS_FORWARD_CHECK_H_
#define CANOPY_MODELS_FORWARD_CHECK_H_

#include <span>

#include "core/language_model.h"
#include "core/status.h"

namespace canopy {

// The errors of LanguageModel::Forward; states are left as they were.
absl::Status CheckForward(const LanguageModel& model, std::span<const ForwardItem> items,
                          int max_rows);

// The options with defaults filled in. InvalidArgument where the model has no such state.
absl::StatusOr<StateOptions> CheckStateOptions(const ModelInfo& info,
                                               const StateOptions& requested);

}  // namespace canopy

#endif  // CANOPY_MODELS_FORWARD_CHECK_H_
