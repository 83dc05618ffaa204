// The decode loop allocates nothing once it is warm.

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/cpu_backend.h"
#include "drafting/registry.h"
#include "experiments/decode_loop.h"
#include "gtest/gtest.h"
#include "tests/support/allocation_counter.h"
#include "tests/support/random_model.h"

namespace canopy {
namespace {

// Counts from the end of the first round on: before it the prompt is read.
class CountingSink final : public TokenSink {
 public:
  void OnTokens(std::span<const TokenId>, int) override {
    if (rounds++ == 0) before = testing::Allocations();
  }
  int rounds = 0;
  int64_t before = 0;
};

struct Case {
  const char* drafter;
  const char* shape;
  const char* method;
  const char* rule;
  double temperature;
};

TEST(AllocationTest, TheCounterCounts) {
  const int64_t before = testing::Allocations();
  const auto vector = std::make_unique<std::vector<int>>(1000);
  EXPECT_EQ(testing::Allocations() - before, 2);
  const auto cpu = *CpuBackend::Create(1);
  const uint64_t tensors = cpu->memory().allocations;
  ASSERT_TRUE(Tensor::Allocate(*cpu, 2, 2).ok());
  EXPECT_EQ(cpu->memory().allocations, tensors + 1);
}

TEST(AllocationTest, AWarmLoopAllocatesNothing) {
  const auto cpu = *CpuBackend::Create(2);
  const auto target = testing::MakeRandomModel(*cpu, {});
  testing::RandomModelOptions draft_options;
  draft_options.kind = "ssd";
  draft_options.layers = 1;
  const auto draft = testing::MakeRandomModel(*cpu, draft_options);
  std::mt19937_64 rng(2);
  const std::vector<TokenId> prompt = testing::RandomTokens(rng, 200, 97);

  for (const Case& c : {
           Case{"none", "chain:4", "topk", "greedy", 0},
           Case{"model", "chain:5", "topk", "greedy", 0},
           Case{"model", "topk:4,2,2", "topk", "greedy", 0},
           Case{"model", "topk:3,2,1", "sampled", "recursive", 1},
           Case{"model", "topk:3,2,1", "sampled_with_replacement", "recursive", 1},
           Case{"model", "topk:3,2,1", "topk", "gumbel", 1},
           Case{"ngram", "chain:6", "topk", "greedy", 0},
           Case{"ngram", "topk:2,2", "topk", "recursive", 1},
       }) {
    SCOPED_TRACE(std::string(c.drafter) + " " + c.shape + " " + c.method + " " + c.rule);
    DrafterOptions options;
    options.model = draft.get();
    options.shape = c.shape;
    options.method = c.method;
    options.vocab_size = 97;
    options.max_positions = 512;
    const auto drafter = *MakeDrafter(c.drafter, options);
    const auto draft_state = *drafter->NewState();
    const auto rule = *MakeAcceptanceRule(c.rule);
    const auto loop = *DecodeLoop::Create(*target, 64);
    ASSERT_TRUE(loop->Reserve(512).ok());
    DecodeRequest request;
    request.prompt = prompt;
    request.drafter = drafter.get();
    request.draft_state = draft_state.get();
    request.rule = rule.get();
    request.sampling.temperature = c.temperature;
    request.max_new_tokens = 150;
    Generation out;
    ASSERT_TRUE(loop->Decode({&request, 1}, {&out, 1}).ok());
    const std::vector<TokenId> first = out.tokens;
    CountingSink sink;
    request.sink = &sink;
    // Tensors come from the backend, past operator new: a second answer needs none at all.
    const uint64_t tensors = cpu->memory().allocations;
    const absl::Status status = loop->Decode({&request, 1}, {&out, 1});
    EXPECT_EQ(cpu->memory().allocations, tensors);
    const int64_t after = testing::Allocations();
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_EQ(after - sink.before, 0);
    EXPECT_GT(sink.rounds, 5);
    EXPECT_EQ(out.tokens, first);
    EXPECT_EQ(out.tokens.size(), 150u);
  }
}

}  // namespace
}  // namespace canopy
