#include "core/tokenization/bpe.h"

#include <algorithm>

#include "absl/strings/str_format.h"
#include "core/tokenization/unicode.h"

namespace canopy {
namespace {

// A heap's top is the lowest rank, then the leftmost.
bool Later(const BpeModel::Scratch::Merge& a, const BpeModel::Scratch::Merge& b) {
  return a.rank != b.rank ? a.rank > b.rank : a.position > b.position;
}

}  // namespace

absl::StatusOr<BpeModel> BpeModel::FromJson(const JsonFields& fields) {
  // The oldest files lack the type.
  ASSIGN_OR_RETURN(const std::string type, fields.String("type", "BPE"));
  if (type != "BPE") return fields.UnknownType(type, "BPE");
  if (const Json* dropout = fields.Find("dropout");
      dropout != nullptr && !(dropout->is_number() && dropout->get<double>() == 0)) {
    return absl::UnimplementedError(
        absl::StrCat(fields.Path("dropout"), ": merge dropout is not supported; set it to null"));
  }
  for (const std::string_view affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    ASSIGN_OR_RETURN(const std::string text, fields.String(affix, ""));
    if (!text.empty()) {
      return absl::UnimplementedError(absl::StrCat(fields.Path(affix), ": \"", text,
                                                   "\" is not supported; only empty or null is"));
    }
  }
  BpeModel model;
  RETURN_IF_ERROR(model.ReadVocabulary(fields));
  RETURN_IF_ERROR(model.ReadMerges(fields));
  ASSIGN_OR_RETURN(model.byte_fallback_, fields.Bool("byte_fallback", false));
  ASSIGN_OR_RETURN(model.ignore_merges_, fields.Bool("ignore_merges", false));
  ASSIGN_OR_RETURN(model.fuse_unknown_, fields.Bool("fuse_unk", false));
  if (fields.Find("unk_token") != nullptr) {
    ASSIGN_OR_RETURN(const std::string token, fields.String("unk_token"));
    const std::optional<TokenId> id = model.Find(token);
    if (!id) {
      return fields.Error("unk_token", absl::StrCat("\"", token, "\" is not in the vocabulary"));
    }
    model.unknown_ = id->value;
  }
  for (int b = 0; b < 256; ++b) {
    const std::optional<TokenId> id = model.Find(absl::StrFormat("<0x%02X>", b));
    model.byte_tokens_[b] = id ? id->value : -1;
  }
  return model;
}

absl::Status BpeModel::ReadVocabulary(const JsonFields& fields) {
  ASSIGN_OR_RETURN(const JsonFields vocabulary, fields.Object("vocab"));
  vocabulary_.reserve(vocabulary.json().size());
  std::vector<bool> taken;
  for (const auto& [token, value] : vocabulary.json().items()) {
    if (!value.is_number_integer() || (!value.is_number_unsigned() && value.get<int64_t>() < 0) ||
        value.get<uint64_t>() >= kMaxVocabulary) {
      return vocabulary.Error(token, absl::StrCat("expected an id from 0 to ", kMaxVocabulary - 1,
                                                  ", found ", value.dump()));
    }
    const auto id = value.get<int32_t>();
    if (static_cast<size_t>(id) >= taken.size())
      taken.resize(std::max<size_t>(id + 1, 2 * taken.size()));
    if (taken[id]) {
      return vocabulary.Error(token, absl::StrCat("id ", id, " is another token's too"));
    }
    taken[id] = true;
    vocabulary_.emplace(token, id);
  }
  if (vocabulary_.empty()) return fields.Error("vocab", "the vocabulary is empty");
  return absl::OkStatus();
}

absl::Status BpeModel::ReadMerges(const JsonFields& fields) {
  ASSIGN_OR_RETURN(const Json* merges, fields.Array("merges"));
  merges_.reserve(merges->size());
  int32_t rank = 0;
  for (const Json& merge : *merges) {
    const auto error = [&](std::string_view what) {
      return absl::InvalidArgumentError(
          absl::StrCat(fields.Path("merges"), "[", rank, "]: ", std::string(what)));
    };
    std::string left, right;
    if (merge.is_string()) {
      const auto& text = merge.get_ref<const std::string&>();
      const size_t space = text.find(' ');
      if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) {
        return error(
            absl::StrCat("expected two tokens with a space between, found \"", text, "\""));
      }
      left = text.substr(0, space);
      right = text.substr(space + 1);
    } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() &&
               merge[1].is_string()) {
      left = merge[0].get<std::string>();
      right = merge[1].get<std::string>();
    } else {
      return error("expected \"LEFT RIGHT\" or [\"LEFT\", \"RIGHT\"]");
    }
    int32_t ids[3];
    const std::string* names[3] = {&left, &right, nullptr};
    const std::string product = left + right;
    names[2] = &product;
    for (int i = 0; i < 3; ++i) {
      const auto found = vocabulary_.find(*names[i]);
      if (found == vocabulary_.end()) {
        return error(absl::StrCat("the token \"", *names[i], "\" is not in the vocabulary"));
      }
      ids[i] = found->second;
    }
    // Of two merges of one pair the later counts.
    merges_[static_cast<uint64_t>(ids[0]) << 32 | static_cast<uint32_t>(ids[1])] = {rank, ids[2]};
    ++rank;
  }
  return absl::OkStatus();
}

