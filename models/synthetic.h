// Models of published shapes with random weights, for studying speed without checkpoints.

#ifndef CANOPY_MODELS_SYNTHETIC_H_
#define CANOPY_MODELS_SYNTHETIC_H_

#include <string>
#include <string_view>
#include <vector>

#include "core/cpu_backend.h"
#include "core/status.h"
#include "models/decoder.h"

namespace canopy {

inline constexpr std::string_view kSyntheticPrefix = "synthetic:";

// The spec of "synthetic:NAME", bf16. With `cpu`, matrices are filled there; without, they are
// blank and the device that the model is made on fills them. NotFound lists the names.
absl::StatusOr<DecoderSpec> SyntheticSpec(const std::string& path, CpuBackend* cpu);

// Names with where their sizes are from, for `canopy list`.
std::vector<std::pair<std::string, std::string>> ListSyntheticModels();

}  // namespace canopy

#endif  // CANOPY_MODELS_SYNTHETIC_H_
