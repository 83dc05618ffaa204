// Loads a checkpoint folder in Hugging Face form.

#ifndef CANOPY_MODELS_LOADER_H_
#define CANOPY_MODELS_LOADER_H_

#include <memory>
#include <string>
#include <string_view>
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
//
// A folder "synthetic:NAME" is a model of a published shape with random weights
// (models/synthetic.h). dtype: of weights and activations on a GPU: "bf16", "f32", or "auto", bf16
// for a bf16 checkpoint and f32 for others, so that no weight is rounded. The CPU keeps the
// checkpoint's and takes "auto" alone.
absl::StatusOr<std::unique_ptr<LanguageModel>> LoadModel(Backend& backend,
                                                         const std::string& folder,
                                                         std::string_view dtype = "auto");

struct DeviceName {
  DeviceKind kind = DeviceKind::kCpu;
  int number = 0;
};
// "cpu", "cuda" (the first one) or "cuda:N". InvalidArgument for anything else.
absl::StatusOr<DeviceName> ParseDevice(std::string_view text);

// The device of that name. threads: of the CPU, 0 for one a core. InvalidArgument for another name
// or where this build is without CUDA; NotFound and FailedPrecondition where the device is missing
// or does not fit.
absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(std::string_view device, int threads);

// The same without building the model: config and tensors into a spec.
absl::StatusOr<DecoderSpec> ReadSpec(Checkpoint& checkpoint);

// model_type values, for `canopy list`.
std::vector<std::string> ListArchitectures();

}  // namespace canopy

#endif  // CANOPY_MODELS_LOADER_H_
