// An NVIDIA GPU: its memory and one stream on which passes run in order.

#ifndef CANOPY_CORE_CUDA_BACKEND_H_
#define CANOPY_CORE_CUDA_BACKEND_H_

#include <cuda_runtime_api.h>

#include <memory>
#include <span>
#include <string>

#include "core/backend.h"
#include "trees/ids.h"

namespace canopy {

namespace cuda {
struct PassResult;
struct Selected;
}  // namespace cuda

// OK, or Internal with what was being done and CUDA's name and text of the error; ResourceExhausted
// for a lack of memory.
absl::Status CudaStatus(cudaError_t error, const char* doing);

#define RETURN_IF_CUDA_ERROR(expression, doing) RETURN_IF_ERROR(CudaStatus((expression), (doing)))

// Called from one thread at a time.
class CudaBackend final : public Backend {
 public:
  // NotFound without a device of that number, FailedPrecondition for a driver that is too old, a
  // compute capability below 8.0, or one that this build has no code for.
  static absl::StatusOr<std::unique_ptr<CudaBackend>> Create(int device = 0);
  ~CudaBackend() override;

  DeviceKind kind() const override { return DeviceKind::kCuda; }
  std::string Description() const override;
  absl::StatusOr<Buffer> Allocate(size_t bytes) override;
  MemoryStats memory() const override;

  cudaStream_t stream() const { return stream_; }
  int capability() const { return capability_; }  // 90 for 9.0
  int multiprocessors() const { return multiprocessors_; }
  int shared_bytes() const { return shared_bytes_; }  // that a block may have
  size_t cache_bytes() const { return cache_bytes_; }
  // Bytes a second by the memory's clock and width, which no program reaches; 0 where unknown.
  double nominal_bandwidth() const { return nominal_bandwidth_; }

  // Both wait until the copy is done.
  absl::Status ToDevice(void* to, const void* from, size_t bytes);
  absl::Status ToHost(void* to, const void* from, size_t bytes);
  absl::Status Synchronize();

  // Passes of all models are numbered from 1 on in the order in which they are launched. What each
  // leaves is kept for a while, see core/cuda/pass.h.
  uint32_t NewPass() { return static_cast<uint32_t>(++passes_); }
  uint64_t passes() const { return passes_; }
  cuda::PassResult* result(uint32_t pass) const;              // in the host's memory
  cuda::Selected* selections() const;                         // on the device, of all that are kept
  uint64_t* device_ns() const { return ns_.as<uint64_t>(); }  // the same, of all passes so far
  // Waits for a pass of the last kPromisePasses, some microseconds less than Synchronize.
  absl::Status AwaitPass(uint32_t pass);
  // As LanguageModel::Resolve.
  absl::StatusOr<double> Resolve(std::span<TokenId> tokens);

  // Seconds that the device has worked on passes up to the last that was waited for, by its own
  // clock; of those after it up to `pass`, which is done, nothing shall be counted.
  double device_seconds() const { return Seconds(waited_ns_); }
  void SkipDeviceTime(uint32_t pass);

  // How often the host has waited for the device.
  uint64_t waits() const { return waits_; }

 private:
  CudaBackend() = default;
  void Free(void* data, size_t bytes) override;
  double Seconds(uint64_t ns) const { return 1e-9 * static_cast<double>(ns - skipped_ns_); }

  int device_ = 0;
  std::string name_;
  int capability_ = 0;
  int multiprocessors_ = 0;
  int shared_bytes_ = 0;
  size_t cache_bytes_ = 0;
  double nominal_bandwidth_ = 0.0;
  cudaStream_t stream_ = nullptr;
  uint64_t passes_ = 0;
  cuda::PassResult* results_ = nullptr;  // [kPromisePasses], pinned
  Buffer selections_;                    // [kPromisePasses]
  Buffer ns_;
  uint64_t waited_ns_ = 0;  // of device_ns, when the last pass that was waited for was done
  uint64_t skipped_ns_ = 0;
  uint64_t waits_ = 0;
  std::atomic<size_t> bytes_in_use_{0};
  std::atomic<size_t> peak_bytes_{0};
  std::atomic<uint64_t> allocations_{0};
};

}  // namespace canopy

#endif  // CANOPY_CORE_CUDA_BACKEND_H_
