// Any bytes as a safetensors file: it is refused, or everything that its header claims can be read.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <vector>

#include "core/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::StatusOr<canopy::Safetensors> file = canopy::Safetensors::FromBytes(
      "fuzz.safetensors", std::as_bytes(std::span<const uint8_t>(data, size)));
  if (!file.ok()) {
    if (file.status().message().empty()) std::abort();
    return 0;
  }
  size_t bytes = 0;
  for (const auto& [name, entry] : file->entries()) {
    bytes += entry.bytes;
    // Offsets inside the data; asan sees a read beyond them.
    (void)canopy::XxHash64({entry.data, entry.bytes});
    std::vector<float> values(entry.dtype ? entry.elements() : 0);
    if (entry.dtype && entry.bytes != values.size() * canopy::SizeOf(*entry.dtype)) std::abort();
    if (entry.dtype) (void)canopy::ReadFloats(entry, values);
  }
  if (bytes > size) std::abort();  // tensors overlap
  (void)canopy::FindNonFinite(*file);
  (void)file->Hash();
  return 0;
}
