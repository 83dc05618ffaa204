// A checkpoint folder while it is read into a DecoderSpec: tensors by name, with the shape that the
// architecture expects.
//
//   ASSIGN_OR_RETURN(spec.out, checkpoint.Matrix({{"model.layers.0.self_attn.o_proj.weight", 384}},
//   384));
//
// Errors name folder, tensor, its shape and the expected one: NotFound for a tensor that is
// missing, InvalidArgument for one of another shape, Unimplemented for a dtype that Canopy does not
// compute with.

#ifndef CANOPY_MODELS_CHECKPOINT_H_
#define CANOPY_MODELS_CHECKPOINT_H_

#include <cstdint>
#include <initializer_list>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/cpu_backend.h"
#include "core/hf_config.h"
#include "core/ops/packed_matrix.h"
#include "core/safetensors.h"
#include "core/status.h"

namespace canopy {

// Movable. Used by one thread; gone when the model is loaded.
class Checkpoint {
 public:
  // Some rows of a stacked matrix or elements of a stacked vector: all of tensor `name`.
  struct Rows {
    std::string name;
    int64_t rows = 0;
  };

  // Opens config.json and the weight files of `folder`.
  static absl::StatusOr<Checkpoint> Open(CpuBackend& backend, const std::string& folder);
  // The same with a config and tensors that are there already (tests).
  Checkpoint(CpuBackend& backend, std::string folder, HfConfig config, Safetensors tensors);

  CpuBackend& backend() const { return *backend_; }
  const std::string& folder() const { return folder_; }
  const HfConfig& config() const { return config_; }
  const Safetensors& tensors() const { return tensors_; }
  bool Has(std::string_view name) const { return tensors_.Find(name) != nullptr; }

  // The tensors [rows, columns] stacked, in their dtype, which must be the same for all.
  absl::StatusOr<PackedMatrix> Matrix(std::initializer_list<Rows> parts, int64_t columns);
  // The tensors [rows] one after the other, widened.
  absl::StatusOr<std::vector<float>> Vector(std::initializer_list<Rows> parts);
  absl::StatusOr<std::vector<float>> Vector(const std::string& name, int64_t size);
  // A tensor of any shape, flat, widened.
  absl::StatusOr<std::vector<float>> Floats(const std::string& name,
                                            std::span<const int64_t> shape);

  // InvalidArgument if a tensor named layer_prefix + "N." + ... with N < layers has not been read:
  // it would change the layer's result (a bias that config.json does not mention, the scales of
  // quantised weights). Tensors elsewhere are ignored, and so are stored RoPE frequencies.
  absl::Status CheckLayersFullyRead(std::string_view layer_prefix, int layers) const;

  // Elements of the tensors that were read, each counted once.
  int64_t parameters() const { return parameters_; }

 private:
  absl::StatusOr<const SafetensorsEntry*> Get(const std::string& name,
                                              std::span<const int64_t> shape);

  CpuBackend* backend_;
  std::string folder_;
  HfConfig config_;
  Safetensors tensors_;
  std::set<const SafetensorsEntry*> read_;
  int64_t parameters_ = 0;
};

}  // namespace canopy

#endif  // CANOPY_MODELS_CHECKPOINT_H_
