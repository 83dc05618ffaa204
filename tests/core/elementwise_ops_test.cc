// Norms, activations and RoPE against the formulas in double, and their independence of rows,
// threads and of where in a vector a column lies.

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "core/ops/activation.h"
#include "core/ops/norm.h"
#include "core/ops/rope.h"
#include "core/ops/simd.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "hwy/targets.h"
#include "tests/support/matrices.h"

namespace canopy {
namespace {

using testing::HasSubstr;

constexpr int kWidths[] = {1, 5, 15, 16, 17, 31, 64, 100, 384, 1001};
constexpr double kHalfUlp = 0x1p-24;  // relative error of one rounding to f32

std::vector<float> RandomVector(int n, TestRandom& random) {
  std::vector<float> values(n);
  for (float& value : values) value = random.Uniform();
  return values;
}

// Numbers up to 8 in magnitude, where sigmoids go from 0 to 1.
void Scale(const Tensor& x, float factor) {
  for (int r = 0; r < x.view().rows; ++r) {
    for (int c = 0; c < x.view().columns; ++c) x.view().row(r)[c] *= factor;
  }
}

Tensor Copy(Backend& backend, ConstMatrix x) {
  Tensor copy = *Tensor::Allocate(backend, x.rows, x.columns);
  for (int r = 0; r < x.rows; ++r) {
    std::memcpy(copy.view().row(r), x.row(r), sizeof(float) * x.columns);
  }
  return copy;
}

void ExpectSameBits(ConstMatrix a, ConstMatrix b) {
  ASSERT_EQ(a.rows, b.rows);
  ASSERT_EQ(a.columns, b.columns);
  for (int r = 0; r < a.rows; ++r) {
    ASSERT_EQ(std::memcmp(a.row(r), b.row(r), sizeof(float) * a.columns), 0) << "row " << r;
  }
}

double SiluOf(double x) { return x / (1.0 + std::exp(-x)); }

class ElementwiseOpsTest : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override { UseSimdTarget(GetParam()); }
  void TearDown() override { UseSimdTarget(0); }
};

// A sum of n squares in sixteen chains has at most n / 16 + 5 roundings, halved by the root; then
// three more for the factor and two products.
double NormTolerance(int n) { return (n / 16 + 5) / 2.0 * kHalfUlp + 4 * kHalfUlp; }

TEST_P(ElementwiseOpsTest, RmsNorm) {
  const auto cpu = *CpuBackend::Create(2);
  TestRandom random(1);
  for (int n : kWidths) {
    const Tensor x = RandomTensor(*cpu, 40, n, random);
    const std::vector<float> weight = RandomVector(n, random);
    const Tensor y = RandomTensor(*cpu, 40, n, random);
    ASSERT_TRUE(RmsNorm(*cpu, x.view(), weight.data(), 1e-5f, y.view()).ok());
    for (int r = 0; r < 40; ++r) {
      double squares = 0.0;
      for (int c = 0; c < n; ++c) squares += double{x.view().row(r)[c]} * x.view().row(r)[c];
      const double scale = 1.0 / std::sqrt(squares / n + 1e-5f);
      for (int c = 0; c < n; ++c) {
        const double expected = weight[c] * x.view().row(r)[c] * scale;
        ASSERT_NEAR(y.view().row(r)[c], expected, std::fabs(expected) * NormTolerance(n))
            << n << " columns, at " << r << ", " << c;
      }
    }
    // Row by row, in place, on one thread: the same bits.
    const auto one = *CpuBackend::Create(1);
    const Tensor in_place = Copy(*cpu, x.view());
    for (int r = 0; r < 40; ++r) {
      const Matrix row = in_place.view().Rows(r, 1);
      ASSERT_TRUE(RmsNorm(*one, row, weight.data(), 1e-5f, row).ok());
    }
    ExpectSameBits(in_place.view(), y.view());
  }
}

TEST_P(ElementwiseOpsTest, HeadRmsNormIsRmsNormOfEachHead) {
  const auto cpu = *CpuBackend::Create(2);
  TestRandom random(2);
  for (int head_dim : {1, 8, 16, 20, 33, 64}) {
    const int heads = 5, extra = 3;
    const Tensor x = RandomTensor(*cpu, 30, heads * head_dim + extra, random);
    const std::vector<float> weight = RandomVector(head_dim, random);
    const Tensor y = Copy(*cpu, x.view());
    ASSERT_TRUE(HeadRmsNorm(*cpu, y.view(), heads, head_dim, weight.data(), 1e-6f).ok());
    const Tensor slice = *Tensor::Allocate(*cpu, 1, head_dim);
    for (int r = 0; r < 30; ++r) {
      for (int h = 0; h < heads; ++h) {
        std::memcpy(slice.view().data, x.view().row(r) + h * head_dim, sizeof(float) * head_dim);
        ASSERT_TRUE(RmsNorm(*cpu, slice.view(), weight.data(), 1e-6f, slice.view()).ok());
        ASSERT_EQ(std::memcmp(slice.view().data, y.view().row(r) + h * head_dim,
                              sizeof(float) * head_dim),
                  0)
            << "head_dim " << head_dim << " at " << r << ", " << h;
      }
      for (int c = heads * head_dim; c < x.view().columns; ++c) {
        ASSERT_EQ(y.view().row(r)[c], x.view().row(r)[c]);
      }
    }
  }
}

TEST_P(ElementwiseOpsTest, GatedRmsNorm) {
  const auto cpu = *CpuBackend::Create(2);
  TestRandom random(3);
  struct Shape {
    int columns, groups;
  };
  for (const Shape& shape : {Shape{16, 1}, {21, 3}, {64, 2}, {100, 5}, {768, 1}, {768, 8}}) {
    const int n = shape.columns / shape.groups;
    const Tensor x = RandomTensor(*cpu, 20, shape.columns, random);
    const Tensor gate = RandomTensor(*cpu, 20, shape.columns, random);
    Scale(gate, 8.0f);
    const std::vector<float> weight = RandomVector(shape.columns, random);
    const Tensor y = RandomTensor(*cpu, 20, shape.columns, random);
    ASSERT_TRUE(
        GatedRmsNorm(*cpu, x.view(), gate.view(), weight.data(), 1e-5f, shape.groups, y.view())
            .ok());
    for (int r = 0; r < 20; ++r) {
      for (int g = 0; g < shape.groups; ++g) {
        std::vector<double> v(n);
        double squares = 0.0;
        for (int c = 0; c < n; ++c) {
          v[c] = x.view().row(r)[g * n + c] * SiluOf(gate.view().row(r)[g * n + c]);
          squares += v[c] * v[c];
        }
        const double scale = 1.0 / std::sqrt(squares / n + 1e-5f);
        for (int c = 0; c < n; ++c) {
          const double expected = weight[g * n + c] * v[c] * scale;
          // The gate's exponential is good to 1 ulp (Highway); quotient and products round thrice
          // more, for the value itself and within the mean.
          ASSERT_NEAR(y.view().row(r)[g * n + c], expected,
                      std::fabs(expected) * (NormTolerance(n) + 12 * kHalfUlp))
              << shape.columns << "/" << shape.groups << " at " << r << ", " << g * n + c;
        }
      }
    }
    const auto one = *CpuBackend::Create(1);
    const Tensor in_place = Copy(*cpu, x.view());
    for (int r = 0; r < 20; ++r) {
      const Matrix row = in_place.view().Rows(r, 1);
      ASSERT_TRUE(
          GatedRmsNorm(*one, row, gate.view().Rows(r, 1), weight.data(), 1e-5f, shape.groups, row)
              .ok());
    }
    ExpectSameBits(in_place.view(), y.view());
  }
}

double Reference(Activation act, double x) {
  switch (act) {
    case Activation::kSilu:
      return SiluOf(x);
    case Activation::kGelu:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case Activation::kGeluTanh:
      return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::kRelu:
      return x > 0.0 ? x : 0.0;
    case Activation::kRelu2:
      return x > 0.0 ? x * x : 0.0;
  }
  return NAN;
}

TEST_P(ElementwiseOpsTest, GatedActivation) {
  const auto cpu = *CpuBackend::Create(2);
  TestRandom random(4);
  for (Activation act : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh,
                         Activation::kRelu, Activation::kRelu2}) {
    for (int n : kWidths) {
      const Tensor gate_up = RandomTensor(*cpu, 19, 2 * n, random);
      Scale(gate_up, 8.0f);
      const Tensor y = RandomTensor(*cpu, 19, n, random);
      ASSERT_TRUE(GatedActivation(*cpu, act, gate_up.view(), y.view()).ok());
      for (int r = 0; r < 19; ++r) {
        for (int c = 0; c < n; ++c) {
          const double x = gate_up.view().row(r)[c];
          const double up = gate_up.view().row(r)[n + c];
          const double expected = Reference(act, x) * up;
          // Exponential 1 ulp, sum, quotient and two products half each; for tanh's argument u, of
          // up to a few tens here, its roundings times |u| where the result is near 0: relative to
          // |x up|.
          const double tolerance = act == Activation::kGeluTanh
                                       ? 16 * kHalfUlp * std::fabs(x * up)
                                       : 8 * kHalfUlp * std::fabs(expected) + 1e-37;
          ASSERT_NEAR(y.view().row(r)[c], expected, tolerance)
              << "activation " << static_cast<int>(act) << " of " << x << ", " << n << " columns";
        }
      }
    }
  }
}

