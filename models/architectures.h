// The architectures: one function a file, from a checkpoint to a spec. To add one, write its file,
// declare it here and add its line to kArchitectures in loader.cc (docs/add-a-model.md).

#ifndef CANOPY_MODELS_ARCHITECTURES_H_
#define CANOPY_MODELS_ARCHITECTURES_H_

#include "core/status.h"
#include "models/checkpoint.h"
#include "models/decoder.h"

namespace canopy {

// Each fills in blocks, norms, embedding and head, and of `info` the sizes (layers, hidden_size,
// vocab_size, max_positions); the loader adds the rest.
absl::StatusOr<DecoderSpec> ReadLlama(Checkpoint& checkpoint);
absl::StatusOr<DecoderSpec> ReadQwen2(Checkpoint& checkpoint);
absl::StatusOr<DecoderSpec> ReadQwen3(Checkpoint& checkpoint);
absl::StatusOr<DecoderSpec> ReadMamba2(Checkpoint& checkpoint);
absl::StatusOr<DecoderSpec> ReadBamba(Checkpoint& checkpoint);

}  // namespace canopy

#endif  // CANOPY_MODELS_ARCHITECTURES_H_
