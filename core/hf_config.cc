#include "core/hf_config.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <filesystem>
#include <limits>

#include "core/files.h"
#include "nlohmann/json.hpp"

namespace canopy {
namespace {

using Json = nlohmann::json;

// Far beyond any checkpoint's; the JSON library prints and copies by recursion.
constexpr int kMaxDepth = 64;

bool IsWordCharacter(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '.';
}

// Replaces the bare tokens Infinity, -Infinity and NaN outside strings by transformers 5's form,
// which is JSON. Line numbers stay as they are.
std::string QuoteFloatTokens(std::string_view text, int* max_depth) {
  std::string result;
  result.reserve(text.size());
  bool in_string = false;
  int depth = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      result += c;
      if (c == '\\' && i + 1 < text.size()) result += text[++i];
      in_string = c != '"';
      continue;
    }
    in_string = c == '"';
    if (c == '{' || c == '[') *max_depth = std::max(*max_depth, ++depth);
    if (c == '}' || c == ']') --depth;
    bool replaced = false;
    if ((c == 'I' || c == '-' || c == 'N') && (i == 0 || !IsWordCharacter(text[i - 1]))) {
      for (std::string_view token : {"-Infinity", "Infinity", "NaN"}) {
        const size_t end = i + token.size();
        if (text.substr(i, token.size()) != token) continue;
        if (end < text.size() && IsWordCharacter(text[end])) continue;
        result.append("{\"__float__\":\"").append(token).append("\"}");
        i = end - 1;
        replaced = true;
        break;
      }
    }
    if (!replaced) result += c;
  }
  return result;
}

std::optional<double> AsDouble(const Json& value) {
  if (value.is_number()) return value.get<double>();
  if (value.is_object() && value.size() == 1 && value.contains("__float__") &&
      value["__float__"].is_string()) {
    const std::string& text = value["__float__"].get_ref<const std::string&>();
    if (text == "Infinity") return std::numeric_limits<double>::infinity();
    if (text == "-Infinity") return -std::numeric_limits<double>::infinity();
    if (text == "NaN") return std::numeric_limits<double>::quiet_NaN();
  }
  return std::nullopt;
}

std::optional<int64_t> AsInt(const Json& value) {
  if (value.is_number_unsigned()) {
    const uint64_t number = value.get<uint64_t>();
    return static_cast<int64_t>(std::min<uint64_t>(number, INT64_MAX));
  }
  if (value.is_number_integer()) return value.get<int64_t>();
  return std::nullopt;
}

// A value for a message: cut to a readable length.
std::string Show(const Json& value) {
  std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (text.size() > 60) text = text.substr(0, 60) + "...";
  return text;
}

std::string Describe(IntRange range) {
  return absl::StrCat("a whole number from ", range.min, " to ", range.max);
}

}  // namespace

absl::StatusOr<HfConfig> HfConfig::Load(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  return Parse(text, path);
}

absl::StatusOr<HfConfig> HfConfig::Parse(std::string_view text, const std::string& file) {
  int depth = 0;
  const std::string quoted = QuoteFloatTokens(text, &depth);
  if (depth > kMaxDepth) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, ": brackets nest ", depth, " deep; expected at most ", kMaxDepth));
  }
  std::shared_ptr<const Json> root;
  try {
    root = std::make_shared<const Json>(Json::parse(quoted));
  } catch (const Json::exception& error) {
    // "[json.exception.parse_error.101] parse error at line 3, column 7: ..."
    std::string reason = error.what();
    if (const size_t end = reason.find("] "); end != std::string::npos) reason.erase(0, end + 2);
    std::replace_if(
        reason.begin(), reason.end(), [](unsigned char c) { return c < 0x20; }, '?');
    return absl::InvalidArgumentError(absl::StrCat(file, ": is not JSON: ", reason));
  }
  if (!root->is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, ": expected a JSON object, found ", Show(*root)));
  }
  const Json* object = root.get();
  return HfConfig(file, "", std::move(root), object);
}

std::string HfConfig::Where(std::string_view key) const {
  return absl::StrCat(file_, ": ", prefix_, std::string(key));
}

const Json* HfConfig::Find(std::string_view key) const {
  const auto it = object_->find(key);
  return it == object_->end() || it->is_null() ? nullptr : &*it;
}

bool HfConfig::Has(std::string_view key) const { return Find(key) != nullptr; }

absl::Status HfConfig::Missing(std::string_view key) const {
  return absl::NotFoundError(absl::StrCat(Where(key), " is missing"));
}

absl::Status HfConfig::Mismatch(std::string_view key, const Json& value,
                                const std::string& expected) const {
  return absl::InvalidArgumentError(
      absl::StrCat(Where(key), " is ", Show(value), "; expected ", expected));
}

