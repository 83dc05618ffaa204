// The forward path on a GPU: within a tolerance what the CPU computes, and to the last bit a
// function of a node's token path alone. Skipped where there is no device.

#include "models/decoder_cuda.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/cpu_backend.h"
#include "core/cuda_backend.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "models/loader.h"
#include "tests/support/on_device.h"
#include "tests/support/random_model.h"
#include "tests/support/session.h"
#include "trees/token_tree.h"
#include "verify/sampling.h"

namespace canopy {
namespace {

using testing::CopyRows;
using ::testing::HasSubstr;
using testing::MakeRandomModel;
using testing::MakeRandomSpec;
using testing::OnDevice;
using testing::RandomModelOptions;
using testing::RandomTokens;
using testing::RandomTree;
using testing::Rows;
using testing::SameBits;
using testing::Session;
using testing::SessionOptions;
using testing::TokenByToken;

struct Case {
  std::string name;
  RandomModelOptions options;
};

std::vector<Case> Cases() {
  return {
      {"ssd", {.kind = "ssd", .seed = 11}},
      {"ssd_groups_odd_sizes",
       {.kind = "ssd",
        .hidden = 52,
        .heads = 6,
        .head_dim = 24,
        .groups = 2,
        .d_state = 20,
        .seed = 12}},
      // Parts of out_proj end with norm groups.
      {"ssd_norm_groups",
       {.kind = "ssd",
        .hidden = 256,
        .heads = 16,
        .head_dim = 64,
        .groups = 2,
        .norm_groups = 4,
        .seed = 24}},
      // On 132 multiprocessors tiles of 24 channels, one of which lies in both norm groups.
      {"ssd_straddled_norm_groups",
       {.kind = "ssd", .hidden = 64, .heads = 34, .head_dim = 64, .norm_groups = 2, .seed = 25}},
      {"ssd_short_convolution", {.kind = "ssd", .conv_kernel = 2, .seed = 22}},
      {"ssd_wide_heads", {.kind = "ssd", .heads = 3, .head_dim = 72, .d_state = 33, .seed = 13}},
      {"ssd_published_head",
       {.kind = "ssd", .hidden = 256, .heads = 8, .head_dim = 64, .d_state = 128, .seed = 19}},
      // States are more than a warp loads at once.
      {"ssd_many_states", {.kind = "ssd", .d_state = 160, .seed = 28}},
      // Pairs of blocks take strips of out_proj, of one group of outputs and of five.
      {"ssd_strips",
       {.kind = "ssd", .hidden = 256, .layers = 4, .heads = 8, .head_dim = 64, .seed = 26}},
      {"ssd_strips_of_five",
       {.kind = "ssd",
        .hidden = 2560,
        .layers = 3,
        .heads = 16,
        .head_dim = 64,
        .d_state = 128,
        .seed = 27}},
      // More heads than multiprocessors: blocks take several of them.
      {"ssd_many_heads",
       {.kind = "ssd", .hidden = 64, .heads = 160, .head_dim = 64, .d_state = 64, .seed = 20}},
      {"attention", {.kind = "attention", .seed = 14}},
      {"attention_odd_head_dim",
       {.kind = "attention", .heads = 6, .head_dim = 20, .kv_heads = 2, .seed = 15}},
      {"attention_multi_query",
       {.kind = "attention", .heads = 8, .head_dim = 40, .kv_heads = 1, .seed = 16}},
      {"attention_wide_heads",
       {.kind = "attention",
        .hidden = 128,
        .heads = 2,
        .head_dim = 256,
        .kv_heads = 1,
        .seed = 21}},
      {"hybrid", {.kind = "hybrid", .layers = 3, .seed = 17}},
      {"hybrid_wide",
       {.kind = "hybrid",
        .hidden = 1024,
        .layers = 2,
        .vocab = 5000,
        .heads = 16,
        .head_dim = 64,
        .groups = 4,
        .d_state = 128,
        .kv_heads = 4,
        .seed = 18}},
  };
}

struct Param {
  Case model;
  DType dtype;
};

class DecoderCuda : public OnDevice, public ::testing::WithParamInterface<Param> {
 protected:
  void SetUp() override {
    OnDevice::SetUp();
    if (cuda_ == nullptr) return;
    auto model =
        MakeCudaDecoder(*cuda_, MakeRandomSpec(*cpu_, GetParam().model.options), GetParam().dtype);
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
    vocab_ = GetParam().model.options.vocab;
  }

