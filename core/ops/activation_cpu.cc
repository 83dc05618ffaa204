#include <cmath>

#include "core/ops/activation.h"
#include "core/ops/parallel_rows.h"
#include "core/ops/simd.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/ops/activation_cpu.cc"
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

struct SiluFunction {
  static HWY_INLINE FloatVec Apply(FloatVec x) { return Silu(x); }
};

// x * Phi(x). The error function comes from the C library, lane by lane.
struct GeluFunction {
  static HWY_INLINE FloatVec Apply(FloatVec x) {
    const FloatTag d;
    alignas(64) float lanes[kFloatLanes];
    hn::Store(x, d, lanes);
    for (float& lane : lanes) {
      lane = static_cast<float>(0.5 * lane * std::erfc(-lane * 0.70710678118654752440));
    }
    return hn::Load(d, lanes);
  }
};

// 0.5 x (1 + tanh(u)) = x * sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3).
struct GeluTanhFunction {
  static HWY_INLINE FloatVec Apply(FloatVec x) {
    const FloatTag d;
    const FloatVec cube = hn::Mul(hn::Mul(x, x), x);
    const FloatVec inner = hn::MulAdd(hn::Set(d, 0.044715f), cube, x);
    return hn::Mul(x, Sigmoid(hn::Mul(hn::Set(d, 1.59576912160573071176f), inner)));
  }
};

struct ReluFunction {
  static HWY_INLINE FloatVec Apply(FloatVec x) { return hn::Max(x, hn::Zero(FloatTag())); }
};

struct Relu2Function {
  static HWY_INLINE FloatVec Apply(FloatVec x) {
    const FloatVec positive = hn::Max(x, hn::Zero(FloatTag()));
    return hn::Mul(positive, positive);
  }
};

template <class Function>
HWY_INLINE void GatedBlock(const float* gate, const float* up, float* y) {
  const FloatTag d;
  for (int i = 0; i < kBlockColumns; i += kFloatLanes) {
    const FloatVec activated = Function::Apply(hn::LoadU(d, gate + i));
    hn::StoreU(hn::Mul(activated, hn::LoadU(d, up + i)), d, y + i);
  }
}

template <class Function>
HWY_INLINE void GatedSlice(const float* gate, const float* up, int n, float* y) {
  int c = 0;
  for (; c + kBlockColumns <= n; c += kBlockColumns) {
    GatedBlock<Function>(gate + c, up + c, y + c);
  }
  if (c < n) {
    ColumnBlock gates, ups;
    gates.Load(gate + c, n - c);
    ups.Load(up + c, n - c);
    GatedBlock<Function>(gates.values, ups.values, gates.values);
    std::memcpy(y + c, gates.values, sizeof(float) * (n - c));
  }
}

void GatedActivationRow(Activation act, const float* gate, const float* up, int n, float* y) {
  switch (act) {
    case Activation::kSilu:
      return GatedSlice<SiluFunction>(gate, up, n, y);
    case Activation::kGelu:
      return GatedSlice<GeluFunction>(gate, up, n, y);
    case Activation::kGeluTanh:
      return GatedSlice<GeluTanhFunction>(gate, up, n, y);
    case Activation::kRelu:
      return GatedSlice<ReluFunction>(gate, up, n, y);
    case Activation::kRelu2:
      return GatedSlice<Relu2Function>(gate, up, n, y);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace canopy
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace canopy {
namespace {

HWY_EXPORT(GatedActivationRow);

struct Spelling {
  std::string_view name;
  Activation activation;
};
constexpr Spelling kSpellings[] = {
    {"silu", Activation::kSilu},
    {"swish", Activation::kSilu},
    {"gelu", Activation::kGelu},
    {"gelu_new", Activation::kGeluTanh},
    {"gelu_pytorch_tanh", Activation::kGeluTanh},
    {"relu", Activation::kRelu},
    {"relu2", Activation::kRelu2},
};

}  // namespace

absl::StatusOr<Activation> ParseActivation(std::string_view name) {
  std::string known;
  for (const Spelling& spelling : kSpellings) {
    if (spelling.name == name) return spelling.activation;
    absl::StrAppend(&known, known.empty() ? "" : ", ", std::string(spelling.name));
  }
  return absl::UnimplementedError(absl::StrCat("activation \"", std::string(name),
                                               "\" is not supported; expected one of ", known));
}

absl::Status GatedActivation(CpuBackend& cpu, Activation act, ConstMatrix gate_up, Matrix y) {
  if (gate_up.rows != y.rows || gate_up.columns != 2 * int64_t{y.columns}) {
    return absl::InvalidArgumentError(
        absl::StrCat("GatedActivation: gate_up [", gate_up.rows, ", ", gate_up.columns, "], y [",
                     y.rows, ", ", y.columns, "]; expected gate_up [rows, 2 n] and y [rows, n]"));
  }
  const auto apply = HWY_DYNAMIC_DISPATCH(GatedActivationRow);
  const int n = y.columns;
  // An exponential costs about as much as four plain elements.
  ParallelRows(cpu, y.rows, 4 * int64_t{y.rows} * n, [&](int begin, int end) {
    for (int r = begin; r < end; ++r) {
      const float* gate = gate_up.row(r);
      apply(act, gate, gate + n, n, y.row(r));
    }
  });
  return absl::OkStatus();
}

}  // namespace canopy
#endif  // HWY_ONCE
