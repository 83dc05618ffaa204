#include <cmath>

#include "core/ops/parallel_rows.h"
#include "core/ops/rope.h"

namespace canopy {
namespace {

// Frequencies whose sines are kept at a time: on the stack, so that no memory is asked for.
constexpr int kFrequencies = 64;

// Plain arithmetic, each product rounded before the sum: the same bits however it is compiled.
void Rotate(float* head, int half, int first, int count, const float* cosines, const float* sines) {
  float* low = head + first;
  float* high = head + half + first;
  for (int i = 0; i < count; ++i) {
    const float a = low[i];
    const float b = high[i];
    low[i] = a * cosines[i] - b * sines[i];
    high[i] = b * cosines[i] + a * sines[i];
  }
}

}  // namespace

std::vector<float> RopeInverseFrequencies(int rotary_dim, double theta,
                                          const Llama3RopeScaling* scaling, double linear_factor) {
  std::vector<float> inv_freq(rotary_dim / 2);
  for (int i = 0; i < rotary_dim / 2; ++i) {
    double frequency = std::pow(theta, -2.0 * i / rotary_dim);
    if (scaling != nullptr) {
      const double wavelength = 2.0 * M_PI / frequency;
      const double low_freq_wavelength = scaling->original_max_positions / scaling->low_freq_factor;
      const double high_freq_wavelength =
          scaling->original_max_positions / scaling->high_freq_factor;
      if (wavelength > low_freq_wavelength) {
        frequency /= scaling->factor;
      } else if (wavelength >= high_freq_wavelength) {
        const double smooth =
            (scaling->original_max_positions / wavelength - scaling->low_freq_factor) /
            (scaling->high_freq_factor - scaling->low_freq_factor);
        frequency = (1.0 - smooth) * frequency / scaling->factor + smooth * frequency;
      }
    }
    inv_freq[i] = static_cast<float>(frequency / linear_factor);
  }
  return inv_freq;
}

absl::Status ApplyRope(CpuBackend& cpu, Matrix x, int heads, int head_dim,
                       std::span<const float> inv_freq, std::span<const int32_t> positions) {
  const int half = static_cast<int>(inv_freq.size());
  if (heads < 1 || 2 * int64_t{half} > head_dim || int64_t{heads} * head_dim > x.columns) {
    return absl::InvalidArgumentError(
        absl::StrCat("ApplyRope: ", heads, " heads of ", head_dim, " columns, ", half,
                     " frequencies, x [", x.rows, ", ", x.columns,
                     "]; expected 2 * frequencies within a head and all heads within x's columns"));
  }
  if (positions.size() != static_cast<size_t>(x.rows)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "ApplyRope: ", positions.size(), " positions for ", x.rows, " rows; expected one a row"));
  }
  // A sine and a cosine cost about 32 plain elements, once for all heads.
  ParallelRows(cpu, x.rows, x.rows * (int64_t{heads} * head_dim + 32 * int64_t{half}),
               [&](int begin, int end) {
                 for (int r = begin; r < end; ++r) {
                   const float position = static_cast<float>(positions[r]);
                   for (int first = 0; first < half; first += kFrequencies) {
                     const int count = std::min(kFrequencies, half - first);
                     float cosines[kFrequencies], sines[kFrequencies];
                     for (int i = 0; i < count; ++i) {
                       const float angle = position * inv_freq[first + i];
                       cosines[i] = std::cos(angle);
                       sines[i] = std::sin(angle);
                     }
                     for (int h = 0; h < heads; ++h) {
                       Rotate(x.row(r) + int64_t{h} * head_dim, half, first, count, cosines, sines);
                     }
                   }
                 }
               });
  return absl::OkStatus();
}

}  // namespace canopy
