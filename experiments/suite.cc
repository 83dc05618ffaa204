#include "experiments/suite.h"

#include <algorithm>
#include <set>
#include <unordered_map>

#include "absl/strings/ascii.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "core/files.h"
#include "core/random.h"
#include "nlohmann/json.hpp"

namespace canopy {
namespace {

using nlohmann::json;

// speed.py's mt_bench_list.
constexpr std::string_view kMtBench[] = {"writing", "roleplay",   "reasoning", "math",
                                         "coding",  "extraction", "stem",      "humanities"};

bool IsBlank(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return absl::ascii_isspace(c); });
}

absl::StatusOr<Question> ParseQuestion(std::string_view line, const std::string& where) {
  const auto error = [&](const std::string& message) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": ", message));
  };
  if (!IsUtf8(line)) return error("the line is not valid UTF-8");
  const json parsed = json::parse(line.begin(), line.end(), nullptr, /*allow_exceptions=*/false);
  if (parsed.is_discarded()) return error("the line is not valid JSON");
  if (!parsed.is_object()) return error("expected a JSON object with question_id, category, turns");
  Question question;
  const auto id = parsed.find("question_id");
  if (id == parsed.end() || !id->is_number_integer() ||
      (id->is_number_unsigned() && id->get<uint64_t>() > uint64_t{INT64_MAX})) {
    return error("question_id is missing or not a whole number");
  }
  question.id = id->get<int64_t>();
  const auto category = parsed.find("category");
  if (category == parsed.end() || !category->is_string() ||
      category->get_ref<const std::string&>().empty()) {
    return error("category is missing, empty or not a string");
  }
  question.category = category->get<std::string>();
  const auto turns = parsed.find("turns");
  if (turns == parsed.end() || !turns->is_array() || turns->empty()) {
    return error("turns is missing, empty or not an array");
  }
  for (const json& turn : *turns) {
    if (!turn.is_string()) {
      return error(absl::StrCat("turn ", question.turns.size() + 1, " is not a string"));
    }
    if (IsBlank(turn.get_ref<const std::string&>())) {
      return error(absl::StrCat("turn ", question.turns.size() + 1, " is empty"));
    }
    question.turns.push_back(turn.get<std::string>());
  }
  return question;
}

}  // namespace

bool IsUtf8(std::string_view text) {
  size_t i = 0;
  while (i < text.size()) {
    const auto byte = [&](size_t k) { return static_cast<uint8_t>(text[k]); };
    const uint8_t lead = byte(i);
    if (lead < 0x80) {
      ++i;
      continue;
    }
    int length = 0;
    uint32_t point = 0;
    if (lead >= 0xc2 && lead <= 0xdf) {
      length = 2;
      point = lead & 0x1f;
    } else if (lead >= 0xe0 && lead <= 0xef) {
      length = 3;
      point = lead & 0x0f;
    } else if (lead >= 0xf0 && lead <= 0xf4) {
      length = 4;
      point = lead & 0x07;
    } else {
      return false;
    }
    if (i + length > text.size()) return false;
    for (int k = 1; k < length; ++k) {
      if ((byte(i + k) & 0xc0) != 0x80) return false;
      point = point << 6 | (byte(i + k) & 0x3f);
    }
    if (length == 3 && (point < 0x800 || (point >= 0xd800 && point <= 0xdfff))) return false;
    if (length == 4 && (point < 0x10000 || point > 0x10ffff)) return false;
    i += length;
  }
  return true;
}

std::string PooledCategory(const std::string& category) {
  const bool pooled =
      std::find(std::begin(kMtBench), std::end(kMtBench), category) != std::end(kMtBench);
  return pooled ? "mt_bench" : category;
}

absl::StatusOr<std::vector<Question>> ParseQuestions(std::string_view text,
                                                     const std::string& file) {
  std::vector<Question> questions;
  std::unordered_map<int64_t, int> line_of;
  int number = 0;
  for (absl::string_view line : absl::StrSplit(absl::string_view(text.data(), text.size()), '\n')) {
    ++number;
    const std::string_view view(line.data(), line.size());
    if (IsBlank(view)) continue;
    const std::string where = absl::StrCat(file, ":", number);
    ASSIGN_OR_RETURN(Question question, ParseQuestion(view, where));
    const auto [first, inserted] = line_of.emplace(question.id, number);
    if (!inserted) {
      return absl::InvalidArgumentError(absl::StrCat(where, ": question_id ", question.id,
                                                     " already stands in line ", first->second));
    }
    questions.push_back(std::move(question));
  }
  if (questions.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(file, ": there is no question in the file"));
  }
  return questions;
}

absl::StatusOr<std::vector<Question>> LoadQuestions(const std::string& file) {
  absl::StatusOr<std::string> text = ReadFile(file);
  if (!text.ok()) return Annotate(text.status(), "suite.questions: cannot read the question file");
  return ParseQuestions(*text, file);
}

absl::StatusOr<std::vector<Question>> SelectQuestions(std::vector<Question> questions,
                                                      const ExperimentConfig& config) {
  if (!config.suite_categories.empty()) {
    std::set<std::string> present;
    for (const Question& question : questions) {
      present.insert(question.category);
      present.insert(PooledCategory(question.category));
    }
    std::set<std::string> wanted;
    for (absl::string_view piece : absl::StrSplit(config.suite_categories, ',')) {
      const std::string name(absl::StripAsciiWhitespace(piece));
      if (!present.contains(name)) {
        return absl::InvalidArgumentError(absl::StrCat("suite.categories: there is no category '",
                                                       name, "' in ", config.suite_questions,
                                                       "; it has ", absl::StrJoin(present, ", ")));
      }
      wanted.insert(name);
    }
    std::erase_if(questions, [&](const Question& question) {
      return !wanted.contains(question.category) &&
             !wanted.contains(PooledCategory(question.category));
    });
  }
  if (config.suite_every > 1) {
    std::vector<Question> kept;
    for (size_t i = 0; i < questions.size(); i += config.suite_every) {
      kept.push_back(std::move(questions[i]));
    }
    questions = std::move(kept);
  }
  if (config.suite_sample > 0 && config.suite_sample < static_cast<int>(questions.size())) {
    // Each question has a number of its own, so a sample of n is within the sample of n + 1.
    std::vector<std::pair<double, int64_t>> drawn;
    for (const Question& question : questions) {
      const NoiseStream noise(static_cast<uint64_t>(config.sampling_seed),
                              static_cast<uint64_t>(question.id));
      drawn.emplace_back(noise.Uniform(0, Purpose::kDraft), question.id);
    }
    std::sort(drawn.begin(), drawn.end());
    drawn.resize(config.suite_sample);
    std::set<int64_t> kept;
    for (const auto& [uniform, id] : drawn) kept.insert(id);
    std::erase_if(questions, [&](const Question& q) { return !kept.contains(q.id); });
  }
  if (config.suite_limit > 0 && config.suite_limit < static_cast<int>(questions.size())) {
    questions.resize(config.suite_limit);
  }
  return questions;
}

}  // namespace canopy