absl::StatusOr<int> HfConfig::Int(std::string_view key, IntRange range,
                                  std::optional<int> fallback) const {
  const Json* value = Find(key);
  if (value == nullptr) {
    if (!fallback) return Missing(key);
    return *fallback;
  }
  const std::optional<int64_t> number = AsInt(*value);
  if (!number || *number < range.min || *number > range.max) {
    return Mismatch(key, *value, Describe(range));
  }
  return static_cast<int>(*number);
}

absl::StatusOr<double> HfConfig::Double(std::string_view key,
                                        std::optional<double> fallback) const {
  const Json* value = Find(key);
  if (value == nullptr) {
    if (!fallback) return Missing(key);
    return *fallback;
  }
  const std::optional<double> number = AsDouble(*value);
  if (!number) return Mismatch(key, *value, "a number");
  return *number;
}

absl::StatusOr<double> HfConfig::PositiveDouble(std::string_view key,
                                                std::optional<double> fallback) const {
  ASSIGN_OR_RETURN(const double value, Double(key, fallback));
  if (!(value > 0) || !std::isfinite(value)) {
    return absl::InvalidArgumentError(
        absl::StrCat(Where(key), " is ", value, "; expected a positive number"));
  }
  return value;
}

absl::StatusOr<bool> HfConfig::Bool(std::string_view key, std::optional<bool> fallback) const {
  const Json* value = Find(key);
  if (value == nullptr) {
    if (!fallback) return Missing(key);
    return *fallback;
  }
  if (!value->is_boolean()) return Mismatch(key, *value, "true or false");
  return value->get<bool>();
}

absl::StatusOr<std::string> HfConfig::String(std::string_view key,
                                             std::optional<std::string> fallback) const {
  const Json* value = Find(key);
  if (value == nullptr) {
    if (!fallback) return Missing(key);
    return *std::move(fallback);
  }
  if (!value->is_string()) return Mismatch(key, *value, "a string");
  return value->get<std::string>();
}

absl::StatusOr<std::vector<int>> HfConfig::Ints(std::string_view key, IntRange range) const {
  std::vector<int> result;
  const Json* value = Find(key);
  if (value == nullptr) return result;
  const auto add = [&](const Json& item) {
    const std::optional<int64_t> number = AsInt(item);
    if (!number || *number < range.min || *number > range.max) return false;
    result.push_back(static_cast<int>(*number));
    return true;
  };
  const bool fits =
      value->is_array() ? std::all_of(value->begin(), value->end(), add) : add(*value);
  if (!fits) return Mismatch(key, *value, absl::StrCat(Describe(range), " or a list of such"));
  return result;
}

absl::StatusOr<std::vector<double>> HfConfig::Doubles(std::string_view key) const {
  std::vector<double> result;
  const Json* value = Find(key);
  if (value == nullptr) return result;
  if (!value->is_array()) return Mismatch(key, *value, "a list of numbers");
  for (const Json& item : *value) {
    const std::optional<double> number = AsDouble(item);
    if (!number) return Mismatch(key, *value, "a list of numbers");
    result.push_back(*number);
  }
  return result;
}

absl::StatusOr<std::vector<std::string>> HfConfig::Strings(std::string_view key) const {
  std::vector<std::string> result;
  const Json* value = Find(key);
  if (value == nullptr) return result;
  if (!value->is_array()) return Mismatch(key, *value, "a list of strings");
  for (const Json& item : *value) {
    if (!item.is_string()) return Mismatch(key, *value, "a list of strings");
    result.push_back(item.get<std::string>());
  }
  return result;
}

absl::StatusOr<HfConfig> HfConfig::Object(std::string_view key) const {
  static const Json kEmpty = Json::object();
  const Json* value = Find(key);
  if (value != nullptr && !value->is_object()) return Mismatch(key, *value, "an object");
  return HfConfig(file_, absl::StrCat(prefix_, std::string(key), "."), root_,
                  value == nullptr ? &kEmpty : value);
}

absl::StatusOr<std::vector<TokenId>> ReadEosTokens(const std::string& folder,
                                                   const HfConfig& config) {
  const std::string path = (std::filesystem::path(folder) / "generation_config.json").string();
  std::vector<int> ids;
  std::error_code ignored;
  if (std::filesystem::exists(path, ignored)) {
    ASSIGN_OR_RETURN(const HfConfig generation, HfConfig::Load(path));
    ASSIGN_OR_RETURN(ids, generation.Ints("eos_token_id"));
  }
  if (ids.empty()) {
    ASSIGN_OR_RETURN(ids, config.Ints("eos_token_id"));
  }
  std::vector<TokenId> tokens;
  for (int id : ids) {
    if (std::find(tokens.begin(), tokens.end(), TokenId(id)) == tokens.end()) {
      tokens.push_back(TokenId(id));
    }
  }
  return tokens;
}

}  // namespace canopy
