// The forward path on an NVIDIA GPU: the same DecoderSpec as on the CPU, as a list of operators for
// the persistent kernel of models/pass_kernel.cuh.

#ifndef CANOPY_MODELS_DECODER_CUDA_H_
#define CANOPY_MODELS_DECODER_CUDA_H_

#include <memory>
#include <string>
#include <vector>

#include "core/cuda_backend.h"
#include "core/language_model.h"
#include "core/status.h"
#include "models/decoder.h"

namespace canopy {

// Time of one operator of a pass in block 0: until it is done with it and, where a barrier follows,
// all blocks are. Who waits for what others send is charged for it: readers of sums, and up to 16
// rows products, for their activations.
struct OperatorTime {
  std::string name;
  double share = 0.0;  // of the pass
};

struct ProductShape {
  int out = 0;  // outputs
  int in = 0;   // inputs
};

// What `canopy bench` needs besides LanguageModel.
class CudaModel : public LanguageModel {
 public:
  // Nodes of a pass. Forward scores more in several passes.
  virtual int MaxRows() const = 0;
  // Bytes that a pass of `nodes` nodes must move at least: weights once, and the checkpoint, stored
  // rows, keys and values that it reads at that context.
  virtual size_t PassBytes(int nodes, int context) const = 0;
  // The pass that was run last in the workspace, run again `repetitions` times between events, one
  // time each, in seconds. The state's pending nodes and its prefix stay as they are.
  virtual absl::StatusOr<std::vector<double>> Repeat(Workspace& workspace,
                                                     int repetitions) const = 0;
  // The pass that was run last, once more with a clock read at every operator.
  virtual absl::StatusOr<std::vector<OperatorTime>> Breakdown(Workspace& workspace) const = 0;
  // The shapes of the model's products.
  virtual std::vector<ProductShape> Products() const = 0;
  // Layers whose output projection pairs of blocks take in strips with few rows
  // (core/ops/strip_cuda.cuh).
  virtual int StripLayers() const = 0;
  // Seconds of a product of that shape alone for `rows` rows, its barrier of the grid included, in
  // passes over the products of that shape in all layers (the weights of one come from memory).
  virtual absl::StatusOr<std::vector<double>> TimeProduct(const ProductShape& shape, int rows,
                                                          int repetitions) const = 0;
};

// dtype: of weights and activations, kBF16 or kF32. Matrices without data (PackedMatrix::Blank) get
// random weights on the device. Unimplemented, with the limit, for shapes that the kernels do not
// have; ResourceExhausted without memory. The backend must outlive the model.
absl::StatusOr<std::unique_ptr<CudaModel>> MakeCudaDecoder(CudaBackend& cuda, DecoderSpec spec,
                                                           DType dtype);

}  // namespace canopy

#endif  // CANOPY_MODELS_DECODER_CUDA_H_
