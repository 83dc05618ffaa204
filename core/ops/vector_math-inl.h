// Vector pieces that the element-wise operators share. Compiled once for each SIMD target.
//
// Rows are worked through in blocks of 16 columns, which are one vector of AVX-512, two of AVX2,
// four of NEON; a lane's value depends on its column's inputs alone. A last block of fewer columns
// is copied into a zeroed block, worked on, and copied back, so that its columns get the same bits
// as in a full block and nothing past them is read or written.

#if defined(CANOPY_CORE_OPS_VECTOR_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef CANOPY_CORE_OPS_VECTOR_MATH_INL_H_
#undef CANOPY_CORE_OPS_VECTOR_MATH_INL_H_
#else
#define CANOPY_CORE_OPS_VECTOR_MATH_INL_H_
#endif

#include <cstring>

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace canopy {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::CappedTag<float, 16>;
using FloatVec = hn::Vec<FloatTag>;
constexpr int kFloatLanes = static_cast<int>(hn::MaxLanes(FloatTag()));
constexpr int kBlockColumns = 16;

// Sixteen columns on the stack.
struct ColumnBlock {
  alignas(64) float values[kBlockColumns];

  // The first `count` columns of `from`, then zeros.
  HWY_INLINE void Load(const float* from, int count) {
    if (count < kBlockColumns) std::memset(values, 0, sizeof(values));
    std::memcpy(values, from, sizeof(float) * count);
  }
};

// 1 / (1 + exp(-x)), in a form that does not overflow. 1 for NaN.
HWY_INLINE FloatVec Sigmoid(FloatVec x) {
  const FloatTag d;
  const FloatVec one = hn::Set(d, 1.0f);
  const FloatVec magnitude = hn::Abs(x);
  // Beyond 104 the exponential rounds to zero; Highway's takes neither NaN nor numbers far beyond
  // it.
  const auto in_range = hn::Lt(magnitude, hn::Set(d, 104.0f));
  const FloatVec z =  // exp(-|x|), in [0, 1]
      hn::IfThenElseZero(in_range, hn::Exp(d, hn::Neg(hn::IfThenElseZero(in_range, magnitude))));
  const FloatVec numerator = hn::IfThenElse(hn::Lt(x, hn::Zero(d)), z, one);
  return hn::Div(numerator, hn::Add(one, z));
}

HWY_INLINE FloatVec Silu(FloatVec x) { return hn::Mul(x, Sigmoid(x)); }

// The sum of x[c]^2 over n columns: sixteen sums, column c in sum c % 16, added in a fixed tree at
// the end. The order depends on n alone.
HWY_INLINE float SumOfSquares(const float* x, int n) {
  const FloatTag d;
  constexpr int kVectors = kBlockColumns / kFloatLanes;
  FloatVec sums[kVectors];
  for (int v = 0; v < kVectors; ++v) sums[v] = hn::Zero(d);
  int c = 0;
  for (; c + kBlockColumns <= n; c += kBlockColumns) {
    for (int v = 0; v < kVectors; ++v) {
      const FloatVec value = hn::LoadU(d, x + c + v * kFloatLanes);
      sums[v] = hn::MulAdd(value, value, sums[v]);
    }
  }
  ColumnBlock block;
  if (c < n) {
    block.Load(x + c, n - c);
    for (int v = 0; v < kVectors; ++v) {
      const FloatVec value = hn::Load(d, block.values + v * kFloatLanes);
      sums[v] = hn::MulAdd(value, value, sums[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) hn::Store(sums[v], d, block.values + v * kFloatLanes);
  for (int width = kBlockColumns / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) block.values[i] += block.values[i + width];
  }
  return block.values[0];
}

}  // namespace HWY_NAMESPACE
}  // namespace canopy
HWY_AFTER_NAMESPACE();

#endif  // CANOPY_CORE_OPS_VECTOR_MATH_INL_H_
