#include "core/tokenizer.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <utility>

#include "core/tokenization/added_tokens.h"
#include "core/tokenization/bpe.h"
#include "core/tokenization/config_files.h"
#include "core/tokenization/decoder.h"
#include "core/tokenization/json_fields.h"
#include "core/tokenization/normalizer.h"
#include "core/tokenization/post_processor.h"
#include "core/tokenization/pre_tokenizer.h"
#include "core/tokenization/unicode.h"

namespace canopy {

struct Tokenizer::Tables {
  BpeModel model;
  Normalizer normalizer;
  AddedTokens added;
  PreTokenizer pre_tokenizer;
  PostProcessor post_processor;
  Decoder decoder;
  std::vector<std::string> tokens;  // by id; empty where there is none
  absl::flat_hash_map<int32_t, std::string>
      decoded;                // of added tokens whose decoded text is another
  std::vector<bool> special;  // by id
  absl::flat_hash_map<std::string, TokenId> added_ids;
  std::optional<TokenId> bos;
  std::optional<TokenId> eos;

  std::optional<TokenId> Find(std::string_view token) const {
    if (const auto found = added_ids.find(MapKey(token)); found != added_ids.end())
      return found->second;
    return model.Find(token);
  }
  // Null where Decode leaves the id out.
  const std::string* DecodedToken(TokenId id, bool skip_special) const {
    if (id.value < 0 || static_cast<size_t>(id.value) >= tokens.size()) return nullptr;
    if (tokens[id.value].empty() || (skip_special && special[id.value])) return nullptr;
    const auto other = decoded.find(id.value);
    return other == decoded.end() ? &tokens[id.value] : &other->second;
  }
};

absl::StatusOr<Tokenizer> Tokenizer::FromJson(std::string_view tokenizer_json,
                                              const std::string& source_name) {
  ASSIGN_OR_RETURN(const Json json, ParseJson(tokenizer_json, source_name));
  ASSIGN_OR_RETURN(const JsonFields file, JsonFields::Of(json, source_name));
  auto tables = std::make_shared<Tables>();
  ASSIGN_OR_RETURN(const JsonFields model, file.Object("model"));
  ASSIGN_OR_RETURN(tables->model, BpeModel::FromJson(model));
  ASSIGN_OR_RETURN(tables->normalizer,
                   Normalizer::FromJson(file.Find("normalizer"), file.Path("normalizer")));
  ASSIGN_OR_RETURN(tables->added, AddedTokens::FromJson(file, tables->model, tables->normalizer));
  ASSIGN_OR_RETURN(tables->pre_tokenizer,
                   PreTokenizer::FromJson(file.Find("pre_tokenizer"), file.Path("pre_tokenizer")));
  ASSIGN_OR_RETURN(tables->post_processor, PostProcessor::FromJson(file.Find("post_processor"),
                                                                   file.Path("post_processor")));
  ASSIGN_OR_RETURN(tables->decoder, Decoder::FromJson(file.Find("decoder"), file.Path("decoder")));

  int greatest = -1;
  for (const auto& [token, id] : tables->model.vocabulary()) greatest = std::max(greatest, id);
  for (const AddedToken& token : tables->added.tokens()) {
    greatest = std::max(greatest, token.id.value);
  }
  if (tables->post_processor.greatest_id() > greatest) {
    return file.Error("post_processor",
                      absl::StrCat("it adds id ", tables->post_processor.greatest_id(),
                                   ", but the greatest id of the vocabulary is ", greatest));
  }
  tables->tokens.resize(greatest + 1);
  tables->special.resize(greatest + 1);
  for (const auto& [token, id] : tables->model.vocabulary()) tables->tokens[id] = token;
  for (const AddedToken& token : tables->added.tokens()) {
    tables->tokens[token.id.value] = token.content;
    tables->special[token.id.value] = token.special;
    tables->added_ids.emplace(token.content, token.id);
    if (token.decoded != token.content) tables->decoded.emplace(token.id.value, token.decoded);
  }
  return Tokenizer(std::move(tables));
}

absl::StatusOr<Tokenizer> Tokenizer::Load(const std::string& folder) {
  const std::string path = folder + "/tokenizer.json";
  ASSIGN_OR_RETURN(const std::optional<std::string> text, ReadIfThere(path));
  if (!text) {
    return absl::NotFoundError(
        absl::StrCat(path,
                     ": no such file; the tokenizer is read from a Hugging Face tokenizer.json "
                     "(transformers' save_pretrained of a fast tokenizer writes one)"));
  }
  ASSIGN_OR_RETURN(Tokenizer tokenizer, FromJson(*text, path));
  ASSIGN_OR_RETURN(const SpecialTokenNames names, ReadSpecialTokenNames(folder));
  auto tables = std::make_shared<Tables>(*tokenizer.tables_);
  const auto find = [&](const char* role) -> std::optional<TokenId> {
    const auto name = names.find(role);
    return name == names.end() ? std::nullopt : tables->Find(name->second);
  };
  tables->bos = find("bos_token");
  tables->eos = find("eos_token");
  tokenizer.tables_ = std::move(tables);
  return tokenizer;
}

std::vector<TokenId> Tokenizer::Encode(std::string_view text, bool add_special_tokens) const {
  std::string valid;
  if (!IsValidUtf8(text)) {
    AppendLossyUtf8(text, /*hold=*/false, &valid);
    text = valid;
  }
  Pieces pieces = tables_->added.Split(text, tables_->normalizer);
  tables_->pre_tokenizer.Apply(&pieces);
  std::vector<TokenId> ids;
  BpeModel::Scratch scratch;
  for (const Piece& piece : pieces) {
    if (piece.is_token()) {
      ids.push_back(piece.token);
    } else {
      tables_->model.Encode(piece.text, &scratch, &ids);
    }
  }
  if (add_special_tokens) ids = tables_->post_processor.Apply(std::move(ids));
  return ids;
}

std::string Tokenizer::Decode(std::span<const TokenId> ids, bool skip_special_tokens) const {
  std::vector<std::string> tokens;
  tokens.reserve(ids.size());
  for (const TokenId id : ids) {
    const std::string* token = tables_->DecodedToken(id, skip_special_tokens);
    if (token != nullptr) tokens.push_back(*token);
  }
  return tables_->decoder.Decode(std::move(tokens));
}

int Tokenizer::vocab_size() const { return static_cast<int>(tables_->tokens.size()); }

std::optional<TokenId> Tokenizer::TokenToId(std::string_view token) const {
  return tables_->Find(token);
}

std::string Tokenizer::IdToToken(TokenId id) const {
  if (id.value < 0 || id.value >= vocab_size()) return "";
  return tables_->tokens[id.value];
}

bool Tokenizer::IsSpecial(TokenId id) const {
  return id.value >= 0 && id.value < vocab_size() && tables_->special[id.value];
}

std::optional<TokenId> Tokenizer::bos() const { return tables_->bos; }
std::optional<TokenId> Tokenizer::eos() const { return tables_->eos; }

struct StreamDecoder::State {
  std::shared_ptr<const Tokenizer::Tables> tables;
  bool skip_special_tokens = false;
  Decoder::Stream stream;
};

StreamDecoder::StreamDecoder(const Tokenizer& tokenizer, bool skip_special_tokens)
    : state_(new State{tokenizer.tables_, skip_special_tokens,
                       Decoder::Stream(tokenizer.tables_->decoder)}) {}
StreamDecoder::~StreamDecoder() = default;
StreamDecoder::StreamDecoder(StreamDecoder&&) noexcept = default;
StreamDecoder& StreamDecoder::operator=(StreamDecoder&&) noexcept = default;

std::string StreamDecoder::Push(TokenId id) {
  const std::string* token = state_->tables->DecodedToken(id, state_->skip_special_tokens);
  return token == nullptr ? "" : state_->stream.Push(*token);
}

std::string StreamDecoder::Finish() { return state_->stream.Finish(); }

absl::Status CompareVocabularies(const Tokenizer& target, const Tokenizer& draft) {
  const int common = std::min(target.vocab_size(), draft.vocab_size());
  for (int id = 0; id < common; ++id) {
    const std::string of_target = target.IdToToken(TokenId(id));
    const std::string of_draft = draft.IdToToken(TokenId(id));
    if (of_target != of_draft) {
      return absl::InvalidArgumentError(absl::StrCat(
          "the draft's vocabulary differs from the target's, first at id ", id, ": \"", of_target,
          "\" in the target, \"", of_draft,
          "\" in the draft; a draft needs the target's own tokenizer (vocabulary sizes ",
          target.vocab_size(), " and ", draft.vocab_size(), ")"));
    }
  }
  if (target.vocab_size() != draft.vocab_size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the draft's vocabulary has ", draft.vocab_size(), " tokens and the target's ",
                     target.vocab_size(), " (the first ", common,
                     " agree); a draft needs the target's own tokenizer"));
  }
  return absl::OkStatus();
}

}  // namespace canopy
