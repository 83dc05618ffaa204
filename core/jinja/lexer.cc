#include "core/jinja/lexer.h"

#include <utility>

#include "core/tokenization/unicode.h"

namespace canopy::jinja {
namespace {

bool IsDigit(char c) { return c >= '0' && c <= '9'; }
bool IsNameStart(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }

// One kind of line end, and none at the very end.
std::string WithPlainLines(std::string_view source) {
  std::string text;
  text.reserve(source.size());
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] != '\r') {
      text += source[i];
    } else {
      text += '\n';
      if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
    }
  }
  if (text.ends_with('\n')) text.pop_back();
  return text;
}

// Bounds how deep the syntax tree of a tag can be, which is walked recursively.
constexpr size_t kMaxTokens = 1000;

class Lexer {
 public:
  explicit Lexer(std::string_view source) : source_(WithPlainLines(source)), in_(source_) {}

  absl::StatusOr<std::vector<Token>> Run() {
    while (at_ < in_.size()) {
      const size_t tag = NextTag();
      if (tag == std::string_view::npos) {
        AddText(in_.substr(at_));
        Advance(in_.size());
        break;
      }
      RETURN_IF_ERROR(Tag(tag));
    }
    Add(Token::Kind::kEnd, "");
    return std::move(tokens_);
  }

 private:
  size_t NextTag() const {
    for (size_t i = in_.find('{', at_); i != std::string_view::npos; i = in_.find('{', i + 1)) {
      if (i + 1 < in_.size() && (in_[i + 1] == '%' || in_[i + 1] == '{' || in_[i + 1] == '#')) {
        return i;
      }
    }
    return std::string_view::npos;
  }

  void Add(Token::Kind kind, std::string text) {
    tokens_.push_back({kind, line_, std::move(text)});
  }
  void AddText(std::string_view text) {
    if (!text.empty()) Add(Token::Kind::kText, std::string(text));
  }
  void Advance(size_t to) {
    for (; at_ < to; ++at_) line_ += in_[at_] == '\n';
  }
  void SkipSpace() { Advance(at_ + (in_.size() - at_ - StripLeft(in_.substr(at_)).size())); }

  // The text up to a tag, and the tag.
  absl::Status Tag(size_t tag) {
    std::string_view text = in_.substr(at_, tag - at_);
    const char kind = in_[tag + 1];
    const char sign = tag + 2 < in_.size() ? in_[tag + 2] : '\0';
    if (sign == '-') {
      text = StripRight(text);
    } else if (sign != '+' && kind != '{') {
      // lstrip_blocks: white space between the line's beginning and the tag goes.
      const size_t line = text.rfind('\n') + 1;
      if ((line > 0 || line_begins_) && StripLeft(text.substr(line)).empty()) {
        text = text.substr(0, line);
      }
    }
    AddText(text);
    Advance(tag + 2 + (sign == '-' || sign == '+' ? 1 : 0));
    if (kind == '#') return Comment();
    Add(kind == '%' ? Token::Kind::kBlockBegin : Token::Kind::kOutputBegin, "");
    return Inside(kind == '%');
  }

  // What follows a tag's end: "-" takes white space, a block or comment takes one line end.
  void AfterTag(bool minus, bool plus, bool trims) {
    const size_t before = at_;
    if (minus) {
      SkipSpace();
    } else if (!plus && trims && at_ < in_.size() && in_[at_] == '\n') {
      Advance(at_ + 1);
    }
    line_begins_ = at_ > before && in_[at_ - 1] == '\n';
  }

  absl::Status Comment() {
    const size_t end = in_.find("#}", at_);
    if (end == std::string_view::npos) {
      return absl::InvalidArgumentError(AtLine(line_, "a comment '{#' is not closed"));
    }
    const char sign = end > at_ ? in_[end - 1] : '\0';
    Advance(end + 2);
    AfterTag(sign == '-', sign == '+', true);
    return absl::OkStatus();
  }

