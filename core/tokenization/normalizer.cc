#include "core/tokenization/normalizer.h"

#include <utility>

namespace canopy {
namespace {

constexpr int kMaxNesting = 16;

}  // namespace

absl::StatusOr<Normalizer> Normalizer::FromJson(const Json* json, const std::string& where) {
  Normalizer normalizer;
  if (json == nullptr) return normalizer;
  ASSIGN_OR_RETURN(const JsonFields fields, JsonFields::Of(*json, where));
  RETURN_IF_ERROR(normalizer.Add(fields, 0));
  return normalizer;
}

absl::Status Normalizer::Add(const JsonFields& fields, int depth) {
  ASSIGN_OR_RETURN(const std::string type, fields.String("type"));
  if (type == "Sequence") {
    if (depth >= kMaxNesting) return fields.Error("normalizers", "nested too deep");
    ASSIGN_OR_RETURN(const Json* list, fields.Array("normalizers"));
    for (size_t i = 0; i < list->size(); ++i) {
      ASSIGN_OR_RETURN(
          const JsonFields each,
          JsonFields::Of((*list)[i], absl::StrCat(fields.Path("normalizers"), "[", i, "]")));
      RETURN_IF_ERROR(Add(each, depth + 1));
    }
  } else if (type == "NFC") {
    steps_.push_back(NormalForm::kNfc);
  } else if (type == "NFD") {
    steps_.push_back(NormalForm::kNfd);
  } else if (type == "NFKC") {
    steps_.push_back(NormalForm::kNfkc);
  } else if (type == "NFKD") {
    steps_.push_back(NormalForm::kNfkd);
  } else if (type == "Prepend") {
    ASSIGN_OR_RETURN(std::string text, fields.String("prepend"));
    steps_.push_back(Prepend{std::move(text)});
  } else if (type == "Replace") {
    ASSIGN_OR_RETURN(Pattern pattern, Pattern::FromJson(fields, "pattern"));
    ASSIGN_OR_RETURN(std::string content, fields.String("content"));
    steps_.push_back(Replace{std::move(pattern), std::move(content)});
  } else if (type == "Lowercase") {
    steps_.push_back(Lowercase{});
  } else if (type == "Strip") {
    Strip strip;
    ASSIGN_OR_RETURN(strip.left, fields.Bool("strip_left", true));
    ASSIGN_OR_RETURN(strip.right, fields.Bool("strip_right", true));
    steps_.push_back(strip);
  } else {
    return fields.UnknownType(
        type, "NFC, NFD, NFKC, NFKD, Prepend, Replace, Lowercase, Strip and Sequence");
  }
  return absl::OkStatus();
}

void Normalizer::Apply(Piece* piece) const {
  for (const Step& step : steps_) {
    std::visit([&](const auto& run) { Run(run, piece); }, step);
  }
}

void Normalizer::Run(NormalForm form, Piece* piece) { piece->text = Normalize(piece->text, form); }

void Normalizer::Run(const Prepend& prepend, Piece* piece) {
  if (!piece->text.empty()) piece->text.insert(0, prepend.text);
}

void Normalizer::Run(const Replace& replace, Piece* piece) {
  piece->text = replace.pattern.ReplaceAll(piece->text, replace.content);
}

void Normalizer::Run(const Lowercase&, Piece* piece) { piece->text = ToLower(piece->text); }

void Normalizer::Run(const Strip& strip, Piece* piece) {
  std::string_view rest = piece->text;
  size_t begin = 0;
  if (strip.left) {
    while (!rest.empty() && IsWhiteSpace(TakeChar(&rest))) begin = piece->text.size() - rest.size();
    rest = piece->text;
    rest.remove_prefix(begin);
  }
  size_t end = 0;  // of what is kept, from `begin`
  const std::string_view kept = rest;
  if (strip.right) {
    while (!rest.empty()) {
      if (!IsWhiteSpace(TakeChar(&rest))) end = kept.size() - rest.size();
    }
  } else {
    end = kept.size();
  }
  if (begin > 0) piece->at_text_start = false;
  piece->text = std::string(kept.substr(0, end));
}

}  // namespace canopy
