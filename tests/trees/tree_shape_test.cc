#include "trees/tree_shape.h"

#include <algorithm>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace canopy {
namespace {

using ::testing::HasSubstr;

void ExpectWellFormed(const TreeShape& shape) {
  std::vector<int> children(shape.size(), 0);
  ASSERT_EQ(shape.parent(NodeId(0)), kPrefix);
  for (int i = 1; i < shape.size(); ++i) {
    const NodeId node(i);
    const NodeId parent = shape.parent(node);
    ASSERT_GE(parent.value, 0);
    ASSERT_LT(parent.value, i);
    EXPECT_EQ(shape.rank(node), children[parent.value]);
    EXPECT_EQ(shape.child(parent, children[parent.value]++), node);
    EXPECT_EQ(shape.depth(node), shape.depth(parent) + 1);
    EXPECT_GE(shape.depth(node), shape.depth(NodeId(i - 1))) << "breadth-first";
  }
  for (int i = 0; i < shape.size(); ++i) EXPECT_EQ(shape.children(NodeId(i)), children[i]);
  EXPECT_EQ(shape.height(), shape.depth(NodeId(shape.size() - 1)) + 1);
}

TEST(TreeShapeTest, Forms) {
  EXPECT_EQ(TreeShape::Parse("chain:3")->ToString(), "(((())))");
  EXPECT_EQ(*TreeShape::Parse(" chain: 3 "), TreeShape::Chain(3));
  EXPECT_EQ(TreeShape::Parse("topk:2,1")->ToString(), "((()),(()))");
  EXPECT_EQ(TreeShape::Parse("chain:0")->ToString(), "()");
  EXPECT_EQ(TreeShape::Parse("topk:8,4,2")->size(), 1 + 8 + 32 + 64);
  EXPECT_EQ(TreeShape::Parse("( ( (), () ), () )")->ToString(), "(((),()),())");
  EXPECT_EQ(*TreeShape::Parse("((((()))))"), *TreeShape::Parse("chain:4"));
  for (const char* text : {"chain:0", "chain:31", "topk:8,4,2", "(((),()),())", "((),((),(())))"}) {
    const auto shape = TreeShape::Parse(text);
    ASSERT_TRUE(shape.ok()) << shape.status();
    ExpectWellFormed(*shape);
    EXPECT_EQ(*TreeShape::Parse(shape->ToString()), *shape);
  }
}

TEST(TreeShapeTest, ErrorsNameTheCharacter) {
  const std::pair<const char*, const char*> cases[] = {
      {"", "at character 1, found the end"},
      {"chain:", "number from 0 to 4095 at character 7, found the end"},
      {"chain:-1", "at character 7, found '-'"},
      {"chain:4,2", "expected the end at character 8, found ','"},
      {"chain:5000", "at character 7"},
      {"chain:99999999999999999999", "at character 7"},
      {"topk:0", "from 1"},
      {"topk:4,", "at character 8, found the end"},
      {"topk:4,x", "at character 8, found 'x'"},
      {"topk:4 2", "expected ',' or the end at character 8"},
      {"topk:100,100", "more than 4096 nodes; expected a smaller shape at character 10"},
      {"(", "expected '(' or ')' at character 2, found the end"},
      {"((),)", "expected '(' at character 5, found ')'"},
      {"(,())", "expected '(' or ')' at character 2, found ','"},
      {"(()())", "expected ',' or ')' at character 4, found '('"},
      {"(()))", "expected the end at character 5, found ')'"},
      {"(),()", "expected the end at character 3, found ','"},
      {"beam:3", "expected \"chain:\", \"topk:\" or '(' at character 1, found 'b'"},
  };
  for (const auto& [text, message] : cases) {
    const auto shape = TreeShape::Parse(text);
    ASSERT_FALSE(shape.ok()) << text;
    EXPECT_EQ(shape.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(shape.status().message()), HasSubstr(message)) << text;
  }
  EXPECT_FALSE(TreeShape::Parse(std::string(100000, '(')).ok());
}

TEST(TreeShapeTest, RandomTextNeverBreaksTheParser) {
  std::mt19937 random(5);
  const std::string alphabet = "((((()))),, 1c";
  int good = 0;
  for (int trial = 0; trial < 200000; ++trial) {
    std::string text(random() % 10, ' ');
    for (char& c : text) c = alphabet[random() % alphabet.size()];
    const auto shape = TreeShape::Parse(text);
    if (!shape.ok()) continue;
    ++good;
    ExpectWellFormed(*shape);
    text.erase(std::remove(text.begin(), text.end(), ' '), text.end());
    EXPECT_EQ(shape->ToString(), text);
  }
  EXPECT_GT(good, 1000);
}

}  // namespace
}  // namespace canopy
