#include "core/tokenization/json_fields.h"

#include "core/tokenization/unicode.h"

namespace canopy {

absl::StatusOr<Json> ParseJson(std::string_view text, const std::string& source) {
  try {
    return Json::parse(text.begin(), text.end());
  } catch (const Json::exception& error) {
    return absl::InvalidArgumentError(
        absl::StrCat(source, ": not valid JSON (is the file whole?): ", error.what()));
  }
}

absl::StatusOr<JsonFields> JsonFields::Of(const Json& json, std::string where) {
  if (!json.is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": expected an object, found ", json.type_name()));
  }
  return JsonFields(&json, std::move(where));
}

std::string JsonFields::Path(std::string_view key) const {
  return absl::StrCat(where_, ".", std::string(key));
}

const Json* JsonFields::Find(std::string_view key) const {
  const auto found = json_->find(std::string(key));
  return found == json_->end() || found->is_null() ? nullptr : &*found;
}

absl::StatusOr<const Json*> JsonFields::Array(std::string_view key) const {
  const Json* value = Find(key);
  if (value == nullptr) return Error(key, "missing; expected an array");
  if (!value->is_array()) {
    return Error(key, absl::StrCat("expected an array, found ", value->type_name()));
  }
  return value;
}

absl::StatusOr<JsonFields> JsonFields::Object(std::string_view key) const {
  const Json* value = Find(key);
  if (value == nullptr) return Error(key, "missing; expected an object");
  return Of(*value, Path(key));
}

absl::StatusOr<std::string> JsonFields::String(std::string_view key) const {
  const Json* value = Find(key);
  if (value == nullptr) return Error(key, "missing; expected a string");
  if (!value->is_string()) {
    return Error(key, absl::StrCat("expected a string, found ", value->type_name()));
  }
  return value->get<std::string>();
}

absl::StatusOr<std::string> JsonFields::String(std::string_view key,
                                               std::string_view if_missing) const {
  if (Find(key) == nullptr) return std::string(if_missing);
  return String(key);
}

absl::StatusOr<bool> JsonFields::Bool(std::string_view key, bool if_missing) const {
  const Json* value = Find(key);
  if (value == nullptr) return if_missing;
  if (!value->is_boolean()) {
    return Error(key, absl::StrCat("expected true or false, found ", value->type_name()));
  }
  return value->get<bool>();
}

absl::StatusOr<int> JsonFields::Int(std::string_view key, int low, int high) const {
  const Json* value = Find(key);
  const std::string expected = absl::StrCat("expected a whole number from ", low, " to ", high);
  if (value == nullptr) return Error(key, absl::StrCat("missing; ", expected));
  if (!value->is_number_integer()) {
    return Error(key, absl::StrCat(expected, ", found ", value->type_name()));
  }
  const bool fits = value->is_number_unsigned()
                        ? value->get<uint64_t>() <= static_cast<uint64_t>(high)
                        : value->get<int64_t>() <= high;
  if (!fits || value->get<int64_t>() < low) {
    return Error(key, absl::StrCat(expected, ", found ", value->dump()));
  }
  return value->get<int>();
}

absl::StatusOr<char32_t> JsonFields::Char(std::string_view key) const {
  ASSIGN_OR_RETURN(const std::string text, String(key));
  if (CountChars(text) != 1) {
    return Error(key, absl::StrCat("expected one character, found \"", text, "\""));
  }
  std::string_view rest = text;
  return TakeChar(&rest);
}

absl::Status JsonFields::Error(std::string_view key, std::string_view what) const {
  return absl::InvalidArgumentError(absl::StrCat(Path(key), ": ", std::string(what)));
}

absl::Status JsonFields::UnknownType(std::string_view type, std::string_view supported) const {
  return absl::UnimplementedError(absl::StrCat(where_, ": type \"", std::string(type),
                                               "\" is not supported; supported are ",
                                               std::string(supported)));
}

}  // namespace canopy
