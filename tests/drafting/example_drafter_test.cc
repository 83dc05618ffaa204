// The example of docs/add-a-drafter.md: compiled, run, and the same as in the page.

#include "tests/drafting/example_drafter.cc"

#include <fstream>
#include <sstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace canopy {
namespace {

TEST(ExampleDrafterTest, DraftsWhatFollowedBefore) {
  ASSERT_TRUE(
      RegisterDrafter("successor", "what followed each token last", MakeSuccessorDrafter).ok());
  const auto drafter = *MakeDrafter("successor", {.vocab_size = 50});
  const auto state = *drafter->NewState();
  std::vector<TokenId> text;
  for (const int token : {1, 2, 3, 1, 9, 60, 4, 1}) text.push_back(TokenId(token));
  DraftTree draft;
  DraftContext context{.tokens = std::span(text).first(4), .state = state.get()};
  context.max_depth = 4;
  ASSERT_TRUE(drafter->Draft({&context, 1}, {&draft, 1}).ok());
  EXPECT_EQ(draft.tree.ToString(), "1(2(3(1(2))))");
  context.tokens = text;
  ASSERT_TRUE(drafter->Draft({&context, 1}, {&draft, 1}).ok());
  EXPECT_EQ(draft.tree.ToString(), "1(9)");  // 60 is outside the vocabulary
  EXPECT_TRUE(Validate(draft, 50).ok());
}

TEST(ExampleDrafterTest, ThePageShowsThisFile) {
  const auto read = [](const std::string& path) {
    std::ifstream file(CANOPY_SOURCE_DIR "/" + path);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
  };
  const std::string example = read("tests/drafting/example_drafter.cc");
  ASSERT_FALSE(example.empty());
  EXPECT_THAT(read("docs/add-a-drafter.md"), ::testing::HasSubstr("```cpp\n" + example + "```"));
}

}  // namespace
}  // namespace canopy
