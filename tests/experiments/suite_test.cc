#include "experiments/suite.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace canopy {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string ErrorOf(std::string_view text) {
  const auto questions = ParseQuestions(text, "q.jsonl");
  return questions.ok() ? "no error" : std::string(questions.status().message());
}

constexpr char kGood[] =
    R"({"question_id": 81, "category": "writing", "turns": ["One.", "Two \u00e9."]})"
    "\n\n"
    R"({"question_id": 7, "category": "qa", "turns": ["Q?"], "reference": ["A"]})"
    "\r\n";

TEST(SuiteTest, ReadsQuestions) {
  const auto questions = ParseQuestions(kGood, "q");
  ASSERT_TRUE(questions.ok()) << questions.status();
  ASSERT_EQ(questions->size(), 2u);
  EXPECT_EQ((*questions)[0].id, 81);
  EXPECT_EQ((*questions)[0].category, "writing");
  EXPECT_THAT((*questions)[0].turns, ElementsAre("One.", "Two \xc3\xa9."));
  EXPECT_EQ((*questions)[1].id, 7);
}

TEST(SuiteTest, NamesTheLineThatIsWrong) {
  const std::string good = kGood;  // three lines
  struct Case {
    std::string line;
    const char* message;
  };
  for (const Case& c : {
           Case{R"({"question_id": 1, "category": "a", "turns": ["x"])", "not valid JSON"},
           Case{"[1]", "JSON object"},
           Case{R"({"category": "a", "turns": ["x"]})", "question_id"},
           Case{R"({"question_id": "1", "category": "a", "turns": ["x"]})", "question_id"},
           Case{R"({"question_id": 1.5, "category": "a", "turns": ["x"]})", "question_id"},
           Case{R"({"question_id": 18446744073709551615, "category": "a", "turns": ["x"]})",
                "question_id"},
           Case{R"({"question_id": 1, "turns": ["x"]})", "category"},
           Case{R"({"question_id": 1, "category": "", "turns": ["x"]})", "category"},
           Case{R"({"question_id": 1, "category": "a"})", "turns"},
           Case{R"({"question_id": 1, "category": "a", "turns": []})", "turns"},
           Case{R"({"question_id": 1, "category": "a", "turns": ["x", "  "]})", "turn 2 is empty"},
           Case{R"({"question_id": 1, "category": "a", "turns": ["x", 3]})", "turn 2"},
           Case{R"({"question_id": 81, "category": "a", "turns": ["x"]})",
                "already stands in line 1"},
           Case{"{\"question_id\": 1, \"category\": \"a\", \"turns\": [\"\xff\"]}", "UTF-8"},
           Case{"{\"question_id\": 1, \"category\": \"a\", \"turns\": [\"\xed\xa0\x80\"]}",
                "UTF-8"},
       }) {
    EXPECT_THAT(ErrorOf(good + c.line + "\n"), AllOf(HasSubstr("q.jsonl:4"), HasSubstr(c.message)))
        << c.line;
  }
}

TEST(SuiteTest, RefusesAFileWithoutQuestions) {
  EXPECT_THAT(ErrorOf("\n \n"), HasSubstr("no question"));
  EXPECT_FALSE(LoadQuestions("/no/such/file").ok());
  EXPECT_FALSE(LoadQuestions(::testing::TempDir()).ok());
}

TEST(SuiteTest, PoolsMtBenchAsSpecBenchDoes) {
  for (const char* category :
       {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}) {
    EXPECT_EQ(PooledCategory(category), "mt_bench");
  }
  for (const char* category : {"translation", "math_reasoning", "qa", "mt_bench"}) {
    EXPECT_EQ(PooledCategory(category), category);
  }
}

std::vector<Question> Numbered(int count) {
  std::vector<Question> questions;
  for (int i = 0; i < count; ++i) {
    questions.push_back({100 + i, i % 2 ? "writing" : "qa", {"x"}});
  }
  return questions;
}

std::vector<int64_t> Ids(const absl::StatusOr<std::vector<Question>>& questions) {
  std::vector<int64_t> ids;
  if (questions.ok()) {
    for (const Question& q : *questions) ids.push_back(q.id);
  }
  return ids;
}

TEST(SuiteTest, Selects) {
  ExperimentConfig config;
  EXPECT_EQ(Ids(SelectQuestions(Numbered(5), config)).size(), 5u);
  config.suite_every = 3;
  EXPECT_THAT(Ids(SelectQuestions(Numbered(8), config)), ElementsAre(100, 103, 106));
  config.suite_limit = 2;
  EXPECT_THAT(Ids(SelectQuestions(Numbered(8), config)), ElementsAre(100, 103));
  config = ExperimentConfig();
  config.suite_categories = " mt_bench ";
  EXPECT_THAT(Ids(SelectQuestions(Numbered(4), config)), ElementsAre(101, 103));
  config.suite_categories = "qa,writing";
  EXPECT_EQ(Ids(SelectQuestions(Numbered(4), config)).size(), 4u);
  config.suite_categories = "qa,poems";
  EXPECT_THAT(SelectQuestions(Numbered(4), config).status().message(),
              AllOf(HasSubstr("poems"), HasSubstr("mt_bench")));
}

TEST(SuiteTest, SamplesAreReproducibleNestedAndInOrder) {
  ExperimentConfig config;
  config.suite_sample = 10;
  config.sampling_seed = 3;
  const std::vector<int64_t> ten = Ids(SelectQuestions(Numbered(100), config));
  ASSERT_EQ(ten.size(), 10u);
  EXPECT_TRUE(std::is_sorted(ten.begin(), ten.end()));
  EXPECT_EQ(ten, Ids(SelectQuestions(Numbered(100), config)));
  config.suite_sample = 11;
  const std::vector<int64_t> eleven = Ids(SelectQuestions(Numbered(100), config));
  EXPECT_TRUE(std::includes(eleven.begin(), eleven.end(), ten.begin(), ten.end()));
  config.suite_sample = 10;
  config.sampling_seed = 4;
  EXPECT_NE(ten, Ids(SelectQuestions(Numbered(100), config)));
}

TEST(SuiteTest, KnowsUtf8) {
  for (const char* good : {"", "abc", "\xc3\xa9", "\xe2\x82\xac", "\xf0\x9f\x98\x80",
                           "\xf4\x8f\xbf\xbf", "\xed\x9f\xbf"}) {
    EXPECT_TRUE(IsUtf8(good)) << good;
  }
  for (const char* bad :
       {"\x80", "\xc0\x80", "\xc3", "\xe2\x82", "\xe0\x80\x80", "\xf0\x80\x80\x80",
        "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xed\xa0\x80", "\xc3\x28"}) {
    EXPECT_FALSE(IsUtf8(bad));
  }
}

}  // namespace
}  // namespace canopy
