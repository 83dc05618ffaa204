// The row-invariant matrix product.
//
// y[r, n] = sum over k of x[r, k] * w[n, k], accumulated in f32 by one chain of fused multiply-adds
// in the order k = 0, 1, ..., K-1, whatever the number of rows, threads or vector lanes. A row's
// bits so depend on the row and the weights alone (docs/architecture.md, "Bit-exact").

#ifndef CANOPY_CORE_OPS_MATMUL_H_
#define CANOPY_CORE_OPS_MATMUL_H_

#include <cstdint>

#include "core/cpu_backend.h"
#include "core/ops/packed_matrix.h"
#include "core/status.h"
#include "core/tensor.h"

namespace canopy {

struct MatMulOptions {
  const float* bias = nullptr;  // [out_features], added after the sum
  bool accumulate = false;      // y += instead of y = (the residual add), after the bias
};

// x [rows, in_features], y [rows, out_features] f32. x and y must not overlap.
// InvalidArgument where dimensions differ. Columns of y up to PaddedColumns(out_features) may be
// written. Bytes: weights once; FLOPs: 2 * rows * out * in.
absl::Status MatMul(CpuBackend& cpu, ConstMatrix x, const PackedMatrix& w, Matrix y,
                    const MatMulOptions& options = {});

// The readable reference: the same sums in double. For tests.
void MatMulReference(ConstMatrix x, const PackedMatrix& w, Matrix y,
                     const MatMulOptions& options = {});

}  // namespace canopy

#endif  // CANOPY_CORE_OPS_MATMUL_H_
