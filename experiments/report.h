// What a run shows: a table by category for each arm, the comparison of a sweep, and CSV.
//
// Rates follow Spec-Bench's evaluation/speed.py: tokens per second is the mean over questions of
// tokens / wall time (prompt included), MAT the mean over all rounds, and MT-Bench's eight
// categories are one row. Beside it stands the token-weighted rate, all tokens / all time. Baseline
// and method are counted from the same token ids and over the same questions: those that both
// answered.

#ifndef CANOPY_EXPERIMENTS_REPORT_H_
#define CANOPY_EXPERIMENTS_REPORT_H_

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "experiments/records.h"

namespace canopy {

// Mean and sample standard deviation over repetitions.
struct Spread {
  double mean = 0;
  double deviation = 0;  // 0 for one repetition
  int repetitions = 0;
};
Spread SpreadOf(std::span<const double> values);

struct CategoryRow {
  std::string category;  // pooled; "overall" for the last row
  int questions = 0;     // answered, each counted once however often it was repeated
  int failed = 0;
  int64_t tokens = 0;  // of all repetitions
  int64_t rounds = 0;
  double mat = 0;        // tokens / rounds
  Spread rate;           // tokens/s, Spec-Bench's mean over questions
  Spread weighted_rate;  // tokens/s, all tokens / all time
  // Over the questions that the baseline answered too; absent without a baseline.
  std::optional<Spread> baseline_rate;
  std::optional<Spread> baseline_weighted_rate;
  std::optional<Spread> speedup;  // ratio of the rates, a repetition at a time
  std::optional<Spread> weighted_speedup;
};

// Whether the method's token ids are the baseline's, where they must be.
struct CorrectnessGate {
  bool applies =
      false;         // greedy and Gumbel-coupled decoding; not where each arm draws its own noise
  int compared = 0;  // pairs of answers
  int different = 0;
  std::string first;  // where the first difference is

  bool red() const { return applies && different > 0; }
};

// An arm and the records that count for it.
struct ArmRecords {
  std::string name;
  bool is_baseline = false;
  bool must_equal_baseline = false;
  std::vector<std::pair<std::string, std::string>> axes;  // key and value
  std::vector<const QuestionRecord*> records;
  std::vector<const QuestionRecord*> baseline;  // empty without one
};

struct ArmReport {
  std::string name;
  bool is_baseline = false;
  std::vector<std::pair<std::string, std::string>> axes;
  std::vector<CategoryRow> rows;  // "overall" last; empty without records
  CorrectnessGate gate;
  std::vector<NodeCounts> by_depth;  // [0] is depth 1
  std::vector<NodeCounts> by_rank;
  PhaseSeconds seconds;

  const CategoryRow& overall() const { return rows.back(); }
  int failed() const { return rows.empty() ? 0 : overall().failed; }
};

// Rates, speed-ups and the gate of one arm. Where the gate is red the speed-ups are absent.
ArmReport MakeArmReport(const ArmRecords& arm);

// The table of one arm, its acceptance by depth and sibling rank, and its time by phase.
std::string ArmTable(const ArmReport& report);
// One row an arm: what differs, MAT, rates, speed-up.
std::string ComparisonTable(std::span<const ArmReport> reports);
// A row for each arm and category, with every figure of the tables.
std::string ReportCsv(std::span<const ArmReport> reports);

}  // namespace canopy

#endif  // CANOPY_EXPERIMENTS_REPORT_H_
