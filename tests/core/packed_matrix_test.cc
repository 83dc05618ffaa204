#include "core/ops/packed_matrix.h"

#include <bit>
#include <climits>
#include <cstring>
#include <string>
#include <vector>

#include "core/cpu_backend.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/matrices.h"

namespace canopy {
namespace {

using testing::HasSubstr;

TEST(PackedMatrixTest, UnpackRowGivesTheRowsBack) {
  const auto cpu = *CpuBackend::Create(1);
  TestRandom random(1);
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (int out : {1, 31, 32, 33, 100}) {
      for (int in : {1, 7, 128, 300}) {
        const TestWeights weights = RandomWeights(*cpu, dtype, out, in, random);
        EXPECT_EQ(weights.packed.out_features(), out);
        EXPECT_EQ(weights.packed.in_features(), in);
        EXPECT_EQ(weights.packed.dtype(), dtype);
        EXPECT_EQ(weights.packed.panels(), (out + 31) / 32);
        EXPECT_EQ(weights.packed.bytes(),
                  static_cast<size_t>((out + 31) / 32) * 32 * in * SizeOf(dtype));
        std::vector<float> row(in);
        for (int r = 0; r < out; ++r) {
          weights.packed.UnpackRow(r, row.data());
          for (int k = 0; k < in; ++k) {
            ASSERT_EQ(row[k], weights.values[static_cast<size_t>(r) * in + k])
                << Name(dtype) << " [" << out << ", " << in << "] at " << r << ", " << k;
          }
        }
      }
    }
  }
}

// Every pattern of a half or bf16, special values too, comes back as what it stands for.
TEST(PackedMatrixTest, WideningIsExactForAllBits) {
  const auto cpu = *CpuBackend::Create(1);
  for (DType dtype : {DType::kBF16, DType::kF16}) {
    std::vector<uint16_t> bits(0x10000);
    for (uint32_t i = 0; i < 0x10000; ++i) bits[i] = static_cast<uint16_t>(i);
    const PackedMatrix::Source source{bits.data(), 256};
    const PackedMatrix packed = *PackedMatrix::Pack(*cpu, dtype, 256, {&source, 1});
    std::vector<float> row(256);
    for (int r = 0; r < 256; ++r) {
      packed.UnpackRow(r, row.data());
      for (int k = 0; k < 256; ++k) {
        const uint16_t b = bits[r * 256 + k];
        const float expected = dtype == DType::kBF16 ? BF16ToF32(b) : F16ToF32(b);
        ASSERT_EQ(std::bit_cast<uint32_t>(row[k]), std::bit_cast<uint32_t>(expected)) << b;
      }
    }
  }
}

TEST(PackedMatrixTest, SourcesStack) {
  const auto cpu = *CpuBackend::Create(1);
  TestRandom random(2);
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    const int outs[] = {3, 40, 1, 64};
    std::vector<TestWeights> parts;
    std::vector<PackedMatrix::Source> sources;
    for (int out : outs) parts.push_back(RandomWeights(*cpu, dtype, out, 19, random));
    for (int i = 0; i < 4; ++i) sources.push_back({parts[i].stored.data(), outs[i]});
    const PackedMatrix packed = *PackedMatrix::Pack(*cpu, dtype, 19, sources);
    ASSERT_EQ(packed.out_features(), 108);
    int row = 0;
    std::vector<float> values(19);
    for (int i = 0; i < 4; ++i) {
      for (int r = 0; r < outs[i]; ++r, ++row) {
        packed.UnpackRow(row, values.data());
        for (int k = 0; k < 19; ++k) ASSERT_EQ(values[k], parts[i].values[r * 19 + k]);
      }
    }
  }
}

TEST(PackedMatrixTest, SourcesNeedNoAlignment) {
  const auto cpu = *CpuBackend::Create(1);
  TestRandom random(3);
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    const TestWeights weights = RandomWeights(*cpu, dtype, 5, 6, random);
    std::vector<unsigned char> shifted(weights.stored.size() + 1);
    std::memcpy(shifted.data() + 1, weights.stored.data(), weights.stored.size());
    const PackedMatrix::Source source{shifted.data() + 1, 5};
    const PackedMatrix packed = *PackedMatrix::Pack(*cpu, dtype, 6, {&source, 1});
    EXPECT_EQ(std::memcmp(packed.data(), weights.packed.data(), packed.bytes()), 0);
  }
}

TEST(PackedMatrixTest, Errors) {
  const auto cpu = *CpuBackend::Create(1);
  const float data[4] = {};
  using Sources = std::vector<PackedMatrix::Source>;
  const auto pack = [&](DType dtype, int in, const Sources& sources) {
    return PackedMatrix::Pack(*cpu, dtype, in, sources).status();
  };
  struct Case {
    absl::Status status;
    std::string message;
  };
  for (const Case& c : std::vector<Case>{
           {pack(DType::kI32, 2, Sources{{data, 1}}), "i32"},
           {pack(DType::kF32, 0, Sources{{data, 1}}), "in_features is 0"},
           {pack(DType::kF32, 2, Sources{}), "no sources"},
           {pack(DType::kF32, 2, Sources{{data, 0}}), "0 output features"},
           {pack(DType::kF32, 2, Sources{{nullptr, 1}}), "no data"},
           {pack(DType::kF32, 1, Sources{{data, INT_MAX}, {data, INT_MAX}}), "4294967294"}}) {
    EXPECT_EQ(c.status.code(), absl::StatusCode::kInvalidArgument) << c.status;
    EXPECT_THAT(std::string(c.status.message()), HasSubstr(c.message));
  }
  EXPECT_EQ(pack(DType::kF32, INT_MAX, Sources{{data, INT_MAX - 32}}).code(),
            absl::StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace canopy
