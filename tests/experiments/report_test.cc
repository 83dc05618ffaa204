#include "experiments/report.h"

#include <cmath>
#include <sstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace canopy {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

QuestionRecord Answer(int64_t id, const std::string& category, std::vector<int32_t> tokens,
                      int rounds, double seconds, int repetition = 0) {
  QuestionRecord record;
  record.question_id = id;
  record.category = category;
  record.repetition = repetition;
  TurnRecord turn;
  turn.accept_lengths.assign(rounds, 1);
  turn.accept_lengths[0] = static_cast<int32_t>(tokens.size()) - rounds + 1;
  turn.tokens = std::move(tokens);
  turn.seconds.verify = seconds / 2;
  turn.seconds.total = seconds;
  record.turns = {turn};
  return record;
}

std::vector<int32_t> Tokens(int count) { return std::vector<int32_t>(count, 7); }

ArmRecords Arm(const std::vector<QuestionRecord>& method,
               const std::vector<QuestionRecord>& baseline) {
  ArmRecords arm;
  arm.name = "method";
  arm.must_equal_baseline = true;
  for (const QuestionRecord& record : method) arm.records.push_back(&record);
  for (const QuestionRecord& record : baseline) arm.baseline.push_back(&record);
  return arm;
}

const CategoryRow* Find(const ArmReport& report, const std::string& category) {
  for (const CategoryRow& row : report.rows) {
    if (row.category == category) return &row;
  }
  return nullptr;
}

TEST(ReportTest, DeviceTimeIsAShareOfTheRounds) {
  std::vector<QuestionRecord> records = {Answer(1, "qa", Tokens(10), 5, 2.0)};
  EXPECT_THAT(ArmTable(MakeArmReport(Arm(records, {}))), Not(HasSubstr("the device")));
  PhaseSeconds& seconds = records[0].turns[0].seconds;
  seconds.prefill = 1.0;
  seconds.draft = 0.25;
  seconds.verify = 0.7;
  seconds.commit = 0.05;
  seconds.device = 0.8;
  EXPECT_THAT(ArmTable(MakeArmReport(Arm(records, {}))),
              HasSubstr("the device was at work in 80.0% of the time of draft, verify, accept and "
                        "commit"));
}

TEST(ReportTest, RatesAreSpecBenchsAndTokenWeighted) {
  // By hand: writing 10 tokens in 2 s, coding 30 in 3 s, qa 20 in 1 s; plain decoding twice as slow
  // on the first two and four times on the third.
  const std::vector<QuestionRecord> method = {Answer(1, "writing", Tokens(10), 5, 2.0),
                                              Answer(2, "coding", Tokens(30), 10, 3.0),
                                              Answer(3, "qa", Tokens(20), 4, 1.0)};
  const std::vector<QuestionRecord> plain = {Answer(1, "writing", Tokens(10), 10, 4.0),
                                             Answer(2, "coding", Tokens(30), 30, 6.0),
                                             Answer(3, "qa", Tokens(20), 20, 4.0)};
  const ArmReport report = MakeArmReport(Arm(method, plain));
  ASSERT_EQ(report.rows.size(), 3u);
  EXPECT_EQ(report.rows[0].category, "mt_bench");
  const CategoryRow& mt = *Find(report, "mt_bench");
  EXPECT_EQ(mt.questions, 2);
  EXPECT_EQ(mt.tokens, 40);
  EXPECT_DOUBLE_EQ(mt.mat, 40.0 / 15);
  EXPECT_DOUBLE_EQ(mt.rate.mean, (5.0 + 10.0) / 2);
  EXPECT_DOUBLE_EQ(mt.weighted_rate.mean, 40.0 / 5);
  EXPECT_DOUBLE_EQ(mt.baseline_rate->mean, (2.5 + 5.0) / 2);
  EXPECT_DOUBLE_EQ(mt.baseline_weighted_rate->mean, 4.0);
  EXPECT_DOUBLE_EQ(mt.speedup->mean, 2.0);
  const CategoryRow& all = report.overall();
  EXPECT_EQ(all.category, "overall");
  EXPECT_DOUBLE_EQ(all.rate.mean, (5.0 + 10.0 + 20.0) / 3);
  EXPECT_DOUBLE_EQ(all.baseline_rate->mean, (2.5 + 5.0 + 5.0) / 3);
  EXPECT_DOUBLE_EQ(all.speedup->mean, (35.0 / 3) / (12.5 / 3));
  EXPECT_DOUBLE_EQ(all.weighted_speedup->mean, (60.0 / 6) / (60.0 / 14));
  EXPECT_DOUBLE_EQ(all.mat, 60.0 / 19);
  EXPECT_TRUE(report.gate.applies);
  EXPECT_EQ(report.gate.compared, 3);
  EXPECT_FALSE(report.gate.red());
}

