// Drafters, verifier and rules together, as the decode loop runs them.

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>

#include "core/cpu_backend.h"
#include "drafting/registry.h"
#include "gtest/gtest.h"
#include "models/loader.h"
#include "tests/support/allocation_counter.h"
#include "tests/support/fake_model.h"
#include "tests/support/random_model.h"
#include "verify/tree_verifier.h"

namespace canopy {
namespace {

using testing::FakeModel;

struct Arm {
  std::string drafter;
  DrafterOptions options;
};

// A decode loop of one sequence at a time over a target and a drafter.
class Loop {
 public:
  Loop(const LanguageModel& target, const Arm& arm, std::string_view rule, int max_positions)
      : verifier_(*TreeVerifier::Create(target, 64)),
        target_state_(*target.NewState({.max_positions = max_positions, .max_pending = 64})),
        drafter_(*MakeDrafter(arm.drafter, arm.options)),
        draft_state_(*drafter_->NewState()),
        rule_(*MakeAcceptanceRule(rule)) {}

  // The first `length` tokens of the output.
  std::vector<TokenId> Decode(std::span<const TokenId> prompt, int length,
                              const SamplingOptions& sampling, const NoiseStream& noise) {
    target_state_->Reset();
    draft_state_->Reset();
    std::vector<TokenId> text;
    text.reserve(prompt.size() + length + kMaxTreeHeight);
    text.assign(prompt.begin(), prompt.end());
    int rounds_of_text = 0;
    Check(verifier_->Prefill(prompt.first(prompt.size() - 1), *target_state_));
    while (text.size() < prompt.size() + length) {
      const DraftContext context{.tokens = text,
                                 .state = draft_state_.get(),
                                 .sampling = &sampling,
                                 .noise = &noise,
                                 .gumbel_coupled = rule_->name() == "gumbel"};
      Check(drafter_->Draft({&context, 1}, {&draft_, 1}));
      const auto scores = verifier_->Score(draft_.tree, *target_state_);
      Check(scores.status());
      const int64_t position = static_cast<int64_t>(text.size()) - 1;
      Check(rule_->Accept(draft_, *scores, sampling, noise, position, scratch_, &accepted_));
      for (size_t i = 1; i < accepted_.path.size(); ++i) {
        text.push_back(draft_.tree.token(accepted_.path[i]));
      }
      text.push_back(accepted_.next);
      Check(target_state_->Commit(accepted_.path));
      if (++rounds_of_text == warm_rounds) allocations_when_warm = testing::Allocations();
      ++rounds;
      tokens += static_cast<int>(accepted_.path.size());
    }
    allocations_at_end = testing::Allocations();
    return {text.begin() + prompt.size(), text.begin() + prompt.size() + length};
  }

  int rounds = 0;
  int tokens = 0;
  // Of the program, after that many rounds of the last text and at its end.
  int warm_rounds = 0;
  int64_t allocations_when_warm = 0;
  int64_t allocations_at_end = 0;

 private:
  static void Check(const absl::Status& status) {
    if (!status.ok()) {
      ADD_FAILURE() << status;
      std::abort();
    }
  }

