// A device that runs the operators, and its memory.

#ifndef CANOPY_CORE_BACKEND_H_
#define CANOPY_CORE_BACKEND_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "core/status.h"
#include "core/tensor.h"

namespace canopy {

struct MemoryStats {
  size_t bytes_in_use = 0;
  size_t peak_bytes = 0;
  uint64_t allocations = 0;  // since the backend was made
};

enum class DeviceKind { kCpu, kCuda };

// Operators are free functions that are overloaded on the concrete backend (core/ops/, verify/), so
// this interface holds only what every device has. Thread-safe. Must outlive all its buffers.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual DeviceKind kind() const = 0;
  // "cpu (AVX3, 2 threads)": goes into records.
  virtual std::string Description() const = 0;
  // Zeroed and 64-byte aligned. ResourceExhausted names the size asked for and what is in use.
  virtual absl::StatusOr<Buffer> Allocate(size_t bytes) = 0;
  virtual MemoryStats memory() const = 0;

 private:
  friend class Buffer;
  virtual void Free(void* data, size_t bytes) = 0;
};

}  // namespace canopy

#endif  // CANOPY_CORE_BACKEND_H_
