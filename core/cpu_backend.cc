#include "core/cpu_backend.h"

#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <system_error>
#include <thread>

#include "core/ops/simd.h"

namespace canopy {
namespace {

constexpr size_t kAlignment = 64;
// The size of a huge page on x86-64 and (with 4 KiB pages) arm64.
constexpr size_t kHugePage = size_t{2} << 20;
// Smaller buffers come from the heap.
constexpr size_t kArenaBuffer = size_t{64} << 10;
// Address space, not memory: pages take memory when they are first touched.
constexpr size_t kChunk = size_t{64} << 20;
constexpr int kMaxThreads = 1024;

size_t RoundUp(size_t bytes, size_t multiple) {
  return (bytes + multiple - 1) / multiple * multiple;
}

// Zeroed, at a multiple of kHugePage. Null if the system refuses. `size` is a multiple of
// kHugePage.
char* MapHuge(size_t size) {
  void* mapped =
      mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(mapped);
  const uintptr_t aligned = RoundUp(begin, kHugePage);
  if (aligned > begin) munmap(mapped, aligned - begin);
  const size_t after = begin + kHugePage - aligned;
  if (after > 0) munmap(reinterpret_cast<void*>(aligned + size), after);
#ifdef MADV_HUGEPAGE
  madvise(reinterpret_cast<void*>(aligned), size, MADV_HUGEPAGE);  // a hint: may fail without harm
#endif
  return reinterpret_cast<char*>(aligned);
}

}  // namespace

// Buffers cut from chunks of huge pages, first fit. A chunk goes back to the system with its last
// buffer.
class CpuBackend::Arena {
 public:
  // Zeroed. `bytes` is a multiple of kAlignment. Null if the system refuses.
  char* Allocate(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [begin, chunk] : chunks_) {
      if (char* data = Take(begin, chunk, bytes)) return data;
    }
    const size_t size = std::max(kChunk, RoundUp(bytes, kHugePage));
    char* begin = MapHuge(size);
    if (begin == nullptr) return nullptr;
    Chunk& chunk = chunks_[begin];
    chunk.size = size;
    chunk.free[0] = size;
    return Take(begin, chunk, bytes);
  }

  void Free(char* data, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto at = std::prev(chunks_.upper_bound(data));
    Chunk& chunk = at->second;
    auto range = chunk.free.emplace(data - at->first, bytes).first;
    if (const auto next = std::next(range);
        next != chunk.free.end() && range->first + range->second == next->first) {
      range->second += next->second;
      chunk.free.erase(next);
    }
    if (range != chunk.free.begin()) {
      const auto previous = std::prev(range);
      if (previous->first + previous->second == range->first) {
        previous->second += range->second;
        chunk.free.erase(range);
      }
    }
    if (chunk.free.begin()->second == chunk.size) {
      munmap(at->first, chunk.size);
      chunks_.erase(at);
    }
  }

 private:
  struct Chunk {
    size_t size = 0;
    size_t used = 0;                // bytes from the start that were ever handed out
    std::map<size_t, size_t> free;  // offset to size, no two adjacent
  };

  char* Take(char* begin, Chunk& chunk, size_t bytes) {
    for (auto range = chunk.free.begin(); range != chunk.free.end(); ++range) {
      if (range->second < bytes) continue;
      const auto [offset, size] = *range;
      chunk.free.erase(range);
      if (size > bytes) chunk.free[offset + bytes] = size - bytes;
      if (offset < chunk.used) std::memset(begin + offset, 0, std::min(bytes, chunk.used - offset));
      chunk.used = std::max(chunk.used, offset + bytes);
      return begin + offset;
    }
    return nullptr;
  }

  std::mutex mutex_;
  std::map<char*, Chunk> chunks_;
};

namespace {

// The address sanitizer watches the heap, so under it all buffers that fit come from there.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kHeapBelow = size_t{256} << 20;
#else
constexpr size_t kHeapBelow = kArenaBuffer;
#endif

}  // namespace

CpuBackend::CpuBackend() : arena_(std::make_unique<Arena>()) {}
CpuBackend::~CpuBackend() = default;

absl::StatusOr<std::unique_ptr<CpuBackend>> CpuBackend::Create(int threads) {
  if (threads < 0 || threads > kMaxThreads) {
    return absl::InvalidArgumentError(absl::StrCat(
        "CPU backend: ", threads, " threads asked for; expected 0 (all cores) to ", kMaxThreads));
  }
  if (threads == 0) {
    cpu_set_t cores;
    CPU_ZERO(&cores);
    if (sched_getaffinity(0, sizeof(cores), &cores) == 0) {
      threads = CPU_COUNT(&cores);
    } else {  // more cores than cpu_set_t has room for
      threads = static_cast<int>(std::thread::hardware_concurrency());
    }
    if (threads < 1) threads = 1;
    if (threads > kMaxThreads) threads = kMaxThreads;
  }
  auto backend = std::unique_ptr<CpuBackend>(new CpuBackend());
  try {
    backend->pool_ = std::make_unique<ThreadPool>(threads);
  } catch (const std::system_error& error) {
    return absl::ResourceExhaustedError(absl::StrCat("CPU backend: the system did not start ",
                                                     threads, " threads (", error.what(),
                                                     "); ask for fewer"));
  }
  return backend;
}

std::string CpuBackend::Description() const {
  const int threads = pool_->threads();
  return absl::StrCat("cpu (", SimdTargetName(), ", ", threads,
                      threads == 1 ? " thread)" : " threads)");
}

absl::StatusOr<Buffer> CpuBackend::Allocate(size_t bytes) {
  if (bytes == 0) return Buffer();
  void* data = nullptr;
  if (bytes <= SIZE_MAX - 2 * kHugePage) {
    const size_t rounded = RoundUp(bytes, kAlignment);
    if (bytes >= kHeapBelow) {
      data = arena_->Allocate(rounded);
    } else {
      data = std::aligned_alloc(kAlignment, rounded);
      if (data != nullptr) std::memset(data, 0, rounded);
    }
  }
  if (data == nullptr) {
    return absl::ResourceExhaustedError(absl::StrCat("CPU memory: ", bytes,
                                                     " bytes asked for and refused by the system; ",
                                                     bytes_in_use_.load(), " bytes are in use"));
  }
  const size_t in_use = bytes_in_use_.fetch_add(bytes) + bytes;
  size_t peak = peak_bytes_.load();
  while (peak < in_use && !peak_bytes_.compare_exchange_weak(peak, in_use)) {
  }
  allocations_.fetch_add(1);
  return Buffer(this, data, bytes);
}

void CpuBackend::Free(void* data, size_t bytes) {
  if (bytes >= kHeapBelow) {
    arena_->Free(static_cast<char*>(data), RoundUp(bytes, kAlignment));
  } else {
    std::free(data);
  }
  bytes_in_use_.fetch_sub(bytes);
}

MemoryStats CpuBackend::memory() const {
  return {bytes_in_use_.load(), peak_bytes_.load(), allocations_.load()};
}

}  // namespace canopy
