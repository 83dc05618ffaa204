// The CPU kernels of the matrix product, one per SIMD target. Used by matmul.cc alone.

#ifndef CANOPY_CORE_OPS_MATMUL_CPU_H_
#define CANOPY_CORE_OPS_MATMUL_CPU_H_

#include <cstdint>

#include "core/dtype.h"

namespace canopy {

struct MatMulKernelArgs {
  const float* x = nullptr;  // [rows, k]
  int64_t x_stride = 0;
  const unsigned char* weights = nullptr;  // packed panels
  DType dtype = DType::kF32;
  int k = 0;
  int n = 0;
  float* y = nullptr;  // [rows, n]
  int64_t y_stride = 0;
  const float* bias = nullptr;  // [n] or null
  bool accumulate = false;
};

// Rows [row_begin, row_end) of the columns of panels [panel_begin, panel_end). Reads of x stay
// inside its rows and columns; writes of y stay inside its n columns.
void MatMulBlock(const MatMulKernelArgs& args, int row_begin, int row_end, int panel_begin,
                 int panel_end);

}  // namespace canopy

#endif  // CANOPY_CORE_OPS_MATMUL_CPU_H_
