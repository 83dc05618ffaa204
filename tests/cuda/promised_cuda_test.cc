// Promised tokens and commits that the next pass does, on a GPU: to the last bit what waiting for
// every pass gives. Skipped where there is no device.

#include <algorithm>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/cpu_backend.h"
#include "core/cuda/pass.h"
#include "core/cuda_backend.h"
#include "drafting/registry.h"
#include "experiments/decode_loop.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "models/decoder_cuda.h"
#include "tests/support/noting_drafter.h"
#include "tests/support/on_device.h"
#include "tests/support/random_model.h"
#include "tests/support/session.h"
#include "verify/sampling.h"

namespace canopy {
namespace {

using ::testing::HasSubstr;
using testing::MakeRandomSpec;
using testing::NotingDrafter;
using testing::OnDevice;
using testing::RandomModelOptions;
using testing::RandomTokens;
using testing::RandomTree;
using testing::Rows;
using testing::SameBits;
using testing::Session;

constexpr int kVocab = 97;

class PromisedCuda : public OnDevice {
 protected:
  std::unique_ptr<CudaModel> Make(const RandomModelOptions& options, DType dtype = DType::kBF16) {
    auto model = MakeCudaDecoder(*cuda_, MakeRandomSpec(*cpu_, options), dtype);
    CHECK(model.ok());
    return *std::move(model);
  }
  // Gives no numbers.
  std::unique_ptr<CudaModel> MakeBroken() {
    DecoderSpec spec = MakeRandomSpec(*cpu_, {});
    for (float& weight : spec.final_norm.weight) weight = std::numeric_limits<float>::quiet_NaN();
    auto model = MakeCudaDecoder(*cuda_, std::move(spec), DType::kBF16);
    CHECK(model.ok());
    return *std::move(model);
  }
  std::vector<TokenId> Tokens(int length, uint64_t seed) {
    std::mt19937_64 rng(seed);
    return RandomTokens(rng, length, kVocab);
  }
};

struct Outcome {
  absl::Status status;
  Generation generation;
  std::vector<std::string> trees;
  int resolved = 0;
  uint64_t waits = 0;  // of the host, for the device
};

Outcome Generate(CudaBackend& cuda, const LanguageModel& target, const LanguageModel& draft,
                 const std::string& shape, std::span<const TokenId> prompt, bool may_promise,
                 int workspace_rows = 64) {
  constexpr int kNewTokens = 100;
  Outcome outcome;
  const auto loop = *DecodeLoop::Create(target, 64);
  const auto drafter = *MakeDrafter(
      "model",
      {.model = &draft, .shape = shape, .max_positions = 512, .workspace_rows = workspace_rows});
  const auto state = *drafter->NewState();
  const NotingDrafter noting(*drafter, may_promise);
  const auto rule = *MakeAcceptanceRule("greedy");
  DecodeRequest request;
  request.prompt = prompt;
  request.drafter = &noting;
  request.draft_state = state.get();
  request.rule = rule.get();
  request.max_new_tokens = kNewTokens;
  CHECK(loop->Reserve(static_cast<int64_t>(prompt.size()) + kNewTokens).ok());
  const uint64_t before = cuda.waits();
  outcome.status = loop->Decode({&request, 1}, {&outcome.generation, 1});
  outcome.waits = cuda.waits() - before;
  outcome.trees = noting.trees;
  outcome.resolved = noting.resolved;
  return outcome;
}

TEST_F(PromisedCuda, DraftsChangeNothingAndAreWaitedForOnce) {
  for (DType dtype : {DType::kBF16, DType::kF32}) {
    const auto target = Make({.kind = "hybrid", .layers = 3, .seed = 1}, dtype);
    const auto ssd = Make({.kind = "ssd", .seed = 2}, dtype);
    const auto attention = Make({.kind = "attention", .seed = 3}, dtype);
    // Drafts that are hardly ever right, and always.
    for (const CudaModel* draft : {ssd.get(), attention.get(), target.get()}) {
      for (const char* shape :
           {"chain:1", "chain:5", "topk:4,3,2,1", "((((),()),()),((),()),())"}) {
        for (int length : {1, 2, 33, 150}) {
          const std::vector<TokenId> prompt = Tokens(length, 10 + length);
          SCOPED_TRACE(absl::StrCat(draft->info().layers, " layers ", shape, " ", length));
          const Outcome got = Generate(*cuda_, *target, *draft, shape, prompt, true);
          const Outcome plain = Generate(*cuda_, *target, *draft, shape, prompt, false);
          ASSERT_TRUE(got.status.ok()) << got.status;
          ASSERT_TRUE(plain.status.ok()) << plain.status;
          EXPECT_EQ(got.generation.tokens, plain.generation.tokens);
          EXPECT_EQ(got.generation.accept_lengths, plain.generation.accept_lengths);
          EXPECT_EQ(got.trees, plain.trees);
          const size_t rounds = got.generation.accept_lengths.size();
          // All rounds but one that has no room for a draft.
          EXPECT_GE(got.resolved, static_cast<int>(rounds) - 1);
          EXPECT_EQ(plain.resolved, 0);
          // Once a round, and once for the prompt.
          EXPECT_EQ(got.waits, rounds + (length > 1 ? 1 : 0));
          EXPECT_GT(plain.waits, got.waits);
          const PhaseSeconds& seconds = got.generation.seconds;
          EXPECT_GT(seconds.device, 0.0);
          EXPECT_LT(seconds.device, seconds.rounds());
          EXPECT_LE(seconds.prefill + seconds.rounds(), seconds.total);
        }
      }
    }
  }
}

TEST_F(PromisedCuda, LevelsOfSeveralPasses) {
  const auto target = Make({.kind = "hybrid", .seed = 1});
  const auto draft = Make({.kind = "ssd", .seed = 2});
  const std::vector<TokenId> prompt = Tokens(20, 1);
  const Outcome got = Generate(*cuda_, *target, *draft, "topk:4,3,2", prompt, true, 5);
  const Outcome plain = Generate(*cuda_, *target, *draft, "topk:4,3,2", prompt, false, 5);
  ASSERT_TRUE(got.status.ok() && plain.status.ok());
  EXPECT_GT(got.resolved, 0);
  EXPECT_EQ(got.generation.tokens, plain.generation.tokens);
  EXPECT_EQ(got.trees, plain.trees);
}

// A sequence of which two models write alternate tokens, each the other's second best.
TEST_F(PromisedCuda, PassesOfSeveralModelsReadEachOthersTokens) {
  const auto a = Make({.kind = "ssd", .seed = 5}), b = Make({.kind = "attention", .seed = 6});
  const CudaModel* models[2] = {a.get(), b.get()};
  constexpr int kLength = kPromisePasses - 2;
  std::vector<TokenId> written[2];
  for (bool promise : {false, true}) {
    Session sessions[2] = {Session(*a), Session(*b)};
    // Each reads all tokens: both states hold the same text.
    TokenId token(7);
    std::vector<TokenId>& text = written[promise];
    for (int i = 0; i < kLength / 2; ++i) {
      TokenId next;
      for (int m = 0; m < 2; ++m) {
        const ForwardItem item{.state = &sessions[m].state(),
                               .tokens = {&token, 1},
                               .logits = LogitsOf::kLast,
                               .commit_chain = true,
                               .top = 2,
                               .promise = promise};
        const auto result = models[m]->Forward({&item, 1}, sessions[m].workspace());
        ASSERT_TRUE(result.ok()) << result.status();
        ASSERT_EQ(result->top.size(), 2u);
        EXPECT_EQ(IsPromised(result->top[1]), promise);
        if (m == i % 2) next = result->top[1];
      }
      text.push_back(next);
      token = next;
    }
    const uint64_t waits = cuda_->waits();
    const auto seconds = a->Resolve(text);
    ASSERT_TRUE(seconds.ok()) << seconds.status();
    EXPECT_LE(cuda_->waits() - waits, promise ? 1u : 0u);
    EXPECT_EQ(*seconds > 0.0, promise);
    EXPECT_LE(*seconds, a->DeviceSeconds());
    for (const TokenId t : text) EXPECT_FALSE(IsPromised(t));
  }
  EXPECT_EQ(written[0], written[1]);
}

TEST_F(PromisedCuda, PromisedPendingNodesAreResolved) {
  const auto model = Make({.kind = "hybrid", .seed = 4});
  const std::vector<TokenId> context = Tokens(40, 2);
  Session session(*model), plain(*model);
  session.Prefill(context);
  plain.Prefill(context);
  const TokenId root(3);
  const NodeId prefix = kPrefix;
  const ForwardItem first{.state = &session.state(),
                          .tokens = {&root, 1},
                          .parents = {&prefix, 1},
                          .top = 3,
                          .promise = true};
  const auto result = model->Forward({&first, 1}, session.workspace());
  ASSERT_TRUE(result.ok()) << result.status();
  const std::vector<TokenId> promised(result->top.begin(), result->top.end());
  const std::vector<NodeId> parents(3, NodeId(0));
  const ForwardItem second{.state = &session.state(), .tokens = promised, .parents = parents};
  const auto scored = model->Forward({&second, 1}, session.workspace());
  ASSERT_TRUE(scored.ok()) << scored.status();
  const Rows rows = testing::CopyRows(scored->logits);
  EXPECT_EQ(session.state().token(NodeId(2)), promised[1]);
  ASSERT_TRUE(session.state().ResolvePending().ok());

  const Rows expected_root = plain.Score({&root, 1}, {&prefix, 1});
  std::vector<TokenId> best;
  TopK(expected_root[0], 3, &best);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(session.state().token(NodeId(1 + i)), best[i]);
  EXPECT_EQ(rows, plain.Score(best, parents));
}

TEST_F(PromisedCuda, PromisesEnd) {
  const auto model = Make({.kind = "ssd", .seed = 5});
  Session session(*model);
  TokenId token(1);
  const auto read = [&](bool promise) {
    const ForwardItem item{.state = &session.state(),
                           .tokens = {&token, 1},
                           .logits = LogitsOf::kLast,
                           .commit_chain = true,
                           .top = 1,
                           .promise = promise};
    return model->Forward({&item, 1}, session.workspace());
  };
  const auto result = read(true);
  ASSERT_TRUE(result.ok());
  const TokenId promised = result->top[0];
  for (int i = 1; i < kPromisePasses; ++i) ASSERT_TRUE(read(false).ok());
  TokenId early = promised;
  ASSERT_TRUE(model->Resolve({&early, 1}).ok());
  EXPECT_GE(early.value, 0);
  // A chain of several passes is too long, and leaves the state as it was.
  std::vector<TokenId> chain(100, promised);
  const int position = session.state().position();
  const ForwardItem item{
      .state = &session.state(), .tokens = chain, .logits = LogitsOf::kNone, .commit_chain = true};
  EXPECT_EQ(model->Forward({&item, 1}, session.workspace()).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(session.state().position(), position);
  token = promised;
  ASSERT_TRUE(read(false).ok());  // the last pass that may
  EXPECT_THAT(std::string(read(false).status().message()), HasSubstr("no longer kept"));
  TokenId late = promised;
  EXPECT_EQ(model->Resolve({&late, 1}).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(late, promised);
  // A pass that read promised tokens is not run again: they may be others by then.
  EXPECT_EQ(model->Repeat(session.workspace(), 1).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST_F(PromisedCuda, OtherNegativeTokensAreNoPromises) {
  const auto model = Make({.kind = "ssd", .seed = 5});
  Session session(*model);
  const auto refused = [&](int32_t value) {
    TokenId token(value);
    const ForwardItem item{.state = &session.state(), .tokens = {&token, 1}, .commit_chain = true};
    EXPECT_EQ(model->Forward({&item, 1}, session.workspace()).status().code(),
              absl::StatusCode::kInvalidArgument)
        << value;
    EXPECT_EQ(model->Resolve({&token, 1}).status().code(), absl::StatusCode::kFailedPrecondition)
        << value;
  };
  constexpr int32_t kLowest = std::numeric_limits<int32_t>::min();
  for (int passes = 0; passes < 3; ++passes) {
    for (const int32_t value : {-2, -100000, kLowest, kLowest + (1 << 30), kLowest + 10 * 2048}) {
      refused(value);
    }
    session.Prefill(Tokens(1, passes));
  }
}

TEST_F(PromisedCuda, WhatIsNoTokenIsFoundWhenItIsResolved) {
  const auto broken = MakeBroken();
  const auto target = Make({.kind = "hybrid", .seed = 1});
  const std::vector<TokenId> prompt = Tokens(10, 3);
  const Outcome got = Generate(*cuda_, *target, *broken, "topk:2,2", prompt, true);
  const Outcome plain = Generate(*cuda_, *target, *broken, "topk:2,2", prompt, false);
  EXPECT_EQ(got.status.code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(got.status, plain.status);
  // A draft model with more tokens than the target.
  const auto wide = Make({.kind = "ssd", .vocab = 3000, .seed = 9});
  EXPECT_EQ(Generate(*cuda_, *target, *wide, "topk:2,2", prompt, true).status.code(),
            absl::StatusCode::kInvalidArgument);
  // And the device goes on.
  const auto draft = Make({.kind = "ssd", .seed = 2});
  EXPECT_TRUE(Generate(*cuda_, *target, *draft, "topk:2,2", prompt, true).status.ok());
}

class CommitsOfTheNextPass : public PromisedCuda,
                             public ::testing::WithParamInterface<std::string> {};

// The prefix of `whole` is committed by kernels of their own, at folds (or in one chain, where a
// model has none); that of the other by the passes behind short paths.
TEST_P(CommitsOfTheNextPass, EqualThoseOfTheirOwn) {
  for (DType dtype : {DType::kBF16, DType::kF32}) {
    const auto model = Make({.kind = GetParam(), .layers = 3, .seed = 8}, dtype);
    std::mt19937_64 rng(11);
    const std::vector<TokenId> context = RandomTokens(rng, 128, kVocab);
    const TokenTree tree = RandomTree(rng, 20, 10, kVocab);
    Session whole(*model), parts(*model);
    whole.Prefill(context);
    const Rows expected = whole.Score(tree);
    std::vector<std::unique_ptr<DecodeState>> forks;
    int commits = 0;
    for (size_t at = 0; at < context.size();) {
      const int length = static_cast<int>(std::min<size_t>(1 + rng() % 6, context.size() - at));
      TokenTree draft;
      std::vector<NodeId> path;
      for (int k = 0; k < length; ++k) {
        const NodeId above = path.empty() ? kPrefix : path.back();
        const TokenId other((context[at + k].value + 1) % kVocab);
        ASSERT_TRUE(draft.AddNode(above, other).ok());
        path.push_back(*draft.AddNode(above, context[at + k]));
      }
      parts.Score(draft);
      ASSERT_TRUE(parts.state().Commit(path).ok());
      at += length;
      if (at < context.size() && ++commits % 5 == 0) {
        // A copy that has the commit before it still, and what it was made of goes on without it.
        forks.push_back(*parts.state().Fork());
        const std::vector<TokenId> rest(context.begin() + static_cast<std::ptrdiff_t>(at),
                                        context.end());
        const ForwardItem item{.state = forks.back().get(),
                               .tokens = rest,
                               .logits = LogitsOf::kNone,
                               .commit_chain = true};
        ASSERT_TRUE(model->Forward({&item, 1}, parts.workspace()).ok());
      }
    }
    ASSERT_GE(forks.size(), 4u);
    const Rows got = parts.Score(tree);
    for (int i = 0; i < tree.size(); ++i) EXPECT_TRUE(SameBits(got[i], expected[i])) << i;
    for (const auto& fork : forks) {
      const ForwardItem item{
          .state = fork.get(), .tokens = tree.tokens(), .parents = tree.parents()};
      const auto result = model->Forward({&item, 1}, parts.workspace());
      ASSERT_TRUE(result.ok()) << result.status();
      EXPECT_EQ(testing::CopyRows(result->logits), expected);
    }
  }
}

TEST_P(CommitsOfTheNextPass, AreDroppedWithTheSequence) {
  const auto model = Make({.kind = GetParam(), .seed = 8});
  const std::vector<TokenId> first = Tokens(37, 1), second = Tokens(41, 2);
  std::mt19937_64 rng(12);
  const TokenTree tree = RandomTree(rng, 20, 10, kVocab);
  Session fresh(*model), used(*model);
  fresh.Prefill(second);
  const Rows expected = fresh.Score(tree);
  used.Prefill(first);
  used.Score(tree);
  const NodeId root(0);
  ASSERT_TRUE(used.state().Commit({&root, 1}).ok());
  used.state().Reset();  // before a pass has done the commit
  used.Prefill(second);
  EXPECT_EQ(used.Score(tree), expected);
}

// Paths that end before, at and behind a fold, and a refused pass in between.
TEST_P(CommitsOfTheNextPass, AroundFolds) {
  const auto model = Make({.kind = GetParam(), .seed = 8});
  for (int before : {29, 30, 31, 32, 61, 63}) {
    for (int length : {1, 2, 3, 31}) {
      const std::vector<TokenId> context = Tokens(before + length, 5);
      const TokenId next(9), unknown(kVocab);
      Session whole(*model), parts(*model);
      whole.Prefill(context);
      const std::span<const TokenId> all(context);
      parts.Prefill(all.first(before));
      std::vector<NodeId> parents, path;
      for (int i = 0; i < length; ++i) {
        parents.push_back(NodeId(i - 1));
        path.push_back(NodeId(i));
      }
      parts.Score(all.subspan(before), parents);
      ASSERT_TRUE(parts.state().Commit(path).ok());
      const NodeId prefix = kPrefix;
      const ForwardItem refused{
          .state = &parts.state(), .tokens = {&unknown, 1}, .parents = {&prefix, 1}};
      EXPECT_FALSE(model->Forward({&refused, 1}, parts.workspace()).ok());
      EXPECT_EQ(parts.Score({&next, 1}, {&prefix, 1}), whole.Score({&next, 1}, {&prefix, 1}))
          << before << " " << length;
    }
  }
}

// Running the last pass again does not do its commit again, which would move other rows.
TEST_P(CommitsOfTheNextPass, AreNotRepeated) {
  const auto model = Make({.kind = GetParam(), .seed = 8});
  const std::vector<TokenId> context = Tokens(20, 5);
  std::mt19937_64 rng(13);
  const TokenTree tree = RandomTree(rng, 20, 10, kVocab), next = RandomTree(rng, 10, 5, kVocab);
  Session session(*model), repeated(*model);
  Rows rows[2];
  for (Session* s : {&session, &repeated}) {
    s->Prefill(context);
    s->Score(tree);
    const NodeId root(0);
    ASSERT_TRUE(s->state().Commit({&root, 1}).ok());
    s->Score(next);
    if (s == &repeated) {
      ASSERT_TRUE(model->Repeat(s->workspace(), 3).ok());
    }
    s->state().DropPending();
    rows[s == &repeated] = s->Score(next);
  }
  EXPECT_EQ(rows[0], rows[1]);
}

INSTANTIATE_TEST_SUITE_P(Kinds, CommitsOfTheNextPass,
                         ::testing::Values("ssd", "attention", "hybrid"));

}  // namespace
}  // namespace canopy
