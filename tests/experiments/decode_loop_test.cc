#include "experiments/decode_loop.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <numeric>
#include <random>

#include "core/cpu_backend.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/random_model.h"

namespace canopy {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// A model with another end of text and another number of positions.
class ChangedModel final : public LanguageModel {
 public:
  explicit ChangedModel(const LanguageModel& base) : base_(base), info_(base.info()) {}
  ModelInfo& mutable_info() { return info_; }
  const ModelInfo& info() const override { return info_; }
  absl::StatusOr<std::unique_ptr<DecodeState>> NewState(
      const StateOptions& options) const override {
    return base_.NewState(options);
  }
  absl::StatusOr<std::unique_ptr<Workspace>> NewWorkspace(int max_rows) const override {
    return base_.NewWorkspace(max_rows);
  }
  absl::StatusOr<ForwardResult> Forward(std::span<const ForwardItem> items,
                                        Workspace& workspace) const override {
    return base_.Forward(items, workspace);
  }

 private:
  absl::Status CommitRows(DecodeState&, std::span<const NodeId>) const override {
    return absl::InternalError("states belong to the base model");
  }

  const LanguageModel& base_;
  ModelInfo info_;
};

class NoState final : public DraftState {
 public:
  void Reset() override {}
};

// Proposes what a function makes of the context.
class TestDrafter final : public Drafter {
 public:
  using Make = std::function<void(const DraftContext&, DraftTree*)>;
  explicit TestDrafter(Make make) : make_(std::move(make)) {}
  DrafterInfo info() const override { return {"test", false}; }
  absl::StatusOr<std::unique_ptr<DraftState>> NewState() const override {
    return std::make_unique<NoState>();
  }
  absl::Status Draft(std::span<const DraftContext> contexts,
                     std::span<DraftTree> out) const override {
    for (size_t i = 0; i < contexts.size(); ++i) make_(contexts[i], &out[i]);
    return absl::OkStatus();
  }
  size_t MemoryBytes(const DraftState&) const override { return 0; }

 private:
  Make make_;
};

void PlainTree(const DraftContext& context, DraftTree* out) {
  out->Clear();
  CHECK(out->AddNode(kPrefix, context.tokens.back()).ok());
}

class DecodeLoopTest : public ::testing::Test {
 protected:
  void SetUp() override {
    cpu_ = *CpuBackend::Create(1);
    base_ = testing::MakeRandomModel(*cpu_, {});
    model_ = std::make_unique<ChangedModel>(*base_);
    rule_ = *MakeAcceptanceRule("greedy");
    std::mt19937_64 rng(5);
    prompt_ = testing::RandomTokens(rng, 13, base_->info().vocab_size);
  }

  // The truth: one node at a time with a state of its own, the greatest logit taken by hand.
  std::vector<TokenId> Naive(int count) {
    auto state = *base_->NewState({.max_positions = 512, .max_pending = 1});
    auto workspace = *base_->NewWorkspace(1);
    std::vector<TokenId> tokens = prompt_;
    for (size_t i = 0; i + 1 < tokens.size() + count; ++i) {
      const NodeId root = kPrefix;
      const ForwardItem item = {state.get(), {&tokens[i], 1}, {&root, 1}, LogitsOf::kAll, false};
      const ForwardResult result = *base_->Forward({&item, 1}, *workspace);
      if (i + 1 == tokens.size()) {
        const float* row = result.logits.row(0);
        int best = 0;
        for (int v = 1; v < result.logits.columns; ++v) {
          if (row[v] > row[best]) best = v;
        }
        tokens.push_back(TokenId(best));
        if (static_cast<int>(tokens.size() - prompt_.size()) == count) break;
      }
      const NodeId first(0);
      CHECK(state->Commit({&first, 1}).ok());
    }
    return {tokens.begin() + static_cast<std::ptrdiff_t>(prompt_.size()), tokens.end()};
  }

  absl::Status Run(const TestDrafter& drafter, int max_new_tokens, Generation* out) {
    auto loop = DecodeLoop::Create(*model_, 64);
    CHECK(loop.ok());
    NoState state;
    DecodeRequest request;
    request.prompt = prompt_;
    request.drafter = &drafter;
    request.draft_state = &state;
    request.rule = rule_.get();
    request.max_new_tokens = max_new_tokens;
    request.sink = sink_;
    request.stop = stop_;
    return (*loop)->Decode({&request, 1}, {out, 1});
  }