  std::unique_ptr<TreeVerifier> verifier_;
  std::unique_ptr<DecodeState> target_state_;
  std::unique_ptr<Drafter> drafter_;
  std::unique_ptr<DraftState> draft_state_;
  std::unique_ptr<AcceptanceRule> rule_;
  DraftTree draft_;
  AcceptanceScratch scratch_;
  Acceptance accepted_;
};

std::vector<Arm> AllArms(const LanguageModel* draft, int vocab, int max_positions) {
  std::vector<Arm> arms = {{"none", {}}};
  for (const char* shape : {"chain:4", "topk:3,2,1", "(((),()),(((()))),())"}) {
    for (const char* method : {"topk", "sampled", "sampled_with_replacement"}) {
      arms.push_back({"model", {.model = draft, .shape = shape, .method = method}});
    }
    arms.push_back({"ngram", {.shape = shape}});
  }
  for (Arm& arm : arms) {
    arm.options.vocab_size = vocab;
    arm.options.max_positions = max_positions;
  }
  return arms;
}

std::string Name(const Arm& arm) {
  return arm.drafter + " " + arm.options.shape + " " + arm.options.method;
}

TEST(DecodeLoopTest, TextDoesNotDependOnTheDrafter) {
  const FakeModel target({.vocab = 12, .seed = 1});
  const FakeModel draft({.vocab = 14, .seed = 1, .disagreement = 0.7, .disagreement_seed = 2});
  const std::vector<TokenId> prompt = {TokenId(3), TokenId(1), TokenId(4), TokenId(1), TokenId(5)};
  const NoiseStream noise(1, 2);
  for (const auto& [rule, temperature] : {std::pair{"greedy", 0.0},
                                          {"recursive", 0.0},
                                          {"gumbel", 0.0},
                                          {"gumbel", 1.0},
                                          {"gumbel", 0.6}}) {
    const SamplingOptions sampling{.temperature = temperature, .top_p = 0.95};
    std::vector<TokenId> plain;
    for (const Arm& arm : AllArms(&draft, 12, 400)) {
      Loop loop(target, arm, rule, 400);
      const auto text = loop.Decode(prompt, 300, sampling, noise);
      if (plain.empty()) plain = text;
      EXPECT_EQ(text, plain) << rule << ", " << Name(arm);
      const double mean = static_cast<double>(loop.tokens) / loop.rounds;
      // Drafts that are never accepted would make the comparison empty.
      if (arm.drafter == "model") {
        EXPECT_GT(mean, 1.5) << rule << ", " << Name(arm);
      }
      if (arm.drafter == "none") {
        EXPECT_EQ(mean, 1.0);
      }
    }
  }
}

// A text that is decoded a second time, in the same memory, allocates nothing after its first
// round.
TEST(DecodeLoopTest, NoAllocationOnceWarm) {
  const auto cpu = *CpuBackend::Create(2);
  const auto target = testing::MakeRandomModel(*cpu, {.seed = 1});
  const auto draft = testing::MakeRandomModel(*cpu, {.kind = "ssd", .seed = 2});
  const std::vector<TokenId> prompt(5, TokenId(3));
  const NoiseStream noise(1, 2);
  for (const char* rule : {"greedy", "recursive", "gumbel"}) {
    for (const Arm& arm : AllArms(draft.get(), 97, 400)) {
      const double temperature = std::string_view(rule) == "greedy" ? 0.0 : 1.0;
      const SamplingOptions sampling{.temperature = temperature, .top_p = 0.9};
      Loop loop(*target, arm, rule, 400);
      const auto text = loop.Decode(prompt, 100, sampling, noise);
      const int rounds = loop.rounds;
      loop.warm_rounds = 1;
      EXPECT_EQ(loop.Decode(prompt, 100, sampling, noise), text) << rule << ", " << Name(arm);
      EXPECT_EQ(loop.rounds, 2 * rounds);
      EXPECT_GT(loop.allocations_when_warm, 0);
      EXPECT_EQ(loop.allocations_at_end, loop.allocations_when_warm) << rule << ", " << Name(arm);
    }
  }
}

// Chi-square of counts against exact probabilities; cells with an expectation below 5 are pooled.
struct ChiSquare {
  double value = 0.0;
  int degrees = -1;

