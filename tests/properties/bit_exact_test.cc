// The logits of a node depend, to the last bit, on the token path that leads to it and on nothing
// else.

#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/cpu_backend.h"
#include "core/language_model.h"
#include "gtest/gtest.h"
#include "tests/support/random_model.h"
#include "tests/support/session.h"
#include "trees/token_tree.h"

namespace canopy {
namespace {

using testing::CopyRows;
using testing::MakeRandomModel;
using testing::RandomModelOptions;
using testing::RandomTokens;
using testing::RandomTree;
using testing::Row;
using testing::Rows;
using testing::SameBits;
using testing::TokenByToken;

// With room for trees that grow beyond 64 nodes.
class Session : public testing::Session {
 public:
  Session(const LanguageModel& model, int max_rows)
      : testing::Session(model, {.max_rows = max_rows, .max_pending = 96}) {}
};

struct Case {
  std::string name;
  RandomModelOptions options;
};

std::vector<Case> Cases() {
  return {
      {"ssd", {.kind = "ssd", .seed = 11}},
      {"ssd_f32_groups_odd_sizes",
       {.kind = "ssd",
        .dtype = DType::kF32,
        .hidden = 52,
        .heads = 6,
        .head_dim = 24,
        .groups = 2,
        .d_state = 20,
        .seed = 12}},
      {"ssd_wide_heads", {.kind = "ssd", .heads = 3, .head_dim = 72, .d_state = 33, .seed = 13}},
      {"attention", {.kind = "attention", .seed = 14}},
      {"attention_odd_head_dim",
       {.kind = "attention", .heads = 6, .head_dim = 20, .kv_heads = 2, .seed = 15}},
      {"attention_multi_query",
       {.kind = "attention", .heads = 8, .head_dim = 40, .kv_heads = 1, .seed = 16}},
      {"hybrid", {.kind = "hybrid", .layers = 3, .seed = 17}},
      {"hybrid_f32",
       {.kind = "hybrid", .dtype = DType::kF32, .layers = 3, .groups = 4, .seed = 18}},
  };
}

class BitExact : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    cpu_ = *CpuBackend::Create(2);
    model_ = MakeRandomModel(*cpu_, GetParam().options);
    vocab_ = GetParam().options.vocab;
  }

  void ExpectSame(const Rows& got, const Rows& expected, const std::string& what) {
    ASSERT_EQ(got.size(), expected.size()) << what;
    for (size_t i = 0; i < got.size(); ++i) {
      ASSERT_TRUE(SameBits(got[i], expected[i])) << what << ": node " << i << " differs";
    }
  }

  std::unique_ptr<CpuBackend> cpu_;
  std::unique_ptr<LanguageModel> model_;
  int vocab_ = 0;
};

// Context lengths on both sides of every boundary: empty, inside the first segment, at and around
// multiples of 32, and where a tree crosses into a segment with another checkpoint.
constexpr int kContexts[] = {0, 1, 3, 17, 31, 32, 33, 47, 63, 64, 65, 95, 96, 100, 127, 129};

TEST_P(BitExact, TreeEqualsTokenByToken) {
  std::mt19937_64 rng(5);
  for (int length : kContexts) {
    const std::vector<TokenId> context = RandomTokens(rng, length, vocab_);
    const int nodes = 1 + static_cast<int>(rng() % 64);
    const TokenTree tree = RandomTree(rng, nodes, 32, vocab_);
    Session session(*model_, 64);
    session.Prefill(context);
    ExpectSame(session.Score(tree), TokenByToken(*model_, context, tree),
               absl::StrCat("context ", length, ", tree ", tree.ToString()));
  }
}

