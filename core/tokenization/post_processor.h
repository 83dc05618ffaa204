// The "post_processor" of tokenizer.json: the special tokens around a text.

#ifndef CANOPY_CORE_TOKENIZATION_POST_PROCESSOR_H_
#define CANOPY_CORE_TOKENIZATION_POST_PROCESSOR_H_

#include <string>
#include <vector>

#include "core/status.h"
#include "core/tokenization/json_fields.h"
#include "trees/ids.h"

namespace canopy {

// TemplateProcessing (its template for one text), ByteLevel (which adds nothing) and Sequence.
// Const after loading.
class PostProcessor {
 public:
  // Null means none. Unimplemented names a type that is not supported.
  static absl::StatusOr<PostProcessor> FromJson(const Json* json, const std::string& where);

  std::vector<TokenId> Apply(std::vector<TokenId> text) const;
  // The greatest id that it adds, -1 if none.
  int greatest_id() const { return greatest_id_; }

 private:
  // -1 stands for the text.
  using Template = std::vector<TokenId>;

  absl::Status Add(const JsonFields& fields, int depth);

  std::vector<Template> templates_;  // applied one after another
  int greatest_id_ = -1;
};

}  // namespace canopy

#endif  // CANOPY_CORE_TOKENIZATION_POST_PROCESSOR_H_
