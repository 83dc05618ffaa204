#include "core/ops/matmul.h"

#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/ops/simd.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "hwy/targets.h"
#include "tests/support/matrices.h"

namespace canopy {
namespace {

using testing::HasSubstr;

// [out_features, in_features]: a single element, odd sizes below and above a panel, panels less one
// and plus one, and sizes of real models.
const std::pair<int, int> kShapes[] = {{1, 1},   {5, 3},    {31, 17},  {32, 64},   {33, 65},
                                       {97, 40}, {160, 33}, {352, 96}, {420, 384}, {40, 1000}};
const int kRowCounts[] = {1, 2, 3, 5, 8, 16, 17, 33, 64};

// A sum of K products in f32, in any order, fused or not, is off by at most (K + 1) * 2^-24 * sum
// |x w| to first order (Higham, Accuracy and Stability, 3.1); the epilogue adds two roundings.
double ErrorBound(const float* x, const double* w, int k, double epilogue) {
  double magnitude = std::fabs(epilogue);
  for (int i = 0; i < k; ++i) magnitude += std::fabs(x[i] * w[i]);
  return (k + 4) * 0x1p-24 * magnitude * 1.01;
}

class MatMulTest : public testing::TestWithParam<std::tuple<DType, int64_t>> {
 protected:
  void SetUp() override { UseSimdTarget(std::get<1>(GetParam())); }
  void TearDown() override { UseSimdTarget(0); }
  DType dtype() const { return std::get<0>(GetParam()); }
};

TEST_P(MatMulTest, AgreesWithDoubleSums) {
  const auto cpu = *CpuBackend::Create(2);
  TestRandom random(1);
  for (const auto& [n, k] : kShapes) {
    const TestWeights weights = RandomWeights(*cpu, dtype(), n, k, random);
    for (int rows : kRowCounts) {
      const Tensor x = RandomTensor(*cpu, rows, k, random);
      const Tensor y = RandomTensor(*cpu, rows, n, random);
      ASSERT_TRUE(MatMul(*cpu, x.view(), weights.packed, y.view()).ok());
      for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < n; ++c) {
          const float* row = x.view().row(r);
          const double* w = &weights.values[static_cast<size_t>(c) * k];
          double expected = 0.0;
          for (int i = 0; i < k; ++i) expected += row[i] * w[i];
          ASSERT_NEAR(y.view().row(r)[c], expected, ErrorBound(row, w, k, 0.0))
              << "[" << n << ", " << k << "], rows " << rows << ", at " << r << ", " << c;
        }
      }
    }
  }
}

// Exactly the chain of fused multiply-adds that the header promises, where the target fuses.
TEST_P(MatMulTest, IsOneChainOfFusedMultiplyAdds) {
  const int64_t target = std::get<1>(GetParam());
  if (target == HWY_SCALAR || target == HWY_EMU128 || target == HWY_STATIC_TARGET) {
    GTEST_SKIP() << "this SIMD target has no fused multiply-add";
  }
  const auto cpu = *CpuBackend::Create(2);
  TestRandom random(2);
  for (const auto& [n, k] : kShapes) {
    const TestWeights weights = RandomWeights(*cpu, dtype(), n, k, random);
    const Tensor x = RandomTensor(*cpu, 9, k, random);
    const Tensor y = RandomTensor(*cpu, 9, n, random);
    ASSERT_TRUE(MatMul(*cpu, x.view(), weights.packed, y.view()).ok());
    for (int r = 0; r < 9; ++r) {
      for (int c = 0; c < n; ++c) {
        float sum = 0.0f;
        for (int i = 0; i < k; ++i) {
          sum = std::fma(static_cast<float>(weights.values[static_cast<size_t>(c) * k + i]),
                         x.view().row(r)[i], sum);
        }
        ASSERT_EQ(y.view().row(r)[c], sum) << "[" << n << ", " << k << "] at " << r << ", " << c;
      }
    }
  }
}

