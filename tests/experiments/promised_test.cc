// Promised tokens, from the draft model to the acceptance rule: they change when the host learns of
// a token, and nothing else.

#include <random>
#include <string>
#include <vector>

#include "core/cpu_backend.h"
#include "core/cuda/pass.h"
#include "drafting/registry.h"
#include "experiments/decode_loop.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/fake_model.h"
#include "tests/support/noting_drafter.h"
#include "tests/support/promising_model.h"
#include "tests/support/random_model.h"

namespace canopy {
namespace {

using testing::FakeModel;
using ::testing::HasSubstr;
using testing::NotingDrafter;
using testing::PassLog;
using testing::PromisingModel;

// A target and a draft model on one backend, promising or not.
struct Pair {
  Pair(const Backend& backend, const LanguageModel& target_base, const LanguageModel& draft_base,
       bool promising)
      : log{.backend = &backend}, target(target_base, &log), draft(draft_base, &log) {
    target.promising = draft.promising = promising;
  }

  PassLog log;
  PromisingModel target, draft;
};

struct Options {
  std::string shape = "topk:2,2,1";
  std::string rule = "greedy";
  std::string method = "topk";
  double temperature = 0.0;
  int max_new_tokens = 60;
  int workspace_rows = 64;
  int max_nodes = 64;
  ScoreSink* scores = nullptr;
};

struct Outcome {
  absl::Status status;
  Generation generation;
  std::vector<std::string> trees;
  int resolved = 0;
};

Outcome Generate(const Pair& pair, std::span<const TokenId> prompt, const Options& options) {
  Outcome outcome;
  const auto loop = *DecodeLoop::Create(pair.target, 64);
  const auto drafter = *MakeDrafter("model", {.model = &pair.draft,
                                              .shape = options.shape,
                                              .method = options.method,
                                              .workspace_rows = options.workspace_rows});
  const auto state = *drafter->NewState();
  const NotingDrafter noting(*drafter);
  const auto rule = *MakeAcceptanceRule(options.rule);
  DecodeRequest request;
  request.prompt = prompt;
  request.drafter = &noting;
  request.draft_state = state.get();
  request.rule = rule.get();
  request.sampling.temperature = options.temperature;
  request.noise = NoiseStream(3, 4);
  request.max_new_tokens = options.max_new_tokens;
  request.max_nodes = options.max_nodes;
  request.scores = options.scores;
  outcome.status = loop->Decode({&request, 1}, {&outcome.generation, 1});
  outcome.trees = noting.trees;
  outcome.resolved = noting.resolved;
  return outcome;
}

void ExpectSame(const Outcome& promised, const Outcome& plain) {
  ASSERT_TRUE(promised.status.ok()) << promised.status;
  ASSERT_TRUE(plain.status.ok()) << plain.status;
  EXPECT_EQ(promised.generation.tokens, plain.generation.tokens);
  EXPECT_EQ(promised.generation.accept_lengths, plain.generation.accept_lengths);
  EXPECT_EQ(promised.trees, plain.trees);
  for (int i = 0; i < kMaxTreeHeight; ++i) {
    EXPECT_EQ(promised.generation.by_depth[i].accepted, plain.generation.by_depth[i].accepted);
    EXPECT_EQ(promised.generation.by_depth[i].proposed, plain.generation.by_depth[i].proposed);
  }
}

class PromisedTest : public ::testing::Test {
 protected:
  PromisedTest() : cpu_(*CpuBackend::Create(1)) {}

  std::vector<TokenId> Prompt(int length, int vocab, uint64_t seed) {
    std::mt19937_64 rng(seed);
    return testing::RandomTokens(rng, length, vocab);
  }