// A column's value does not depend on its place in a vector, nor on the row count.
TEST_P(ElementwiseOpsTest, GatedActivationDependsOnItsInputsAlone) {
  const auto cpu = *CpuBackend::Create(3);
  const auto one = *CpuBackend::Create(1);
  TestRandom random(5);
  const int n = 333;
  const Tensor gate_up = RandomTensor(*cpu, 64, 2 * n, random);
  Scale(gate_up, 20.0f);
  const Tensor pair = *Tensor::Allocate(*cpu, 1, 2);
  const Tensor single = *Tensor::Allocate(*cpu, 1, 1);
  for (Activation act : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh,
                         Activation::kRelu, Activation::kRelu2}) {
    const Tensor y = *Tensor::Allocate(*cpu, 64, n);
    ASSERT_TRUE(GatedActivation(*cpu, act, gate_up.view(), y.view()).ok());
    for (int r = 0; r < 64; r += 21) {
      for (int c = 0; c < n; ++c) {
        pair.view().data[0] = gate_up.view().row(r)[c];
        pair.view().data[1] = gate_up.view().row(r)[n + c];
        ASSERT_TRUE(GatedActivation(*one, act, pair.view(), single.view()).ok());
        ASSERT_EQ(single.view().data[0], y.view().row(r)[c]) << "at " << r << ", " << c;
      }
    }
  }
}

