// The regular expressions of tokenizer.json files. They are written for Oniguruma (Ruby's syntax),
// which `tokenizers` uses; here they are translated into PCRE2's.

#ifndef CANOPY_CORE_TOKENIZATION_REGEX_H_
#define CANOPY_CORE_TOKENIZATION_REGEX_H_

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/status.h"

namespace canopy {

// Const after compiling; safe from several threads.
class Regex {
 public:
  struct Match {
    size_t begin = 0;
    size_t end = 0;
  };

  // Unimplemented names a construct whose meaning differs between the two libraries and is not
  // translated; InvalidArgument says where the pattern is malformed.
  static absl::StatusOr<Regex> Compile(std::string_view pattern);
  // A pattern that is PCRE2's already.
  static absl::StatusOr<Regex> CompilePcre(const std::string& pattern);

  // All matches from left to right, without overlap. An empty match right after the last match does
  // not count. `text` is valid UTF-8. A match that takes more than 10^8 steps counts as none, so
  // the rest of the text has no matches.
  void FindAll(std::string_view text, std::vector<Match>* matches) const;

 private:
  struct Code;
  explicit Regex(std::shared_ptr<const Code> code) : code_(std::move(code)) {}
  std::shared_ptr<const Code> code_;
};

// What Compile hands to PCRE2. Visible for tests.
absl::StatusOr<std::string> TranslateRegex(std::string_view pattern);

}  // namespace canopy

#endif  // CANOPY_CORE_TOKENIZATION_REGEX_H_
