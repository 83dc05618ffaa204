// RMSNorm, plain, per head, and gated.

#ifndef CANOPY_CORE_OPS_NORM_H_
#define CANOPY_CORE_OPS_NORM_H_

#include "core/cpu_backend.h"
#include "core/status.h"
#include "core/tensor.h"

namespace canopy {

// y[r, c] = weight[c] * x[r, c] / sqrt(mean over c of x[r, c]^2 + eps)   [rows, columns] f32
// The mean is taken in a fixed order that depends on `columns` alone. x and y may be the same
// matrix.
absl::Status RmsNorm(CpuBackend& cpu, ConstMatrix x, const float* weight, float eps, Matrix y);

// RmsNorm of each of `heads` slices [head_dim] of a row with one weight [head_dim] (Qwen3's q and k
// norm), in place. Any head_dim; slices are contiguous: head h is columns [h * head_dim, (h+1) *
// head_dim).
absl::Status HeadRmsNorm(CpuBackend& cpu, Matrix x, int heads, int head_dim, const float* weight,
                         float eps);

// Mamba-2's gated norm: v = x * silu(gate), then RMSNorm of v over each of `groups` equal slices of
// the row. y may be x. (norm_before_gate = false in mamba_ssm's terms.)
absl::Status GatedRmsNorm(CpuBackend& cpu, ConstMatrix x, ConstMatrix gate, const float* weight,
                          float eps, int groups, Matrix y);

}  // namespace canopy

#endif  // CANOPY_CORE_OPS_NORM_H_
