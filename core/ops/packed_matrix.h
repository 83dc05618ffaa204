// A weight matrix in the layout that the product streams.
//
// Layout: panels of kPanel output columns, each [K][kPanel], panels in order; the last is padded
// with zeros. f32 and f16 panels hold column c of the panel at element c. bf16 panels hold, at each
// k, 16 32-bit words; word i carries column i in its low half and column 16 + i in its high half,
// so that one shift and one mask widen two vectors.

#ifndef CANOPY_CORE_OPS_PACKED_MATRIX_H_
#define CANOPY_CORE_OPS_PACKED_MATRIX_H_

#include <cstdint>
#include <span>

#include "core/backend.h"
#include "core/dtype.h"
#include "core/status.h"

namespace canopy {

// Columns of a panel: two vectors of 16 floats, the widest there is (AVX-512).
inline constexpr int kPanel = 32;

// [out_features, in_features] of dtype f32, bf16 or f16, as in the checkpoint. Movable. Const after
// packing; safe from several threads.
class PackedMatrix {
 public:
  PackedMatrix() = default;

  // Packs rows of `weights` [out_features, in_features], row-major and contiguous, without
  // alignment demands. Several sources stack: the result's rows are those of sources[0], then
  // sources[1], ... (fused q/k/v or gate/up). All have the same dtype and in_features.
  // InvalidArgument for other dtypes or sizes below 1; ResourceExhausted without memory.
  struct Source {
    const void* data = nullptr;
    int out_features = 0;
  };
  static absl::StatusOr<PackedMatrix> Pack(Backend& backend, DType dtype, int in_features,
                                           std::span<const Source> sources);

  // A matrix of that shape without data: of synthetic models, whose device makes the weights.
  static PackedMatrix Blank(DType dtype, int out_features, int in_features);

  int out_features() const { return out_features_; }
  int in_features() const { return in_features_; }
  DType dtype() const { return dtype_; }
  int panels() const { return (out_features_ + kPanel - 1) / kPanel; }
  const void* data() const { return buffer_.data(); }
  // Of the buffer, padding included.
  size_t bytes() const { return buffer_.bytes(); }

  // Row `out` widened into result [in_features]: embedding look-up from a tied head.
  void UnpackRow(int out, float* result) const;

 private:
  Buffer buffer_;
  DType dtype_ = DType::kF32;
  int out_features_ = 0;
  int in_features_ = 0;
};

}  // namespace canopy

#endif  // CANOPY_CORE_OPS_PACKED_MATRIX_H_
