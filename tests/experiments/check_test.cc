// canopy check: what it compares, what it finds, and what it says.

#include "experiments/check.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "core/cpu_backend.h"
#include "experiments/arm.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "models/loader.h"
#include "tests/support/checkpoint_files.h"
#include "tests/support/command_output.h"
#include "tests/support/session.h"

namespace canopy {
namespace {

using ::testing::HasSubstr;
using testing::Session;
using testing::TempFolder;
using testing::WriteFile;

const std::string kData = std::string(CANOPY_SOURCE_DIR) + "/data";
const std::string kTarget = kData + "/models/tiny-bamba-4m";
const std::string kDraft = kData + "/models/tiny-draft-m2";

// A config of a small run on the bundled pair.
std::string Config(const TempFolder& folder, const std::string& shapes = "topk:2,1,1") {
  const std::string file = folder.File("small.cfg");
  WriteFile(file, absl::StrCat("[target]\nmodel = ", kTarget, "\n[draft]\nmodel = ", kDraft,
                               "\n[tree]\nshape = ", shapes, "\n[suite]\nquestions = ", kData,
                               "/questions/grade_school.jsonl\nlimit = 2\nmax_new_tokens = 12\n"));
  return file;
}

testing::CommandOutput Check(std::vector<std::string> args) {
  args.insert(args.begin(), "check");
  return testing::RunCommand(args);
}

TEST(Check, SettingsThatMustNotMatterPass) {
  const TempFolder folder;
  const testing::CommandOutput output = Check({"--config", Config(folder), "--run.threads=1",
                                               "--against", "run.threads=2", "--tolerance=0"});
  EXPECT_EQ(output.code, 0) << output.err;
  EXPECT_THAT(output.out, HasSubstr("2 of 2"));
  EXPECT_THAT(output.out, HasSubstr("passed"));
}

TEST(Check, AnotherModelFails) {
  const TempFolder folder;
  const std::string file = Config(folder);
  const testing::CommandOutput output =
      Check({"--config", file, "--against=target.model=" + kDraft});
  EXPECT_EQ(output.code, 1);
  EXPECT_THAT(output.out, HasSubstr("ids: plain decoding, question"));
  EXPECT_THAT(output.err, HasSubstr("differ in a token id"));
  // The tolerance is of logits, not of ids.
  const testing::CommandOutput wide =
      Check({"--config", file, "--against=target.model=" + kDraft, "--tolerance=1e9"});
  EXPECT_EQ(wide.code, 1);
  EXPECT_THAT(wide.err, HasSubstr("and 0 of"));
}

// The greatest difference of logits, found token by token.
TEST(Check, FindsTheGreatestDifferenceOfLogits) {
  const TempFolder folder;
  const std::string file = Config(folder);
  const auto a = LoadConfig(file, std::vector<std::string>{"--draft.kind=none"});
  const auto b =
      LoadConfig(file, std::vector<std::string>{"--draft.kind=none", "--target.model=" + kDraft});
  ASSERT_TRUE(a.ok() && b.ok()) << a.status() << b.status();
  FILE* nowhere = std::fopen("/dev/null", "w");
  CheckOptions options;
  options.tolerance = 0.5;
  options.out = options.progress = nowhere;
  const auto report = CheckSettings(*a, *b, options);
  std::fclose(nowhere);
  ASSERT_TRUE(report.ok()) << report.status();

  const ExperimentConfig& config = a->runs.front();
  const auto store = *ModelStore::Create(config, config.tree_nodes);
  const auto other = *LoadModel(store->backend(), kDraft);
  const auto questions = *SelectQuestions(*LoadQuestions(config.suite_questions), config);
  const auto arm = *ArmDecoder::Create(*store, config, {.positions = 2000});
  int64_t rows = 0, above = 0;
  double greatest = 0.0;
  for (const Question& question : questions) {
    QuestionRecord record;
    ASSERT_TRUE(arm->Answer(question, config.suite_max_new_tokens, nullptr, &record));
    ASSERT_TRUE(record.ok()) << record.error;
    std::vector<ChatMessage> messages;
    for (size_t t = 0; t < record.turns.size(); ++t) {
      messages.push_back({"user", question.turns[t]});
      const std::vector<TokenId> prompt = *arm->Prompt(messages);
      messages.push_back({"assistant", record.turns[t].text});
      Session x(arm->target(), {.max_rows = 8}), y(*other, {.max_rows = 8});
      std::vector<float> row_x, row_y;
      for (const TokenId token : prompt) row_x = x.Step(token), row_y = y.Step(token);
      for (const int32_t id : record.turns[t].tokens) {
        double difference = 0.0;
        for (size_t i = 0; i < row_x.size(); ++i) {
          difference = std::max(difference, std::abs(double{row_x[i]} - double{row_y[i]}));
        }
        ++rows;
        above += difference > options.tolerance;
        greatest = std::max(greatest, difference);
        row_x = x.Step(TokenId(id)), row_y = y.Step(TokenId(id));
      }
    }
  }
  EXPECT_GT(greatest, 0.0);
  EXPECT_EQ(report->greatest_difference, greatest);
  EXPECT_EQ(report->rows, rows);
  EXPECT_EQ(report->rows_different, above);
  EXPECT_FALSE(report->passed());
}

TEST(Check, TreesAndDraftersAreExact) {
  const TempFolder folder;
  const testing::CommandOutput output = Check({"--config", Config(folder, "chain:3 | topk:3,2,1"),
                                               "--exact", "--draft.kind=model | ngram"});
  EXPECT_EQ(output.code, 0) << output.err << output.out;
  EXPECT_THAT(output.out, HasSubstr("2 of 2"));
  EXPECT_THAT(output.out, HasSubstr("passed"));
}

TEST(Check, ExactNeedsTwoScoresOfAPath) {
  const TempFolder folder;
  const testing::CommandOutput output =
      Check({"--config", Config(folder), "--exact", "--draft.kind=none", "--suite.limit=1"});
  EXPECT_EQ(output.code, 1);
  EXPECT_THAT(output.err, HasSubstr("no two logits could be compared"));
}

TEST(PathScores, ComparesTheBitsOfEqualPathsAlone) {
  std::vector<float> rows = {0.0f, 1.0f, 2.0f, 3.0f};
  TokenTree tree;
  ASSERT_TRUE(tree.AddNode(kPrefix, TokenId(7)).ok());
  ASSERT_TRUE(tree.AddNode(NodeId(0), TokenId(8)).ok());
  const std::vector<TokenId> tokens = {TokenId(5), TokenId(7)};
  TargetScores scores;
  scores.logits = {rows.data(), 2, 2, 2};
  Differences differences;
  PathScores paths(&differences);
  paths.Begin("model", "plain", 1);
  paths.OnScores(tokens, tree, scores);
  EXPECT_EQ(paths.scored(), 2);
  EXPECT_EQ(paths.compared(), 0);

  // The second node as the first one of a later tree, and a node of another path.
  TokenTree later;
  ASSERT_TRUE(later.AddNode(kPrefix, TokenId(8)).ok());
  ASSERT_TRUE(later.AddNode(NodeId(0), TokenId(9)).ok());
  std::vector<float> again = {2.0f, 3.0f, 0.5f, 0.5f};
  scores.logits = {again.data(), 2, 2, 2};
  const std::vector<TokenId> longer = {TokenId(5), TokenId(7), TokenId(8)};
  paths.Begin("model", "tree", 1);
  paths.OnScores(longer, later, scores);
  EXPECT_EQ(paths.compared(), 1);
  EXPECT_EQ(paths.different(), 0);

  // One bit, the sign of a zero.
  rows[0] = -0.0f;
  scores.logits = {rows.data(), 2, 2, 2};
  paths.OnScores(tokens, tree, scores);
  EXPECT_EQ(paths.compared(), 3);
  EXPECT_EQ(paths.different(), 1);
  EXPECT_THAT(differences.shown(),
              ::testing::ElementsAre("bits: question 1, position 1: the logits of tree differ from "
                                     "those of plain"));
  // Another model's scores are its own.
  paths.Begin("other model", "tree", 1);
  paths.OnScores(tokens, tree, scores);
  EXPECT_EQ(paths.compared(), 3);
}

TEST(Check, SaysWhatIsWrongWithItsArguments) {
  const TempFolder folder;
  const std::string file = Config(folder);
  EXPECT_EQ(Check({}).code, 2);
  EXPECT_THAT(Check({}).err, HasSubstr("a config file is expected"));
  EXPECT_THAT(Check({"--config", file, "--against", "run.threads"}).err,
              HasSubstr("expected KEY=VALUE"));
  EXPECT_THAT(Check({"--config", file, "--tolerance=-1"}).err, HasSubstr("0 or more"));
  EXPECT_THAT(Check({"--config", file, "--exact", "--against=run.threads=2"}).err,
              HasSubstr("one setting"));
  EXPECT_THAT(Check({"--config", file, "--against=run.thread=2"}).err, HasSubstr("run.threads"));
  EXPECT_THAT(Check({"--config", file, "--against=tree.shape=chain:2 | chain:3"}).err,
              HasSubstr("compared one by one"));
  EXPECT_EQ(Check({"--help"}).code, 0);
}

}  // namespace
}  // namespace canopy