TEST(ReportTest, DispersionIsOverRepetitions) {
  // Speed-ups 2 and 3: mean 2.5, sample deviation sqrt(0.5).
  const std::vector<QuestionRecord> method = {Answer(1, "qa", Tokens(12), 4, 1.0, 0),
                                              Answer(1, "qa", Tokens(12), 4, 1.0, 1)};
  const std::vector<QuestionRecord> plain = {Answer(1, "qa", Tokens(12), 12, 2.0, 0),
                                             Answer(1, "qa", Tokens(12), 12, 3.0, 1)};
  const ArmReport report = MakeArmReport(Arm(method, plain));
  EXPECT_EQ(report.overall().questions, 1);
  EXPECT_EQ(report.overall().tokens, 24);
  EXPECT_DOUBLE_EQ(report.overall().speedup->mean, 2.5);
  EXPECT_DOUBLE_EQ(report.overall().speedup->deviation, std::sqrt(0.5));
  EXPECT_EQ(report.overall().speedup->repetitions, 2);
  EXPECT_THAT(ArmTable(report), HasSubstr("2.50x ±0.71"));
}

TEST(ReportTest, SpreadOfKnownValues) {
  const std::vector<double> values = {2, 4, 4, 4, 5, 5, 7, 9};
  EXPECT_DOUBLE_EQ(SpreadOf(values).mean, 5.0);
  EXPECT_DOUBLE_EQ(SpreadOf(values).deviation, std::sqrt(32.0 / 7));
  EXPECT_EQ(SpreadOf({}).repetitions, 0);
}

TEST(ReportTest, ComparesOnlyQuestionsThatBothAnswered) {
  std::vector<QuestionRecord> method = {Answer(1, "qa", Tokens(10), 5, 1.0),
                                        Answer(2, "qa", Tokens(10), 5, 10.0)};
  std::vector<QuestionRecord> plain = {Answer(1, "qa", Tokens(10), 10, 2.0),
                                       Answer(2, "qa", Tokens(10), 10, 2.0)};
  plain[1].error = "failed";
  const ArmReport report = MakeArmReport(Arm(method, plain));
  EXPECT_DOUBLE_EQ(report.overall().speedup->mean, 2.0);
  EXPECT_DOUBLE_EQ(report.overall().rate.mean, 5.5);  // its own rate is over all it answered
  EXPECT_EQ(report.gate.compared, 1);

  method[0].error = "failed too";
  const ArmReport failed = MakeArmReport(Arm(method, plain));
  EXPECT_EQ(failed.failed(), 1);
  EXPECT_EQ(failed.overall().questions, 1);
  EXPECT_FALSE(failed.overall().speedup.has_value());
  EXPECT_THAT(ArmTable(failed), HasSubstr("failed"));
}