  // The value that is exceeded with probability 1e-5, by Wilson and Hilferty's cube; 4.265 is that
  // quantile of the normal distribution.
  double Limit() const {
    const double h = 2.0 / (9.0 * degrees);
    return degrees * std::pow(1.0 - h + 4.265 * std::sqrt(h), 3);
  }
};

ChiSquare Compare(const std::map<std::vector<int>, int>& counts,
                  const std::map<std::vector<int>, double>& probs, int samples) {
  ChiSquare result;
  double pooled_expected = 0.0;
  int pooled_count = 0;
  int counted = 0;
  const auto add = [&](double expected, int count) {
    result.value += (count - expected) * (count - expected) / expected;
    ++result.degrees;
  };
  for (const auto& [outcome, prob] : probs) {
    const auto it = counts.find(outcome);
    const int count = it == counts.end() ? 0 : it->second;
    counted += count;
    if (prob * samples < 5.0) {
      pooled_expected += prob * samples;
      pooled_count += count;
    } else {
      add(prob * samples, count);
    }
  }
  EXPECT_EQ(counted, samples) << "an output that the target cannot produce";
  if (pooled_expected >= 5.0) add(pooled_expected, pooled_count);
  return result;
}

// The joint distribution of the first two tokens of the output. `next` gives the target's
// distribution after the prompt and some tokens, `samples` requests are decoded. Returns the mean
// number of tokens a round.
double ExpectTargetDistribution(Loop& loop, std::span<const TokenId> prompt,
                                const SamplingOptions& sampling, int samples,
                                const std::function<Distribution(std::span<const TokenId>)>& next,
                                const std::string& what) {
  std::map<std::vector<int>, int> first_counts;
  std::map<std::vector<int>, int> pair_counts;
  for (int request = 0; request < samples; ++request) {
    const auto text = loop.Decode(prompt, 2, sampling, NoiseStream(2024, request));
    ++first_counts[{text[0].value}];
    ++pair_counts[{text[0].value, text[1].value}];
  }
  std::map<std::vector<int>, double> first_probs;
  std::map<std::vector<int>, double> pair_probs;
  const Distribution first = next({});
  for (size_t i = 0; i < first.tokens.size(); ++i) {
    first_probs[{first.tokens[i].value}] = first.probs[i];
    const Distribution second = next({&first.tokens[i], 1});
    for (size_t j = 0; j < second.tokens.size(); ++j) {
      pair_probs[{first.tokens[i].value, second.tokens[j].value}] =
          first.probs[i] * second.probs[j];
    }
  }
  for (const bool pairs : {false, true}) {
    const ChiSquare result =
        Compare(pairs ? pair_counts : first_counts, pairs ? pair_probs : first_probs, samples);
    EXPECT_GE(result.degrees, 3) << what;
    EXPECT_LT(result.value, result.Limit())
        << what << (pairs ? ", token pairs, " : ", first tokens, ") << result.degrees
        << " degrees of freedom";
  }
  return static_cast<double>(loop.tokens) / loop.rounds;
}

TEST(DecodeLoopTest, FakePairSamplesTheTarget) {
  const FakeModel target({.vocab = 12, .seed = 1});
  const FakeModel draft({.vocab = 12, .seed = 1, .disagreement = 1.0, .disagreement_seed = 2});
  const std::vector<TokenId> prompt = {TokenId(3), TokenId(1), TokenId(4)};
  const SamplingOptions sampling{.temperature = 1.3, .top_k = 9};
  const auto next = [&](std::span<const TokenId> tokens) {
    std::vector<TokenId> text(prompt);
    text.insert(text.end(), tokens.begin(), tokens.end());
    Distribution distribution;
    Warp(target.LogitsAfter(text), sampling, &distribution);
    return distribution;
  };
  for (const char* rule : {"recursive", "gumbel"}) {
    for (const Arm& arm : AllArms(&draft, 12, 100)) {
      Loop loop(target, arm, rule, 100);
      ExpectTargetDistribution(loop, prompt, sampling, 4000, next, rule + (", " + Name(arm)));
    }
  }
}

// Sanitizers slow a pass down some thirtyfold; under them it is the code that is watched.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int kTrainedSamples = 300;
#else
constexpr int kTrainedSamples = 2000;
#endif

TEST(DecodeLoopTest, TrainedPairSamplesTheTargetSlow) {
  const std::string target_path = CANOPY_SOURCE_DIR "/data/models/tiny-bamba-4m";
  const std::string draft_path = CANOPY_SOURCE_DIR "/data/models/tiny-draft-m2";
  // One thread: the models are so small that handing out work costs more than it saves.
  const auto cpu = *CpuBackend::Create(1);
  const auto target = LoadModel(*cpu, target_path);
  ASSERT_TRUE(target.ok()) << target.status();
  const auto draft = LoadModel(*cpu, draft_path);
  ASSERT_TRUE(draft.ok()) << draft.status();
  // A chat turn's beginning: <|bos|><|user|> and a few tokens of text.
  std::vector<TokenId> prompt = {TokenId(1), TokenId(3)};
  for (int i = 0; i < 6; ++i) prompt.push_back(TokenId(300 + 17 * i));
  prompt.push_back(TokenId(4));
  // top_k bounds the number of second tokens whose exact probabilities are needed.
  const SamplingOptions sampling{.temperature = 1.0, .top_k = 50};
  const auto verifier = *TreeVerifier::Create(**target, 64);
  const auto state = *(*target)->NewState({.max_positions = 100, .max_pending = 64});
  const auto next = [&](std::span<const TokenId> tokens) {
    std::vector<TokenId> text(prompt);
    text.insert(text.end(), tokens.begin(), tokens.end());
    state->Reset();
    EXPECT_TRUE(verifier->Prefill(std::span(text).first(text.size() - 1), *state).ok());
    TokenTree tree;
    (void)*tree.AddNode(kPrefix, text.back());
    const auto scores = verifier->Score(tree, *state);
    EXPECT_TRUE(scores.ok()) << scores.status();
    Distribution distribution;
    Warp(scores->row(NodeId(0)), sampling, &distribution);
    return distribution;
  };
  const int vocab = (*target)->info().vocab_size;
  for (const char* method : {"topk", "sampled", "sampled_with_replacement"}) {
    const Arm arm{"model",
                  {.model = draft->get(),
                   .shape = "topk:3,2",
                   .method = method,
                   .vocab_size = vocab,
                   .max_positions = 100}};
    Loop loop(**target, arm, "recursive", 100);
    const double mean =
        ExpectTargetDistribution(loop, prompt, sampling, kTrainedSamples, next, Name(arm));
    EXPECT_GT(mean, 1.2) << Name(arm);  // acceptances are part of what is tested
  }
}

}  // namespace
}  // namespace canopy
