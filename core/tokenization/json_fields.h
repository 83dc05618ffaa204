// Typed access to the fields of a JSON object, with errors that say where.

#ifndef CANOPY_CORE_TOKENIZATION_JSON_FIELDS_H_
#define CANOPY_CORE_TOKENIZATION_JSON_FIELDS_H_

#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "core/status.h"
#include "nlohmann/json.hpp"

namespace canopy {

using Json = nlohmann::json;

// InvalidArgument "SOURCE: not valid JSON: ..." with the place.
absl::StatusOr<Json> ParseJson(std::string_view text, const std::string& source);

// A JSON object and its name in messages, such as "t/tokenizer.json: decoder". Does not own the
// JSON.
class JsonFields {
 public:
  static absl::StatusOr<JsonFields> Of(const Json& json, std::string where);

  const std::string& where() const { return where_; }
  std::string Path(std::string_view key) const;

  // Null if the key is missing or its value is null.
  const Json* Find(std::string_view key) const;
  absl::StatusOr<const Json*> Array(std::string_view key) const;
  absl::StatusOr<JsonFields> Object(std::string_view key) const;
  absl::StatusOr<std::string> String(std::string_view key) const;
  absl::StatusOr<std::string> String(std::string_view key, std::string_view if_missing) const;
  absl::StatusOr<bool> Bool(std::string_view key, bool if_missing) const;
  absl::StatusOr<int> Int(std::string_view key, int low, int high) const;
  // A string of one character.
  absl::StatusOr<char32_t> Char(std::string_view key) const;

  // InvalidArgument "WHERE.KEY: WHAT".
  absl::Status Error(std::string_view key, std::string_view what) const;
  // Unimplemented "WHERE: type "X" is not supported; supported are ...".
  absl::Status UnknownType(std::string_view type, std::string_view supported) const;

  const Json& json() const { return *json_; }

 private:
  JsonFields(const Json* json, std::string where) : json_(json), where_(std::move(where)) {}
  const Json* json_;
  std::string where_;
};

}  // namespace canopy

#endif  // CANOPY_CORE_TOKENIZATION_JSON_FIELDS_H_
