#include "models/pass_kernel_impl.cuh"

namespace canopy::cuda {
CANOPY_INSTANTIATE_PASS(__nv_bfloat16);
}  // namespace canopy::cuda
