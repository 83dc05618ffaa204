// Tokens that stand outside BPE ("added_tokens" of tokenizer.json) and are found in the text first.

#ifndef CANOPY_CORE_TOKENIZATION_ADDED_TOKENS_H_
#define CANOPY_CORE_TOKENIZATION_ADDED_TOKENS_H_

#include <array>
#include <bitset>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "core/status.h"
#include "core/tokenization/bpe.h"
#include "core/tokenization/json_fields.h"
#include "core/tokenization/normalizer.h"
#include "core/tokenization/piece.h"

namespace canopy {

struct AddedToken {
  std::string content;
  TokenId id;
  bool single_word = false;  // counts only where no word character touches it
  bool lstrip = false;       // takes the white space before it along
  bool rstrip = false;       // and after it
  bool normalized = true;    // is looked for in normalized text, itself normalized
  std::string decoded;  // its text when decoded: the content, normalized if that is how it is found
  bool special = false;  // left out of decoded text if the caller says so
};

// Const after loading; safe from several threads.
class AddedTokens {
 public:
  // The file's "added_tokens". InvalidArgument for an id out of range, one that belongs to
  // another token, or a token that the vocabulary has under another id.
  static absl::StatusOr<AddedTokens> FromJson(const JsonFields& file, const BpeModel& model,
                                              const Normalizer& normalizer);

  // Cuts the text at added tokens and normalizes the rest: no empty pieces come out.
  Pieces Split(std::string_view text, const Normalizer& normalizer) const;

  const std::vector<AddedToken>& tokens() const { return tokens_; }

 private:
  // A trie over bytes that finds the longest entry at a place.
  class Trie {
   public:
    // An entry that is there already stays.
    void Add(std::string_view text, int value);
    // The value of the longest entry that `text` begins with and its length; -1 if there is none.
    int Longest(std::string_view text, size_t* length) const;

   private:
    struct Node {
      int value = -1;
    };
    std::vector<Node> nodes_ = std::vector<Node>(1);
    absl::flat_hash_map<uint64_t, int> edges_;  // by node << 8 | byte
    std::bitset<256> first_;
  };

  void Cut(const Trie& trie, Piece piece, Pieces* out) const;

  std::vector<AddedToken> tokens_;
  Trie raw_;
  Trie normalized_;
};

}  // namespace canopy

#endif  // CANOPY_CORE_TOKENIZATION_ADDED_TOKENS_H_
