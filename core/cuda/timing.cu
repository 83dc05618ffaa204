#include "core/cuda/timing.h"

namespace canopy {
namespace {

struct Events {
  ~Events() {
    for (cudaEvent_t event : all) cudaEventDestroy(event);
  }
  std::vector<cudaEvent_t> all;
};

}  // namespace

absl::StatusOr<std::vector<double>> TimeEach(CudaBackend& cuda, int repetitions,
                                             const std::function<absl::Status(int)>& launch) {
  Events events;
  for (int i = 0; i <= repetitions; ++i) {
    cudaEvent_t event;
    RETURN_IF_CUDA_ERROR(cudaEventCreate(&event), "making events");
    events.all.push_back(event);
  }
  RETURN_IF_CUDA_ERROR(cudaEventRecord(events.all[0], cuda.stream()), "recording an event");
  for (int i = 0; i < repetitions; ++i) {
    RETURN_IF_ERROR(launch(i));
    RETURN_IF_CUDA_ERROR(cudaEventRecord(events.all[i + 1], cuda.stream()), "recording an event");
  }
  RETURN_IF_ERROR(cuda.Synchronize());
  std::vector<double> seconds;
  for (int i = 0; i < repetitions; ++i) {
    float milliseconds = 0.0f;
    RETURN_IF_CUDA_ERROR(cudaEventElapsedTime(&milliseconds, events.all[i], events.all[i + 1]),
                         "reading an event");
    seconds.push_back(1e-3 * milliseconds);
  }
  return seconds;
}

}  // namespace canopy
