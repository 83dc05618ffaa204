#include <algorithm>
#include <random>

#include "drafting/registry.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/fake_model.h"

namespace canopy {
namespace {

using ::canopy::testing::FakeModel;
using ::testing::HasSubstr;

std::vector<TokenId> TextAt(const DraftContext& context, const TokenTree& tree, NodeId node) {
  std::vector<TokenId> text(context.tokens.begin(), context.tokens.end() - 1);
  for (const NodeId n : tree.Path(node)) text.push_back(tree.token(n));
  return text;
}

// The children of `node` by the definition of each method, from a dense distribution.
std::vector<TokenId> NaiveDraws(const FakeModel& model, const DrafterOptions& options,
                                const DraftContext& context, const TokenTree& tree, NodeId node,
                                int count, uint32_t* draw) {
  std::vector<float> logits = model.LogitsAfter(TextAt(context, tree, node));
  if (options.vocab_size > 0 && options.vocab_size < model.info().vocab_size) {
    logits.resize(options.vocab_size);
  }
  const int vocab = static_cast<int>(logits.size());
  std::vector<double> rank_by(logits.begin(), logits.end());
  const int64_t position = static_cast<int64_t>(context.tokens.size()) + tree.depth(node);
  std::vector<double> probs(vocab, 0.0);
  const double temperature = context.sampling->temperature;
  if (temperature > 0.0) {
    Distribution warped;
    Warp(logits, *context.sampling, &warped);  // tested on its own
    for (int i = 0; i < vocab; ++i) probs[i] = warped.Probability(TokenId(i));
  }
  if (context.gumbel_coupled && temperature > 0.0) {
    for (int i = 0; i < vocab; ++i) {
      rank_by[i] = std::log(probs[i]) + context.noise->Gumbel(position, i);
    }
  } else if (temperature > 0.0 && options.method != "topk") {
    std::vector<TokenId> draws;
    for (int k = 0; k < count; ++k) {
      double mass = 0.0;
      for (const double prob : probs) mass += prob;
      if (mass == 0.0) break;
      const double uniform = context.noise->Uniform(position, Purpose::kDraft, (*draw)++);
      double cumulative = 0.0;
      int token = 0;
      while (cumulative + probs[token] / mass <= uniform) cumulative += probs[token++] / mass;
      draws.push_back(TokenId(token));
      if (options.method == "sampled") probs[token] = 0.0;
    }
    return draws;
  }
  std::vector<int> order(vocab);
  for (int i = 0; i < vocab; ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return rank_by[a] > rank_by[b]; });
  std::vector<TokenId> best;
  for (const int token : order) {
    if (static_cast<int>(best.size()) == count || std::isinf(rank_by[token])) break;
    best.push_back(TokenId(token));
  }
  return best;
}

// Breadth-first by the definition.
TokenTree BruteForce(const FakeModel& model, const DrafterOptions& options,
                     const DraftContext& context) {
  const TreeShape shape = *TreeShape::Parse(options.shape);
  TokenTree tree;
  (void)*tree.AddNode(kPrefix, context.tokens.back());
  std::vector<NodeId> shape_of = {NodeId(0)};
  uint32_t draw = 0;
  for (int i = 0; i < tree.size(); ++i) {
    const NodeId node(i);
    if (tree.depth(node) == context.max_depth) break;
    const int count = shape.children(shape_of[i]);
    if (count == 0 || tree.size() > context.max_nodes) continue;
    for (const TokenId token : NaiveDraws(model, options, context, tree, node, count, &draw)) {
      if (tree.size() > context.max_nodes || tree.FindChild(node, token) != kPrefix) continue;
      const NodeId child = *tree.AddNode(node, token);
      shape_of.push_back(shape.child(shape_of[i], tree.sibling_rank(child)));
    }
  }
  return tree;
}

struct Mode {
  const char* method;
  double temperature;
  bool gumbel;
};
constexpr Mode kModes[] = {{"topk", 0.0, false},
                           {"topk", 1.0, false},
                           {"topk", 0.8, true},
                           {"sampled", 1.0, false},
                           {"sampled", 0.0, false},
                           {"sampled", 1.0, true},
                           {"sampled_with_replacement", 0.9, false}};

// What the target would add to the text: a random path of the tree, and a token of its own.
void Extend(std::mt19937& random, const TokenTree& tree, int vocab, std::vector<TokenId>* text) {
  NodeId node(0);
  while (random() % 5 != 0 && tree.first_child(node) != kPrefix) {
    NodeId child = tree.first_child(node);
    while (random() % 2 && tree.next_sibling(child) != kPrefix) child = tree.next_sibling(child);
    node = child;
    text->push_back(tree.token(node));
  }
  // Not a child, which would have been accepted, unless all tokens are.
  TokenId own(static_cast<int>(random() % vocab));
  for (int i = 0; i < vocab && tree.FindChild(node, own) != kPrefix; ++i) {
    own = TokenId((own.value + 1) % vocab);
  }
  text->push_back(own);
}

class ModelDrafterTest : public ::testing::TestWithParam<Mode> {};

// Over many rounds: trees equal those of the definition, whatever the limits, and nothing is
// computed twice.
TEST_P(ModelDrafterTest, TreesEqualTheDefinitionRoundAfterRound) {
  const Mode mode = GetParam();
  std::mt19937 random(9);
  const char* shapes[] = {"chain:5", "topk:3,2,2", "(((),()),(((()))),())", "topk:7", "chain:0"};
  for (int trial = 0; trial < 40; ++trial) {
    const FakeModel model(
        {.vocab = trial % 4 == 0 ? 5 : 40, .seed = 3, .prefers_top = trial % 2 == 0});
    const int vocab = model.info().vocab_size;
    DrafterOptions options{.model = &model, .shape = shapes[random() % 5], .method = mode.method};
    options.workspace_rows = random() % 2 ? 2 : 50;
    // The target's vocabulary may be smaller, also than the number of siblings asked for.
    options.vocab_size = random() % 4 ? 0 : 4;
    const auto drafter = *MakeDrafter("model", options);
    EXPECT_EQ(drafter->info().samples, std::string(mode.method) != "topk");
    const auto state = *drafter->NewState();
    SamplingOptions sampling{.temperature = mode.temperature};
    if (trial % 3 == 0) sampling.top_k = 6;
    if (trial % 5 == 0) sampling.top_p = 0.7;
    for (int sequence = 0; sequence < 2; ++sequence) {
      const NoiseStream noise(trial, sequence);
      std::vector<TokenId> text;
      for (int i = 1 + static_cast<int>(random() % 20); i > 0; --i) {
        text.push_back(TokenId(static_cast<int>(random() % vocab)));
      }
      model.ClearCounts();
      DraftTree draft;
      for (int round = 0; round < 15; ++round) {
        DraftContext context{.tokens = text,
                             .state = state.get(),
                             .sampling = &sampling,
                             .noise = &noise,
                             .gumbel_coupled = mode.gumbel};
        if (random() % 2) context.max_nodes = static_cast<int>(random() % 10);
        if (random() % 2) context.max_depth = static_cast<int>(random() % 5);
        const absl::Status status = drafter->Draft({&context, 1}, {&draft, 1});
        ASSERT_TRUE(status.ok()) << status;
        ASSERT_TRUE(Validate(draft, vocab).ok()) << Validate(draft, vocab);
        const TokenTree expected = BruteForce(model, options, context);
        ASSERT_EQ(draft.tree, expected)
            << draft.tree.ToString() << " instead of " << expected.ToString();
        // Once more for the same text: the same tree.
        if (random() % 4 == 0) {
          const TokenTree first = draft.tree;
          ASSERT_TRUE(drafter->Draft({&context, 1}, {&draft, 1}).ok());
          ASSERT_EQ(draft.tree, first);
          model.ClearCounts();  // that does compute the tree again
        }
        Extend(random, draft.tree, vocab, &text);
      }
      EXPECT_EQ(model.repeated_rows(), 0);
      state->Reset();
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Modes, ModelDrafterTest, ::testing::ValuesIn(kModes),
                         [](const auto& info) {
                           return std::string(info.param.method) +
                                  std::to_string(static_cast<int>(info.param.temperature * 10)) +
                                  (info.param.gumbel ? "gumbel" : "");
                         });

// Where children are the best tokens, logits stay where they are.
TEST(ModelDrafterTest, AsksForTheBestTokensAloneWhereTheyWillDo) {
  const FakeModel model({.vocab = 40, .seed = 3, .prefers_top = true});
  for (const Mode& mode : kModes) {
    for (const int vocab : {0, 30}) {
      const auto drafter = *MakeDrafter(
          "model",
          {.model = &model, .shape = "topk:3,2,2", .method = mode.method, .vocab_size = vocab});
      const auto state = *drafter->NewState();
      const SamplingOptions sampling{.temperature = mode.temperature};
      const NoiseStream noise(1, 2);
      const std::vector<TokenId> text(10, TokenId(4));
      DraftTree draft;
      const DraftContext context{.tokens = text,
                                 .state = state.get(),
                                 .sampling = &sampling,
                                 .noise = &noise,
                                 .gumbel_coupled = mode.gumbel};
      model.ClearCounts();
      ASSERT_TRUE(drafter->Draft({&context, 1}, {&draft, 1}).ok());
      const bool ranked =
          mode.temperature == 0.0 || (mode.method == std::string("topk") && !mode.gumbel);
      EXPECT_EQ(model.top_passes(), ranked && vocab == 0 ? model.passes() : 0)
          << mode.method << " " << mode.temperature << " " << vocab;
    }
  }
}

TEST(ModelDrafterTest, PassesAndRowsOfARound) {
  const FakeModel model({.vocab = 40, .seed = 3});
  const auto drafter = *MakeDrafter("model", {.model = &model, .shape = "topk:3,2,2"});
  const auto state = *drafter->NewState();
  const SamplingOptions sampling;
  std::vector<TokenId> text(10, TokenId(4));
  DraftTree draft;
  DraftContext context{.tokens = text, .state = state.get(), .sampling = &sampling};
  ASSERT_TRUE(drafter->Draft({&context, 1}, {&draft, 1}).ok());
  EXPECT_EQ(draft.tree.size(), 1 + 3 + 6 + 12);
  EXPECT_EQ(model.passes(), 3);         // the text, levels 1 and 2
  EXPECT_EQ(model.rows(), 10 + 3 + 6);  // and not the 12 of level 3
  // The target takes a whole path: its last node and the target's token are new to the draft model.
  const NodeId leaf(draft.tree.size() - 1);
  for (const NodeId node : draft.tree.Path(leaf)) {
    if (node.value > 0) text.push_back(draft.tree.token(node));
  }
  text.push_back(TokenId(1));
  context.tokens = text;
  model.ClearCounts();
  ASSERT_TRUE(drafter->Draft({&context, 1}, {&draft, 1}).ok());
  EXPECT_EQ(model.passes(), 3);
  EXPECT_EQ(model.rows(), 2 + 3 + 6);
  // One level: a single pass.
  context.max_depth = 1;
  text.push_back(TokenId(2));
  context.tokens = text;
  model.ClearCounts();
  ASSERT_TRUE(drafter->Draft({&context, 1}, {&draft, 1}).ok());
  EXPECT_EQ(model.passes(), 1);
  EXPECT_EQ(model.rows(), 1);
  EXPECT_EQ(drafter->MemoryBytes(*state), 12345 + 777 + 40 * sizeof(float) + 1000);
}

TEST(ModelDrafterTest, ABatchEqualsItsSequencesOneByOne) {
  std::mt19937 random(10);
  const FakeModel model({.vocab = 30, .seed = 5});
  for (const Mode& mode : kModes) {
    for (const int workspace_rows : {3, 100}) {
      const auto drafter = *MakeDrafter("model", {.model = &model,
                                                  .shape = "topk:3,2,1",
                                                  .method = mode.method,
                                                  .workspace_rows = workspace_rows});
      constexpr int kSequences = 4;
      const SamplingOptions sampling{.temperature = mode.temperature};
      std::vector<NoiseStream> noise;
      std::vector<std::vector<TokenId>> texts(kSequences);
      std::vector<std::unique_ptr<DraftState>> together;
      std::vector<std::unique_ptr<DraftState>> alone;
      for (int i = 0; i < kSequences; ++i) {
        noise.emplace_back(1, i);
        texts[i].assign(1 + i * 3, TokenId(i));
        together.push_back(*drafter->NewState());
        alone.push_back(*drafter->NewState());
      }
      for (int round = 0; round < 10; ++round) {
        std::vector<DraftContext> contexts;
        for (int i = 0; i < kSequences; ++i) {
          contexts.push_back({.tokens = texts[i],
                              .state = together[i].get(),
                              .sampling = &sampling,
                              .noise = &noise[i],
                              .gumbel_coupled = mode.gumbel,
                              .max_nodes = static_cast<int>(random() % 14)});
        }
        std::vector<DraftTree> out(kSequences);
        ASSERT_TRUE(drafter->Draft(contexts, out).ok());
        for (int i = 0; i < kSequences; ++i) {
          DraftContext context = contexts[i];
          context.state = alone[i].get();
          DraftTree draft;
          ASSERT_TRUE(drafter->Draft({&context, 1}, {&draft, 1}).ok());
          ASSERT_EQ(out[i].tree, draft.tree) << mode.method;
          Extend(random, draft.tree, 30, &texts[i]);
        }
      }
    }
  }
}

TEST(ModelDrafterTest, StopsAtTheModelsLastPosition) {
  const FakeModel model({.vocab = 30, .max_positions = 12, .seed = 5});
  const auto drafter =
      *MakeDrafter("model", {.model = &model, .shape = "chain:6", .max_positions = 100});
  const auto state = *drafter->NewState();
  const SamplingOptions sampling;
  DraftTree draft;
  for (int size = 1; size <= 12; ++size) {
    const std::vector<TokenId> text(size, TokenId(3));
    state->Reset();
    const DraftContext context{.tokens = text, .state = state.get(), .sampling = &sampling};
    ASSERT_TRUE(drafter->Draft({&context, 1}, {&draft, 1}).ok());
    // The last drafted token is not read by the draft model.
    EXPECT_EQ(draft.tree.size() - 1, std::min(6, 12 - size + 1)) << size;
  }
  const std::vector<TokenId> text(13, TokenId(3));
  const DraftContext context{.tokens = text, .state = state.get(), .sampling = &sampling};
  EXPECT_THAT(std::string(drafter->Draft({&context, 1}, {&draft, 1}).message()),
              HasSubstr("the sequence has 13 tokens, but fake at nowhere drafts at most 12"));
}

TEST(ModelDrafterTest, Errors) {
  const FakeModel model({});
  const auto message = [&](DrafterOptions options) {
    return std::string(MakeDrafter("model", options).status().message());
  };
  EXPECT_THAT(message({}), HasSubstr("drafter \"model\": no draft model"));
  EXPECT_THAT(message({.model = &model, .shape = "chain:"}), HasSubstr("at character 7"));
  EXPECT_THAT(message({.model = &model, .shape = "chain:32"}), HasSubstr("drafts 32 levels"));
  EXPECT_THAT(message({.model = &model, .method = "beam"}),
              HasSubstr("expected one of topk, sampled, sampled_with_replacement"));
  EXPECT_THAT(message({.model = &model, .workspace_rows = 0}), HasSubstr("workspace_rows is 0"));

  const auto drafter = *MakeDrafter("model", {.model = &model, .method = "sampled"});
  const auto state = *drafter->NewState();
  const SamplingOptions sampling{.temperature = 1.0};
  DraftTree draft;
  std::vector<TokenId> text(5, TokenId(3));
  DraftContext context{.tokens = text, .state = state.get(), .sampling = &sampling};
  EXPECT_THAT(std::string(drafter->Draft({&context, 1}, {&draft, 1}).message()),
              HasSubstr("needs the context's noise"));
  const NoiseStream noise(1, 1);
  context.noise = &noise;
  ASSERT_TRUE(drafter->Draft({&context, 1}, {&draft, 1}).ok());
  context.tokens = std::span(text).first(4);
  EXPECT_THAT(std::string(drafter->Draft({&context, 1}, {&draft, 1}).message()),
              HasSubstr("does not continue the 5"));
  std::vector<TokenId> other(6, TokenId(7));
  context.tokens = other;
  EXPECT_FALSE(drafter->Draft({&context, 1}, {&draft, 1}).ok());
  // A token that the draft model does not know is refused by the model, and the state survives.
  text.push_back(TokenId(1000));
  context.tokens = text;
  EXPECT_FALSE(drafter->Draft({&context, 1}, {&draft, 1}).ok());
  text.back() = TokenId(2);
  EXPECT_TRUE(drafter->Draft({&context, 1}, {&draft, 1}).ok());
}

TEST(RegistryTest, NamesAndErrors) {
  std::vector<std::string> names;
  for (const auto& [name, help] : ListDrafters()) {
    EXPECT_FALSE(help.empty());
    names.push_back(name);
  }
  EXPECT_THAT(std::span(names).first(3), ::testing::ElementsAre("none", "model", "ngram"));
  const auto unknown = MakeDrafter("medusa", {});
  EXPECT_EQ(unknown.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(unknown.status().message()), HasSubstr("none, model, ngram"));
  EXPECT_EQ(RegisterDrafter("ngram", "again", MakeNgramDrafter).code(),
            absl::StatusCode::kAlreadyExists);
  EXPECT_FALSE(RegisterDrafter("", "nameless", MakeNgramDrafter).ok());

  const auto none = *MakeDrafter("none", {});
  const auto state = *none->NewState();
  const std::vector<TokenId> text = {TokenId(4), TokenId(5)};
  const DraftContext context{.tokens = text, .state = state.get()};
  DraftTree draft;
  ASSERT_TRUE(none->Draft({&context, 1}, {&draft, 1}).ok());
  EXPECT_EQ(draft.tree.ToString(), "5");
  EXPECT_EQ(none->MemoryBytes(*state), 0u);
}

}  // namespace
}  // namespace canopy
