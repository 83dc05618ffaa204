#include "trees/token_tree.h"

#include <algorithm>
#include <map>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "trees/ancestor_mask.h"

namespace canopy {
namespace {

using ::testing::HasSubstr;

TokenTree RandomTree(std::mt19937& random, int nodes) {
  TokenTree tree;
  while (tree.size() < nodes) {
    const NodeId parent(static_cast<int>(random() % (tree.size() + 1)) - 1);
    (void)tree.AddNode(parent, TokenId(static_cast<int>(random() % 50)));  // may repeat a sibling
  }
  return tree;
}

TEST(TokenTreeTest, LinksAgreeWithTheArrays) {
  std::mt19937 random(1);
  for (int trial = 0; trial < 50; ++trial) {
    const TokenTree tree = RandomTree(random, 1 + static_cast<int>(random() % 80));
    std::map<int, std::vector<int>> children;
    for (int i = 0; i < tree.size(); ++i) children[tree.parents()[i].value].push_back(i);
    int height = 0;
    for (int i = -1; i < tree.size(); ++i) {
      std::vector<int> listed;
      for (NodeId n = tree.first_child(NodeId(i)); n != kPrefix; n = tree.next_sibling(n)) {
        EXPECT_EQ(tree.sibling_rank(n), static_cast<int>(listed.size()));
        EXPECT_EQ(tree.FindChild(NodeId(i), tree.token(n)), n);
        listed.push_back(n.value);
      }
      EXPECT_EQ(listed, children[i]);
      EXPECT_EQ(tree.FindChild(NodeId(i), TokenId(1000)), kPrefix);
      if (i < 0) continue;
      const std::vector<NodeId> path = tree.Path(NodeId(i));
      ASSERT_EQ(static_cast<int>(path.size()), tree.depth(NodeId(i)) + 1);
      EXPECT_EQ(path.back(), NodeId(i));
      for (size_t k = 0; k < path.size(); ++k) {
        EXPECT_EQ(tree.parent(path[k]), k == 0 ? kPrefix : path[k - 1]);
      }
      height = std::max(height, static_cast<int>(path.size()));
    }
    EXPECT_EQ(tree.height(), height);

    const AncestorMask mask(tree.parents());
    for (int i = 0; i < tree.size(); ++i) {
      const std::vector<NodeId> path = tree.Path(NodeId(i));
      for (int j = 0; j < tree.size(); ++j) {
        EXPECT_EQ(mask.Sees(NodeId(i), NodeId(j)),
                  std::find(path.begin(), path.end(), NodeId(j)) != path.end());
      }
    }

    auto same = TokenTree::Create(tree.parents(), tree.tokens());
    ASSERT_TRUE(same.ok());
    EXPECT_EQ(*same, tree);
    // The text form renumbers the nodes, but keeps tree and sibling order.
    auto parsed = TokenTree::Parse(tree.ToString());
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    EXPECT_EQ(parsed->ToString(), tree.ToString());
    EXPECT_EQ(parsed->size(), tree.size());
  }
}

TEST(TokenTreeTest, TextForm) {
  TokenTree tree;
  EXPECT_EQ(tree.ToString(), "");
  const NodeId root = *tree.AddNode(kPrefix, TokenId(17));
  *tree.AddNode(root, TokenId(42));
  const NodeId second = *tree.AddNode(root, TokenId(43));
  *tree.AddNode(second, TokenId(5));
  EXPECT_EQ(tree.ToString(), "17(42,43(5))");
  EXPECT_EQ(*TokenTree::Parse(" 17 ( 42 , 43 ( 5 ) ) "), tree);
  *tree.AddNode(kPrefix, TokenId(1));
  EXPECT_EQ(tree.ToString(), "17(42,43(5)),1");
  EXPECT_EQ(AncestorMask(tree.parents()).ToString(), "#....\n##...\n#.#..\n#.##.\n....#\n");
  tree.Clear();
  EXPECT_TRUE(tree.empty());
  EXPECT_EQ(tree.height(), 0);
  EXPECT_EQ(tree.first_child(kPrefix), kPrefix);
}

TEST(TokenTreeTest, RefusesWhatIsNoTree) {
  TokenTree tree;
  const NodeId root = *tree.AddNode(kPrefix, TokenId(1));
  *tree.AddNode(root, TokenId(2));
  EXPECT_THAT(std::string(tree.AddNode(NodeId(2), TokenId(3)).status().message()),
              HasSubstr("node 2 has parent 2"));
  EXPECT_THAT(std::string(tree.AddNode(NodeId(-2), TokenId(3)).status().message()),
              HasSubstr("has parent -2"));
  EXPECT_THAT(std::string(tree.AddNode(root, TokenId(-1)).status().message()),
              HasSubstr("has token -1"));
  EXPECT_THAT(std::string(tree.AddNode(root, TokenId(2)).status().message()),
              HasSubstr("like its sibling 1"));
  EXPECT_EQ(tree.size(), 2);

  const NodeId parents[] = {kPrefix, NodeId(1)};
  const TokenId tokens[] = {TokenId(4), TokenId(5)};
  EXPECT_THAT(std::string(TokenTree::Create(parents, tokens).status().message()),
              HasSubstr("node 1 has parent 1"));
  EXPECT_FALSE(TokenTree::Create(parents, {tokens, 1}).ok());
}

TEST(TokenTreeTest, PromisedTokensAreResolvedLater) {
  TokenTree tree;
  const NodeId root = *tree.AddNode(kPrefix, TokenId(5));
  EXPECT_FALSE(tree.promised());
  const NodeId a = *tree.AddPromised(root, TokenId(-10));
  const NodeId b = *tree.AddPromised(root, TokenId(-11));
  const NodeId c = *tree.AddPromised(a, TokenId(-10));
  EXPECT_TRUE(tree.promised());
  EXPECT_EQ(tree.sibling_rank(b), 1);
  EXPECT_EQ(tree.FindChild(root, TokenId(-11)), b);
  EXPECT_FALSE(tree.AddPromised(root, TokenId(-10)).ok());  // the same token
  EXPECT_THAT(std::string(tree.AddPromised(root, TokenId(-1)).status().message()),
              HasSubstr("expected a promised one"));
  EXPECT_FALSE(tree.AddPromised(root, TokenId(3)).ok());
  EXPECT_THAT(std::string(tree.AddNode(c, TokenId(-10)).status().message()),
              HasSubstr("expected 0 or more"));

  const auto message = [&](std::vector<TokenId> tokens) {
    return std::string(tree.Resolve(tokens).message());
  };
  EXPECT_THAT(message({TokenId(5), TokenId(1), TokenId(2)}), HasSubstr("3 tokens for 4 nodes"));
  EXPECT_THAT(message({TokenId(5), TokenId(1), TokenId(1), TokenId(0)}),
              HasSubstr("node 2 gets token 1 like its sibling 1"));
  EXPECT_THAT(message({TokenId(6), TokenId(1), TokenId(2), TokenId(0)}),
              HasSubstr("node 0 gets token 6; it carries 5"));
  EXPECT_THAT(message({TokenId(5), TokenId(1), TokenId(), TokenId(0)}),
              HasSubstr("node 2 gets token -1"));
  EXPECT_TRUE(tree.promised());
  EXPECT_EQ(tree.token(a), TokenId(-10));
  ASSERT_TRUE(tree.Resolve(std::vector{TokenId(5), TokenId(1), TokenId(2), TokenId(1)}).ok());
  EXPECT_FALSE(tree.promised());
  EXPECT_TRUE(tree ==
              *TokenTree::Create(std::vector{kPrefix, root, root, a},
                                 std::vector{TokenId(5), TokenId(1), TokenId(2), TokenId(1)}));
  (void)*tree.AddPromised(c, TokenId(-9));
  tree.Clear();
  EXPECT_FALSE(tree.promised());
}

TEST(TokenTreeTest, ParseErrorsNameTheCharacter) {
  const std::pair<const char*, const char*> cases[] = {
      {"1(", "at character 3, found the end"},
      {"1)", "at character 2, found ')'"},
      {"x", "at character 1, found 'x'"},
      {"1(2,2)", "twice among siblings at character 5"},
      {"1,", "at character 3"},
      {"1(2))", "at character 5, found ')'"},
      {"99999999999", "at character 1"},
      {"1 2", "at character 3, found '2'"},
      {"()", "at character 1"},
  };
  for (const auto& [text, message] : cases) {
    const auto tree = TokenTree::Parse(text);
    ASSERT_FALSE(tree.ok()) << text;
    EXPECT_THAT(std::string(tree.status().message()), HasSubstr(message)) << text;
  }
}

}  // namespace
}  // namespace canopy