  // Drafts `right` tokens of the truth, and at each depth a wrong sibling that is drawn first.
  TestDrafter Oracle(const std::vector<TokenId>& truth, int right) {
    return TestDrafter([this, truth, right](const DraftContext& context, DraftTree* out) {
      PlainTree(context, out);
      NodeId parent(0);
      const size_t done = context.tokens.size() - prompt_.size();
      const int vocab = base_->info().vocab_size;
      for (int d = 0; d < right && d < context.max_depth && done + d < truth.size(); ++d) {
        const TokenId good = truth[done + d];
        const TokenId bad((good.value + 1) % vocab);
        CHECK(out->AddNode(parent, bad).ok());
        parent = *out->AddNode(parent, good);
      }
    });
  }

  std::unique_ptr<CpuBackend> cpu_;
  std::unique_ptr<LanguageModel> base_;
  std::unique_ptr<ChangedModel> model_;
  std::unique_ptr<AcceptanceRule> rule_;
  std::vector<TokenId> prompt_;
  TokenSink* sink_ = nullptr;
  const std::atomic<bool>* stop_ = nullptr;
};

int64_t Sum(const std::vector<int32_t>& values) {
  return std::accumulate(values.begin(), values.end(), int64_t{0});
}

TEST_F(DecodeLoopTest, PlainDecodingEqualsANaiveLoop) {
  Generation out;
  ASSERT_TRUE(Run(TestDrafter(PlainTree), 60, &out).ok());
  EXPECT_EQ(out.tokens, Naive(60));
  EXPECT_EQ(out.accept_lengths, std::vector<int32_t>(60, 1));
  EXPECT_EQ(out.finish, Finish::kLimit);
  EXPECT_EQ(out.max_pending, 1);
  for (const NodeCounts& counts : out.by_depth) EXPECT_EQ(counts.proposed, 0);
}

// A state that has served another sequence is as good as a new one, past the first folds too.
TEST_F(DecodeLoopTest, AnswersDoNotDependOnWhatWasAnsweredBefore) {
  const std::vector<TokenId> truth = Naive(150);
  auto loop = *DecodeLoop::Create(*model_, 64);
  const TestDrafter drafter(PlainTree);
  NoState state;
  DecodeRequest request;
  request.drafter = &drafter;
  request.draft_state = &state;
  request.rule = rule_.get();
  Generation out;
  for (int length : {150, 70, 35, 101}) {
    std::mt19937_64 rng(length);
    const std::vector<TokenId> other = testing::RandomTokens(rng, length, 97);
    request.prompt = other;
    request.max_new_tokens = length;
    ASSERT_TRUE(loop->Decode({&request, 1}, {&out, 1}).ok());
    request.prompt = prompt_;
    request.max_new_tokens = 150;
    ASSERT_TRUE(loop->Decode({&request, 1}, {&out, 1}).ok());
    EXPECT_EQ(out.tokens, truth) << length;
  }
}

TEST_F(DecodeLoopTest, RightDraftsAreAcceptedAndCounted) {
  const std::vector<TokenId> truth = Naive(60);
  Generation out;
  ASSERT_TRUE(Run(Oracle(truth, 3), 60, &out).ok());
  EXPECT_EQ(out.tokens, truth);
  // Rounds add 3 drafted tokens and one more; 60 = 15 * 4.
  EXPECT_EQ(out.accept_lengths, std::vector<int32_t>(15, 4));
  for (int depth = 1; depth <= 3; ++depth) {
    EXPECT_EQ(out.by_depth[depth].rounds, 15) << depth;
    EXPECT_EQ(out.by_depth[depth].proposed, 30) << depth;
    EXPECT_EQ(out.by_depth[depth].accepted, 15) << depth;
  }
  EXPECT_EQ(out.by_depth[4].proposed, 0);
  EXPECT_EQ(out.by_rank[0].proposed, 45);
  EXPECT_EQ(out.by_rank[0].accepted, 0);
  EXPECT_EQ(out.by_rank[1].proposed, 45);
  EXPECT_EQ(out.by_rank[1].accepted, 45);
  EXPECT_EQ(out.by_rank[1].rounds, 15);
  EXPECT_EQ(out.max_pending, 7);
}

TEST_F(DecodeLoopTest, TheLastRoundsDraftNoFurtherThanTheLimit) {
  const std::vector<TokenId> truth = Naive(60);
  for (int limit : {1, 2, 5, 6, 7, 8}) {
    Generation out;
    ASSERT_TRUE(Run(Oracle(truth, 3), limit, &out).ok());
    EXPECT_EQ(out.tokens, std::vector<TokenId>(truth.begin(), truth.begin() + limit));
    EXPECT_EQ(Sum(out.accept_lengths), limit);
    EXPECT_EQ(out.finish, Finish::kLimit);
    EXPECT_EQ(static_cast<int>(out.accept_lengths.size()), (limit + 3) / 4);
  }
}

TEST_F(DecodeLoopTest, RandomTreesChangeNothing) {
  const std::vector<TokenId> truth = Naive(80);
  std::mt19937_64 rng(9);
  const TestDrafter drafter([&](const DraftContext& context, DraftTree* out) {
    PlainTree(context, out);
    const size_t done = context.tokens.size() - prompt_.size();
    const int nodes = static_cast<int>(rng() % 40);
    for (int i = 0; i < nodes; ++i) {
      const NodeId parent(static_cast<int32_t>(rng() % out->tree.size()));
      const int depth = out->tree.depth(parent);
      if (depth + 1 > context.max_depth) continue;
      TokenId token(static_cast<int32_t>(rng() % base_->info().vocab_size));
      if (rng() % 2 && done + depth < truth.size()) token = truth[done + depth];
      if (out->tree.FindChild(parent, token) == kPrefix) CHECK(out->AddNode(parent, token).ok());
    }
  });
  Generation out;
  ASSERT_TRUE(Run(drafter, 80, &out).ok());
  EXPECT_EQ(out.tokens, truth);
  EXPECT_EQ(Sum(out.accept_lengths), 80);
  EXPECT_LT(out.accept_lengths.size(), 80u);  // something was accepted
  int64_t accepted_by_depth = 0, accepted_by_rank = 0;
  for (const NodeCounts& c : out.by_depth) accepted_by_depth += c.accepted;
  for (const NodeCounts& c : out.by_rank) accepted_by_rank += c.accepted;
  EXPECT_EQ(accepted_by_depth, accepted_by_rank);
  EXPECT_EQ(accepted_by_depth + static_cast<int64_t>(out.accept_lengths.size()), 80);
}

// The end of the text at every place of a round: as a drafted token and as the target's own.
TEST_F(DecodeLoopTest, NothingAfterTheEndOfTextIsOutputOrCounted) {
  const std::vector<TokenId> truth = Naive(60);
  for (int at = 0; at < 12; ++at) {
    const TokenId eos = truth[at];
    const int first = static_cast<int>(std::find(truth.begin(), truth.end(), eos) - truth.begin());
    model_->mutable_info().eos_tokens = {TokenId(-5), eos};
    Generation out;
    ASSERT_TRUE(Run(Oracle(truth, 3), 60, &out).ok());
    EXPECT_EQ(out.tokens, std::vector<TokenId>(truth.begin(), truth.begin() + first + 1));
    EXPECT_EQ(out.finish, Finish::kEndOfText);
    EXPECT_EQ(Sum(out.accept_lengths), first + 1);
    EXPECT_EQ(static_cast<int>(out.accept_lengths.size()), first / 4 + 1);
    int64_t accepted = 0;
    for (const NodeCounts& c : out.by_depth) accepted += c.accepted;
    // All but the target's own tokens, one at the end of each whole round.
    EXPECT_EQ(accepted, first + 1 - (first + 1) / 4);
    // Levels below the end are not proposed either.
    const int last_round = first % 4 + 1;
    for (int depth = 1; depth <= 3; ++depth) {
      const int rounds = first / 4 + (depth <= last_round ? 1 : 0);
      EXPECT_EQ(out.by_depth[depth].proposed, 2 * rounds) << at << " " << depth;
    }
  }
}

TEST_F(DecodeLoopTest, StopsWhereTheModelHasNoPositionLeft) {
  const std::vector<TokenId> truth = Naive(60);
  const int prompt = static_cast<int>(prompt_.size());
  for (int positions : {prompt, prompt + 1, prompt + 7}) {
    model_->mutable_info().max_positions = positions;
    Generation out;
    ASSERT_TRUE(Run(Oracle(truth, 3), 60, &out).ok());
    // The last token needs no position of its own.
    EXPECT_EQ(static_cast<int>(out.tokens.size()), positions - prompt + 1);
    EXPECT_TRUE(std::equal(out.tokens.begin(), out.tokens.end(), truth.begin()));
    EXPECT_EQ(out.finish, Finish::kPositions);
  }
  model_->mutable_info().max_positions = prompt - 1;
  Generation out;
  const absl::Status status = Run(Oracle(truth, 3), 60, &out);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("13 tokens"));
  prompt_.clear();
  EXPECT_THAT(std::string(Run(TestDrafter(PlainTree), 5, &out).message()), HasSubstr("no tokens"));
}

