// What normalizers, pre-tokenizers and decoders search for: {"String": s} or {"Regex": r}.

#ifndef CANOPY_CORE_TOKENIZATION_PATTERN_H_
#define CANOPY_CORE_TOKENIZATION_PATTERN_H_

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/status.h"
#include "core/tokenization/json_fields.h"
#include "core/tokenization/regex.h"

namespace canopy {

class Pattern {
 public:
  // The pattern under `key`.
  static absl::StatusOr<Pattern> FromJson(const JsonFields& fields, std::string_view key);
  explicit Pattern(std::string literal) : literal_(std::move(literal)) {}
  explicit Pattern(Regex regex) : regex_(std::move(regex)) {}

  void FindAll(std::string_view text, std::vector<Regex::Match>* matches) const;
  // `text` with every match replaced.
  std::string ReplaceAll(std::string_view text, std::string_view with) const;
  // The text sought, or null for a regular expression.
  const std::string* literal() const { return regex_ ? nullptr : &literal_; }

 private:
  std::string literal_;
  std::optional<Regex> regex_;
};

}  // namespace canopy

#endif  // CANOPY_CORE_TOKENIZATION_PATTERN_H_
