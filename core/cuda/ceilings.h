// What a GPU reaches at most, measured: what passes are compared with.

#ifndef CANOPY_CORE_CUDA_CEILINGS_H_
#define CANOPY_CORE_CUDA_CEILINGS_H_

#include "core/cuda_backend.h"
#include "core/status.h"

namespace canopy {

// Bytes a second of reading a buffer of 4 GiB (less where memory is short) once, median of 20.
absl::StatusOr<double> MeasureReadBandwidth(CudaBackend& cuda);

// Seconds of y [rows, out] = x [rows, in] w^T in bf16 by cuBLAS, median of `repetitions` over
// different weights. NotFound if libcublas cannot be loaded.
absl::StatusOr<double> TimeCublasProduct(CudaBackend& cuda, int rows, int out, int in,
                                         int repetitions);

}  // namespace canopy

#endif  // CANOPY_CORE_CUDA_CEILINGS_H_
