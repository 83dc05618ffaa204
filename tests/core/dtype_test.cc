#include "core/dtype.h"

#include <cmath>
#include <cstdint>
#include <limits>

#include "gtest/gtest.h"

namespace canopy {
namespace {

// Every one of the 65536 halves against its definition (IEEE 754 binary16).
TEST(DTypeTest, F16ToF32IsExact) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const int exponent = static_cast<int>(bits >> 10 & 0x1f);
    const int mantissa = static_cast<int>(bits & 0x3ff);
    const float actual = F16ToF32(static_cast<uint16_t>(bits));
    if (exponent == 31) {
      EXPECT_EQ(std::isnan(actual), mantissa != 0) << bits;
      EXPECT_EQ(std::isinf(actual), mantissa == 0) << bits;
    } else {
      const double magnitude =
          exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
      EXPECT_EQ(std::fabs(actual), magnitude) << bits;
    }
    EXPECT_EQ(std::signbit(actual), (bits >> 15) != 0) << bits;
  }
}

// The nearest of the two neighbours, and the even one halfway.
TEST(DTypeTest, F32ToBF16RoundsToNearestEven) {
  for (uint32_t high = 0; high < 0x7f80; high += 7) {
    const uint16_t below = static_cast<uint16_t>(high);
    for (uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      const float value = std::bit_cast<float>(high << 16 | low);
      const uint16_t expected = low < 0x8000u || (low == 0x8000u && high % 2 == 0)
                                    ? below
                                    : static_cast<uint16_t>(below + 1);
      EXPECT_EQ(F32ToBF16(value), expected) << value;
      EXPECT_EQ(F32ToBF16(-value), expected | 0x8000) << value;
    }
  }
  EXPECT_TRUE(std::isnan(BF16ToF32(F32ToBF16(std::numeric_limits<float>::quiet_NaN()))));
  EXPECT_TRUE(std::isnan(BF16ToF32(F32ToBF16(std::bit_cast<float>(0x7f800001u)))));
}

TEST(DTypeTest, SizesAndNames) {
  EXPECT_EQ(SizeOf(DType::kBF16), 2u);
  EXPECT_EQ(SizeOf(DType::kI64), 8u);
  EXPECT_EQ(Name(DType::kF16), "f16");
}

}  // namespace
}  // namespace canopy
