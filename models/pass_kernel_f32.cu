#include "models/pass_kernel_impl.cuh"

namespace canopy::cuda {
CANOPY_INSTANTIATE_PASS(float);
}  // namespace canopy::cuda
