#include "core/tokenization/config_files.h"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <system_error>

#include "core/tokenization/json_fields.h"

namespace canopy {

absl::StatusOr<std::optional<std::string>> ReadIfThere(const std::string& path) {
  std::error_code error;
  if (!std::filesystem::exists(path, error)) return std::nullopt;
  if (std::filesystem::is_directory(path, error)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": a folder where a file is expected"));
  }
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    return absl::UnavailableError(absl::StrCat(path, ": cannot be opened: ", std::strerror(errno)));
  }
  std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (file.bad()) {
    return absl::UnavailableError(absl::StrCat(path, ": cannot be read: ", std::strerror(errno)));
  }
  return text;
}

absl::StatusOr<SpecialTokenNames> ReadSpecialTokenNames(const std::string& folder) {
  SpecialTokenNames names;
  for (const char* file : {"tokenizer_config.json", "special_tokens_map.json"}) {
    const std::string path = absl::StrCat(folder, "/", file);
    ASSIGN_OR_RETURN(const std::optional<std::string> text, ReadIfThere(path));
    if (!text) continue;
    ASSIGN_OR_RETURN(const Json json, ParseJson(*text, path));
    ASSIGN_OR_RETURN(const JsonFields fields, JsonFields::Of(json, path));
    for (const char* role : {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token",
                             "cls_token", "mask_token"}) {
      const Json* value = fields.Find(role);
      if (value == nullptr || names.count(role) > 0) continue;
      if (value->is_string()) {
        names[role] = value->get<std::string>();
      } else {
        // An AddedToken in full.
        ASSIGN_OR_RETURN(const JsonFields token, fields.Object(role));
        ASSIGN_OR_RETURN(names[role], token.String("content"));
      }
    }
  }
  return names;
}

}  // namespace canopy