  absl::Status Inside(bool block) {
    const std::string_view close = block ? "%}" : "}}";
    const int begin = line_;
    const size_t first = tokens_.size();
    int open = 0;  // brackets
    while (true) {
      SkipSpace();
      if (at_ >= in_.size()) {
        return absl::InvalidArgumentError(
            AtLine(begin, block ? "a '{%' is not closed" : "a '{{' is not closed"));
      }
      if (tokens_.size() > first + kMaxTokens) return Unsupported(begin, "a tag this long");
      const std::string_view rest = in_.substr(at_);
      const bool minus = rest[0] == '-', plus = rest[0] == '+' && block;
      if (open == 0 && rest.substr(minus || plus ? 1 : 0).starts_with(close)) {
        Add(block ? Token::Kind::kBlockEnd : Token::Kind::kOutputEnd, "");
        Advance(at_ + (minus || plus ? 3 : 2));
        AfterTag(minus, plus, block);
        return absl::OkStatus();
      }
      if (IsNameStart(rest[0])) {
        size_t length = 1;
        while (length < rest.size() && (IsNameStart(rest[length]) || IsDigit(rest[length])))
          ++length;
        Add(Token::Kind::kName, std::string(rest.substr(0, length)));
        Advance(at_ + length);
      } else if (IsDigit(rest[0])) {
        RETURN_IF_ERROR(Number(rest));
      } else if (rest[0] == '\'' || rest[0] == '"') {
        RETURN_IF_ERROR(String(rest));
      } else {
        RETURN_IF_ERROR(Operator(rest, &open));
      }
    }
  }

  absl::Status Number(std::string_view rest) {
    size_t length = 1;
    while (length < rest.size() && IsDigit(rest[length])) ++length;
    const bool more =
        length < rest.size() &&
        (IsNameStart(rest[length]) ||
         (rest[length] == '.' && length + 1 < rest.size() && IsDigit(rest[length + 1])));
    if (more || length > 18 || (rest[0] == '0' && length > 1)) {
      return Unsupported(line_, absl::StrCat("the number that begins with \"",
                                             std::string(rest.substr(0, length + 1)), "\""));
    }
    Add(Token::Kind::kInteger, std::string(rest.substr(0, length)));
    Advance(at_ + length);
    return absl::OkStatus();
  }

  absl::Status String(std::string_view rest) {
    std::string value;
    size_t i = 1;
    while (true) {
      if (i >= rest.size()) {
        return absl::InvalidArgumentError(AtLine(line_, "a string is not closed"));
      }
      if (rest[i] == rest[0]) break;
      if (rest[i] != '\\') {
        value += rest[i++];
        continue;
      }
      RETURN_IF_ERROR(EscapeIn(rest, &i, &value));
    }
    Add(Token::Kind::kString, std::move(value));
    Advance(at_ + i + 1);
    return absl::OkStatus();
  }

  // Python's escapes. `*i` is at the backslash.
  absl::Status EscapeIn(std::string_view rest, size_t* i, std::string* value) {
    const char c = *i + 1 < rest.size() ? rest[*i + 1] : '\0';
    constexpr std::pair<char, char> kPlain[] = {
        {'n', '\n'}, {'t', '\t'}, {'r', '\r'}, {'\\', '\\'}, {'\'', '\''},
        {'"', '"'},  {'a', '\a'}, {'b', '\b'}, {'f', '\f'},  {'v', '\v'}};
    for (const auto& [name, meant] : kPlain) {
      if (c == name) {
        *value += meant;
        *i += 2;
        return absl::OkStatus();
      }
    }
    const size_t digits = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
    if (digits > 0) {
      char32_t code = 0;
      for (size_t k = 0; k < digits; ++k) {
        const char d = *i + 2 + k < rest.size() ? rest[*i + 2 + k] : '\0';
        const int hex = IsDigit(d)             ? d - '0'
                        : d >= 'a' && d <= 'f' ? d - 'a' + 10
                        : d >= 'A' && d <= 'F' ? d - 'A' + 10
                                               : -1;
        if (hex < 0 || code > 0x10ffff) {
          return absl::InvalidArgumentError(AtLine(line_, "a malformed escape in a string"));
        }
        code = code << 4 | static_cast<char32_t>(hex);
      }
      if (code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) {
        return absl::InvalidArgumentError(AtLine(line_, "an escape in a string is no character"));
      }
      AppendChar(code, value);
      *i += 2 + digits;
      return absl::OkStatus();
    }
    if (IsDigit(c) || c == 'N' || c == '\n') {
      return Unsupported(line_, absl::StrCat("the escape '\\", std::string(1, c), "'"));
    }
    *value += '\\';  // an unknown escape stands for itself
    ++*i;
    return absl::OkStatus();
  }

