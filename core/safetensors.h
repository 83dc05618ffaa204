// Reading safetensors files: memory-mapped, one file or several with an index.
//
//   ASSIGN_OR_RETURN(Safetensors weights, Safetensors::OpenFolder("models/m2-16m"));
//   const SafetensorsEntry* embedding = weights.Find("backbone.embeddings.weight");
//
// Form: 8 bytes little-endian length of the header, the header (a JSON object from names to
// {"dtype", "shape", "data_offsets"}, and "__metadata__" from strings to strings), then the data.
// https://github.com/huggingface/safetensors. Everything that the header claims is checked against
// the file before anything is read through it.

#ifndef CANOPY_CORE_SAFETENSORS_H_
#define CANOPY_CORE_SAFETENSORS_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/dtype.h"
#include "core/status.h"

namespace canopy {

// One tensor, where it lies in the mapped file. Row-major and contiguous; `data` has no alignment.
struct SafetensorsEntry {
  std::string dtype_name;  // as in the header: "BF16"
  std::optional<DType>
      dtype;  // absent for those that Canopy does not compute with (F64, F8_E4M3, ...)
  std::vector<int64_t> shape;  // [] is a scalar
  const std::byte* data = nullptr;
  size_t bytes = 0;
  int file = 0;  // index into files()

  int64_t elements() const;
  std::string ShapeString() const;  // "[320, 64]"
};

// A set of tensors. Movable, const after opening, safe from several threads. The data are valid as
// long as it lives; a file must not be changed meanwhile.
class Safetensors {
 public:
  Safetensors();
  Safetensors(Safetensors&&) noexcept;
  Safetensors& operator=(Safetensors&&) noexcept;
  ~Safetensors();

  // One file. NotFound if it cannot be opened; InvalidArgument, naming file and tensor, for a
  // header that is truncated, longer than the file, not JSON of the form above, names a tensor
  // twice, has a shape that overflows or does not fit its offsets, or whose tensors overlap, leave
  // gaps or end elsewhere than the file.
  static absl::StatusOr<Safetensors> Open(const std::string& path);
  // A checkpoint folder: model.safetensors, or the shards that model.safetensors.index.json names.
  // Every tensor of the index must be in the shard that the index says.
  static absl::StatusOr<Safetensors> OpenFolder(const std::string& folder);
  // From memory that the caller keeps; `name` stands for the path in messages.
  static absl::StatusOr<Safetensors> FromBytes(std::string name, std::span<const std::byte> bytes);

  // Null if there is no tensor of that name.
  const SafetensorsEntry* Find(std::string_view name) const;
  // In name order.
  const std::map<std::string, SafetensorsEntry, std::less<>>& entries() const { return entries_; }
  // "__metadata__" of the file, or of the first shard that has the key.
  const std::map<std::string, std::string, std::less<>>& metadata() const { return metadata_; }
  // Paths, in name order.
  const std::vector<std::string>& files() const { return files_; }

  // Identifies the weights in records: 16 hex digits. Of one file it is XXH64 (seed 0) of all its
  // bytes, so `xxh64sum model.safetensors` gives the same; of several, XXH64 of their digests, 8
  // bytes little-endian each, in name order. Reads every byte once, at memory speed.
  std::string Hash() const;

 private:
  struct Mapping;
  absl::Status AddFile(std::string name, std::span<const std::byte> bytes);
  absl::Status MapFile(const std::string& path);

  std::vector<std::unique_ptr<Mapping>> mappings_;
  std::vector<std::string> files_;
  std::vector<std::span<const std::byte>> contents_;  // parallel to files_
  std::map<std::string, SafetensorsEntry, std::less<>> entries_;
  std::map<std::string, std::string, std::less<>> metadata_;
};

// XXH64 of bytes (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md).
uint64_t XxHash64(std::span<const std::byte> bytes, uint64_t seed = 0);

// A tensor with values that are not finite.
struct NonFiniteTensor {
  std::string name;
  std::string file;
  std::vector<int64_t> shape;
  int64_t nans = 0;
  int64_t infinities = 0;
  int64_t first = 0;  // flat index of the first of either
  // "model.norm.weight [64] in model.safetensors: 2 NaN and 0 infinite values, the first at index
  // 7".
  std::string ToString() const;
};

// Scans every f32, bf16 and f16 tensor, in name order.
std::vector<NonFiniteTensor> FindNonFinite(const Safetensors& tensors);

// Widens an f32, bf16 or f16 tensor. Unimplemented for other dtypes, with the dtype's name.
absl::Status ReadFloats(const SafetensorsEntry& entry, std::span<float> out);

}  // namespace canopy

#endif  // CANOPY_CORE_SAFETENSORS_H_
