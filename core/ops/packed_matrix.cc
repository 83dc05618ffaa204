#include "core/ops/packed_matrix.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace canopy {
namespace {

// Element of column c within a panel's row of kPanel elements.
constexpr int ElementOf(DType dtype, int c) {
  if (dtype != DType::kBF16) return c;
  return c < kPanel / 2 ? 2 * c : 2 * (c - kPanel / 2) + 1;
}
static_assert(std::endian::native == std::endian::little,
              "bf16 panels pair columns as the halves of little-endian words");

// Input features of all of a panel's columns that are packed together: short enough that the
// panel's part stays in the L1 cache while its columns are scattered into it.
constexpr int kBlock = 128;

// Copies `count` columns of a panel, rows of `source` [count, in_features], to columns first,
// first + 1, ... of `panel` [in_features, kPanel].
template <typename T>
void PackColumns(DType dtype, const unsigned char* source, int in_features, int count, int first,
                 T* panel) {
  for (int begin = 0; begin < in_features; begin += kBlock) {
    const int end = std::min(in_features, begin + kBlock);
    for (int c = 0; c < count; ++c) {
      const unsigned char* row = source + (int64_t{c} * in_features) * sizeof(T);
      T* column = panel + ElementOf(dtype, first + c);
      for (int k = begin; k < end; ++k) {
        std::memcpy(column + int64_t{k} * kPanel, row + int64_t{k} * sizeof(T), sizeof(T));
      }
    }
  }
}

}  // namespace

absl::StatusOr<PackedMatrix> PackedMatrix::Pack(Backend& backend, DType dtype, int in_features,
                                                std::span<const Source> sources) {
  if (dtype != DType::kF32 && dtype != DType::kBF16 && dtype != DType::kF16) {
    return absl::InvalidArgumentError(absl::StrCat("packed matrix: weights of dtype ",
                                                   std::string(Name(dtype)),
                                                   "; expected f32, bf16 or f16"));
  }
  if (in_features < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("packed matrix: in_features is ", in_features, "; expected at least 1"));
  }
  if (sources.empty()) {
    return absl::InvalidArgumentError("packed matrix: no sources; expected at least one");
  }
  int64_t out_features = 0;
  for (const Source& source : sources) {
    if (source.out_features < 1 || source.data == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat(
          "packed matrix: a source has ", source.out_features, " output features",
          source.data == nullptr ? " and no data" : "", "; expected at least 1, with data"));
    }
    out_features += source.out_features;
  }
  if (out_features > std::numeric_limits<int>::max() - kPanel) {
    return absl::InvalidArgumentError(absl::StrCat("packed matrix: ", out_features,
                                                   " output features in all; expected at most ",
                                                   std::numeric_limits<int>::max() - kPanel));
  }

  PackedMatrix matrix;
  matrix.dtype_ = dtype;
  matrix.out_features_ = static_cast<int>(out_features);
  matrix.in_features_ = in_features;
  // At most 2^26 panels of 2^31 rows of 128 bytes: no overflow.
  const size_t panel_elements = static_cast<size_t>(in_features) * kPanel;
  const size_t panel_bytes = panel_elements * SizeOf(dtype);
  ASSIGN_OR_RETURN(matrix.buffer_, backend.Allocate(panel_bytes * matrix.panels()));

  int column = 0;  // of the whole matrix
  for (const Source& source : sources) {
    const auto* data = static_cast<const unsigned char*>(source.data);
    for (int done = 0; done < source.out_features;) {
      const int first = column % kPanel;
      const int count = std::min(kPanel - first, source.out_features - done);
      const unsigned char* rows = data + static_cast<size_t>(done) * in_features * SizeOf(dtype);
      const size_t offset = static_cast<size_t>(column / kPanel) * panel_elements;
      if (dtype == DType::kF32) {
        PackColumns(dtype, rows, in_features, count, first, matrix.buffer_.as<float>() + offset);
      } else {
        PackColumns(dtype, rows, in_features, count, first, matrix.buffer_.as<uint16_t>() + offset);
      }
      done += count;
      column += count;
    }
  }
  return matrix;
}

PackedMatrix PackedMatrix::Blank(DType dtype, int out_features, int in_features) {
  PackedMatrix matrix;
  matrix.dtype_ = dtype;
  matrix.out_features_ = out_features;
  matrix.in_features_ = in_features;
  return matrix;
}

void PackedMatrix::UnpackRow(int out, float* result) const {
  CHECK(out >= 0 && out < out_features_ && data() != nullptr);
  const size_t first =
      static_cast<size_t>(out / kPanel) * in_features_ * kPanel + ElementOf(dtype_, out % kPanel);
  switch (dtype_) {
    case DType::kF32: {
      const float* weights = buffer_.as<const float>() + first;
      for (int k = 0; k < in_features_; ++k) result[k] = weights[int64_t{k} * kPanel];
      break;
    }
    case DType::kBF16: {
      const uint16_t* weights = buffer_.as<const uint16_t>() + first;
      for (int k = 0; k < in_features_; ++k) result[k] = BF16ToF32(weights[int64_t{k} * kPanel]);
      break;
    }
    default: {
      const uint16_t* weights = buffer_.as<const uint16_t>() + first;
      for (int k = 0; k < in_features_; ++k) result[k] = F16ToF32(weights[int64_t{k} * kPanel]);
      break;
    }
  }
}

}  // namespace canopy
