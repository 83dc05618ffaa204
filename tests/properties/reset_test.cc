// A state that was reset scores as a new one, to the last bit.

#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "core/cpu_backend.h"
#include "gtest/gtest.h"
#include "tests/support/random_model.h"

namespace canopy {
namespace {

TEST(ResetTest, AResetStateScoresAsANewOne) {
  const auto cpu = *CpuBackend::Create(1);
  for (const char* kind : {"ssd", "attention", "hybrid"}) {
    testing::RandomModelOptions options;
    options.kind = kind;
    const auto model = testing::MakeRandomModel(*cpu, options);
    const auto workspace = *model->NewWorkspace(16);
    std::mt19937_64 rng(3);
    // Past two folds, so that both checkpoints come into play.
    const std::vector<TokenId> tokens = testing::RandomTokens(rng, 150, options.vocab);
    const std::vector<TokenId> other = testing::RandomTokens(rng, 200, options.vocab);
    const auto logits = [&](DecodeState& state) {
      std::vector<float> all;
      for (const TokenId& token : tokens) {
        const NodeId parent = kPrefix;
        const ForwardItem item = {&state, {&token, 1}, {&parent, 1}, LogitsOf::kAll, false};
        const ForwardResult result = *model->Forward({&item, 1}, *workspace);
        all.insert(all.end(), result.logits.row(0), result.logits.row(0) + options.vocab);
        const NodeId node(0);
        CHECK(state.Commit({&node, 1}).ok());
      }
      return all;
    };
    const auto fresh = *model->NewState({.max_positions = 256, .max_pending = 4});
    const std::vector<float> expected = logits(*fresh);
    const auto used = *model->NewState({.max_positions = 256, .max_pending = 4});
    for (int length : {200, 100, 33}) {
      const ForwardItem item = {used.get(),
                                std::span<const TokenId>(other).first(length),
                                {},
                                LogitsOf::kNone,
                                /*commit_chain=*/true};
      ASSERT_TRUE(model->Forward({&item, 1}, *workspace).ok());
      used->Reset();
      const std::vector<float> again = logits(*used);
      EXPECT_EQ(std::memcmp(again.data(), expected.data(), expected.size() * sizeof(float)), 0)
          << kind << " after " << length;
      used->Reset();
    }
  }
}

}  // namespace
}  // namespace canopy
