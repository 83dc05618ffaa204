// Any bytes are read as a question file or refused with a line number.

#include <cstdint>
#include <cstdlib>
#include <set>
#include <string>
#include <string_view>

#include "experiments/suite.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace canopy;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto questions = ParseQuestions(text, "fuzz.jsonl");
  if (!questions.ok()) {
    if (questions.status().message().find("fuzz.jsonl") == absl::string_view::npos) std::abort();
    return 0;
  }
  if (questions->empty()) std::abort();
  std::set<int64_t> ids;
  for (const Question& question : *questions) {
    if (!ids.insert(question.id).second) std::abort();
    if (question.turns.empty() || question.category.empty()) std::abort();
    for (const std::string& turn : question.turns) {
      if (turn.empty() || !IsUtf8(turn)) std::abort();
    }
  }
  return 0;
}