TEST_P(ElementwiseOpsTest, ActivationsOfExtremeNumbers) {
  const auto cpu = *CpuBackend::Create(1);
  const float values[] = {0.0f, -0.0f, 100.0f, -100.0f, 3e38f, -3e38f, INFINITY, 1e-40f};
  const Tensor gate_up = *Tensor::Allocate(*cpu, 1, 16);
  for (int i = 0; i < 8; ++i) {
    gate_up.view().data[i] = values[i];
    gate_up.view().data[8 + i] = 1.0f;
  }
  const Tensor y = *Tensor::Allocate(*cpu, 1, 8);
  for (Activation act : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh}) {
    ASSERT_TRUE(GatedActivation(*cpu, act, gate_up.view(), y.view()).ok());
    const float* result = y.view().data;
    EXPECT_EQ(result[0], 0.0f);
    EXPECT_EQ(result[1], 0.0f);
    EXPECT_EQ(result[2], 100.0f);
    EXPECT_NEAR(result[3], 0.0f, 1e-35f);
    EXPECT_EQ(result[4], 3e38f);
    EXPECT_NEAR(result[5], 0.0f, 1e-35f);
    EXPECT_EQ(result[6], INFINITY);
    EXPECT_NEAR(result[7], 0.5e-40, 1e-44);
  }
  for (float& value : std::span<float>(gate_up.view().data, 8)) value = NAN;
  for (Activation act : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh}) {
    ASSERT_TRUE(GatedActivation(*cpu, act, gate_up.view(), y.view()).ok());
    EXPECT_TRUE(std::isnan(y.view().data[0]));
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, ElementwiseOpsTest, testing::ValuesIn(RunnableSimdTargets()),
                         [](const auto& info) { return hwy::TargetName(info.param); });

