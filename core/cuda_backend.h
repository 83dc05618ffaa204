// An NVIDIA GPU: its memory and one stream on which passes run in order.

#ifndef CANOPY_CORE_CUDA_BACKEND_H_
#define CANOPY_CORE_CUDA_BACKEND_H_

#include <cuda_runtime_api.h>

#include <memory>
#include <string>

#include "core/backend.h"

namespace canopy {

// OK, or Internal with what was being done and CUDA's name and text of the error; ResourceExhausted
// for a lack of memory.
absl::Status CudaStatus(cudaError_t error, const char* doing);

#define RETURN_IF_CUDA_ERROR(expression, doing) RETURN_IF_ERROR(CudaStatus((expression), (doing)))

// Called from one thread at a time.
class CudaBackend final : public Backend {
 public:
  // NotFound without a device of that number, FailedPrecondition for a driver that is too old or a
  // compute capability below 8.0.
  static absl::StatusOr<std::unique_ptr<CudaBackend>> Create(int device = 0);
  ~CudaBackend() override;

  DeviceKind kind() const override { return DeviceKind::kCuda; }
  std::string Description() const override;
  absl::StatusOr<Buffer> Allocate(size_t bytes) override;
  MemoryStats memory() const override;

  cudaStream_t stream() const { return stream_; }
  int multiprocessors() const { return multiprocessors_; }
  int shared_bytes() const { return shared_bytes_; }  // that a block may have
  size_t cache_bytes() const { return cache_bytes_; }

  // Both wait until the copy is done.
  absl::Status ToDevice(void* to, const void* from, size_t bytes);
  absl::Status ToHost(void* to, const void* from, size_t bytes);
  absl::Status Synchronize();
  // Waits until a number in pinned memory, which what was launched last writes, has become `value`:
  // some microseconds faster than Synchronize.
  absl::Status Await(uint32_t* number, uint32_t value);

  // Seconds that the device has worked on passes, by its own clock.
  double device_seconds() const { return device_seconds_; }
  void AddDeviceSeconds(double seconds) { device_seconds_ += seconds; }

 private:
  CudaBackend() = default;
  void Free(void* data, size_t bytes) override;

  int device_ = 0;
  std::string name_;
  int capability_ = 0;  // 90 for 9.0
  int multiprocessors_ = 0;
  int shared_bytes_ = 0;
  size_t cache_bytes_ = 0;
  cudaStream_t stream_ = nullptr;
  double device_seconds_ = 0.0;
  std::atomic<size_t> bytes_in_use_{0};
  std::atomic<size_t> peak_bytes_{0};
  std::atomic<uint64_t> allocations_{0};
};

}  // namespace canopy

#endif  // CANOPY_CORE_CUDA_BACKEND_H_
