// Loads a checkpoint folder in Hugging Face form.

#ifndef CANOPY_MODELS_LOADER_H_
#define CANOPY_MODELS_LOADER_H_

#include <memory>
#include <string>
#include <vector>

#include "core/cpu_backend.h"
#include "core/language_model.h"
#include "core/status.h"
#include "models/checkpoint.h"
#include "models/decoder.h"

namespace canopy {

// Picks the architecture by config.json's model_type. Errors name file, key or tensor: NotFound for
// missing files and tensors, InvalidArgument for shapes and values that do not fit, Unimplemented
// for an architecture, RoPE type or activation that Canopy does not have (with what it has).
absl::StatusOr<std::unique_ptr<LanguageModel>> LoadModel(CpuBackend& backend,
                                                         const std::string& folder);

// The same without building the model: config and tensors into a spec.
absl::StatusOr<DecoderSpec> ReadSpec(Checkpoint& checkpoint);

// model_type values, for `canopy list`.
std::vector<std::string> ListArchitectures();

}  // namespace canopy

#endif  // CANOPY_MODELS_LOADER_H_
