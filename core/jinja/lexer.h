// The tokens of a chat template.

#ifndef CANOPY_CORE_JINJA_LEXER_H_
#define CANOPY_CORE_JINJA_LEXER_H_

#include <string>
#include <string_view>
#include <vector>

#include "core/status.h"

namespace canopy::jinja {

struct Token {
  enum class Kind {
    kText,        // between tags
    kBlockBegin,  // {%
    kBlockEnd,
    kOutputBegin,  // {{
    kOutputEnd,
    kName,
    kString,  // text is the value
    kInteger,
    kOperator,
    kEnd,
  };
  Kind kind = Kind::kEnd;
  int line = 0;
  std::string text;
};

// The last token is kEnd. InvalidArgument or Unimplemented with the line.
absl::StatusOr<std::vector<Token>> Tokenize(std::string_view source);

// "line N: WHAT".
std::string AtLine(int line, std::string_view what);
// Unimplemented "line N: WHAT is not supported".
absl::Status Unsupported(int line, std::string_view what);

// Python's str.strip() in its three forms: white space, or any of the given characters.
std::string_view StripLeft(std::string_view text, std::string_view characters = "");
std::string_view StripRight(std::string_view text, std::string_view characters = "");
// Python's str.isspace of one character.
bool IsPythonSpace(char32_t c);

}  // namespace canopy::jinja

#endif  // CANOPY_CORE_JINJA_LEXER_H_