TEST(ActivationTest, Spellings) {
  EXPECT_EQ(*ParseActivation("silu"), Activation::kSilu);
  EXPECT_EQ(*ParseActivation("swish"), Activation::kSilu);
  EXPECT_EQ(*ParseActivation("gelu"), Activation::kGelu);
  EXPECT_EQ(*ParseActivation("gelu_new"), Activation::kGeluTanh);
  EXPECT_EQ(*ParseActivation("gelu_pytorch_tanh"), Activation::kGeluTanh);
  EXPECT_EQ(*ParseActivation("relu"), Activation::kRelu);
  EXPECT_EQ(*ParseActivation("relu2"), Activation::kRelu2);
  const absl::Status status = ParseActivation("mish").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(status.message()), HasSubstr("\"mish\""));
  EXPECT_THAT(std::string(status.message()), HasSubstr("gelu_new"));
}

TEST(ElementwiseErrorsTest, ShapesMustAgree) {
  const auto cpu = *CpuBackend::Create(1);
  const Tensor x = *Tensor::Allocate(*cpu, 2, 6);
  const Tensor y = *Tensor::Allocate(*cpu, 2, 3);
  const std::vector<float> weight(6, 1.0f);
  const std::vector<float> inv_freq(2, 1.0f);
  const std::vector<int32_t> positions(2, 0);
  EXPECT_TRUE(GatedActivation(*cpu, Activation::kSilu, x.view(), y.view()).ok());
  EXPECT_TRUE(ApplyRope(*cpu, x.view(), 1, 6, inv_freq, positions).ok());
  const absl::Status failures[] = {
      RmsNorm(*cpu, x.view(), weight.data(), 1e-5f, y.view()),
      RmsNorm(*cpu, x.Rows(1), weight.data(), 1e-5f, x.view()),
      HeadRmsNorm(*cpu, x.view(), 4, 2, weight.data(), 1e-5f),
      HeadRmsNorm(*cpu, x.view(), 0, 2, weight.data(), 1e-5f),
      GatedRmsNorm(*cpu, x.view(), y.view(), weight.data(), 1e-5f, 1, x.view()),
      GatedRmsNorm(*cpu, x.view(), x.view(), weight.data(), 1e-5f, 4, x.view()),
      GatedRmsNorm(*cpu, x.view(), x.view(), weight.data(), 1e-5f, 0, x.view()),
      GatedActivation(*cpu, Activation::kSilu, y.view(), x.view()),
      GatedActivation(*cpu, Activation::kSilu, x.Rows(1), y.view()),
      ApplyRope(*cpu, x.view(), 2, 3, inv_freq, positions),
      ApplyRope(*cpu, x.view(), 2, 4, inv_freq, positions),
      ApplyRope(*cpu, x.view(), 1, 6, inv_freq, std::span(positions).first(1)),
  };
  for (const absl::Status& status : failures) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("expected"));
  }
}