  std::unique_ptr<CpuBackend> cpu_;
};

const char* const kShapes[] = {"chain:1", "chain:6", "topk:2,2,1", "topk:4,3,2,1,1",
                               "((((),()),()),((),()),())"};

TEST_F(PromisedTest, ChangesNothingOfFakeModels) {
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    const FakeModel target({.vocab = 20, .seed = seed});
    const FakeModel draft(
        {.vocab = 20, .seed = seed, .disagreement = 0.8, .disagreement_seed = 100 + seed});
    for (const char* shape : kShapes) {
      for (int length : {1, 2, 17}) {
        // Few rows: levels take several passes.
        for (int rows : {3, 64}) {
          const Pair promising(*cpu_, target, draft, true), plain(*cpu_, target, draft, false);
          const auto prompt = Prompt(length, 20, seed);
          const Options options{.shape = shape, .workspace_rows = rows};
          SCOPED_TRACE(absl::StrCat(shape, " seed ", seed, " length ", length, " rows ", rows));
          const Outcome got = Generate(promising, prompt, options);
          ExpectSame(got, Generate(plain, prompt, options));
          const int rounds = static_cast<int>(got.generation.accept_lengths.size());
          EXPECT_LT(rounds, 60);  // something was accepted
          // All trees but those of no drafted node, where the limit is near.
          EXPECT_GE(got.resolved, rounds - 1);
          // The prompt, and once a round.
          EXPECT_EQ(promising.log.waits, rounds + (length > 1 ? 1 : 0));
          EXPECT_EQ(plain.draft.promised_passes(), 0);
        }
      }
    }
  }
}

TEST_F(PromisedTest, ChangesNothingOfRealModels) {
  const auto target = testing::MakeRandomModel(*cpu_, {.seed = 1});
  for (const char* kind : {"ssd", "attention"}) {
    // A draft model that is never right, and one that always is.
    const auto other = testing::MakeRandomModel(*cpu_, {.kind = kind, .seed = 2});
    for (const LanguageModel* draft : {other.get(), target.get()}) {
      for (const char* shape : {"chain:4", "topk:3,2,1"}) {
        for (int length : {1, 40}) {
          const Pair promising(*cpu_, *target, *draft, true), plain(*cpu_, *target, *draft, false);
          const auto prompt = Prompt(length, target->info().vocab_size, 9);
          const Options options{.shape = shape, .max_new_tokens = 45};
          SCOPED_TRACE(absl::StrCat(kind, " ", shape, " ", length));
          const Outcome got = Generate(promising, prompt, options);
          ExpectSame(got, Generate(plain, prompt, options));
          EXPECT_GT(got.resolved, 0);
        }
      }
    }
  }
}

class NoScores final : public ScoreSink {
 public:
  void OnScores(std::span<const TokenId>, const TokenTree& tree,
                const TargetScores& scores) override {
    EXPECT_FALSE(tree.promised());
    EXPECT_EQ(scores.logits.rows, tree.size());
  }
};

TEST_F(PromisedTest, OnlyWhereTheGreatestTokensAreEnough) {
  const FakeModel target({.vocab = 20, .seed = 1});
  const FakeModel draft({.vocab = 20, .seed = 1, .disagreement = 0.5, .disagreement_seed = 7});
  const auto prompt = Prompt(5, 20, 1);
  NoScores sink;
  const struct {
    Options options;
    bool promised;
  } cases[] = {
      {{.rule = "gumbel"}, true},
      {{.method = "sampled"}, true},  // temperature 0: the best tokens
      {{.max_nodes = 4}, true},
      {{.max_nodes = 1}, false},
      {{.rule = "gumbel", .temperature = 0.8}, false},
      {{.rule = "recursive", .method = "sampled", .temperature = 0.8}, false},
      {{.rule = "recursive", .temperature = 0.8}, false},
      {{.scores = &sink}, false},
  };
  for (const auto& c : cases) {
    SCOPED_TRACE(absl::StrCat(c.options.rule, " ", c.options.method, " ", c.options.temperature));
    const Pair promising(*cpu_, target, draft, true), plain(*cpu_, target, draft, false);
    const Outcome got = Generate(promising, prompt, c.options);
    ExpectSame(got, Generate(plain, prompt, c.options));
    EXPECT_EQ(got.resolved > 0, c.promised);
  }
  // Models of two backends.
  const auto other_cpu = *CpuBackend::Create(1);
  PassLog here{.backend = cpu_.get()}, there{.backend = other_cpu.get()};
  Pair apart(*cpu_, target, draft, true);
  const PromisingModel far(draft, &there);
  const auto drafter = *MakeDrafter("model", {.model = &far, .shape = "chain:3"});
  const auto state = *drafter->NewState();
  const SamplingOptions sampling;
  const DraftContext context{
      .tokens = prompt, .state = state.get(), .sampling = &sampling, .promises = cpu_.get()};
  DraftTree tree;
  ASSERT_TRUE(drafter->Draft({&context, 1}, {&tree, 1}).ok());
  EXPECT_FALSE(tree.tree.promised());
}

TEST_F(PromisedTest, LogitsThatAreNoNumbersAreFoundAllTheSame) {
  const FakeModel target({.vocab = 20, .seed = 1});
  const FakeModel draft({.vocab = 20, .seed = 1, .disagreement = 0.5, .disagreement_seed = 7});
  const auto prompt = Prompt(5, 20, 1);
  for (int bad_call : {1, 2, 3, 5, 12}) {
    absl::Status statuses[2];
    for (bool promising : {false, true}) {
      Pair pair(*cpu_, target, draft, promising);
      pair.draft.nan = [&](int call, int) { return call == bad_call; };
      statuses[promising] = Generate(pair, prompt, {}).status;
    }
    EXPECT_EQ(statuses[1].code(), absl::StatusCode::kDataLoss);
    EXPECT_EQ(statuses[0], statuses[1]);
  }
  // Of the target.
  for (bool promising : {false, true}) {
    Pair pair(*cpu_, target, draft, promising);
    pair.target.nan = [](int call, int row) { return call == 3 && row == 0; };
    EXPECT_THAT(std::string(Generate(pair, prompt, {}).status.message()),
                HasSubstr("are not numbers"));
  }
}

TEST_F(PromisedTest, TokensThatTheTargetDoesNotHaveAreRefused) {
  const FakeModel target({.vocab = 20, .seed = 1}), draft({.vocab = 500, .seed = 2});
  const auto prompt = Prompt(5, 20, 1);
  for (bool promising : {false, true}) {
    const Pair pair(*cpu_, target, draft, promising);
    EXPECT_EQ(Generate(pair, prompt, {.shape = "chain:1"}).status.code(),
              absl::StatusCode::kInvalidArgument);
  }
}

// Promises the best token of a pass of its own, and cannot resolve it.
class ForgetfulDrafter final : public Drafter {
 public:
  explicit ForgetfulDrafter(const LanguageModel& model) : model_(model) {}
  DrafterInfo info() const override { return {"forgetful", false}; }
  absl::StatusOr<std::unique_ptr<DraftState>> NewState() const override {
    return absl::UnimplementedError("it has none");
  }
  absl::Status Draft(std::span<const DraftContext> contexts,
                     std::span<DraftTree> out) const override {
    RETURN_IF_ERROR(BeginDraft(contexts[0], &out[0]));
    EXPECT_EQ(contexts[0].promises, model_.promises());
    ASSIGN_OR_RETURN(const auto state, model_.NewState({.max_positions = 100, .max_pending = 1}));
    ASSIGN_OR_RETURN(const auto workspace, model_.NewWorkspace(1));
    const ForwardItem item{.state = state.get(),
                           .tokens = contexts[0].tokens,
                           .logits = LogitsOf::kLast,
                           .commit_chain = true,
                           .top = 1,
                           .promise = true};
    ASSIGN_OR_RETURN(const ForwardResult result, model_.Forward({&item, 1}, *workspace));
    return out[0].AddPromised(NodeId(0), result.top[0]).status();
  }
  size_t MemoryBytes(const DraftState&) const override { return 0; }

