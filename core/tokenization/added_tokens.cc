#include "core/tokenization/added_tokens.h"

#include <algorithm>
#include <utility>

#include "core/tokenization/unicode.h"

namespace canopy {
namespace {

// The beginning of the last character of `text`.
size_t LastChar(std::string_view text) {
  size_t at = text.size() - 1;
  while ((static_cast<unsigned char>(text[at]) & 0xc0) == 0x80) --at;
  return at;
}

bool EndsWithWord(std::string_view text) {
  if (text.empty()) return false;
  std::string_view last = text.substr(LastChar(text));
  return IsWordChar(TakeChar(&last));
}

bool StartsWithWord(std::string_view text) { return !text.empty() && IsWordChar(TakeChar(&text)); }

}  // namespace

void AddedTokens::Trie::Add(std::string_view text, int value) {
  if (text.empty()) return;
  first_.set(static_cast<unsigned char>(text[0]));
  int node = 0;
  for (const char c : text) {
    const uint64_t key = static_cast<uint64_t>(node) << 8 | static_cast<unsigned char>(c);
    const auto [edge, added] = edges_.try_emplace(key, static_cast<int>(nodes_.size()));
    if (added) nodes_.emplace_back();
    node = edge->second;
  }
  if (nodes_[node].value < 0) nodes_[node].value = value;
}

int AddedTokens::Trie::Longest(std::string_view text, size_t* length) const {
  int value = -1;
  if (!first_.test(static_cast<unsigned char>(text[0]))) return value;
  int node = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto edge =
        edges_.find(static_cast<uint64_t>(node) << 8 | static_cast<unsigned char>(text[i]));
    if (edge == edges_.end()) break;
    node = edge->second;
    if (nodes_[node].value >= 0) {
      value = nodes_[node].value;
      *length = i + 1;
    }
  }
  return value;
}

absl::StatusOr<AddedTokens> AddedTokens::FromJson(const JsonFields& file, const BpeModel& model,
                                                  const Normalizer& normalizer) {
  AddedTokens result;
  if (file.Find("added_tokens") == nullptr) return result;
  ASSIGN_OR_RETURN(const Json* list, file.Array("added_tokens"));
  absl::flat_hash_map<int32_t, std::string> owner;
  for (const auto& [token, id] : model.vocabulary()) owner.emplace(id, token);
  absl::flat_hash_map<std::string, int32_t> seen;
  for (size_t i = 0; i < list->size(); ++i) {
    ASSIGN_OR_RETURN(
        const JsonFields fields,
        JsonFields::Of((*list)[i], absl::StrCat(file.Path("added_tokens"), "[", i, "]")));
    AddedToken token;
    ASSIGN_OR_RETURN(token.content, fields.String("content"));
    ASSIGN_OR_RETURN(const int id, fields.Int("id", 0, kMaxVocabulary - 1));
    token.id = TokenId(id);
    ASSIGN_OR_RETURN(token.single_word, fields.Bool("single_word", false));
    ASSIGN_OR_RETURN(token.lstrip, fields.Bool("lstrip", false));
    ASSIGN_OR_RETURN(token.rstrip, fields.Bool("rstrip", false));
    ASSIGN_OR_RETURN(token.special, fields.Bool("special", false));
    ASSIGN_OR_RETURN(token.normalized, fields.Bool("normalized", !token.special));
    if (token.content.empty()) return fields.Error("content", "the token is empty");
    if (const auto found = model.Find(token.content); found && *found != token.id) {
      return fields.Error("id", absl::StrCat("\"", token.content, "\" has id ", id,
                                             " here, but id ", found->value, " in model.vocab"));
    }
    if (const auto [entry, added] = owner.try_emplace(id, token.content);
        !added && entry->second != token.content) {
      return fields.Error("id", absl::StrCat(id, " of \"", token.content, "\" is the id of \"",
                                             entry->second, "\" too"));
    }
    if (const auto [entry, added] = seen.try_emplace(token.content, id); !added) {
      return fields.Error("content", absl::StrCat("\"", token.content, "\" is there twice"));
    }
    result.tokens_.push_back(std::move(token));
  }
  // Special tokens come first, so that they win where normalizing makes two tokens alike.
  for (const bool special : {true, false}) {
    for (size_t i = 0; i < result.tokens_.size(); ++i) {
      AddedToken& token = result.tokens_[i];
      if (token.special != special) continue;
      Piece piece{.text = token.content};
      if (token.normalized) normalizer.Apply(&piece);
      token.decoded = std::move(piece.text);
      (token.normalized ? result.normalized_ : result.raw_).Add(token.decoded, static_cast<int>(i));
    }
  }
  return result;
}

void AddedTokens::Cut(const Trie& trie, Piece piece, Pieces* out) const {
  const std::string_view text = piece.text;
  size_t done = 0;
  const auto add_text = [&](size_t begin, size_t end) {
    out->push_back({std::string(text.substr(begin, end - begin)), piece.at_text_start && begin == 0,
                    TokenId()});
  };
  for (size_t at = 0; at < text.size();) {
    size_t length = 0;
    const int found = trie.Longest(text.substr(at), &length);
    if (found < 0) {
      ++at;
      continue;
    }
    const AddedToken& token = tokens_[found];
    size_t begin = at;
    size_t end = at + length;
    at = end;  // also where the match is refused
    if (token.single_word &&
        (EndsWithWord(text.substr(0, begin)) || StartsWithWord(text.substr(end)))) {
      continue;
    }
    if (token.lstrip) {
      while (begin > done) {
        const size_t previous = LastChar(text.substr(0, begin));
        std::string_view c = text.substr(previous);
        if (!IsWhiteSpace(TakeChar(&c))) break;
        begin = previous;
      }
    }
    if (token.rstrip) {
      while (end < text.size()) {
        std::string_view rest = text.substr(end);
        if (!IsWhiteSpace(TakeChar(&rest))) break;
        end = text.size() - rest.size();
      }
    }
    if (done < begin) add_text(done, begin);
    out->push_back({"", false, token.id});
    done = end;
  }
  if (done == 0 && !text.empty()) {
    out->push_back(std::move(piece));
  } else if (done < text.size()) {
    add_text(done, text.size());
  }
}

Pieces AddedTokens::Split(std::string_view text, const Normalizer& normalizer) const {
  Pieces raw, result;
  Cut(raw_, {.text = std::string(text)}, &raw);
  for (Piece& piece : raw) {
    if (piece.is_token()) {
      result.push_back(std::move(piece));
    } else {
      normalizer.Apply(&piece);
      Cut(normalized_, std::move(piece), &result);
    }
  }
  return result;
}

}  // namespace canopy
