#include "core/tokenization/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <array>
#include <optional>
#include <utility>

#include "core/tokenization/unicode.h"

namespace canopy {
namespace {

// The contents of character classes. PCRE2's own \s has U+180E, and its \w lacks marks.
constexpr std::string_view kSpace =
    "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}"
    "\\x{205f}\\x{3000}";
constexpr std::string_view kNotSpace =
    "\\x{0}-\\x{8}\\x{e}-\\x{1f}\\x{21}-\\x{84}\\x{86}-\\x{9f}\\x{a1}-\\x{167f}\\x{1681}-\\x{1fff}"
    "\\x{200b}-\\x{2027}\\x{202a}-\\x{202e}\\x{2030}-\\x{205e}\\x{2060}-\\x{2fff}"
    "\\x{3001}-\\x{10ffff}";
// Oniguruma counts Latin-1's superscripts and fractions as word characters, but no others.
constexpr std::string_view kWord =
    "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{b2}\\x{b3}\\x{b9}\\x{bc}-\\x{be}";
constexpr std::string_view kHex = "0-9A-Fa-f";

// General categories are spelled alike in both libraries.
constexpr std::string_view kCategories[] = {
    "Any", "L",  "Ll", "Lu", "Lt", "Lm", "Lo", "M",  "Mn", "Mc", "Me", "N",  "Nd",
    "Nl",  "No", "P",  "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "S",  "Sm", "Sc",
    "Sk",  "So", "Z",  "Zs", "Zl", "Zp", "C",  "Cc", "Cf", "Co", "Cs", "Cn"};
constexpr std::pair<std::string_view, std::string_view> kLongCategories[] = {
    {"Letter", "L"}, {"Mark", "M"},      {"Number", "N"}, {"Punctuation", "P"},
    {"Symbol", "S"}, {"Separator", "Z"}, {"Other", "C"}};
// POSIX classes: Oniguruma's and PCRE2's differ in what they hold.
constexpr std::string_view kPosix[] = {"Alnum",  "Alpha", "Blank", "Cntrl", "Digit",
                                       "Graph",  "Lower", "Print", "Punct", "Space",
                                       "XDigit", "Word",  "ASCII", "Upper"};

bool IsHexDigit(char c) {
  return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
}
bool IsDigit(char c) { return c >= '0' && c <= '9'; }
bool IsAsciiLetter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

class Translator {
 public:
  explicit Translator(std::string_view pattern) : in_(pattern) {}

  absl::StatusOr<std::string> Run() {
    while (at_ < in_.size()) RETURN_IF_ERROR(Step());
    if (!groups_.empty()) return Malformed("a group is not closed");
    return std::move(out_);
  }

 private:
  absl::Status Unsupported(std::string_view what) const {
    return absl::UnimplementedError(absl::StrCat("the regular expression \"", std::string(in_),
                                                 "\" uses ", std::string(what), " at byte ", at_,
                                                 ", which is not supported"));
  }
  absl::Status Malformed(std::string_view what) const {
    return absl::InvalidArgumentError(absl::StrCat("the regular expression \"", std::string(in_),
                                                   "\" is malformed: ", std::string(what)));
  }
  bool Next(std::string_view text) const { return in_.substr(at_).starts_with(text); }

  absl::Status Step() {
    const char c = in_[at_];
    switch (c) {
      case '\\':
        atom_ = out_.size();
        return Escape(/*in_class=*/false);
      case '[':
        atom_ = out_.size();
        return Class();
      case '(':
        return OpenGroup();
      case ')':
        if (groups_.empty()) return Malformed("a ')' closes no group");
        atom_ = groups_.back();
        groups_.pop_back();
        out_ += c;
        ++at_;
        return absl::OkStatus();
      case '|':
      case '^':
      case '$':
        atom_.reset();
        out_ += c;
        ++at_;
        return absl::OkStatus();
      case '*':
      case '+':
      case '?':
        if (!atom_) return Malformed("a quantifier follows nothing");
        out_ += c;
        ++at_;
        // Lazy and possessive forms are alike.
        if (at_ < in_.size() && (in_[at_] == '?' || in_[at_] == '+')) out_ += in_[at_++];
        return absl::OkStatus();
      case '{':
        return Interval();
      case '}':
      case ']':
        atom_ = out_.size();
        out_ += '\\';
        out_ += c;
        ++at_;
        return absl::OkStatus();
      default: {
        atom_ = out_.size();
        const int length = Utf8Length(c);
        out_ += in_.substr(at_, length);
        at_ += length;
        return absl::OkStatus();
      }
    }
  }