TEST_P(BitExact, DeepestTree) {
  std::mt19937_64 rng(6);
  for (int length : {0, 30, 32, 65, 97}) {
    const std::vector<TokenId> context = RandomTokens(rng, length, vocab_);
    TokenTree tree;
    NodeId last = kPrefix;
    for (int i = 0; i < 32; ++i) last = *tree.AddNode(last, TokenId(i));
    for (int i = 0; i < 32; ++i) ASSERT_TRUE(tree.AddNode(NodeId(i / 2), TokenId(40 + i)).ok());
    Session session(*model_, 64);
    session.Prefill(context);
    ExpectSame(session.Score(tree), TokenByToken(*model_, context, tree),
               absl::StrCat("context ", length));
    TokenId token(1);
    const NodeId parent(31);
    const ForwardItem deeper{
        .state = &session.state(), .tokens = {&token, 1}, .parents = {&parent, 1}};
    auto workspace = model_->NewWorkspace(1);
    const auto refused = model_->Forward({&deeper, 1}, **workspace);
    EXPECT_EQ(refused.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_NE(refused.status().message().find("32 levels"), std::string::npos) << refused.status();
    EXPECT_EQ(session.state().pending(), 64);
  }
}

TEST_P(BitExact, SiblingOrderAndExtraBranches) {
  std::mt19937_64 rng(7);
  for (int round = 0; round < 8; ++round) {
    const std::vector<TokenId> context = RandomTokens(rng, static_cast<int>(rng() % 110), vocab_);
    const TokenTree tree = RandomTree(rng, 24, 12, vocab_);
    Session session(*model_, 64);
    session.Prefill(context);
    const Rows expected = session.Score(tree);

    // The same nodes in another order that keeps parents before children, with more nodes between.
    std::vector<int> order;
    std::vector<bool> placed(tree.size(), false);
    TokenTree other;
    std::vector<NodeId> place(tree.size());
    while (static_cast<int>(order.size()) < tree.size()) {
      const int pick = static_cast<int>(rng() % tree.size());
      const NodeId parent = tree.parent(NodeId(pick));
      if (placed[pick] || (parent != kPrefix && !placed[parent.value])) continue;
      const NodeId to = parent == kPrefix ? kPrefix : place[parent.value];
      if (to != kPrefix && rng() % 2 == 0) {
        (void)other.AddNode(to, TokenId(static_cast<int>(vocab_ - 1 - rng() % 5)));
      }
      const NodeId existing = other.FindChild(to, tree.token(NodeId(pick)));
      place[pick] = existing != kPrefix ? existing : *other.AddNode(to, tree.token(NodeId(pick)));
      placed[pick] = true;
      order.push_back(pick);
    }
    session.state().DropPending();
    const Rows got = session.Score(other);
    for (int i = 0; i < tree.size(); ++i) {
      ASSERT_TRUE(SameBits(got[place[i].value], expected[i]))
          << "round " << round << ", node " << i;
    }
  }
}

TEST_P(BitExact, GrownInSteps) {
  std::mt19937_64 rng(8);
  for (int round = 0; round < 8; ++round) {
    const std::vector<TokenId> context = RandomTokens(rng, static_cast<int>(rng() % 130), vocab_);
    const TokenTree tree = RandomTree(rng, 40, 32, vocab_);
    Session whole(*model_, 64);
    whole.Prefill(context);
    const Rows expected = whole.Score(tree);
    Session grown(*model_, 64);
    grown.Prefill(context);
    for (int begin = 0; begin < tree.size();) {
      const int end = std::min<int>(tree.size(), begin + 1 + static_cast<int>(rng() % 9));
      const Rows rows = grown.Score(tree.tokens().subspan(begin, end - begin),
                                    tree.parents().subspan(begin, end - begin));
      for (int i = begin; i < end; ++i) {
        ASSERT_TRUE(SameBits(rows[i - begin], expected[i])) << "round " << round << ", node " << i;
      }
      begin = end;
    }
  }
}

TEST_P(BitExact, PrefillChunksAndHistory) {
  std::mt19937_64 rng(9);
  const std::vector<TokenId> context = RandomTokens(rng, 171, vocab_);
  const TokenTree tree = RandomTree(rng, 30, 20, vocab_);
  Session whole(*model_, 256);
  whole.Prefill(context);
  const Rows expected = whole.Score(tree);
  // Chunks by workspace size, by the caller's cuts, and by trees of which a path was committed.
  for (int max_rows : {30, 31, 64, 100}) {
    Session chunked(*model_, max_rows);
    chunked.Prefill(context);
    ExpectSame(chunked.Score(tree), expected, absl::StrCat("workspace of ", max_rows));
  }
  for (int round = 0; round < 4; ++round) {
    Session mixed(*model_, 64);
    size_t done = 0;
    while (done < context.size()) {
      const size_t left = context.size() - done;
      const size_t count = std::min<size_t>(left, 1 + rng() % 32);
      const std::span<const TokenId> part = std::span(context).subspan(done, count);
      if (rng() % 2 == 0) {
        mixed.Prefill(part);
      } else {
        // The right path among wrong siblings.
        TokenTree guess;
        NodeId at = kPrefix;
        std::vector<NodeId> path;
        for (TokenId token : part) {
          if (guess.size() < 60 && rng() % 2 == 0) {
            (void)guess.AddNode(at, TokenId((token.value + 1) % vocab_));
          }
          at = *guess.AddNode(at, token);
          path.push_back(at);
        }
        mixed.Score(guess);
        ASSERT_TRUE(mixed.state().Commit(path).ok());
      }
      done += count;
    }
    ExpectSame(mixed.Score(tree), expected, absl::StrCat("round ", round));
  }
}

TEST_P(BitExact, ThreadCounts) {
  std::mt19937_64 rng(10);
  const std::vector<TokenId> context = RandomTokens(rng, 77, vocab_);
  const TokenTree tree = RandomTree(rng, 50, 16, vocab_);
  Rows expected;
  for (int threads : {1, 2, 3, 5}) {
    auto cpu = *CpuBackend::Create(threads);
    auto model = MakeRandomModel(*cpu, GetParam().options);
    Session session(*model, 64);
    session.Prefill(context);
    const Rows rows = session.Score(tree);
    if (expected.empty()) expected = rows;
    ExpectSame(rows, expected, absl::StrCat(threads, " threads"));
  }
}

TEST_P(BitExact, BatchNeighbours) {
  std::mt19937_64 rng(11);
  constexpr int kSequences = 4;
  std::vector<std::unique_ptr<DecodeState>> states;
  std::vector<TokenTree> trees;
  std::vector<Rows> expected;
  std::vector<ForwardItem> items;
  for (int s = 0; s < kSequences; ++s) {
    const std::vector<TokenId> context = RandomTokens(rng, static_cast<int>(rng() % 140), vocab_);
    trees.push_back(RandomTree(rng, 5 + s * 6, 14, vocab_));
    Session alone(*model_, 64);
    alone.Prefill(context);
    auto fork = alone.state().Fork();
    ASSERT_TRUE(fork.ok());
    expected.push_back(alone.Score(trees.back()));
    states.push_back(*std::move(fork));
  }
  for (int s = 0; s < kSequences; ++s) {
    items.push_back(
        {.state = states[s].get(), .tokens = trees[s].tokens(), .parents = trees[s].parents()});
  }
  // A prompt is read in the same pass.
  auto reading = model_->NewState({.max_positions = 256, .max_pending = 4});
  const std::vector<TokenId> prompt = RandomTokens(rng, 45, vocab_);
  items.insert(
      items.begin() + 1,
      {.state = reading->get(), .tokens = prompt, .logits = LogitsOf::kLast, .commit_chain = true});
  auto workspace = model_->NewWorkspace(160);
  auto result = model_->Forward(items, **workspace);
  ASSERT_TRUE(result.ok()) << result.status();
  const Rows rows = CopyRows(result->logits);
  int item = 0;
  for (int s = 0; s < kSequences; ++s, ++item) {
    if (item == 1) ++item;
    const int first = result->first_row[item];
    ExpectSame(Rows(rows.begin() + first, rows.begin() + first + trees[s].size()), expected[s],
               absl::StrCat("sequence ", s));
  }
  Session plain(*model_, 8);
  Row last;
  for (TokenId token : prompt) last = plain.Step(token);
  EXPECT_TRUE(SameBits(rows[result->first_row[1]], last));
}

INSTANTIATE_TEST_SUITE_P(Models, BitExact, ::testing::ValuesIn(Cases()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace canopy