  absl::Status Operator(std::string_view rest, int* open) {
    for (const std::string_view op : {"==", "!=", "<=", ">=", "//", "**"}) {
      if (rest.starts_with(op)) {
        Add(Token::Kind::kOperator, std::string(op));
        Advance(at_ + 2);
        return absl::OkStatus();
      }
    }
    const char c = rest[0];
    if (std::string_view("+-*/%~<>=()[]{}.,:|").find(c) == std::string_view::npos) {
      return absl::InvalidArgumentError(AtLine(
          line_, absl::StrCat("unexpected \"", std::string(rest.substr(0, Utf8Length(c))), "\"")));
    }
    if (c == '(' || c == '[' || c == '{') ++*open;
    if (c == ')' || c == ']' || c == '}') --*open;
    if (*open < 0) {
      return absl::InvalidArgumentError(
          AtLine(line_, absl::StrCat("'", std::string(1, c), "' closes nothing")));
    }
    Add(Token::Kind::kOperator, std::string(1, c));
    Advance(at_ + 1);
    return absl::OkStatus();
  }

  const std::string source_;
  const std::string_view in_;
  size_t at_ = 0;
  int line_ = 1;
  bool line_begins_ = true;
  std::vector<Token> tokens_;
};

bool Contains(std::string_view characters, std::string_view c) {
  while (!characters.empty()) {
    const size_t length = Utf8Length(characters[0]);
    if (characters.substr(0, length) == c) return true;
    characters.remove_prefix(length);
  }
  return false;
}

bool Strips(std::string_view c, std::string_view characters) {
  if (!characters.empty()) return Contains(characters, c);
  std::string_view rest = c;
  return IsPythonSpace(TakeChar(&rest));
}

}  // namespace

std::string AtLine(int line, std::string_view what) {
  return absl::StrCat("line ", line, ": ", std::string(what));
}

absl::Status Unsupported(int line, std::string_view what) {
  return absl::UnimplementedError(
      AtLine(line, absl::StrCat(std::string(what), " is not supported")));
}

bool IsPythonSpace(char32_t c) { return IsWhiteSpace(c) || (c >= 0x1c && c <= 0x1f); }

std::string_view StripLeft(std::string_view text, std::string_view characters) {
  while (!text.empty() && Strips(text.substr(0, Utf8Length(text[0])), characters)) {
    text.remove_prefix(Utf8Length(text[0]));
  }
  return text;
}

std::string_view StripRight(std::string_view text, std::string_view characters) {
  while (!text.empty()) {
    size_t last = text.size() - 1;
    while (last > 0 && (static_cast<unsigned char>(text[last]) & 0xc0) == 0x80) --last;
    if (!Strips(text.substr(last), characters)) break;
    text.remove_suffix(text.size() - last);
  }
  return text;
}

absl::StatusOr<std::vector<Token>> Tokenize(std::string_view source) {
  if (!IsValidUtf8(source)) return absl::InvalidArgumentError("the template is not valid UTF-8");
  return Lexer(source).Run();
}

}  // namespace canopy::jinja