TEST(ReportTest, ARedGateShowsNoSpeedup) {
  std::vector<QuestionRecord> method = {Answer(1, "qa", {1, 2, 3}, 2, 1.0),
                                        Answer(2, "qa", {1, 2, 3}, 2, 1.0),
                                        Answer(3, "qa", {1, 2}, 2, 1.0)};
  const std::vector<QuestionRecord> plain = {Answer(1, "qa", {1, 2, 3}, 3, 2.0),
                                             Answer(2, "qa", {1, 9, 3}, 3, 2.0),
                                             Answer(3, "qa", {1, 2, 3}, 3, 2.0)};
  ArmReport report = MakeArmReport(Arm(method, plain));
  EXPECT_TRUE(report.gate.red());
  EXPECT_EQ(report.gate.different, 2);  // a shorter answer is a different one
  EXPECT_EQ(report.gate.compared, 3);
  EXPECT_FALSE(report.overall().speedup.has_value());
  EXPECT_FALSE(report.overall().weighted_speedup.has_value());
  const std::string table = ArmTable(report);
  EXPECT_THAT(table, HasSubstr("NOT EQUAL"));
  EXPECT_THAT(table, HasSubstr("question 2, turn 1, token 1: 2 where plain decoding has 9"));
  EXPECT_THAT(table, Not(HasSubstr("2.00x")));
  EXPECT_THAT(ComparisonTable({&report, 1}), Not(HasSubstr("2.00x")));
  EXPECT_THAT(ReportCsv({&report, 1}), HasSubstr(",NO"));

  method.resize(1);
  EXPECT_FALSE(MakeArmReport(Arm(method, plain)).gate.red());

  // Where each arm draws its own noise the texts differ, and nothing is compared.
  method = {Answer(2, "qa", {1, 2, 3}, 2, 1.0)};
  ArmRecords sampled = Arm(method, plain);
  sampled.must_equal_baseline = false;
  EXPECT_FALSE(MakeArmReport(sampled).gate.applies);
  EXPECT_TRUE(MakeArmReport(sampled).overall().speedup.has_value());
}

TEST(ReportTest, AddsCountsOfAllQuestions) {
  std::vector<QuestionRecord> method = {Answer(1, "qa", Tokens(3), 2, 1.0),
                                        Answer(2, "qa", Tokens(3), 2, 1.0)};
  method[0].by_depth = {{2, 4, 1}};
  method[1].by_depth = {{2, 2, 2}, {1, 2, 1}};
  method[1].by_rank = {{2, 3, 3}, {1, 1, 0}};
  const ArmReport report = MakeArmReport(Arm(method, {}));
  ASSERT_EQ(report.by_depth.size(), 2u);
  EXPECT_EQ(report.by_depth[0].rounds, 4);
  EXPECT_EQ(report.by_depth[0].proposed, 6);
  EXPECT_EQ(report.by_depth[0].accepted, 3);
  const std::string table = ArmTable(report);
  EXPECT_THAT(table, HasSubstr("1: 50.0% (3/6)"));
  EXPECT_THAT(table, HasSubstr("2: 50.0% (1/2)"));
  EXPECT_THAT(table, HasSubstr("0: 100.0% (3/3)"));
  EXPECT_THAT(table, HasSubstr("verify 50.0%"));
}

TEST(ReportTest, CsvHasOneRowAnArmAndCategory) {
  const std::vector<QuestionRecord> method = {Answer(1, "writing", Tokens(10), 5, 2.0),
                                              Answer(3, "qa", Tokens(20), 4, 1.0)};
  ArmRecords arm = Arm(method, {});
  arm.name = "topk:4,2";
  arm.axes = {{"tree.shape", "topk:4,2"}};
  const ArmReport report = MakeArmReport(arm);
  std::istringstream csv(ReportCsv({&report, 1}));
  std::vector<std::string> lines;
  for (std::string line; std::getline(csv, line);) lines.push_back(line);
  ASSERT_EQ(lines.size(), 4u);
  EXPECT_THAT(lines[0], ::testing::StartsWith("arm,tree.shape,category,questions"));
  EXPECT_THAT(lines[1], ::testing::StartsWith("\"topk:4,2\",\"topk:4,2\",mt_bench,1,0,10,5,2,5,"));
  EXPECT_THAT(lines[3], ::testing::StartsWith("\"topk:4,2\",\"topk:4,2\",overall,2,0,30,9,"));
}

}  // namespace
}  // namespace canopy