  absl::Status OpenGroup() {
    groups_.push_back(out_.size());
    if (groups_.size() > 200) return Unsupported("groups nested more than 200 deep");
    atom_.reset();
    if (!Next("(?")) {
      if (Next("(*")) return Unsupported("a callout or verb '(*'");
      out_ += '(';
      ++at_;
      opened_ = out_.size();
      return absl::OkStatus();
    }
    for (const std::string_view opener :
         {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:", "(?-i:"}) {
      if (Next(opener)) {
        out_ += opener;
        at_ += opener.size();
        opened_ = out_.size();
        return absl::OkStatus();
      }
    }
    if (Next("(?i)")) {
      // In mid-group Oniguruma lets it reach over a '|' in another way than PCRE2.
      if (groups_.back() != opened_) return Unsupported("'(?i)' in the middle of a group");
      groups_.pop_back();
      out_ += "(?i)";
      opened_ = out_.size();
      at_ += 4;
      return absl::OkStatus();
    }
    return Unsupported(absl::StrCat("'", std::string(in_.substr(at_, 4)), "'"));
  }

  // {n}, {n,}, {,m}, {n,m}; anything else is a literal brace.
  absl::Status Interval() {
    size_t i = at_ + 1;
    std::string low, high;
    while (i < in_.size() && IsDigit(in_[i])) low += in_[i++];
    const bool comma = i < in_.size() && in_[i] == ',';
    if (comma) {
      ++i;
      while (i < in_.size() && IsDigit(in_[i])) high += in_[i++];
    }
    if (i >= in_.size() || in_[i] != '}' || (low.empty() && high.empty())) {
      atom_ = out_.size();
      out_ += "\\{";
      ++at_;
      return absl::OkStatus();
    }
    if (!atom_) return Malformed("a quantifier follows nothing");
    if (low.size() > 5 || high.size() > 5) return Malformed("a repeat count is too large");
    if (!high.empty() && !low.empty() && std::stoi(low) > std::stoi(high)) {
      return Unsupported("an interval whose first number is the greater");
    }
    at_ = i + 1;
    out_ += absl::StrCat("{", low.empty() ? "0" : low, comma ? "," : "", high, "}");
    // Oniguruma reads X{1,3}+ as (?:X{1,3})+ and X{3}? as (?:X{3})?, PCRE2 as possessive and lazy.
    if (Next("+") || (Next("?") && !comma)) {
      out_.insert(*atom_, "(?:");
      out_ += ')';
      out_ += in_[at_++];
    } else if (Next("?")) {
      out_ += in_[at_++];
    }
    return absl::OkStatus();
  }

  // One of the sets above, as itself or inside a class.
  void Set(std::string_view contents, bool negated, bool in_class) {
    if (in_class) {
      out_ += contents;
    } else {
      out_ += absl::StrCat(negated ? "[^" : "[", std::string(contents), "]");
    }
  }

  absl::Status Escape(bool in_class) {
    if (at_ + 1 >= in_.size()) return Malformed("it ends in a backslash");
    const char c = in_[at_ + 1];
    const auto use = [&](std::string_view text) {
      out_ += text;
      at_ += 2;
      return absl::OkStatus();
    };
    switch (c) {
      case 's':
        Set(kSpace, false, in_class);
        return use("");
      case 'S':
        Set(kNotSpace, false, in_class);
        return use("");
      case 'd':
        return use("\\p{Nd}");
      case 'D':
        return use("\\P{Nd}");
      case 'w':
        Set(kWord, false, in_class);
        return use("");
      case 'h':
        Set(kHex, false, in_class);
        return use("");
      case 'W':
      case 'H':
        if (in_class) return Unsupported(absl::StrCat("'\\", std::string(1, c), "' in a class"));
        Set(c == 'W' ? kWord : kHex, true, false);
        return use("");
      case 'p':
      case 'P':
        return Property();
      case 'n':
      case 'r':
      case 't':
      case 'f':
      case 'a':
      case 'e':
        return use(in_.substr(at_, 2));
      case 'v':
        return use("\\x{b}");
      case 'x':
      case 'u':
        return CodePoint();
      case 'b':
        if (in_class) return use("\\x{8}");
        atom_.reset();
        return use(absl::StrCat("(?:(?<=[", std::string(kWord), "])(?![", std::string(kWord),
                                "])|(?<![", std::string(kWord), "])(?=[", std::string(kWord),
                                "]))"));
      case 'A':
      case 'z':
      case 'Z':
      case 'G':
        if (in_class) break;
        atom_.reset();
        return use(in_.substr(at_, 2));
      default:
        break;
    }
    if (IsAsciiLetter(c) || IsDigit(c)) {
      return Unsupported(absl::StrCat("'\\", std::string(1, c), "'"));
    }
    const int length = Utf8Length(c);
    // PCRE2 takes a backslash before ASCII punctuation only.
    if (length == 1) out_ += '\\';
    out_ += in_.substr(at_ + 1, length);
    at_ += 1 + length;
    return absl::OkStatus();
  }

  absl::Status CodePoint() {
    const bool braces = in_.substr(at_).starts_with("\\x{");
    const size_t begin = at_ + (braces ? 3 : 2);
    const size_t most = braces ? 6 : in_[at_ + 1] == 'x' ? 2 : 4;
    size_t end = begin;
    while (end < in_.size() && end - begin < most && IsHexDigit(in_[end])) ++end;
    const bool whole = in_[at_ + 1] == 'u' ? end - begin == 4 : end > begin;
    if (!whole || (braces && (end >= in_.size() || in_[end] != '}'))) {
      return Malformed(absl::StrCat("the code point at byte ", at_));
    }
    const std::string digits(in_.substr(begin, end - begin));
    const int value = std::stoi(digits, nullptr, 16);
    if (in_[at_ + 1] == 'x' && !braces && value >= 0x80) {
      return Unsupported("a byte beyond 0x7f");
    }
    out_ += absl::StrCat("\\x{", digits, "}");
    at_ = end + (braces ? 1 : 0);
    return absl::OkStatus();
  }

  absl::Status Property() {
    if (!in_.substr(at_ + 2).starts_with("{")) return Unsupported("'\\p' without braces");
    const size_t close = in_.find('}', at_);
    if (close == std::string_view::npos) return Malformed("a '\\p{' is not closed");
    std::string_view name = in_.substr(at_ + 3, close - at_ - 3);
    const bool caret = name.starts_with("^");
    if (caret) name.remove_prefix(1);
    for (const std::string_view posix : kPosix) {
      if (name == posix) return Unsupported(absl::StrCat("'\\p{", std::string(name), "}'"));
    }
    std::string inner;
    for (const std::string_view category : kCategories) {
      if (name == category) inner = name;
    }
    for (const auto& [full, category] : kLongCategories) {
      if (name == full) inner = category;
    }
    if (name == "Alphabetic" || name == "White_Space" || name == "Uppercase" ||
        name == "Lowercase") {
      inner = name;
    }
    // The rest are scripts. PCRE2's plain \p{Han} would take script extensions in.
    if (inner.empty()) {
      for (const char c : name) {
        if (!IsAsciiLetter(c) && c != '_') {
          return Unsupported(absl::StrCat("'\\p{", std::string(name), "}'"));
        }
      }
      inner = absl::StrCat("sc:", std::string(name));
    }
    const bool negated = (in_[at_ + 1] == 'P') != caret;
    out_ += absl::StrCat(negated ? "\\P{" : "\\p{", inner, "}");
    at_ = close + 1;
    return absl::OkStatus();
  }

  absl::Status Class() {
    out_ += '[';
    ++at_;
    if (Next("^")) {
      out_ += '^';
      ++at_;
    }
    if (Next("]")) return Unsupported("an unescaped ']' that begins a class");
    while (true) {
      if (at_ >= in_.size()) return Malformed("a '[' is not closed");
      const char c = in_[at_];
      if (c == ']') break;
      if (c == '\\') {
        RETURN_IF_ERROR(Escape(/*in_class=*/true));
        continue;
      }
      if (c == '[') return Unsupported(Next("[:") ? "a POSIX class" : "a class within a class");
      if (Next("&&")) return Unsupported("'&&' in a class");
      const int length = Utf8Length(c);
      out_ += in_.substr(at_, length);
      at_ += length;
    }
    out_ += ']';
    ++at_;
    return absl::OkStatus();
  }

  std::string_view in_;
  size_t at_ = 0;
  std::string out_;
  std::optional<size_t> atom_;  // where in out_ the thing that a quantifier would repeat begins
  std::vector<size_t> groups_;  // where in out_ the open groups begin
  size_t opened_ = 0;           // the end of out_ when the innermost group was opened
};

// Matching needs memory of its own; one set a thread.
struct MatchScratch {
  pcre2_match_data* data = pcre2_match_data_create(1, nullptr);
  pcre2_match_context* context = pcre2_match_context_create(nullptr);
  pcre2_jit_stack* stack = pcre2_jit_stack_create(32 << 10, 8 << 20, nullptr);

  MatchScratch() {
    CHECK(data != nullptr && context != nullptr);
    pcre2_set_match_limit(context, 100'000'000);
    if (stack != nullptr) pcre2_jit_stack_assign(context, nullptr, stack);
  }
  ~MatchScratch() {
    pcre2_match_data_free(data);
    pcre2_match_context_free(context);
    pcre2_jit_stack_free(stack);
  }
};

}  // namespace

struct Regex::Code {
  pcre2_code* code = nullptr;
  ~Code() { pcre2_code_free(code); }
};

absl::StatusOr<std::string> TranslateRegex(std::string_view pattern) {
  if (!IsValidUtf8(pattern)) {
    return absl::InvalidArgumentError("a regular expression is not valid UTF-8");
  }
  return Translator(pattern).Run();
}

absl::StatusOr<Regex> Regex::Compile(std::string_view pattern) {
  ASSIGN_OR_RETURN(const std::string translated, TranslateRegex(pattern));
  return CompilePcre(translated);
}

absl::StatusOr<Regex> Regex::CompilePcre(const std::string& pattern) {
  pcre2_compile_context* context = pcre2_compile_context_create(nullptr);
  CHECK(context != nullptr);
  pcre2_set_newline(context, PCRE2_NEWLINE_LF);
  int error = 0;
  PCRE2_SIZE offset = 0;
  auto compiled = std::make_shared<Code>();
  // Ruby's ^ and $ are at every line.
  compiled->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                                 PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE, &error, &offset, context);
  pcre2_compile_context_free(context);
  if (compiled->code == nullptr) {
    std::array<PCRE2_UCHAR, 256> message{};
    pcre2_get_error_message(error, message.data(), message.size());
    return absl::InvalidArgumentError(
        absl::StrCat("the regular expression \"", pattern, "\" does not compile: ",
                     reinterpret_cast<const char*>(message.data()), " at byte ", offset));
  }
  // Where no executable memory is to be had, matching falls back to the interpreter by itself.
  pcre2_jit_compile(compiled->code, PCRE2_JIT_COMPLETE);
  return Regex(std::move(compiled));
}

void Regex::FindAll(std::string_view text, std::vector<Match>* matches) const {
  static thread_local MatchScratch scratch;
  matches->clear();
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  size_t from = 0;
  std::optional<size_t> last_end;
  while (from <= text.size()) {
    int found = pcre2_match(code_->code, subject, text.size(), from, PCRE2_NO_UTF_CHECK,
                            scratch.data, scratch.context);
    if (found == PCRE2_ERROR_JIT_STACKLIMIT) {
      found = pcre2_match(code_->code, subject, text.size(), from,
                          PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, scratch.data, scratch.context);
    }
    if (found < 0) return;
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(scratch.data);
    const Match match{range[0], range[1]};
    if (match.begin > match.end) return;  // \K in a lookahead
    if (match.begin == match.end && last_end == match.end) {
      if (from >= text.size()) return;
      from += Utf8Length(text[from]);
      continue;
    }
    from = match.end;
    last_end = match.end;
    matches->push_back(match);
  }
}

}  // namespace canopy
