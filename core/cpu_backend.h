// The CPU: aligned host memory and a thread pool.

#ifndef CANOPY_CORE_CPU_BACKEND_H_
#define CANOPY_CORE_CPU_BACKEND_H_

#include <memory>
#include <string>

#include "core/backend.h"
#include "core/thread_pool.h"

namespace canopy {

// Operators run one at a time on the pool, called from one thread at a time per backend.
class CpuBackend final : public Backend {
 public:
  // threads = 0: one for each core that this process may use. InvalidArgument beyond 1024 threads.
  static absl::StatusOr<std::unique_ptr<CpuBackend>> Create(int threads = 0);

  ~CpuBackend() override;

  DeviceKind kind() const override { return DeviceKind::kCpu; }
  std::string Description() const override;
  // Buffers of 64 KiB and more lie in huge pages where the system grants them: streaming weights
  // from small pages costs a third of the bandwidth.
  absl::StatusOr<Buffer> Allocate(size_t bytes) override;
  MemoryStats memory() const override;

  ThreadPool& pool() { return *pool_; }

 private:
  class Arena;

  CpuBackend();
  void Free(void* data, size_t bytes) override;

  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<Arena> arena_;
  std::atomic<size_t> bytes_in_use_{0};
  std::atomic<size_t> peak_bytes_{0};
  std::atomic<uint64_t> allocations_{0};
};

}  // namespace canopy

#endif  // CANOPY_CORE_CPU_BACKEND_H_
