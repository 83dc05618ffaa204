#include "core/tokenization/post_processor.h"

#include <algorithm>
#include <utility>

#include "core/tokenization/bpe.h"

namespace canopy {
namespace {

constexpr int kMaxNesting = 16;

}  // namespace

absl::StatusOr<PostProcessor> PostProcessor::FromJson(const Json* json, const std::string& where) {
  PostProcessor result;
  if (json == nullptr) return result;
  ASSIGN_OR_RETURN(const JsonFields fields, JsonFields::Of(*json, where));
  RETURN_IF_ERROR(result.Add(fields, 0));
  return result;
}

absl::Status PostProcessor::Add(const JsonFields& fields, int depth) {
  ASSIGN_OR_RETURN(const std::string type, fields.String("type"));
  if (type == "Sequence") {
    if (depth >= kMaxNesting) return fields.Error("processors", "nested too deep");
    ASSIGN_OR_RETURN(const Json* list, fields.Array("processors"));
    for (size_t i = 0; i < list->size(); ++i) {
      ASSIGN_OR_RETURN(
          const JsonFields each,
          JsonFields::Of((*list)[i], absl::StrCat(fields.Path("processors"), "[", i, "]")));
      RETURN_IF_ERROR(Add(each, depth + 1));
    }
    return absl::OkStatus();
  }
  // It trims offsets, which Canopy does not keep.
  if (type == "ByteLevel") return absl::OkStatus();
  if (type != "TemplateProcessing") {
    return fields.UnknownType(type, "TemplateProcessing, ByteLevel and Sequence");
  }
  ASSIGN_OR_RETURN(const Json* single, fields.Array("single"));
  Template made;
  for (size_t i = 0; i < single->size(); ++i) {
    const std::string path = absl::StrCat(fields.Path("single"), "[", i, "]");
    ASSIGN_OR_RETURN(const JsonFields piece, JsonFields::Of((*single)[i], path));
    if (piece.Find("Sequence") != nullptr) {
      ASSIGN_OR_RETURN(const JsonFields sequence, piece.Object("Sequence"));
      ASSIGN_OR_RETURN(const std::string id, sequence.String("id"));
      if (id != "A") return sequence.Error("id", "expected \"A\" in the template for one text");
      made.push_back(TokenId());
    } else {
      ASSIGN_OR_RETURN(const JsonFields special, piece.Object("SpecialToken"));
      ASSIGN_OR_RETURN(const std::string name, special.String("id"));
      ASSIGN_OR_RETURN(const JsonFields all, fields.Object("special_tokens"));
      ASSIGN_OR_RETURN(const JsonFields entry, all.Object(name));
      ASSIGN_OR_RETURN(const Json* ids, entry.Array("ids"));
      for (const Json& id : *ids) {
        if (!id.is_number_unsigned() || id.get<uint64_t>() >= kMaxVocabulary) {
          return entry.Error("ids", absl::StrCat("expected ids from 0 to ", kMaxVocabulary - 1,
                                                 ", found ", id.dump()));
        }
        made.push_back(TokenId(id.get<int32_t>()));
        greatest_id_ = std::max(greatest_id_, made.back().value);
      }
    }
  }
  templates_.push_back(std::move(made));
  return absl::OkStatus();
}

std::vector<TokenId> PostProcessor::Apply(std::vector<TokenId> text) const {
  for (const Template& made : templates_) {
    std::vector<TokenId> result;
    result.reserve(text.size() + made.size());
    for (const TokenId id : made) {
      if (id.value >= 0) {
        result.push_back(id);
      } else {
        result.insert(result.end(), text.begin(), text.end());
      }
    }
    text = std::move(result);
  }
  return text;
}

}  // namespace canopy
