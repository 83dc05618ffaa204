// UTF-8 and the Unicode properties that tokenizers ask for.

#ifndef CANOPY_CORE_TOKENIZATION_UNICODE_H_
#define CANOPY_CORE_TOKENIZATION_UNICODE_H_

#include <cstdint>
#include <string>
#include <string_view>

namespace canopy {

// The length in bytes of the character that begins with this byte of valid UTF-8.
inline int Utf8Length(char first) {
  const auto byte = static_cast<unsigned char>(first);
  return byte < 0x80 ? 1 : byte < 0xe0 ? 2 : byte < 0xf0 ? 3 : 4;
}

// Takes one character off the front of valid, non-empty UTF-8.
char32_t TakeChar(std::string_view* text);
void AppendChar(char32_t c, std::string* out);
// The number of characters of valid UTF-8.
int64_t CountChars(std::string_view text);

// Appends `bytes` with every maximal ill-formed part replaced by one U+FFFD (what Python's
// errors="replace" and Rust's from_utf8_lossy do). With `hold` set, bytes at the end that a later
// byte could still complete are left out; returns how many bytes were used.
size_t AppendLossyUtf8(std::string_view bytes, bool hold, std::string* out);
bool IsValidUtf8(std::string_view bytes);

// Unicode's White_Space.
bool IsWhiteSpace(char32_t c);
// [\p{Alphabetic}\p{M}\p{Nd}\p{Pc}] and the two zero-width joiners: a word character of Unicode's
// TR18.
bool IsWordChar(char32_t c);

enum class NormalForm { kNfc, kNfd, kNfkc, kNfkd };
std::string Normalize(std::string_view text, NormalForm form);
// The full lower-case mapping of every character by itself (no final sigma).
std::string ToLower(std::string_view text);

// GPT-2's printable stand-ins: byte 0x20 becomes U+0120 and so on.
void AppendByteLevel(std::string_view bytes, std::string* out);
// The byte that a stand-in is for, or -1.
int ByteOfStandIn(char32_t c);

}  // namespace canopy

#endif  // CANOPY_CORE_TOKENIZATION_UNICODE_H_
