// Rotary position embedding (arXiv 2104.09864), half-split ("rotate_half") form as in transformers.

#ifndef CANOPY_CORE_OPS_ROPE_H_
#define CANOPY_CORE_OPS_ROPE_H_

#include <cstdint>
#include <span>
#include <vector>

#include "core/cpu_backend.h"
#include "core/status.h"
#include "core/tensor.h"

namespace canopy {

// rope_scaling of type "llama3" (Llama-3.1): wavelengths are stretched smoothly between the bounds.
struct Llama3RopeScaling {
  double factor = 8.0;
  double low_freq_factor = 1.0;
  double high_freq_factor = 4.0;
  double original_max_positions = 8192;
};

// inv_freq [rotary_dim / 2]: theta^(-2i / rotary_dim), scaled where `scaling` is not null, and
// divided by linear_factor (rope type "linear"; 1 otherwise).
std::vector<float> RopeInverseFrequencies(int rotary_dim, double theta,
                                          const Llama3RopeScaling* scaling,
                                          double linear_factor = 1.0);

// Rotates the first 2 * inv_freq.size() columns of each head of x [rows, heads * head_dim] in
// place; row r is at absolute position positions[r]. Angles are position * inv_freq in f32, as
// transformers has them; the rotation depends on position and values alone.
absl::Status ApplyRope(CpuBackend& cpu, Matrix x, int heads, int head_dim,
                       std::span<const float> inv_freq, std::span<const int32_t> positions);

}  // namespace canopy

#endif  // CANOPY_CORE_OPS_ROPE_H_
