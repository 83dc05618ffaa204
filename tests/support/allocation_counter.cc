#include "tests/support/allocation_counter.h"

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace {

std::atomic<int64_t> allocations{0};

constexpr size_t kDefault = alignof(std::max_align_t);

void* TryAllocate(size_t bytes, size_t alignment) {
  ++allocations;
  // aligned_alloc wants a multiple of the alignment.
  bytes = (bytes + alignment - 1) / alignment * alignment;
  return alignment <= kDefault ? std::malloc(bytes == 0 ? 1 : bytes)
                               : std::aligned_alloc(alignment, bytes);
}

void* Allocate(size_t bytes, size_t alignment) {
  void* data = TryAllocate(bytes, alignment);
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

}  // namespace

namespace canopy::testing {

int64_t Allocations() { return allocations; }

}  // namespace canopy::testing

// All forms, also those that would call these by default: a sanitizer brings its own of each, which
// must not meet these.
void* operator new(size_t bytes) { return Allocate(bytes, kDefault); }
void* operator new[](size_t bytes) { return Allocate(bytes, kDefault); }
void* operator new(size_t bytes, std::align_val_t a) { return Allocate(bytes, size_t(a)); }
void* operator new[](size_t bytes, std::align_val_t a) { return Allocate(bytes, size_t(a)); }
void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  return TryAllocate(bytes, kDefault);
}
void* operator new[](size_t bytes, const std::nothrow_t&) noexcept {
  return TryAllocate(bytes, kDefault);
}
void* operator new(size_t bytes, std::align_val_t a, const std::nothrow_t&) noexcept {
  return TryAllocate(bytes, size_t(a));
}
void* operator new[](size_t bytes, std::align_val_t a, const std::nothrow_t&) noexcept {
  return TryAllocate(bytes, size_t(a));
}
void operator delete(void* data) noexcept { std::free(data); }
void operator delete[](void* data) noexcept { std::free(data); }
void operator delete(void* data, size_t) noexcept { std::free(data); }
void operator delete[](void* data, size_t) noexcept { std::free(data); }
void operator delete(void* data, std::align_val_t) noexcept { std::free(data); }
void operator delete[](void* data, std::align_val_t) noexcept { std::free(data); }
void operator delete(void* data, size_t, std::align_val_t) noexcept { std::free(data); }
void operator delete[](void* data, size_t, std::align_val_t) noexcept { std::free(data); }
void operator delete(void* data, const std::nothrow_t&) noexcept { std::free(data); }
void operator delete[](void* data, const std::nothrow_t&) noexcept { std::free(data); }
void operator delete(void* data, std::align_val_t, const std::nothrow_t&) noexcept {
  std::free(data);
}
void operator delete[](void* data, std::align_val_t, const std::nothrow_t&) noexcept {
  std::free(data);
}
