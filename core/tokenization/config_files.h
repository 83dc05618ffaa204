// The small files beside tokenizer.json.

#ifndef CANOPY_CORE_TOKENIZATION_CONFIG_FILES_H_
#define CANOPY_CORE_TOKENIZATION_CONFIG_FILES_H_

#include <map>
#include <optional>
#include <string>

#include "core/status.h"

namespace canopy {

// The file's bytes; nullopt if there is no such file. An error names the path.
absl::StatusOr<std::optional<std::string>> ReadIfThere(const std::string& path);

// "bos_token" -> "<s>" and so on, for all roles that are set.
using SpecialTokenNames = std::map<std::string, std::string>;

// From FOLDER/tokenizer_config.json, and for roles that it lacks FOLDER/special_tokens_map.json.
// Either may be missing.
absl::StatusOr<SpecialTokenNames> ReadSpecialTokenNames(const std::string& folder);

}  // namespace canopy

#endif  // CANOPY_CORE_TOKENIZATION_CONFIG_FILES_H_