TEST_P(MatMulTest, ARowDoesNotDependOnRowsOrThreads) {
  const auto one = *CpuBackend::Create(1);
  TestRandom random(3);
  for (const auto& [n, k] : kShapes) {
    const TestWeights weights = RandomWeights(*one, dtype(), n, k, random);
    std::vector<float> bias(n);
    for (float& b : bias) b = random.Uniform();
    const Tensor x = RandomTensor(*one, 64, k, random);
    const Tensor start = RandomTensor(*one, 64, n, random);
    for (const bool plain : {true, false}) {
      const MatMulOptions options{plain ? nullptr : bias.data(), !plain};
      const Tensor single = RandomTensor(*one, 64, n, random);
      for (int r = 0; r < 64; ++r) {
        std::memcpy(single.view().row(r), start.view().row(r), sizeof(float) * n);
        ASSERT_TRUE(
            MatMul(*one, x.view().Rows(r, 1), weights.packed, single.view().Rows(r, 1), options)
                .ok());
      }
      for (int threads : {1, 2, 3, 5}) {
        const auto cpu = *CpuBackend::Create(threads);
        for (int rows : kRowCounts) {
          const Tensor y = RandomTensor(*one, rows, n, random);
          for (int r = 0; r < rows; ++r) {
            std::memcpy(y.view().row(r), start.view().row(r), sizeof(float) * n);
          }
          ASSERT_TRUE(MatMul(*cpu, x.Rows(rows), weights.packed, y.view(), options).ok());
          for (int r = 0; r < rows; ++r) {
            ASSERT_EQ(std::memcmp(y.view().row(r), single.view().row(r), sizeof(float) * n), 0)
                << "[" << n << ", " << k << "], row " << r << " of " << rows << ", " << threads
                << " threads" << (plain ? "" : ", with bias and accumulate");
          }
        }
      }
    }
  }
}

TEST_P(MatMulTest, BiasAndAccumulate) {
  const auto cpu = *CpuBackend::Create(2);
  TestRandom random(4);
  for (const auto& [n, k] : kShapes) {
    const TestWeights weights = RandomWeights(*cpu, dtype(), n, k, random);
    std::vector<float> bias(n);
    for (float& b : bias) b = random.Uniform();
    const Tensor x = RandomTensor(*cpu, 7, k, random);
    for (const bool with_bias : {false, true}) {
      for (const bool accumulate : {false, true}) {
        const Tensor y = RandomTensor(*cpu, 7, n, random);
        const std::vector<float> before(y.view().data, y.view().row(7));
        ASSERT_TRUE(MatMul(*cpu, x.view(), weights.packed, y.view(),
                           {with_bias ? bias.data() : nullptr, accumulate})
                        .ok());
        for (int r = 0; r < 7; ++r) {
          for (int c = 0; c < n; ++c) {
            const float* row = x.view().row(r);
            const double* w = &weights.values[static_cast<size_t>(c) * k];
            const double added =
                (with_bias ? bias[c] : 0.0) + (accumulate ? before[r * y.view().stride + c] : 0.0);
            double expected = added;
            for (int i = 0; i < k; ++i) expected += row[i] * w[i];
            ASSERT_NEAR(y.view().row(r)[c], expected, ErrorBound(row, w, k, 2.0 + added))
                << "[" << n << ", " << k << "] at " << r << ", " << c;
          }
        }
      }
    }
  }
}

TEST_P(MatMulTest, ReferenceAgreesWithDoubleSums) {
  const auto cpu = *CpuBackend::Create(1);
  TestRandom random(5);
  const TestWeights weights = RandomWeights(*cpu, dtype(), 37, 50, random);
  const Tensor x = RandomTensor(*cpu, 3, 50, random);
  const Tensor y = RandomTensor(*cpu, 3, 37, random);
  MatMulReference(x.view(), weights.packed, y.view());
  for (int r = 0; r < 3; ++r) {
    for (int c = 0; c < 37; ++c) {
      double expected = 0.0;
      for (int i = 0; i < 50; ++i) expected += x.view().row(r)[i] * weights.values[c * 50 + i];
      EXPECT_FLOAT_EQ(y.view().row(r)[c], static_cast<float>(expected));
    }
  }
}