TEST(RopeTest, InverseFrequencies) {
  const std::vector<float> plain = RopeInverseFrequencies(8, 10000.0, nullptr);
  const std::vector<float> expected = {1.0f, 0.1f, 0.01f, 0.001f};
  ASSERT_EQ(plain.size(), 4u);
  for (int i = 0; i < 4; ++i) EXPECT_FLOAT_EQ(plain[i], expected[i]);
  const std::vector<float> stretched = RopeInverseFrequencies(8, 10000.0, nullptr, 4.0);
  for (int i = 0; i < 4; ++i) EXPECT_FLOAT_EQ(stretched[i], expected[i] / 4);
  EXPECT_EQ(RopeInverseFrequencies(6, 10000.0, nullptr).size(), 3u);
}

// Llama-3.1's own numbers (factor 8, 1 to 4, 8192): short waves stay, long ones are stretched by
// the factor, those between are mixed.
TEST(RopeTest, Llama3Scaling) {
  const Llama3RopeScaling scaling;
  const std::vector<float> plain = RopeInverseFrequencies(128, 500000.0, nullptr);
  const std::vector<float> scaled = RopeInverseFrequencies(128, 500000.0, &scaling);
  int mixed = 0;
  for (int i = 0; i < 64; ++i) {
    const double wavelength = 2 * M_PI / plain[i];
    if (wavelength < 8192.0 / 4) {
      EXPECT_EQ(scaled[i], plain[i]);
    } else if (wavelength > 8192.0) {
      EXPECT_FLOAT_EQ(scaled[i], plain[i] / 8);
    } else {
      ++mixed;
      const double smooth = (8192.0 / wavelength - 1.0) / (4.0 - 1.0);
      EXPECT_NEAR(scaled[i], plain[i] * ((1 - smooth) / 8 + smooth), 1e-6 * plain[i]);
    }
  }
  EXPECT_GT(mixed, 3);
}

// Partial rotary dimensions, a head's rest left alone, many frequencies, far positions.
TEST(RopeTest, RotatesEachPair) {
  const auto cpu = *CpuBackend::Create(2);
  TestRandom random(6);
  struct Shape {
    int heads, head_dim, rotary;
  };
  for (const Shape& shape : {Shape{1, 2, 2}, {3, 10, 6}, {4, 64, 64}, {2, 80, 32}, {2, 300, 280}}) {
    const int half = shape.rotary / 2;
    const std::vector<float> inv_freq = RopeInverseFrequencies(shape.rotary, 10000.0, nullptr);
    std::vector<int32_t> positions(50);
    for (int r = 0; r < 50; ++r) positions[r] = r * r * 50;
    const Tensor x = RandomTensor(*cpu, 50, shape.heads * shape.head_dim, random);
    const Tensor y = Copy(*cpu, x.view());
    ASSERT_TRUE(ApplyRope(*cpu, y.view(), shape.heads, shape.head_dim, inv_freq, positions).ok());
    for (int r = 0; r < 50; ++r) {
      for (int h = 0; h < shape.heads; ++h) {
        const float* before = x.view().row(r) + h * shape.head_dim;
        const float* after = y.view().row(r) + h * shape.head_dim;
        for (int i = 0; i < half; ++i) {
          // The angle is rounded to f32, as in transformers; what follows is compared in double.
          const double angle = static_cast<float>(positions[r]) * inv_freq[i];
          const double a = before[i], b = before[half + i];
          ASSERT_NEAR(after[i], a * std::cos(angle) - b * std::sin(angle), 4e-7);
          ASSERT_NEAR(after[half + i], b * std::cos(angle) + a * std::sin(angle), 4e-7);
        }
        for (int i = shape.rotary; i < shape.head_dim; ++i) ASSERT_EQ(after[i], before[i]);
      }
    }
    const auto one = *CpuBackend::Create(1);
    const Tensor single = Copy(*cpu, x.view());
    for (int r = 49; r >= 0; --r) {
      ASSERT_TRUE(ApplyRope(*one, single.view().Rows(r, 1), shape.heads, shape.head_dim, inv_freq,
                            std::span(positions).subspan(r, 1))
                      .ok());
    }
    ExpectSameBits(single.view(), y.view());
  }
}

}  // namespace
}  // namespace canopy
