// Byte-pair encoding of one word (Sennrich et al., arXiv 1508.07909), as `tokenizers` does it.

#ifndef CANOPY_CORE_TOKENIZATION_BPE_H_
#define CANOPY_CORE_TOKENIZATION_BPE_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "core/status.h"
#include "core/tokenization/json_fields.h"
#include "trees/ids.h"

namespace canopy {

// Ids are below this: beyond any vocabulary in use, and small enough for a table by id.
inline constexpr int kMaxVocabulary = 1 << 22;

// A key for looking up in a map by std::string: Debian's Abseil has a string_view of its own.
inline absl::string_view MapKey(std::string_view text) { return {text.data(), text.size()}; }

// Const after loading; safe from several threads.
class BpeModel {
 public:
  // The memory of a call, for reuse.
  struct Scratch {
    struct Symbol {
      int32_t token = 0;
      int32_t previous = -1;
      int32_t next = -1;
      bool gone = false;
    };
    struct Merge {
      int32_t rank = 0;
      int32_t position = 0;
      int32_t token = 0;
    };
    std::vector<Symbol> symbols;
    std::vector<Merge> queue;
  };

  // `fields` is the file's "model". Unimplemented for another type than BPE, for dropout and for
  // affixes; InvalidArgument for ids that are out of range or taken twice, and merges of unknown
  // tokens.
  static absl::StatusOr<BpeModel> FromJson(const JsonFields& fields);

  // Appends the tokens of a word. O(n log n) in its length.
  void Encode(std::string_view word, Scratch* scratch, std::vector<TokenId>* out) const;

  std::optional<TokenId> Find(std::string_view token) const;
  const absl::flat_hash_map<std::string, int32_t>& vocabulary() const { return vocabulary_; }

 private:
  struct Product {
    int32_t rank = 0;
    int32_t token = 0;
  };

  absl::Status ReadVocabulary(const JsonFields& fields);
  absl::Status ReadMerges(const JsonFields& fields);
  // The tokens of a word before any merge.
  void Begin(std::string_view word, std::vector<Scratch::Symbol>* symbols) const;
  const Product* FindMerge(int32_t left, int32_t right) const;

  absl::flat_hash_map<std::string, int32_t> vocabulary_;
  absl::flat_hash_map<uint64_t, Product> merges_;  // by left token << 32 | right token
  int32_t byte_tokens_[256];                       // of <0x00> to <0xFF>, or -1
  std::optional<int32_t> unknown_;
  bool fuse_unknown_ = false;
  bool byte_fallback_ = false;
  bool ignore_merges_ = false;
};

}  // namespace canopy

#endif  // CANOPY_CORE_TOKENIZATION_BPE_H_
