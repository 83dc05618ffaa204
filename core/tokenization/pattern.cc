#include "core/tokenization/pattern.h"

namespace canopy {

absl::StatusOr<Pattern> Pattern::FromJson(const JsonFields& fields, std::string_view key) {
  ASSIGN_OR_RETURN(const JsonFields pattern, fields.Object(key));
  if (pattern.Find("String") != nullptr) {
    ASSIGN_OR_RETURN(std::string literal, pattern.String("String"));
    if (literal.empty()) return pattern.Error("String", "the pattern is empty");
    return Pattern(std::move(literal));
  }
  if (pattern.Find("Regex") != nullptr) {
    ASSIGN_OR_RETURN(const std::string source, pattern.String("Regex"));
    auto regex = Regex::Compile(source);
    if (!regex.ok()) return Annotate(regex.status(), pattern.Path("Regex"));
    return Pattern(*std::move(regex));
  }
  return fields.Error(key, "expected {\"String\": ...} or {\"Regex\": ...}");
}

void Pattern::FindAll(std::string_view text, std::vector<Regex::Match>* matches) const {
  if (regex_) return regex_->FindAll(text, matches);
  matches->clear();
  for (size_t at = text.find(literal_); at != std::string_view::npos;
       at = text.find(literal_, at + literal_.size())) {
    matches->push_back({at, at + literal_.size()});
  }
}

std::string Pattern::ReplaceAll(std::string_view text, std::string_view with) const {
  std::vector<Regex::Match> matches;
  FindAll(text, &matches);
  std::string result;
  result.reserve(text.size());
  size_t end = 0;
  for (const Regex::Match& match : matches) {
    result.append(text.substr(end, match.begin - end)).append(with);
    end = match.end;
  }
  result.append(text.substr(end));
  return result;
}

}  // namespace canopy