 private:
  const LanguageModel& model_;
};

TEST_F(PromisedTest, DraftersThatPromiseResolve) {
  const FakeModel target({.vocab = 20, .seed = 1});
  const Pair pair(*cpu_, target, target, true);
  const ForgetfulDrafter drafter(pair.draft);
  const auto loop = *DecodeLoop::Create(pair.target, 8);
  const auto rule = *MakeAcceptanceRule("greedy");
  const auto prompt = Prompt(5, 20, 1);
  DecodeRequest request;
  request.prompt = prompt;
  request.drafter = &drafter;
  request.rule = rule.get();
  request.max_new_tokens = 10;
  request.max_nodes = 8;
  Generation out;
  EXPECT_THAT(std::string(loop->Decode({&request, 1}, {&out, 1}).message()),
              HasSubstr("drafter 'forgetful' does not resolve promised tokens"));
}

TEST_F(PromisedTest, PromisesEnd) {
  const FakeModel base({.vocab = 20, .seed = 1});
  PassLog log{.backend = cpu_.get()};
  const PromisingModel model(base, &log);
  const auto state = *model.NewState({.max_positions = 200, .max_pending = 64});
  const auto workspace = *model.NewWorkspace(64);
  const TokenId first(3);
  const auto read = [&](TokenId token, int top, bool promise) {
    const ForwardItem item{.state = state.get(),
                           .tokens = {&token, 1},
                           .logits = LogitsOf::kLast,
                           .commit_chain = true,
                           .top = top,
                           .promise = promise};
    return model.Forward({&item, 1}, *workspace);
  };
  const auto result = read(first, 2, true);
  ASSERT_TRUE(result.ok()) << result.status();
  TokenId promised[3] = {result->top[0], TokenId(7), result->top[1]};
  EXPECT_TRUE(IsPromised(promised[0]) && IsPromised(promised[2]));
  std::vector<TokenId> best;
  TopK(base.LogitsAfter({&first, 1}), 2, &best);
  for (int i = 1; i < kPromisePasses; ++i) ASSERT_TRUE(read(first, 1, false).ok());
  TokenId tokens[3] = {promised[0], promised[1], promised[2]};
  ASSERT_TRUE(model.Resolve(tokens).ok());
  EXPECT_THAT(tokens, ::testing::ElementsAre(best[0], TokenId(7), best[1]));
  // The last pass that may read it.
  ASSERT_TRUE(read(promised[0], 1, false).ok());
  EXPECT_EQ(read(promised[0], 1, false).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(model.Resolve(promised).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(IsPromised(promised[0]));

  // Where there are none.
  EXPECT_EQ(read(first, 0, true).status().code(), absl::StatusCode::kInvalidArgument);
  const auto real = testing::MakeRandomModel(*cpu_, {});
  EXPECT_EQ(real->promises(), nullptr);
  EXPECT_EQ(real->Resolve(promised).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(real->Resolve({tokens, 3}).ok());
  const auto real_state = *real->NewState({.max_positions = 10, .max_pending = 4});
  const auto real_workspace = *real->NewWorkspace(4);
  const ForwardItem item{.state = real_state.get(), .tokens = {promised, 1}};
  EXPECT_THAT(std::string(real->Forward({&item, 1}, *real_workspace).status().message()),
              HasSubstr("takes no promised tokens"));
}

TEST_F(PromisedTest, DraftsAreResolvedOnceAndBeforeTheNext) {
  const FakeModel base({.vocab = 20, .seed = 1});
  PassLog log{.backend = cpu_.get()};
  const PromisingModel model(base, &log);
  const auto drafter = *MakeDrafter("model", {.model = &model, .shape = "topk:2,1"});
  const auto state = *drafter->NewState();
  const SamplingOptions sampling;
  const auto prompt = Prompt(5, 20, 1);
  DraftContext context{
      .tokens = prompt, .state = state.get(), .sampling = &sampling, .promises = cpu_.get()};
  DraftTree tree;
  ASSERT_TRUE(drafter->Draft({&context, 1}, {&tree, 1}).ok());
  EXPECT_TRUE(tree.tree.promised());
  EXPECT_EQ(log.waits, 0);
  EXPECT_EQ(drafter->Draft({&context, 1}, {&tree, 1}).code(),
            absl::StatusCode::kFailedPrecondition);
  state->Reset();
  ASSERT_TRUE(drafter->Draft({&context, 1}, {&tree, 1}).ok());
  ASSERT_TRUE(drafter->Resolve(context, &tree).ok());
  EXPECT_FALSE(tree.tree.promised());
  const std::string text = tree.tree.ToString();
  // The same text again: the tokens after it are known.
  ASSERT_TRUE(drafter->Draft({&context, 1}, {&tree, 1}).ok());
  ASSERT_TRUE(drafter->Resolve(context, &tree).ok());
  EXPECT_EQ(tree.tree.ToString(), text);
  // And without promises.
  context.promises = nullptr;
  ASSERT_TRUE(drafter->Draft({&context, 1}, {&tree, 1}).ok());
  EXPECT_EQ(tree.tree.ToString(), text);
  // A promise that does not hold any more.
  context.promises = cpu_.get();
  std::vector<TokenId> longer = prompt;
  longer.push_back(TokenId(1));
  context.tokens = longer;
  ASSERT_TRUE(drafter->Draft({&context, 1}, {&tree, 1}).ok());
  log.launched += kPromisePasses;
  EXPECT_EQ(drafter->Resolve(context, &tree).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST(PromiseTest, TokensSayWhichTheyAre) {
  for (uint32_t pass : {0u, 1u, 63u, 64u, 1000u, cuda::kPassNumbers - 1}) {
    for (int row : {0, 1, 63}) {
      for (int k : {0, 1, 31}) {
        const int32_t token = cuda::ToToken({pass, row, k});
        EXPECT_TRUE(IsPromised(TokenId(token)));
        const cuda::Promise promise = cuda::ToPromise(token);
        EXPECT_EQ(promise.pass, pass);
        EXPECT_EQ(promise.row, row);
        EXPECT_EQ(promise.k, k);
        const cuda::Promise wrapped =
            cuda::ToPromise(cuda::ToToken({pass + 3 * cuda::kPassNumbers, row, k}));
        EXPECT_EQ(wrapped.pass, pass);
      }
    }
  }
  EXPECT_FALSE(IsPromised(TokenId()));
  EXPECT_FALSE(IsPromised(TokenId(0)));
  // Numbers of passes wrap, and so do their last bits.
  for (uint64_t pass : {uint64_t{5}, uint64_t{cuda::kPassNumbers} - 1, uint64_t{cuda::kPassNumbers},
                        uint64_t{UINT32_MAX} - 2}) {
    const cuda::Promise promise =
        cuda::ToPromise(cuda::ToToken({static_cast<uint32_t>(pass), 0, 0}));
    EXPECT_TRUE(cuda::Holds(promise, pass));
    EXPECT_TRUE(cuda::Holds(promise, pass + kPromisePasses - 1));
    EXPECT_FALSE(cuda::Holds(promise, pass + kPromisePasses));
    EXPECT_FALSE(cuda::Holds(promise, pass - 1));
  }
  // Passes have numbers from 1, and not every negative number is a promise.
  for (const int32_t other : {-2, -100000, INT32_MIN, INT32_MIN + (1 << 30)}) {
    for (uint64_t launched : {0, 1, 2, 63}) {
      EXPECT_FALSE(cuda::Holds(cuda::ToPromise(other), launched)) << other << " " << launched;
    }
  }
}

}  // namespace
}  // namespace canopy
