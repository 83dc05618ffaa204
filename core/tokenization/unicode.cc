#include "core/tokenization/unicode.h"

#include <utf8proc.h>

#include <array>
#include <cstdlib>

#include "core/status.h"
#include "core/tokenization/regex.h"

namespace canopy {
namespace {

constexpr std::string_view kReplacement = "\xef\xbf\xbd";

// The length of the well-formed character at the front; 0 if there is none, with *bad set to the
// length of the maximal ill-formed part, and *open if that part only lacks further bytes.
int WellFormed(std::string_view text, int* bad, bool* open) {
  const auto at = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = at(0);
  *open = false;
  *bad = 1;
  if (first < 0x80) return 1;
  int length = 0;
  unsigned char low = 0x80, high = 0xbf;
  if (first >= 0xc2 && first <= 0xdf) {
    length = 2;
  } else if (first >= 0xe0 && first <= 0xef) {
    length = 3;
    if (first == 0xe0) low = 0xa0;
    if (first == 0xed) high = 0x9f;
  } else if (first >= 0xf0 && first <= 0xf4) {
    length = 4;
    if (first == 0xf0) low = 0x90;
    if (first == 0xf4) high = 0x8f;
  } else {
    return 0;
  }
  for (int i = 1; i < length; ++i) {
    if (static_cast<size_t>(i) == text.size()) {
      *bad = i;
      *open = true;
      return 0;
    }
    if (at(i) < low || at(i) > high) {
      *bad = i;
      return 0;
    }
    low = 0x80;
    high = 0xbf;
  }
  return length;
}

struct ByteLevelTable {
  std::array<char32_t, 256> of_byte{};
  std::array<int16_t, 0x180> of_char{};

  ByteLevelTable() {
    of_char.fill(-1);
    char32_t next = 0x100;
    for (int b = 0; b < 256; ++b) {
      const bool printable = (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
      of_byte[b] = printable ? static_cast<char32_t>(b) : next++;
      of_char[of_byte[b]] = static_cast<int16_t>(b);
    }
  }
};

const ByteLevelTable& ByteLevel() {
  static const ByteLevelTable table;
  return table;
}

}  // namespace

char32_t TakeChar(std::string_view* text) {
  const auto at = [&](size_t i) { return static_cast<unsigned char>((*text)[i]); };
  const int length = Utf8Length((*text)[0]);
  char32_t c = at(0);
  if (length == 2) c = (c & 0x1f) << 6 | (at(1) & 0x3f);
  if (length == 3) c = (c & 0x0f) << 12 | (at(1) & 0x3f) << 6 | (at(2) & 0x3f);
  if (length == 4) {
    c = (c & 0x07) << 18 | (at(1) & 0x3f) << 12 | (at(2) & 0x3f) << 6 | (at(3) & 0x3f);
  }
  text->remove_prefix(length);
  return c;
}

void AppendChar(char32_t c, std::string* out) {
  if (c < 0x80) {
    *out += static_cast<char>(c);
  } else if (c < 0x800) {
    *out += static_cast<char>(0xc0 | c >> 6);
    *out += static_cast<char>(0x80 | (c & 0x3f));
  } else if (c < 0x10000) {
    *out += static_cast<char>(0xe0 | c >> 12);
    *out += static_cast<char>(0x80 | (c >> 6 & 0x3f));
    *out += static_cast<char>(0x80 | (c & 0x3f));
  } else {
    *out += static_cast<char>(0xf0 | c >> 18);
    *out += static_cast<char>(0x80 | (c >> 12 & 0x3f));
    *out += static_cast<char>(0x80 | (c >> 6 & 0x3f));
    *out += static_cast<char>(0x80 | (c & 0x3f));
  }
}

int64_t CountChars(std::string_view text) {
  int64_t count = 0;
  for (const char c : text) count += (static_cast<unsigned char>(c) & 0xc0) != 0x80;
  return count;
}

size_t AppendLossyUtf8(std::string_view bytes, bool hold, std::string* out) {
  size_t i = 0;
  while (i < bytes.size()) {
    int bad = 0;
    bool open = false;
    const int length = WellFormed(bytes.substr(i), &bad, &open);
    if (length > 0) {
      out->append(bytes.substr(i, length));
      i += length;
    } else {
      if (open && hold) return i;
      out->append(kReplacement);
      i += bad;
    }
  }
  return i;
}

bool IsValidUtf8(std::string_view bytes) {
  while (!bytes.empty()) {
    int bad = 0;
    bool open = false;
    const int length = WellFormed(bytes, &bad, &open);
    if (length == 0) return false;
    bytes.remove_prefix(length);
  }
  return true;
}

bool IsWhiteSpace(char32_t c) {
  return (c >= 0x09 && c <= 0x0d) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
         c == 0x3000;
}

bool IsWordChar(char32_t c) {
  if (c < 0x80) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
  }
  static const Regex* const word = [] {
    auto regex = Regex::CompilePcre("[\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{200c}\\x{200d}]");
    CHECK(regex.ok());
    return new Regex(*std::move(regex));
  }();
  std::string one;
  AppendChar(c, &one);
  std::vector<Regex::Match> matches;
  word->FindAll(one, &matches);
  return !matches.empty();
}

std::string Normalize(std::string_view text, NormalForm form) {
  int options = UTF8PROC_STABLE;
  switch (form) {
    case NormalForm::kNfc:
      options |= UTF8PROC_COMPOSE;
      break;
    case NormalForm::kNfd:
      options |= UTF8PROC_DECOMPOSE;
      break;
    case NormalForm::kNfkc:
      options |= UTF8PROC_COMPOSE | UTF8PROC_COMPAT;
      break;
    case NormalForm::kNfkd:
      options |= UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT;
      break;
  }
  utf8proc_uint8_t* mapped = nullptr;
  const utf8proc_ssize_t length = utf8proc_map(
      reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
      static_cast<utf8proc_ssize_t>(text.size()), &mapped, static_cast<utf8proc_option_t>(options));
  // Valid UTF-8 fails only for want of memory or beyond 2 GiB.
  CHECK(length >= 0);
  std::string result(reinterpret_cast<const char*>(mapped), length);
  std::free(mapped);
  return result;
}

std::string ToLower(std::string_view text) {
  std::string result;
  result.reserve(text.size());
  while (!text.empty()) {
    const char32_t c = TakeChar(&text);
    if (c == 0x130) {
      // The one character whose lower case is two in every language: i and a combining dot.
      result += "i\xcc\x87";
    } else {
      AppendChar(static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c))),
                 &result);
    }
  }
  return result;
}

void AppendByteLevel(std::string_view bytes, std::string* out) {
  const ByteLevelTable& table = ByteLevel();
  for (const char b : bytes) AppendChar(table.of_byte[static_cast<unsigned char>(b)], out);
}

int ByteOfStandIn(char32_t c) {
  const ByteLevelTable& table = ByteLevel();
  return c < table.of_char.size() ? table.of_char[c] : -1;
}

}  // namespace canopy