TEST_F(DecodeLoopTest, DraftersThatBreakTheirLimitsAreRefused) {
  const auto message = [&](TestDrafter::Make make) {
    Generation out;
    return std::string(Run(TestDrafter(std::move(make)), 5, &out).message());
  };
  EXPECT_THAT(message([](const DraftContext&, DraftTree* out) { out->Clear(); }),
              HasSubstr("root"));
  EXPECT_THAT(message([](const DraftContext& c, DraftTree* out) {
                out->Clear();
                CHECK(out->AddNode(kPrefix, TokenId((c.tokens.back().value + 1) % 97)).ok());
              }),
              HasSubstr("root"));
  EXPECT_THAT(message([](const DraftContext& c, DraftTree* out) {
                PlainTree(c, out);
                for (int i = 0; i < 64; ++i) CHECK(out->AddNode(NodeId(0), TokenId(i)).ok());
              }),
              HasSubstr("65 nodes"));
  EXPECT_THAT(message([](const DraftContext& c, DraftTree* out) {
                PlainTree(c, out);
                for (int i = 0; i < 5; ++i) CHECK(out->AddNode(NodeId(i), TokenId(i)).ok());
              }),
              HasSubstr("5 levels where 4"));
  EXPECT_THAT(message([](const DraftContext& c, DraftTree* out) {
                EXPECT_EQ(c.promises, nullptr);
                PlainTree(c, out);
                CHECK(out->AddPromised(NodeId(0), TokenId(-7)).ok());
              }),
              HasSubstr("promised tokens where it was not allowed"));
}