// A product reads and writes nothing outside its matrices, also in views of wider ones.
TEST_P(MatMulTest, StaysInsideItsColumns) {
  const auto cpu = *CpuBackend::Create(2);
  TestRandom random(6);
  const int n = 41, k = 23;
  const TestWeights weights = RandomWeights(*cpu, dtype(), n, k, random);
  for (int rows : kRowCounts) {
    // x is exactly as long as its last row is, so that a read beyond it is one that asan sees.
    const int stride = PaddedColumns(k);
    std::vector<float> values((rows - 1) * stride + k, 0.5f);
    const ConstMatrix x{values.data(), rows, k, stride};
    const Tensor wide = RandomTensor(*cpu, rows, 100, random);
    for (int r = 0; r < rows; ++r) std::fill_n(wide.view().row(r), 100, 7.0f);
    ASSERT_TRUE(MatMul(*cpu, x, weights.packed, wide.view().Columns(16, n)).ok());
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < 16; ++c) ASSERT_EQ(wide.view().row(r)[c], 7.0f);
      for (int c = 16 + n; c < 100; ++c) ASSERT_EQ(wide.view().row(r)[c], 7.0f);
    }
  }
}

std::vector<std::tuple<DType, int64_t>> Cases() {
  std::vector<std::tuple<DType, int64_t>> cases;
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (int64_t target : RunnableSimdTargets()) cases.emplace_back(dtype, target);
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(DTypesAndTargets, MatMulTest, testing::ValuesIn(Cases()),
                         [](const auto& info) {
                           return std::string(Name(std::get<0>(info.param))) + "_" +
                                  hwy::TargetName(std::get<1>(info.param));
                         });

// Targets with fused multiply-add agree to the bit.
TEST(MatMulTargetsTest, FusingTargetsAgree) {
  const auto cpu = *CpuBackend::Create(2);
  TestRandom random(7);
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    const TestWeights weights = RandomWeights(*cpu, dtype, 97, 200, random);
    const Tensor x = RandomTensor(*cpu, 11, 200, random);
    std::vector<float> first;
    for (int64_t target : RunnableSimdTargets()) {
      if (target == HWY_STATIC_TARGET) continue;
      UseSimdTarget(target);
      const Tensor y = *Tensor::Allocate(*cpu, 11, 97);
      ASSERT_TRUE(MatMul(*cpu, x.view(), weights.packed, y.view()).ok());
      const std::vector<float> result(y.view().data, y.view().row(11));
      if (first.empty()) first = result;
      EXPECT_EQ(result, first) << hwy::TargetName(target);
    }
    UseSimdTarget(0);
  }
}

TEST(MatMulErrorsTest, DimensionsMustAgree) {
  const auto cpu = *CpuBackend::Create(1);
  TestRandom random(8);
  const TestWeights weights = RandomWeights(*cpu, DType::kF32, 8, 4, random);
  const Tensor x = RandomTensor(*cpu, 2, 4, random);
  const Tensor y = RandomTensor(*cpu, 2, 8, random);
  EXPECT_TRUE(MatMul(*cpu, x.view(), weights.packed, y.view()).ok());
  EXPECT_TRUE(MatMul(*cpu, x.Rows(0), weights.packed, y.Rows(0)).ok());
  for (const absl::Status& status : {MatMul(*cpu, x.Rows(1), weights.packed, y.view()),
                                     MatMul(*cpu, x.view().Columns(0, 3), weights.packed, y.view()),
                                     MatMul(*cpu, x.view(), weights.packed, y.view().Columns(0, 7)),
                                     MatMul(*cpu, x.view(), PackedMatrix(), y.view())}) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr("MatMul: x ["));
  }
}

}  // namespace
}  // namespace canopy
