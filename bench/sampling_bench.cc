// What a round costs outside the models: choosing tokens from logits, and accepting.
//
//   build/release/sampling_bench

#include <random>

#include "benchmark/benchmark.h"
#include "drafting/registry.h"
#include "verify/acceptance.h"
#include "verify/draw_children.h"

namespace canopy {
namespace {

std::vector<float> RandomLogits(int vocab, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<float> logits(vocab);
  for (float& logit : logits) logit = std::normal_distribution<float>(0.0f, 2.5f)(random);
  return logits;
}

// Arguments: vocabulary, top_k, 100 * top_p.
void BM_Warp(benchmark::State& state) {
  const auto logits = RandomLogits(static_cast<int>(state.range(0)), 1);
  const SamplingOptions options{.temperature = 0.8,
                                .top_k = static_cast<int>(state.range(1)),
                                .top_p = static_cast<double>(state.range(2)) / 100};
  Distribution out;
  for (auto _ : state) {
    Warp(logits, options, &out);
    benchmark::DoNotOptimize(out.probs.data());
  }
}
BENCHMARK(BM_Warp)
    ->ArgsProduct({{8192, 151936}, {0}, {100, 90}})
    ->Args({8192, 50, 90})
    ->Args({151936, 50, 90});

void BM_Argmax(benchmark::State& state) {
  const auto logits = RandomLogits(static_cast<int>(state.range(0)), 1);
  for (auto _ : state) benchmark::DoNotOptimize(Argmax(logits));
}
BENCHMARK(BM_Argmax)->Arg(8192)->Arg(151936);

void BM_TopK(benchmark::State& state) {
  const auto logits = RandomLogits(static_cast<int>(state.range(0)), 1);
  std::vector<TokenId> best;
  for (auto _ : state) TopK(logits, 8, &best);
}
BENCHMARK(BM_TopK)->Arg(8192)->Arg(151936);

void BM_GumbelArgmax(benchmark::State& state) {
  Distribution distribution;
  Warp(RandomLogits(static_cast<int>(state.range(0)), 1), {.temperature = 1.0}, &distribution);
  const NoiseStream noise(1, 2);
  int64_t position = 0;
  for (auto _ : state) benchmark::DoNotOptimize(GumbelArgmax(distribution, noise, ++position));
}
BENCHMARK(BM_GumbelArgmax)->Arg(8192)->Arg(151936);

// A whole decision over a tree of node 0 and `children` children. Arguments: vocabulary, rule,
// children.
void BM_Accept(benchmark::State& state) {
  const int vocab = static_cast<int>(state.range(0));
  const char* const rules[] = {"greedy", "recursive", "gumbel"};
  const auto rule = *MakeAcceptanceRule(rules[state.range(1)]);
  const int children = static_cast<int>(state.range(2));
  const SamplingOptions sampling{.temperature = state.range(1) == 0 ? 0.0 : 1.0};
  const NoiseStream noise(1, 2);
  DraftTree draft;
  (void)*draft.AddNode(kPrefix, TokenId(0));
  Distribution scratch;
  Warp(RandomLogits(vocab, 2), {.temperature = 1.0}, &draft.proposals[0].draft_prob);
  uint32_t draws = 0;
  const absl::Status drawn = DrawChildren(
      NodeId(0), {DrawMethod::kWithoutReplacement, children, 1 + children},
      [&](const Distribution& from) {
        return from.Sample(noise.Uniform(1, Purpose::kDraft, draws++));
      },
      &scratch, &draft);
  if (!drawn.ok()) state.SkipWithError("drawing failed");
  const int64_t stride = PaddedColumns(vocab);
  std::vector<float> rows(stride * draft.tree.size());
  for (int i = 0; i < draft.tree.size(); ++i) {
    std::ranges::copy(RandomLogits(vocab, 10 + i), rows.begin() + i * stride);
  }
  const TargetScores scores{{rows.data(), draft.tree.size(), vocab, stride}};
  AcceptanceScratch accept_scratch;
  Acceptance accepted;
  int64_t position = 0;
  for (auto _ : state) {
    const absl::Status status =
        rule->Accept(draft, scores, sampling, noise, ++position, accept_scratch, &accepted);
    benchmark::DoNotOptimize(status.ok());
  }
}
BENCHMARK(BM_Accept)->ArgsProduct({{8192, 151936}, {0, 1, 2}, {4}});

// Prompt lookup in a text of that many tokens; a round adds three.
void BM_NgramDraft(benchmark::State& state) {
  std::mt19937_64 random(3);
  const auto drafter = *MakeDrafter("ngram", {.shape = "topk:2,2,1,1,1,1"});
  const auto draft_state = *drafter->NewState();
  std::vector<TokenId> text(state.range(0));
  for (TokenId& token : text) token = TokenId(static_cast<int>(random() % 500));
  DraftTree draft;
  for (auto _ : state) {
    for (int i = 0; i < 3; ++i) text.push_back(TokenId(static_cast<int>(random() % 500)));
    const DraftContext context{.tokens = text, .state = draft_state.get()};
    const absl::Status status = drafter->Draft({&context, 1}, {&draft, 1});
    benchmark::DoNotOptimize(status.ok());
  }
}
BENCHMARK(BM_NgramDraft)->Arg(1000)->Arg(100000);

}  // namespace
}  // namespace canopy

BENCHMARK_MAIN();