  // The device's rows of logits and the CPU's in f32.
  void ExpectClose(const Rows& got, const Rows& expected) const {
    ASSERT_EQ(got.size(), expected.size());
    double error = 0.0, scale = 0.0;
    for (size_t r = 0; r < got.size(); ++r) {
      for (int v = 0; v < vocab_; ++v) {
        error = std::max(error, std::abs(double{got[r][v]} - expected[r][v]));
        scale = std::max(scale, std::abs(double{expected[r][v]}));
        ASSERT_TRUE(std::isfinite(got[r][v]));
      }
    }
    // f32: sums in another order. bf16: activations are rounded to 2^-9 at some six places a layer,
    // and random models of this size pass errors on with a factor of a few.
    EXPECT_LE(error, (GetParam().dtype == DType::kF32 ? 1e-4 : 0.06) * scale);
  }

  std::unique_ptr<CudaModel> model_;
  int vocab_ = 0;
};

TEST_P(DecoderCuda, ComputesWhatTheCpuComputes) {
  std::mt19937_64 rng(1);
  const auto reference = MakeRandomModel(*cpu_, GetParam().model.options);
  for (int length : {0, 1, 31, 33, 100}) {
    const std::vector<TokenId> context = RandomTokens(rng, length, vocab_);
    const TokenTree tree = RandomTree(rng, 24, 20, vocab_);
    Session device(*model_), host(*reference);
    device.Prefill(context);
    host.Prefill(context);
    SCOPED_TRACE(length);
    ExpectClose(device.Score(tree), host.Score(tree));
  }
}

TEST_P(DecoderCuda, TreeEqualsTokenByToken) {
  std::mt19937_64 rng(2);
  for (int length : {0, 5, 30, 63, 90}) {
    const std::vector<TokenId> context = RandomTokens(rng, length, vocab_);
    const TokenTree tree = RandomTree(rng, 1 + static_cast<int>(rng() % 64), 32, vocab_);
    Session session(*model_);
    session.Prefill(context);
    const Rows tree_rows = session.Score(tree);
    const Rows plain = TokenByToken(*model_, context, tree);
    for (int i = 0; i < tree.size(); ++i) {
      EXPECT_TRUE(SameBits(tree_rows[i], plain[i])) << "node " << i << " behind " << length;
    }
  }
}

TEST_P(DecoderCuda, DeepestTreeCrossesSegments) {
  std::mt19937_64 rng(3);
  const std::vector<TokenId> context = RandomTokens(rng, 50, vocab_);
  TokenTree tree;
  for (int i = 0; i < kMaxTreeHeight; ++i) {
    ASSERT_TRUE(tree.AddNode(NodeId(i - 1), TokenId(static_cast<int>(rng() % vocab_))).ok());
  }
  Session session(*model_);
  session.Prefill(context);
  const Rows rows = session.Score(tree);
  const Rows plain = TokenByToken(*model_, context, tree);
  for (int i = 0; i < tree.size(); ++i) EXPECT_TRUE(SameBits(rows[i], plain[i])) << i;
}

TEST_P(DecoderCuda, SiblingOrderBranchesAndGrowthDoNotMatter) {
  std::mt19937_64 rng(4);
  const std::vector<TokenId> context = RandomTokens(rng, 45, vocab_);
  const TokenTree tree = RandomTree(rng, 40, 24, vocab_);
  Session whole(*model_);
  whole.Prefill(context);
  const Rows expected = whole.Score(tree);
  // Another order of nodes: any that has parents before children.
  std::vector<int> order;
  std::vector<int> place(tree.size(), -1);
  std::vector<int> open;
  for (int i = 0; i < tree.size(); ++i) {
    if (tree.parent(NodeId(i)) == kPrefix) open.push_back(i);
  }
  while (!open.empty()) {
    const size_t pick = rng() % open.size();
    const int node = open[pick];
    open.erase(open.begin() + pick);
    place[node] = static_cast<int>(order.size());
    order.push_back(node);
    for (int i = 0; i < tree.size(); ++i) {
      if (tree.parent(NodeId(i)) == NodeId(node)) open.push_back(i);
    }
  }
  std::vector<TokenId> tokens;
  std::vector<NodeId> parents;
  for (int node : order) {
    tokens.push_back(tree.token(NodeId(node)));
    const NodeId parent = tree.parent(NodeId(node));
    parents.push_back(parent == kPrefix ? kPrefix : NodeId(place[parent.value]));
  }
  Session permuted(*model_);
  permuted.Prefill(context);
  const Rows other = permuted.Score(tokens, parents);
  for (size_t k = 0; k < order.size(); ++k) {
    EXPECT_TRUE(SameBits(other[k], expected[order[k]])) << order[k];
  }
  // The same in steps of a few nodes, which are passes of other sizes.
  Session grown(*model_);
  grown.Prefill(context);
  for (size_t begin = 0; begin < tokens.size();) {
    const size_t count = std::min<size_t>(1 + rng() % 9, tokens.size() - begin);
    const Rows rows = grown.Score(std::span(tokens).subspan(begin, count),
                                  std::span(parents).subspan(begin, count));
    for (size_t k = 0; k < count; ++k) {
      EXPECT_TRUE(SameBits(rows[k], expected[order[begin + k]])) << order[begin + k];
    }
    begin += count;
  }
}

TEST_P(DecoderCuda, PrefillChunksCommitsAndForksDoNotMatter) {
  std::mt19937_64 rng(5);
  const std::vector<TokenId> context = RandomTokens(rng, 150, vocab_);
  const TokenTree tree = RandomTree(rng, 20, 12, vocab_);
  Session whole(*model_);
  whole.Prefill(context);
  auto fork = whole.state().Fork();
  ASSERT_TRUE(fork.ok());
  const Rows expected = whole.Score(tree);

  const ForwardItem item{.state = fork->get(), .tokens = tree.tokens(), .parents = tree.parents()};
  auto forked = model_->Forward({&item, 1}, whole.workspace());
  ASSERT_TRUE(forked.ok());
  EXPECT_EQ(CopyRows(forked->logits), expected);

  // Chunks of random sizes, and paths of trees that hold other branches as well.
  Session parts(*model_);
  for (size_t at = 0; at < context.size();) {
    const size_t count = std::min<size_t>(1 + rng() % 40, context.size() - at);
    if (rng() % 2 == 0) {
      parts.Prefill(std::span(context).subspan(at, count));
      at += count;
      continue;
    }
    const int length = static_cast<int>(std::min<size_t>(count, 20));
    TokenTree draft;
    std::vector<NodeId> path;
    NodeId last = kPrefix;
    for (int k = 0; k < length; ++k) {
      const NodeId above = last;
      last = *draft.AddNode(above, context[at + k]);
      path.push_back(last);
      const TokenId other((context[at + k].value + 1) % vocab_);
      if (draft.size() < 60) (void)draft.AddNode(above, other);
    }
    parts.Score(draft);
    ASSERT_TRUE(parts.state().Commit(path).ok());
    at += length;
  }
  const Rows rows = parts.Score(tree);
  for (int i = 0; i < tree.size(); ++i) EXPECT_TRUE(SameBits(rows[i], expected[i])) << i;

  // A state that was used before and reset.
  parts.state().Reset();
  parts.Prefill(context);
  EXPECT_EQ(parts.Score(tree), expected);
}

TEST_P(DecoderCuda, BatchNeighboursDoNotMatter) {
  std::mt19937_64 rng(6);
  const std::vector<TokenId> a = RandomTokens(rng, 70, vocab_), b = RandomTokens(rng, 9, vocab_);
  const TokenTree tree_a = RandomTree(rng, 20, 10, vocab_), tree_b = RandomTree(rng, 9, 5, vocab_);
  Session one(*model_), two(*model_);
  one.Prefill(a);
  two.Prefill(b);
  const Rows alone_a = one.Score(tree_a), alone_b = two.Score(tree_b);
  one.state().DropPending();
  two.state().DropPending();
  const ForwardItem items[2] = {
      {.state = &two.state(), .tokens = tree_b.tokens(), .parents = tree_b.parents()},
      {.state = &one.state(), .tokens = tree_a.tokens(), .parents = tree_a.parents()}};
  auto result = model_->Forward(items, one.workspace());
  ASSERT_TRUE(result.ok()) << result.status();
  const Rows rows = CopyRows(result->logits);
  for (int i = 0; i < tree_b.size(); ++i) EXPECT_TRUE(SameBits(rows[i], alone_b[i]));
  for (int i = 0; i < tree_a.size(); ++i) {
    EXPECT_TRUE(SameBits(rows[result->first_row[1] + i], alone_a[i]));
  }
}

TEST_P(DecoderCuda, SelectsTheGreatestLogits) {
  std::mt19937_64 rng(7);
  const std::vector<TokenId> context = RandomTokens(rng, 20, vocab_);
  const TokenTree tree = RandomTree(rng, 33, 8, vocab_);
  Session session(*model_);
  session.Prefill(context);
  const Rows logits = session.Score(tree);
  for (int top : {1, 2, 7, kMaxTop}) {
    session.state().DropPending();
    const ForwardItem item{
        .state = &session.state(), .tokens = tree.tokens(), .parents = tree.parents(), .top = top};
    auto result = model_->Forward({&item, 1}, session.workspace());
    ASSERT_TRUE(result.ok()) << result.status();
    ASSERT_EQ(result->top.size(), static_cast<size_t>(tree.size()) * top);
    for (int i = 0; i < tree.size(); ++i) {
      std::vector<TokenId> expected;
      TopK(logits[i], top, &expected);
      for (int k = 0; k < top; ++k) EXPECT_EQ(result->top[i * top + k], expected[k]) << i << k;
    }
  }
}

TEST_P(DecoderCuda, DeviceTimeIsPartOfThePassesTime) {
  std::mt19937_64 rng(8);
  const TokenTree tree = RandomTree(rng, 20, 8, vocab_);
  Session session(*model_);
  session.Prefill(RandomTokens(rng, 20, vocab_));
  const double before = model_->DeviceSeconds();
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 10; ++i) {
    session.state().DropPending();
    session.Score(tree);
  }
  const std::chrono::duration<double> whole = std::chrono::steady_clock::now() - start;
  const double device = model_->DeviceSeconds() - before;
  EXPECT_GT(device, 10 * 5e-6);  // a pass of a few operators with barriers takes more
  EXPECT_LT(device, whole.count());
}

TEST_P(DecoderCuda, MemoryIsWhatTheStateSays) {
  const size_t before = cuda_->memory().bytes_in_use;
  auto state = model_->NewState({.max_positions = 300, .max_pending = 64});
  ASSERT_TRUE(state.ok());
  EXPECT_EQ(cuda_->memory().bytes_in_use - before, (*state)->memory().total_bytes);
  // Nothing is allocated from pass to pass.
  auto workspace = model_->NewWorkspace(64);
  ASSERT_TRUE(workspace.ok());
  const TokenId token(1);
  const uint64_t allocations = cuda_->memory().allocations;
  for (int i = 0; i < 70; ++i) {
    const NodeId parent = kPrefix, node(0);
    const ForwardItem item{
        .state = state->get(), .tokens = {&token, 1}, .parents = {&parent, 1}, .top = 1};
    ASSERT_TRUE(model_->Forward({&item, 1}, **workspace).ok());
    ASSERT_TRUE((*state)->Commit({&node, 1}).ok());
  }
  EXPECT_EQ(cuda_->memory().allocations, allocations);
}

std::vector<Param> Params() {
  std::vector<Param> params;
  for (const Case& c : Cases()) {
    for (DType dtype : {DType::kBF16, DType::kF32}) params.push_back({c, dtype});
  }
  return params;
}

INSTANTIATE_TEST_SUITE_P(Models, DecoderCuda, ::testing::ValuesIn(Params()), [](const auto& info) {
  return info.param.model.name + "_" + std::string(Name(info.param.dtype));
});

// Attention over several blocks of keys, short and long ones, and around where they begin.
class LongContexts : public DecoderCuda {};

TEST_P(LongContexts, TreeEqualsTokenByTokenAndTheCpu) {
  std::mt19937_64 rng(31);
  const auto reference = MakeRandomModel(*cpu_, GetParam().model.options);
  const SessionOptions options{.max_positions = 3000};
  for (const int length : {447, 505, 511, 512, 575, 760, 768, 1020, 2600}) {
    const std::vector<TokenId> context = RandomTokens(rng, length, vocab_);
    const TokenTree tree = RandomTree(rng, 1 + static_cast<int>(rng() % 64), 24, vocab_);
    Session session(*model_, options);
    session.Prefill(context);
    const auto base = session.state().Fork();
    ASSERT_TRUE(base.ok());
    const Rows rows = session.Score(tree);
    // Plain decoding along the paths to some nodes, of which the last is the deepest that came.
    for (const int node : {0, tree.size() / 2, tree.size() - 1}) {
      const auto state = (*base)->Fork();
      ASSERT_TRUE(state.ok());
      for (const NodeId at : tree.Path(NodeId(node))) {
        const TokenId token = tree.token(at);
        const ForwardItem item{.state = state->get(),
                               .tokens = {&token, 1},
                               .logits = LogitsOf::kLast,
                               .commit_chain = true};
        const auto plain = model_->Forward({&item, 1}, session.workspace());
        ASSERT_TRUE(plain.ok()) << plain.status();
        EXPECT_TRUE(SameBits(rows[at.value], CopyRows(plain->logits)[0]))
            << "node " << at.value << " behind " << length;
      }
    }
    Session host(*reference, options);
    host.Prefill(context);
    SCOPED_TRACE(length);
    ExpectClose(rows, host.Score(tree));
  }
}

std::vector<Param> LongParams() {
  std::vector<Param> params;
  for (const Case& c : std::vector<Case>{
           {"attention", {.kind = "attention", .seed = 41}},
           {"seven_heads_to_one",
            {.kind = "attention", .heads = 7, .head_dim = 80, .kv_heads = 1, .seed = 42}},
           {"many_heads_to_one",
            {.kind = "attention", .heads = 48, .head_dim = 32, .kv_heads = 1, .seed = 43}},
           {"wide_heads",
            {.kind = "attention", .heads = 4, .head_dim = 160, .kv_heads = 2, .seed = 44}},
           {"hybrid", {.kind = "hybrid", .layers = 3, .seed = 45}},
       }) {
    for (DType dtype : {DType::kBF16, DType::kF32}) params.push_back({c, dtype});
  }
  return params;
}

INSTANTIATE_TEST_SUITE_P(Models, LongContexts, ::testing::ValuesIn(LongParams()),
                         [](const auto& info) {
                           return info.param.model.name + "_" + std::string(Name(info.param.dtype));
                         });

// So that the cases of strips test them where there are some: in all layers but the last.
TEST_F(OnDevice, TakesStripsWhereTheyFit) {
  const bool can = cuda_->capability() == 90 && cuda_->multiprocessors() >= 128;
  for (const Case& c : Cases()) {
    if (!c.name.starts_with("ssd_strips")) continue;
    for (const DType dtype : {DType::kBF16, DType::kF32}) {
      auto model = MakeCudaDecoder(*cuda_, MakeRandomSpec(*cpu_, c.options), dtype);
      ASSERT_TRUE(model.ok()) << model.status();
      EXPECT_EQ((*model)->StripLayers(), can && dtype == DType::kBF16 ? c.options.layers - 1 : 0)
          << c.name;
    }
  }
}

// In f32 this state leaves no room for 64 rows.
TEST_F(OnDevice, LargeTreesAreSeveralPassesWhereAPassHasFewerRows) {
  RandomModelOptions options{.kind = "ssd", .d_state = 640, .seed = 23};
  const auto model = MakeCudaDecoder(*cuda_, MakeRandomSpec(*cpu_, options), DType::kF32);
  ASSERT_TRUE(model.ok()) << model.status();
  ASSERT_LT((*model)->MaxRows(), 64);
  std::mt19937_64 rng(23);
  const std::vector<TokenId> context = RandomTokens(rng, 45, options.vocab);
  const TokenTree tree = RandomTree(rng, 64, 20, options.vocab);
  Session session(**model);
  session.Prefill(context);
  const Rows rows = session.Score(tree);
  const Rows plain = TokenByToken(**model, context, tree);
  for (int i = 0; i < tree.size(); ++i) EXPECT_TRUE(SameBits(rows[i], plain[i])) << i;
}

TEST_F(OnDevice, RefusesWhatTheKernelsDoNotHave) {
  RandomModelOptions wide{.kind = "attention", .heads = 1, .head_dim = 320, .kv_heads = 1};
  const auto refused = MakeCudaDecoder(*cuda_, MakeRandomSpec(*cpu_, wide), DType::kBF16);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("at most 256"));

