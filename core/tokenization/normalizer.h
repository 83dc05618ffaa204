// The "normalizer" of tokenizer.json: what is done to text before it is cut.

#ifndef CANOPY_CORE_TOKENIZATION_NORMALIZER_H_
#define CANOPY_CORE_TOKENIZATION_NORMALIZER_H_

#include <string>
#include <variant>
#include <vector>

#include "core/status.h"
#include "core/tokenization/json_fields.h"
#include "core/tokenization/pattern.h"
#include "core/tokenization/piece.h"
#include "core/tokenization/unicode.h"

namespace canopy {

// NFC, NFD, NFKC, NFKD, Prepend, Replace, Lowercase, Strip and Sequence. Const after loading.
class Normalizer {
 public:
  // Null means none. Unimplemented names a type that is not supported.
  static absl::StatusOr<Normalizer> FromJson(const Json* json, const std::string& where);

  void Apply(Piece* piece) const;

 private:
  struct Prepend {
    std::string text;
  };
  struct Replace {
    Pattern pattern;
    std::string content;
  };
  struct Lowercase {};
  struct Strip {
    bool left = true;
    bool right = true;
  };
  using Step = std::variant<NormalForm, Prepend, Replace, Lowercase, Strip>;

  absl::Status Add(const JsonFields& fields, int depth);
  static void Run(NormalForm form, Piece* piece);
  static void Run(const Prepend& prepend, Piece* piece);
  static void Run(const Replace& replace, Piece* piece);
  static void Run(const Lowercase& lowercase, Piece* piece);
  static void Run(const Strip& strip, Piece* piece);

  std::vector<Step> steps_;
};

}  // namespace canopy

#endif  // CANOPY_CORE_TOKENIZATION_NORMALIZER_H_
