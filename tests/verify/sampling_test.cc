#include "verify/sampling.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace canopy {
namespace {

using ::testing::HasSubstr;

// Tokens by falling logit, then rising id, by a full sort.
std::vector<int> NaiveOrder(const std::vector<float>& logits) {
  std::vector<int> order(logits.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
  return order;
}

// From the definitions, over a dense vector in long double.
std::vector<double> NaiveWarp(const std::vector<float>& logits, const SamplingOptions& options) {
  const std::vector<int> order = NaiveOrder(logits);
  std::vector<long double> probs(logits.size(), 0.0L);
  if (options.temperature == 0.0) {
    probs[order[0]] = 1.0L;
  } else {
    const size_t kept =
        options.top_k > 0 ? std::min<size_t>(options.top_k, order.size()) : order.size();
    long double sum = 0.0L;
    for (size_t rank = 0; rank < kept; ++rank) {
      const int token = order[rank];
      probs[token] = std::exp((static_cast<long double>(logits[token]) - logits[order[0]]) /
                              static_cast<long double>(options.temperature));
      sum += probs[token];
    }
    long double before = 0.0L;
    long double mass = 0.0L;
    for (const int token : order) {
      const long double prob = probs[token] / sum;
      probs[token] = before >= static_cast<long double>(options.top_p) ? 0.0L : prob;
      before += prob;
      mass += probs[token];
    }
    for (long double& prob : probs) prob /= mass;
  }
  return {probs.begin(), probs.end()};
}

void ExpectSame(const Distribution& warped, const std::vector<double>& naive) {
  EXPECT_TRUE(std::is_sorted(warped.tokens.begin(), warped.tokens.end()));
  ASSERT_EQ(warped.tokens.size(), warped.probs.size());
  double sum = 0.0;
  for (const double prob : warped.probs) {
    EXPECT_GT(prob, 0.0);
    sum += prob;
  }
  EXPECT_NEAR(sum, 1.0, 1e-12);
  for (size_t token = 0; token < naive.size(); ++token) {
    EXPECT_NEAR(warped.Probability(TokenId(static_cast<int>(token))), naive[token], 1e-13);
  }
}

TEST(SamplingTest, WarpAndTopKEqualTheNaiveOnes) {
  std::mt19937 random(11);
  Distribution warped;
  std::vector<TokenId> best;
  for (int trial = 0; trial < 400; ++trial) {
    const int vocab = 1 + static_cast<int>(random() % (trial % 4 == 0 ? 3000 : 30));
    std::vector<float> logits(vocab);
    for (float& logit : logits) {
      logit = std::normal_distribution<float>(0.0f, 3.0f)(random);
      // Few different values, so that there are ties, also at the cuts.
      if (trial % 3 == 0) logit = std::round(logit);
      if (trial % 5 == 0 && random() % 4 == 0) logit = -INFINITY;
    }
    logits[random() % vocab] = 2.0f;
    const std::vector<int> order = NaiveOrder(logits);
    EXPECT_EQ(Argmax(logits).value, order[0]);
    for (const int k : {1, 2, 7, vocab, vocab + 5}) {
      TopK(logits, k, &best);
      ASSERT_EQ(static_cast<int>(best.size()), std::min(k, vocab));
      for (size_t rank = 0; rank < best.size(); ++rank) EXPECT_EQ(best[rank].value, order[rank]);
    }
    for (const double temperature : {0.0, 0.3, 1.0, 2.0}) {
      for (const int top_k : {0, 1, 5, 2000}) {
        for (const double top_p : {1.0, 0.9137, 0.5011, 1e-9}) {
          const SamplingOptions options{temperature, top_k, top_p};
          Warp(logits, options, &warped);
          ExpectSame(warped, NaiveWarp(logits, options));
        }
      }
    }
  }
}

TEST(SamplingTest, TopPKeepsTheLowerIdsAmongEquals) {
  Distribution warped;
  Warp(std::vector<float>{0.0f, 0.0f, 0.0f, 0.0f}, {.temperature = 1.0, .top_p = 0.5}, &warped);
  EXPECT_EQ(warped.tokens, (std::vector<TokenId>{TokenId(0), TokenId(1)}));
  EXPECT_EQ(warped.probs, (std::vector<double>{0.5, 0.5}));
}

TEST(SamplingTest, OddLogits) {
  Distribution warped;
  const SamplingOptions options{.temperature = 1.0};
  const auto only = [&](int token) {
    EXPECT_EQ(warped.tokens, std::vector<TokenId>{TokenId(token)});
    EXPECT_EQ(warped.probs, std::vector<double>{1.0});
  };
  Warp(std::vector<float>{-INFINITY, -INFINITY}, options, &warped);
  only(0);
  Warp(std::vector<float>{1.0f, INFINITY, 2.0f}, options, &warped);
  only(1);
  Warp(std::vector<float>{NAN, 3.0f, NAN}, options, &warped);
  only(1);
  Warp(std::vector<float>{NAN, NAN}, options, &warped);
  only(0);
  // Small temperatures neither overflow nor leave tokens of probability 0.
  Warp(std::vector<float>{-3e38f, 3e38f, 0.0f}, {.temperature = 1e-300}, &warped);
  only(1);
  std::vector<TokenId> best;
  TopK(std::vector<float>{NAN, 1.0f, NAN, 2.0f}, 3, &best);
  EXPECT_EQ(best, (std::vector<TokenId>{TokenId(3), TokenId(1), TokenId(0)}));
}

TEST(SamplingTest, ReusesMemory) {
  std::vector<float> logits(5000);
  std::mt19937 random(2);
  for (float& logit : logits) logit = std::normal_distribution<float>()(random);
  Distribution warped;
  const SamplingOptions options{.temperature = 1.0, .top_p = 0.9};
  Warp(logits, options, &warped);
  const auto* tokens = warped.tokens.data();
  const auto* probs = warped.probs.data();
  for (int i = 0; i < 3; ++i) {
    Warp(logits, options, &warped);
    Warp(logits, {.temperature = 0.5, .top_k = 40}, &warped);
  }
  EXPECT_EQ(warped.tokens.data(), tokens);
  EXPECT_EQ(warped.probs.data(), probs);
}

TEST(SamplingTest, SampleInvertsTheCumulativeDistribution) {
  const Distribution distribution{{TokenId(2), TokenId(5), TokenId(9)}, {0.25, 0.5, 0.25}};
  EXPECT_EQ(distribution.Sample(0.1).value, 2);
  EXPECT_EQ(distribution.Sample(0.25).value, 5);
  EXPECT_EQ(distribution.Sample(0.74).value, 5);
  EXPECT_EQ(distribution.Sample(0.75).value, 9);
  const Distribution short_of_one{{TokenId(2), TokenId(5)}, {0.5, 0.5 - 1e-16}};
  EXPECT_EQ(short_of_one.Sample(1.0 - 0x1p-53).value, 5);
}

TEST(SamplingTest, Exclude) {
  Distribution distribution{{TokenId(2), TokenId(5), TokenId(9)}, {0.25, 0.5, 0.25}};
  Exclude(TokenId(4), &distribution);
  EXPECT_EQ(distribution.tokens.size(), 3u);
  Exclude(TokenId(5), &distribution);
  EXPECT_EQ(distribution.tokens, (std::vector<TokenId>{TokenId(2), TokenId(9)}));
  EXPECT_EQ(distribution.probs, (std::vector<double>{0.5, 0.5}));
  Exclude(TokenId(2), &distribution);
  EXPECT_EQ(distribution.probs, (std::vector<double>{1.0}));
  Exclude(TokenId(9), &distribution);
  EXPECT_TRUE(distribution.tokens.empty());
}

TEST(SamplingTest, SubtractGoesByToken) {
  std::mt19937 random(12);
  Distribution residual;
  Distribution other;
  for (int trial = 0; trial < 500; ++trial) {
    const int vocab = 1 + static_cast<int>(random() % 40);
    std::vector<double> dense(vocab, 0.0);
    const auto draw = [&](Distribution* out, double sign, bool all) {
      std::vector<float> logits(vocab);
      for (float& logit : logits) {
        logit = std::normal_distribution<float>()(random);
        if (!all && random() % 3 == 0) logit = -INFINITY;
      }
      Warp(logits, {.temperature = 1.0}, out);
      for (size_t i = 0; i < out->tokens.size(); ++i) {
        dense[out->tokens[i].value] += sign * out->probs[i];
      }
    };
    draw(&residual, 1.0, trial % 2 == 0);
    draw(&other, -1.0, trial % 2 == 0);
    double mass = 0.0;
    for (double& rest : dense) mass += rest = std::max(rest, 0.0);
    if (mass < 1e-3) continue;
    ASSERT_TRUE(Subtract(other, &residual));
    for (double& rest : dense) rest /= mass;
    ExpectSame(residual, dense);
  }
  other = residual;
  EXPECT_FALSE(Subtract(other, &residual));
  EXPECT_TRUE(residual.tokens.empty());
}

TEST(SamplingTest, GumbelOrderIsThatOfLogProbPlusNoise) {
  std::mt19937 random(3);
  std::vector<Arrival> arrivals;
  for (int trial = 0; trial < 200; ++trial) {
    const NoiseStream noise(trial, 1);
    std::vector<float> logits(1 + random() % 400);
    for (float& logit : logits) logit = std::normal_distribution<float>(0.0f, 3.0f)(random);
    Distribution distribution;
    Warp(logits, {.temperature = 1.0, .top_p = trial % 2 ? 1.0 : 0.9}, &distribution);
    std::vector<std::pair<double, int>> naive;
    for (size_t i = 0; i < distribution.tokens.size(); ++i) {
      const int token = distribution.tokens[i].value;
      naive.emplace_back(-(std::log(distribution.probs[i]) + noise.Gumbel(17, token)), token);
    }
    std::sort(naive.begin(), naive.end());
    EXPECT_EQ(GumbelArgmax(distribution, noise, 17).value, naive[0].second);
    for (const int k : {1, 3, 1000}) {
      GumbelTopK(distribution, noise, 17, k, &arrivals);
      ASSERT_EQ(arrivals.size(), std::min<size_t>(k, naive.size()));
      for (size_t rank = 0; rank < arrivals.size(); ++rank) {
        EXPECT_EQ(arrivals[rank].token.value, naive[rank].second);
        EXPECT_NEAR(std::log(arrivals[rank].time), naive[rank].first, 1e-9);
      }
    }
  }
}

TEST(SamplingTest, OptionsOutOfRangeAreNamed) {
  EXPECT_TRUE(Validate(SamplingOptions{}).ok());
  const auto message = [](SamplingOptions options) {
    return std::string(Validate(options).message());
  };
  EXPECT_THAT(message({.temperature = -1.0}), HasSubstr("temperature is -1"));
  EXPECT_THAT(message({.temperature = NAN}), HasSubstr("temperature"));
  EXPECT_THAT(message({.temperature = INFINITY}), HasSubstr("temperature"));
  EXPECT_THAT(message({.top_k = -2}), HasSubstr("top_k is -2"));
  EXPECT_THAT(message({.top_p = 0.0}), HasSubstr("top_p is 0"));
  EXPECT_THAT(message({.top_p = 1.5}), HasSubstr("top_p is 1.5"));
}

}  // namespace
}  // namespace canopy