  RandomModelOptions conv{.kind = "ssd", .conv_kernel = 5};
  const auto long_conv = MakeCudaDecoder(*cuda_, MakeRandomSpec(*cpu_, conv), DType::kBF16);
  EXPECT_EQ(long_conv.status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(long_conv.status().message()), HasSubstr("the CUDA kernels have 2 to 4"));

  const auto model = MakeCudaDecoder(*cuda_, MakeRandomSpec(*cpu_, {}), DType::kBF16);
  ASSERT_TRUE(model.ok());
  const auto state = (*model)->NewState({.max_positions = 100, .max_pending = 65});
  EXPECT_THAT(std::string(state.status().message()), HasSubstr("at most 64"));
}

TEST_F(OnDevice, SaysWhatDoesNotFitIntoMemory) {
  const absl::Status status = cuda_->Allocate(size_t{1} << 50).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("bytes asked for"));
  EXPECT_TRUE(cuda_->Allocate(1 << 20).ok());  // and goes on
}

TEST(CudaDevices, MissingOnesAreNamed) {
  const auto backend = MakeBackend("cuda:99", 0);
  ASSERT_FALSE(backend.ok());
  EXPECT_THAT(std::string(backend.status().message()), HasSubstr("cuda"));
  EXPECT_FALSE(MakeBackend("gpu", 0).ok());
}

}  // namespace
}  // namespace canopy