std::optional<TokenId> BpeModel::Find(std::string_view token) const {
  const auto found = vocabulary_.find(MapKey(token));
  if (found == vocabulary_.end()) return std::nullopt;
  return TokenId(found->second);
}

const BpeModel::Product* BpeModel::FindMerge(int32_t left, int32_t right) const {
  const auto found = merges_.find(static_cast<uint64_t>(left) << 32 | static_cast<uint32_t>(right));
  return found == merges_.end() ? nullptr : &found->second;
}

void BpeModel::Begin(std::string_view word, std::vector<Scratch::Symbol>* symbols) const {
  const auto add = [&](int32_t token) { symbols->push_back({.token = token}); };
  bool unknown_open = false;
  while (!word.empty()) {
    const std::string_view c = word.substr(0, Utf8Length(word[0]));
    word.remove_prefix(c.size());
    if (const auto found = vocabulary_.find(MapKey(c)); found != vocabulary_.end()) {
      if (unknown_open) add(*unknown_);
      unknown_open = false;
      add(found->second);
      continue;
    }
    if (byte_fallback_ && std::all_of(c.begin(), c.end(), [&](char b) {
          return byte_tokens_[static_cast<unsigned char>(b)] >= 0;
        })) {
      // An unknown token before the bytes is added only after them: so do `tokenizers`.
      for (const char b : c) add(byte_tokens_[static_cast<unsigned char>(b)]);
      continue;
    }
    // Without an unknown token the character is lost.
    if (!unknown_) continue;
    if (unknown_open && !fuse_unknown_) add(*unknown_);
    unknown_open = true;
  }
  if (unknown_open) add(*unknown_);
}

void BpeModel::Encode(std::string_view word, Scratch* scratch, std::vector<TokenId>* out) const {
  if (ignore_merges_) {
    if (const std::optional<TokenId> whole = Find(word)) {
      out->push_back(*whole);
      return;
    }
  }
  auto& symbols = scratch->symbols;
  auto& queue = scratch->queue;
  symbols.clear();
  queue.clear();
  Begin(word, &symbols);
  const auto count = static_cast<int32_t>(symbols.size());
  for (int32_t i = 0; i < count; ++i) {
    symbols[i].previous = i - 1;
    symbols[i].next = i + 1 < count ? i + 1 : -1;
    if (i + 1 == count) break;
    if (const Product* product = FindMerge(symbols[i].token, symbols[i + 1].token)) {
      queue.push_back({product->rank, i, product->token});
    }
  }
  std::make_heap(queue.begin(), queue.end(), Later);
  const auto offer = [&](int32_t left, int32_t right) {
    if (const Product* product = FindMerge(symbols[left].token, symbols[right].token)) {
      queue.push_back({product->rank, left, product->token});
      std::push_heap(queue.begin(), queue.end(), Later);
    }
  };
  while (!queue.empty()) {
    std::pop_heap(queue.begin(), queue.end(), Later);
    const Scratch::Merge merge = queue.back();
    queue.pop_back();
    Scratch::Symbol& left = symbols[merge.position];
    if (left.gone || left.next < 0) continue;
    Scratch::Symbol& right = symbols[left.next];
    // Either of the pair may have changed since the merge was offered.
    const Product* product = FindMerge(left.token, right.token);
    if (product == nullptr || product->token != merge.token) continue;
    left.token = merge.token;
    right.gone = true;
    left.next = right.next;
    if (left.next >= 0) symbols[left.next].previous = merge.position;
    if (left.previous >= 0) offer(left.previous, merge.position);
    if (left.next >= 0) offer(merge.position, left.next);
  }
  for (const Scratch::Symbol& symbol : symbols) {
    if (!symbol.gone) out->push_back(TokenId(symbol.token));
  }
}

}  // namespace canopy
