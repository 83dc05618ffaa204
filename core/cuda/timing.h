// Timing on the device.

#ifndef CANOPY_CORE_CUDA_TIMING_H_
#define CANOPY_CORE_CUDA_TIMING_H_

#include <functional>
#include <vector>

#include "core/cuda_backend.h"
#include "core/status.h"

namespace canopy {

// Seconds of each of `repetitions` calls of launch(0), launch(1), ..., which enqueue work on the
// backend's stream, from one event to the next.
absl::StatusOr<std::vector<double>> TimeEach(CudaBackend& cuda, int repetitions,
                                             const std::function<absl::Status(int)>& launch);

}  // namespace canopy

#endif  // CANOPY_CORE_CUDA_TIMING_H_
