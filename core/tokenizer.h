// Text to token ids and back, from a Hugging Face tokenizer.json with a BPE model: byte-level
// (GPT-2, GPT-NeoX, Llama-3, Qwen) or SentencePiece-style with byte fallback (Llama-2, Mistral).
//
//   ASSIGN_OR_RETURN(const Tokenizer tokenizer, Tokenizer::Load("models/tiny-bamba-4m"));
//   const std::vector<TokenId> ids = tokenizer.Encode("Hello", /*add_special_tokens=*/true);
//
// Ids and text equal those of the Python package `tokenizers` (tests/core/golden/tokenizer). Where
// the file has a construct that is not supported, loading fails and names it. "truncation" and
// "padding" are left aside, as `transformers` does unless asked for them.

#ifndef CANOPY_CORE_TOKENIZER_H_
#define CANOPY_CORE_TOKENIZER_H_

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/status.h"
#include "trees/ids.h"

namespace canopy {

// Const after loading and safe from several threads. Cheap to copy: copies share their tables.
class Tokenizer {
 public:
  // Reads FOLDER/tokenizer.json and, where it is there, FOLDER/tokenizer_config.json for bos and
  // eos. NotFound without tokenizer.json, InvalidArgument for a malformed file, Unimplemented for a
  // construct that is not supported; all name the file and the key.
  static absl::StatusOr<Tokenizer> Load(const std::string& folder);
  // `source_name` stands for the file in messages.
  static absl::StatusOr<Tokenizer> FromJson(std::string_view tokenizer_json,
                                            const std::string& source_name);

  // Added tokens in the text are recognised. With `add_special_tokens`, what the file's
  // post-processor puts around a text is added. Bytes that are not UTF-8 are read as U+FFFD, one
  // for each maximal ill-formed part.
  std::vector<TokenId> Encode(std::string_view text, bool add_special_tokens) const;
  // Ids without a token add nothing. Bytes that make no UTF-8 become U+FFFD.
  std::string Decode(std::span<const TokenId> ids, bool skip_special_tokens) const;

  int vocab_size() const;  // the greatest id plus one, added tokens included
  std::optional<TokenId> TokenToId(std::string_view token) const;
  // The token as the file spells it ("Ġthe"); empty for an id without one.
  std::string IdToToken(TokenId id) const;
  bool IsSpecial(TokenId id) const;
  // tokenizer_config.json's bos_token and eos_token, if it names tokens of the vocabulary.
  std::optional<TokenId> bos() const;
  std::optional<TokenId> eos() const;

 private:
  friend class StreamDecoder;
  struct Tables;
  explicit Tokenizer(std::shared_ptr<const Tables> tables) : tables_(std::move(tables)) {}
  std::shared_ptr<const Tables> tables_;
};

// The text of an id sequence that grows. Only whole UTF-8 characters come out, and nothing that
// later ids could still change: all pieces and Finish() together equal Decode of all ids. Not
// thread-safe; keeps the tokenizer's tables alive.
class StreamDecoder {
 public:
  StreamDecoder(const Tokenizer& tokenizer, bool skip_special_tokens);
  ~StreamDecoder();
  StreamDecoder(StreamDecoder&&) noexcept;
  StreamDecoder& operator=(StreamDecoder&&) noexcept;

  std::string Push(TokenId id);
  // What was held back. Afterwards the decoder must not be used again.
  std::string Finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Ok if every id has the same token in both, which speculative decoding needs. InvalidArgument
// names the first id that differs and its two tokens, or the two sizes.
absl::Status CompareVocabularies(const Tokenizer& target, const Tokenizer& draft);

}  // namespace canopy

#endif  // CANOPY_CORE_TOKENIZER_H_
