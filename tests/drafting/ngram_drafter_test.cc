#include <random>

#include "drafting/registry.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace canopy {
namespace {

using ::testing::HasSubstr;

std::vector<TokenId> Tokens(std::initializer_list<int> values) {
  std::vector<TokenId> tokens;
  for (const int value : values) tokens.push_back(TokenId(value));
  return tokens;
}

// The definition, by scanning the whole text: a trie of continuations that the shape admits.
TokenTree BruteForce(const DrafterOptions& options, const DraftContext& context) {
  const TreeShape shape = *TreeShape::Parse(options.shape);
  const auto text = context.tokens;
  const int size = static_cast<int>(text.size());
  TokenTree tree;
  (void)*tree.AddNode(kPrefix, text.back());
  std::vector<NodeId> shape_of = {NodeId(0)};
  for (int n = options.ngram_max; n >= options.ngram_min; --n) {
    int matches = 0;
    for (int end = size - 1; end >= n && matches < options.ngram_matches; --end) {
      bool same = true;
      for (int i = 1; i <= n; ++i) same = same && text[end - i] == text[size - i];
      if (!same) continue;
      ++matches;
      NodeId node(0);
      for (int i = end; i < size && tree.depth(node) < context.max_depth; ++i) {
        if (options.vocab_size > 0 && text[i].value >= options.vocab_size) break;
        NodeId child = tree.FindChild(node, text[i]);
        if (child == kPrefix) {
          int rank = 0;
          for (NodeId c = tree.first_child(node); c != kPrefix; c = tree.next_sibling(c)) ++rank;
          if (rank >= shape.children(shape_of[node.value]) || tree.size() > context.max_nodes) {
            break;
          }
          child = *tree.AddNode(node, text[i]);
          shape_of.push_back(shape.child(shape_of[node.value], rank));
        }
        node = child;
      }
    }
  }
  return tree;
}

TEST(NgramDrafterTest, EqualsBruteForceOnGrowingTexts) {
  std::mt19937 random(6);
  int drafted = 0;
  for (int trial = 0; trial < 60; ++trial) {
    const char* shapes[] = {"chain:1", "chain:8", "topk:3,2,1,1", "(((),()),())"};
    DrafterOptions options;
    options.shape = shapes[random() % 4];
    options.ngram_min = 1 + static_cast<int>(random() % 2);
    options.ngram_max = options.ngram_min + static_cast<int>(random() % 3);
    options.ngram_matches = random() % 2 ? 32 : 2;
    const int vocab = 2 + static_cast<int>(random() % 6);
    options.vocab_size = random() % 3 ? 0 : vocab - 1;
    const auto drafter = *MakeDrafter("ngram", options);
    EXPECT_FALSE(drafter->info().samples);
    auto state = *drafter->NewState();
    for (int sequence = 0; sequence < 2; ++sequence) {
      std::vector<TokenId> text;
      DraftTree draft;
      while (text.size() < (trial % 10 == 0 ? 1500 : 200)) {  // beyond the first size of the index
        for (int i = 1 + static_cast<int>(random() % (trial % 10 == 0 ? 200 : 5)); i > 0; --i) {
          text.push_back(TokenId(static_cast<int>(random() % vocab)));
        }
        const DraftContext context{.tokens = text,
                                   .state = state.get(),
                                   .max_nodes = static_cast<int>(random() % 12),
                                   .max_depth = static_cast<int>(random() % 6)};
        ASSERT_TRUE(drafter->Draft({&context, 1}, {&draft, 1}).ok());
        const TokenTree expected = BruteForce(options, context);
        ASSERT_EQ(draft.tree, expected)
            << draft.tree.ToString() << " instead of " << expected.ToString();
        ASSERT_TRUE(Validate(draft, vocab).ok());
        drafted += draft.tree.size() - 1;
      }
      state->Reset();
    }
  }
  EXPECT_GT(drafted, 1000);
}

TEST(NgramDrafterTest, LongestSuffixThenLatestMatch) {
  DrafterOptions options;
  options.shape = "chain:3";
  const auto drafter = *MakeDrafter("ngram", options);
  const auto state = *drafter->NewState();
  DraftTree draft;
  const auto tree_of = [&](const std::vector<TokenId>& text) {
    state->Reset();
    const DraftContext context{.tokens = text, .state = state.get()};
    EXPECT_TRUE(drafter->Draft({&context, 1}, {&draft, 1}).ok());
    return draft.tree.ToString();
  };
  // "1 2" has been followed by 7, "2" alone later by 9.
  EXPECT_EQ(tree_of(Tokens({1, 2, 7, 8, 8, 2, 9, 1, 2})), "2(7(8(8)))");
  EXPECT_EQ(tree_of(Tokens({3, 2, 7, 2, 9, 4, 5, 2})), "2(9(4(5)))");
  // A short continuation is lengthened by an earlier one that agrees.
  EXPECT_EQ(tree_of(Tokens({4, 4, 4, 4, 4})), "4(4(4(4)))");
  EXPECT_EQ(tree_of(Tokens({1, 2, 3})), "3");
}

TEST(NgramDrafterTest, Errors) {
  DrafterOptions options;
  options.ngram_min = 0;
  EXPECT_THAT(std::string(MakeDrafter("ngram", options).status().message()),
              HasSubstr("drafter \"ngram\": ngram_min is 0"));
  options.ngram_min = 4;
  EXPECT_FALSE(MakeDrafter("ngram", options).ok());
  options = {};
  options.shape = "chain:32";
  EXPECT_THAT(std::string(MakeDrafter("ngram", options).status().message()),
              HasSubstr("drafts 32 levels; a tree has at most 31 below its root"));
  options.shape = "chain:31";
  const auto drafter = *MakeDrafter("ngram", options);
  const auto state = *drafter->NewState();
  DraftTree draft;
  const std::vector<TokenId> text = Tokens({1, 2, 3});
  DraftContext context{.tokens = text, .state = state.get()};
  ASSERT_TRUE(drafter->Draft({&context, 1}, {&draft, 1}).ok());
  context.tokens = std::span(text).first(2);
  EXPECT_THAT(std::string(drafter->Draft({&context, 1}, {&draft, 1}).message()),
              HasSubstr("shrunk from 3 to 2"));
  context.tokens = {};
  EXPECT_FALSE(drafter->Draft({&context, 1}, {&draft, 1}).ok());
}

}  // namespace
}  // namespace canopy
