// Spec-Bench's question files: JSON lines with question_id, category, turns and sometimes reference
// (github.com/hemingkx/Spec-Bench, data/spec_bench/question.jsonl).

#ifndef CANOPY_EXPERIMENTS_SUITE_H_
#define CANOPY_EXPERIMENTS_SUITE_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "core/status.h"
#include "experiments/config.h"

namespace canopy {

struct Question {
  int64_t id = 0;
  std::string category;
  std::vector<std::string> turns;  // what the user says, at least one; no turn is empty
};

// Blank lines are skipped. InvalidArgument names `file` and the line that is not JSON or not UTF-8,
// lacks a field, has a field of another type or an empty turn, or repeats an id; also where there
// is no question at all.
absl::StatusOr<std::vector<Question>> ParseQuestions(std::string_view text,
                                                     const std::string& file);
// NotFound if the file cannot be read.
absl::StatusOr<std::vector<Question>> LoadQuestions(const std::string& file);

// Those that the config's suite.* keys choose, in the file's order: categories, then every k-th,
// then the sample, then the limit. InvalidArgument if a category does not exist or nothing is left.
absl::StatusOr<std::vector<Question>> SelectQuestions(std::vector<Question> questions,
                                                      const ExperimentConfig& config);

// The category under which Spec-Bench's scripts report: "mt_bench" for MT-Bench's eight, otherwise
// the category itself.
std::string PooledCategory(const std::string& category);

// Whether `text` is well-formed UTF-8 (no surrogates, no overlong forms).
bool IsUtf8(std::string_view text);

}  // namespace canopy

#endif  // CANOPY_EXPERIMENTS_SUITE_H_
