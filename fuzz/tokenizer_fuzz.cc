// Loads a tokenizer.json and, where that works, encodes and decodes with it. The input is the file,
// and after a byte 0 (which JSON has not) a text.

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "core/status.h"
#include "core/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using canopy::TokenId;
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t end = input.find('\0');
  std::string_view text = end == std::string_view::npos ? "The tree's 12 \xf0\x9f\x8c\xb3\n\xff <s>"
                                                        : input.substr(end + 1);
  // Regular expressions may backtrack, and a fuzzer finds the ones that do.
  text = text.substr(0, 256);
  auto tokenizer = canopy::Tokenizer::FromJson(input.substr(0, end), "fuzz");
  if (!tokenizer.ok()) return 0;
  for (const bool special : {false, true}) {
    const std::vector<TokenId> ids = tokenizer->Encode(text, special);
    for (const TokenId id : ids) CHECK(id.value >= 0 && id.value < tokenizer->vocab_size());
    canopy::StreamDecoder stream(*tokenizer, special);
    std::string streamed;
    for (const TokenId id : ids) streamed += stream.Push(id);
    streamed += stream.Finish();
    CHECK(streamed == tokenizer->Decode(ids, special));
  }
  CHECK(canopy::CompareVocabularies(*tokenizer, *tokenizer).ok());
  return 0;
}
