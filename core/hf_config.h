// The JSON files of a Hugging Face checkpoint: config.json, generation_config.json, ...
//
//   ASSIGN_OR_RETURN(HfConfig config, HfConfig::Load(folder + "/config.json"));
//   ASSIGN_OR_RETURN(const int hidden, config.Int("hidden_size", {.min = 1}));
//
// Numbers that JSON lacks are read as transformers writes them: version 4 as the bare tokens
// Infinity, -Infinity and NaN, version 5 as {"__float__": "Infinity"}. A key whose value is null
// counts as absent, as it does for transformers. Every error names file and key.

#ifndef CANOPY_CORE_HF_CONFIG_H_
#define CANOPY_CORE_HF_CONFIG_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/status.h"
#include "nlohmann/json_fwd.hpp"
#include "trees/ids.h"

namespace canopy {

// Bounds of an integer, both included; the upper one keeps products of two sizes inside int64.
struct IntRange {
  int64_t min = 0;
  int64_t max = INT32_MAX;
};

// A JSON object. Copies are cheap and share it. Const; safe from several threads.
class HfConfig {
 public:
  // NotFound without the file; InvalidArgument, with line and column, for what is not a JSON
  // object.
  static absl::StatusOr<HfConfig> Load(const std::string& path);
  // From text; `file` stands for the path in messages.
  static absl::StatusOr<HfConfig> Parse(std::string_view text, const std::string& file);

  const std::string& file() const { return file_; }
  // There and not null.
  bool Has(std::string_view key) const;

  // Without `fallback`: NotFound if absent. InvalidArgument for another type or out of range.
  absl::StatusOr<int> Int(std::string_view key, IntRange range = {},
                          std::optional<int> fallback = std::nullopt) const;
  absl::StatusOr<double> Double(std::string_view key,
                                std::optional<double> fallback = std::nullopt) const;
  // A Double that is finite and above 0; InvalidArgument otherwise.
  absl::StatusOr<double> PositiveDouble(std::string_view key,
                                        std::optional<double> fallback = std::nullopt) const;
  absl::StatusOr<bool> Bool(std::string_view key,
                            std::optional<bool> fallback = std::nullopt) const;
  absl::StatusOr<std::string> String(std::string_view key,
                                     std::optional<std::string> fallback = std::nullopt) const;
  // Lists; empty if absent. Ints takes a single number for a list of one (eos_token_id).
  absl::StatusOr<std::vector<int>> Ints(std::string_view key, IntRange range = {}) const;
  absl::StatusOr<std::vector<double>> Doubles(std::string_view key) const;
  absl::StatusOr<std::vector<std::string>> Strings(std::string_view key) const;
  // The object under `key`; an empty one if absent. Its errors name "key.inner".
  absl::StatusOr<HfConfig> Object(std::string_view key) const;

  // "FILE: KEY" for messages of the caller's own.
  std::string Where(std::string_view key) const;

 private:
  HfConfig(std::string file, std::string prefix, std::shared_ptr<const nlohmann::json> root,
           const nlohmann::json* object)
      : file_(std::move(file)),
        prefix_(std::move(prefix)),
        root_(std::move(root)),
        object_(object) {}
  const nlohmann::json* Find(std::string_view key) const;
  absl::Status Missing(std::string_view key) const;
  absl::Status Mismatch(std::string_view key, const nlohmann::json& value,
                        const std::string& expected) const;

  std::string file_;
  std::string prefix_;  // "rope_parameters."
  std::shared_ptr<const nlohmann::json> root_;
  const nlohmann::json* object_;  // in *root_
};

// The tokens that end a text: eos_token_id of generation_config.json in `folder` where that has
// one, else of config.json; an integer or a list. Empty if neither names any.
absl::StatusOr<std::vector<TokenId>> ReadEosTokens(const std::string& folder,
                                                   const HfConfig& config);

}  // namespace canopy

#endif  // CANOPY_CORE_HF_CONFIG_H_