class Collector : public TokenSink {
 public:
  void OnTokens(std::span<const TokenId> added, int from_draft) override {
    tokens.insert(tokens.end(), added.begin(), added.end());
    drafted.push_back(from_draft);
    if (on_round) on_round();
  }
  std::vector<TokenId> tokens;
  std::vector<int> drafted;
  std::function<void()> on_round;
};

TEST_F(DecodeLoopTest, TheSinkSeesEveryTokenAndWhoseItIs) {
  const std::vector<TokenId> truth = Naive(10);
  Collector collector;
  sink_ = &collector;
  Generation out;
  ASSERT_TRUE(Run(Oracle(truth, 3), 10, &out).ok());
  EXPECT_EQ(collector.tokens, truth);
  EXPECT_THAT(collector.drafted, ElementsAre(3, 3, 1));
}

TEST_F(DecodeLoopTest, RefusesARequestWithoutDrafterOrRule) {
  const std::vector<TokenId> prompt = {TokenId(1)};
  DecodeRequest request;
  request.prompt = prompt;
  Generation out;
  const auto loop = *DecodeLoop::Create(*model_, 64);
  const absl::Status status = loop->Decode({&request, 1}, {&out, 1});
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("names a drafter"));
}

TEST_F(DecodeLoopTest, StopsAfterTheRoundInWhichItIsAskedTo) {
  const std::vector<TokenId> truth = Naive(20);
  std::atomic<bool> stop{false};
  stop_ = &stop;
  Collector collector;
  collector.on_round = [&] { stop = collector.drafted.size() == 2; };
  sink_ = &collector;
  Generation out;
  ASSERT_TRUE(Run(Oracle(truth, 3), 20, &out).ok());
  EXPECT_EQ(out.finish, Finish::kStopped);
  EXPECT_EQ(out.tokens.size(), 8u);
}

TEST_F(DecodeLoopTest, PhasesAddUpToNoMoreThanTheTotal) {
  Generation out;
  ASSERT_TRUE(Run(Oracle(Naive(60), 3), 60, &out).ok());
  const PhaseSeconds& s = out.seconds;
  for (double phase : {s.prefill, s.draft, s.verify, s.accept, s.commit}) EXPECT_GT(phase, 0);
  EXPECT_LE(s.prefill + s.draft + s.verify + s.accept + s.commit, s.total);
}

}  // namespace
}  // namespace canopy
