#include "core/random.h"

#include <cmath>
#include <set>

#include "gtest/gtest.h"

namespace canopy {
namespace {

// The known-answer vectors of philox4x32 10 in Random123 (kat_vectors).
TEST(PhiloxTest, KnownAnswers) {
  using Block = std::array<uint32_t, 4>;
  EXPECT_EQ(Philox({0, 0, 0, 0}, {0, 0}), (Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(Philox({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}),
            (Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(Philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(NoiseStreamTest, EveryPartOfTheKeyMatters) {
  std::set<double> seen;
  for (uint64_t seed : {0ull, 1ull, 1ull << 40}) {
    for (uint64_t request : {0ull, 1ull, 1ull << 40}) {
      const NoiseStream noise(seed, request);
      for (int64_t position : {int64_t{0}, int64_t{1}, int64_t{1} << 40}) {
        for (Purpose purpose : {Purpose::kDraft, Purpose::kAccept, Purpose::kResidual}) {
          for (uint32_t index : {0u, 1u, ~0u}) {
            const double u = noise.Uniform(position, purpose, index);
            EXPECT_GT(u, 0.0);
            EXPECT_LT(u, 1.0);
            seen.insert(u);
            EXPECT_EQ(u, NoiseStream(seed, request).Uniform(position, purpose, index));
          }
        }
      }
    }
  }
  EXPECT_EQ(seen.size(), 3u * 3 * 3 * 3 * 3);
}

// Pearson's chi-square over 100 cells: 99 degrees of freedom exceed 160 with probability 1e-4.
TEST(NoiseStreamTest, UniformAlongPositionsAndIndices) {
  const NoiseStream noise(7, 9);
  for (const bool along_position : {true, false}) {
    constexpr int kDraws = 100000;
    std::array<int, 100> cells{};
    for (int i = 0; i < kDraws; ++i) {
      const double u = along_position ? noise.Uniform(i, Purpose::kAccept)
                                      : noise.Uniform(5, Purpose::kAccept, i);
      ++cells[static_cast<int>(u * 100)];
    }
    double chi_square = 0.0;
    for (const int count : cells) chi_square += (count - 1000.0) * (count - 1000.0) / 1000.0;
    EXPECT_LT(chi_square, 160.0);
    EXPECT_GT(chi_square, 50.0);  // nor suspiciously even: below 50 with probability 1e-5
  }
}

// The argmax of log w + Gumbel noise has the distribution w.
TEST(NoiseStreamTest, GumbelMaximumSamples) {
  const NoiseStream noise(3, 4);
  const double weights[] = {0.1, 0.2, 0.3, 0.4};
  constexpr int kDraws = 40000;
  std::array<int, 4> counts{};
  for (int position = 0; position < kDraws; ++position) {
    int best = 0;
    double best_value = -INFINITY;
    for (int token = 0; token < 4; ++token) {
      const double value = std::log(weights[token]) + noise.Gumbel(position, token);
      if (value > best_value) {
        best_value = value;
        best = token;
      }
    }
    ++counts[best];
  }
  double chi_square = 0.0;
  for (int token = 0; token < 4; ++token) {
    const double expected = kDraws * weights[token];
    chi_square += (counts[token] - expected) * (counts[token] - expected) / expected;
  }
  EXPECT_LT(chi_square, 21.1);  // 3 degrees of freedom: exceeded with probability 1e-4
}

}  // namespace
}  // namespace canopy
