// The "pre_tokenizer" of tokenizer.json: cuts text into the words that BPE works on.

#ifndef CANOPY_CORE_TOKENIZATION_PRE_TOKENIZER_H_
#define CANOPY_CORE_TOKENIZATION_PRE_TOKENIZER_H_

#include <string>
#include <variant>
#include <vector>

#include "core/status.h"
#include "core/tokenization/json_fields.h"
#include "core/tokenization/pattern.h"
#include "core/tokenization/piece.h"

namespace canopy {

// What becomes of the matches that a text is split at.
enum class SplitBehavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

// Split, ByteLevel, Metaspace, Digits, Punctuation and Sequence. Const after loading.
class PreTokenizer {
 public:
  // Null means none. Unimplemented names a type that is not supported.
  static absl::StatusOr<PreTokenizer> FromJson(const Json* json, const std::string& where);

  // Cuts every piece that is not a token.
  void Apply(Pieces* pieces) const;

 private:
  struct Split {
    Pattern pattern;
    SplitBehavior behavior = SplitBehavior::kIsolated;
    bool invert = false;
  };
  struct ByteLevel {
    bool add_prefix_space = true;
    bool use_regex = true;
    Split words;  // GPT-2's
  };
  struct Metaspace {
    enum class Prepend { kAlways, kFirst, kNever };
    std::string replacement;
    Prepend prepend = Prepend::kAlways;
    bool split = true;
    Split words;
  };
  using Step = std::variant<Split, ByteLevel, Metaspace>;

  absl::Status Add(const JsonFields& fields, int depth);
  static void Cut(const Split& split, Piece piece, Pieces* out);
  static void Run(const Split& split, Piece piece, Pieces* out);
  static void Run(const ByteLevel& byte_level, Piece piece, Pieces* out);
  static void Run(const Metaspace& metaspace, Piece piece, Pieces* out);

  std::vector<Step> steps_;
};

}  // namespace canopy

#endif  // CANOPY_CORE_TOKENIZATION_PRE_TOKENIZER_H_
