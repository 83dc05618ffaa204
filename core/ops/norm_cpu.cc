#include <cmath>

#include "core/ops/norm.h"
#include "core/ops/parallel_rows.h"
#include "core/ops/simd.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/ops/norm_cpu.cc"
// The order of these matters.
// clang-format off
#include "hwy/foreach_target.h"
#include "core/ops/vector_math-inl.h"
#include "hwy/highway.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace canopy {
namespace HWY_NAMESPACE {
namespace {

// y[c] = weight[c] * (x[c] * scale) for one block.
HWY_INLINE void ScaleBlock(const float* x, const float* weight, float scale, float* y) {
  const FloatTag d;
  const FloatVec factor = hn::Set(d, scale);
  for (int i = 0; i < kBlockColumns; i += kFloatLanes) {
    const FloatVec normal = hn::Mul(hn::LoadU(d, x + i), factor);
    hn::StoreU(hn::Mul(hn::LoadU(d, weight + i), normal), d, y + i);
  }
}

// y may be x.
void RmsNormSlice(const float* x, const float* weight, float eps, int n, float* y) {
  const double mean = static_cast<double>(SumOfSquares(x, n)) / n;
  const float scale = static_cast<float>(1.0 / std::sqrt(mean + eps));
  int c = 0;
  for (; c + kBlockColumns <= n; c += kBlockColumns) ScaleBlock(x + c, weight + c, scale, y + c);
  if (c < n) {
    ColumnBlock values, weights;
    values.Load(x + c, n - c);
    weights.Load(weight + c, n - c);
    ScaleBlock(values.values, weights.values, scale, values.values);
    std::memcpy(y + c, values.values, sizeof(float) * (n - c));
  }
}

HWY_INLINE void GateBlock(const float* x, const float* gate, float* y) {
  const FloatTag d;
  for (int i = 0; i < kBlockColumns; i += kFloatLanes) {
    hn::StoreU(hn::Mul(hn::LoadU(d, x + i), Silu(hn::LoadU(d, gate + i))), d, y + i);
  }
}

// y[c] = x[c] * silu(gate[c]). y may be x.
void GateSlice(const float* x, const float* gate, int n, float* y) {
  int c = 0;
  for (; c + kBlockColumns <= n; c += kBlockColumns) GateBlock(x + c, gate + c, y + c);
  if (c < n) {
    ColumnBlock values, gates;
    values.Load(x + c, n - c);
    gates.Load(gate + c, n - c);
    GateBlock(values.values, gates.values, values.values);
    std::memcpy(y + c, values.values, sizeof(float) * (n - c));
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace canopy
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace canopy {
namespace {

HWY_EXPORT(RmsNormSlice);
HWY_EXPORT(GateSlice);

}  // namespace

absl::Status RmsNorm(CpuBackend& cpu, ConstMatrix x, const float* weight, float eps, Matrix y) {
  if (x.rows != y.rows || x.columns != y.columns) {
    return absl::InvalidArgumentError(absl::StrCat("RmsNorm: x [", x.rows, ", ", x.columns,
                                                   "], y [", y.rows, ", ", y.columns,
                                                   "]; expected equal shapes"));
  }
  const auto norm = HWY_DYNAMIC_DISPATCH(RmsNormSlice);
  ParallelRows(cpu, x.rows, int64_t{x.rows} * x.columns, [&](int begin, int end) {
    for (int r = begin; r < end; ++r) norm(x.row(r), weight, eps, x.columns, y.row(r));
  });
  return absl::OkStatus();
}

absl::Status HeadRmsNorm(CpuBackend& cpu, Matrix x, int heads, int head_dim, const float* weight,
                         float eps) {
  if (heads < 1 || head_dim < 1 || int64_t{heads} * head_dim > x.columns) {
    return absl::InvalidArgumentError(absl::StrCat(
        "HeadRmsNorm: ", heads, " heads of ", head_dim, " columns in x [", x.rows, ", ", x.columns,
        "]; expected at least one head and column, and heads * head_dim within x's columns"));
  }
  const auto norm = HWY_DYNAMIC_DISPATCH(RmsNormSlice);
  ParallelRows(cpu, x.rows, int64_t{x.rows} * heads * head_dim, [&](int begin, int end) {
    for (int r = begin; r < end; ++r) {
      for (int h = 0; h < heads; ++h) {
        float* head = x.row(r) + int64_t{h} * head_dim;
        norm(head, weight, eps, head_dim, head);
      }
    }
  });
  return absl::OkStatus();
}

absl::Status GatedRmsNorm(CpuBackend& cpu, ConstMatrix x, ConstMatrix gate, const float* weight,
                          float eps, int groups, Matrix y) {
  if (x.rows != y.rows || x.columns != y.columns || gate.rows != x.rows ||
      gate.columns != x.columns) {
    return absl::InvalidArgumentError(
        absl::StrCat("GatedRmsNorm: x [", x.rows, ", ", x.columns, "], gate [", gate.rows, ", ",
                     gate.columns, "], y [", y.rows, ", ", y.columns, "]; expected equal shapes"));
  }
  if (groups < 1 || x.columns % groups != 0) {
    return absl::InvalidArgumentError(absl::StrCat("GatedRmsNorm: ", groups, " groups of ",
                                                   x.columns,
                                                   " columns; expected a divisor of the columns"));
  }
  const auto norm = HWY_DYNAMIC_DISPATCH(RmsNormSlice);
  const auto apply_gate = HWY_DYNAMIC_DISPATCH(GateSlice);
  const int columns = x.columns / groups;
  // A gate costs an exponential: counted as four elements.
  ParallelRows(cpu, x.rows, 4 * int64_t{x.rows} * x.columns, [&](int begin, int end) {
    for (int r = begin; r < end; ++r) {
      apply_gate(x.row(r), gate.row(r), x.columns, y.row(r));
      for (int g = 0; g < groups; ++g) {
        float* slice = y.row(r) + int64_t{g} * columns;
        norm(slice, weight + int64_t{g} * columns, eps, columns, slice);
      }
    }
  });
  return absl::OkStatus();
}

}  // namespace canopy
#endif  // HWY_ONCE
