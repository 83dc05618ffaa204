#include "core/tokenizer.h"

#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <optional>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "core/tokenization/bpe.h"
#include "core/tokenization/regex.h"
#include "core/tokenization/unicode.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace canopy {
namespace {

using ::testing::HasSubstr;
using Json = nlohmann::json;

const std::string kGolden = std::string(CANOPY_SOURCE_DIR) + "/tests/core/golden/tokenizer/";
const std::string kShared = std::string(CANOPY_SOURCE_DIR) + "/../shared/models/";

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file.good()) << path;
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

Json ReadJson(const std::string& path) { return Json::parse(ReadFile(path)); }

Tokenizer Make(const Json& json) {
  auto tokenizer = Tokenizer::FromJson(json.dump(), "test.json");
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return *std::move(tokenizer);
}

absl::Status ErrorOf(const Json& json) {
  return Tokenizer::FromJson(json.dump(), "test.json").status();
}

std::vector<int> Values(std::span<const TokenId> ids) {
  std::vector<int> values;
  for (const TokenId id : ids) values.push_back(id.value);
  return values;
}

std::vector<TokenId> Ids(const Json& values) {
  std::vector<TokenId> ids;
  for (const Json& value : values) ids.emplace_back(value.get<int>());
  return ids;
}

// The texts of texts.json as bytes.
std::vector<std::string> Texts() {
  std::vector<std::string> texts;
  for (const Json& entry : ReadJson(kGolden + "texts.json")) {
    if (entry.contains("text")) {
      texts.push_back(entry["text"].get<std::string>());
      continue;
    }
    std::string bytes;
    const auto hex = entry["hex"].get<std::string>();
    for (size_t i = 0; i < hex.size(); i += 2) {
      bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
    }
    texts.push_back(bytes);
  }
  return texts;
}

std::string Streamed(const Tokenizer& tokenizer, std::span<const TokenId> ids, bool skip) {
  StreamDecoder stream(tokenizer, skip);
  std::string text;
  for (const TokenId id : ids) {
    const std::string piece = stream.Push(id);
    EXPECT_TRUE(IsValidUtf8(piece)) << "a piece of \"" << tokenizer.Decode(ids, skip) << "\"";
    text += piece;
  }
  return text + stream.Finish();
}

void CheckGolden(const Tokenizer& tokenizer, const Json& golden,
                 const std::vector<std::string>& texts) {
  ASSERT_EQ(golden["texts"].size(), texts.size());
  for (size_t i = 0; i < texts.size(); ++i) {
    SCOPED_TRACE(testing::Message()
                 << "text " << i << " "
                 << Json(texts[i]).dump(-1, ' ', true, Json::error_handler_t::replace));
    const Json& want = golden["texts"][i];
    const std::vector<TokenId> plain = tokenizer.Encode(texts[i], false);
    EXPECT_EQ(Json(Values(plain)), want["ids"]);
    const std::vector<TokenId> ids = tokenizer.Encode(texts[i], true);
    EXPECT_EQ(Json(Values(ids)), want.value("with_special", want["ids"]));
    std::string whole;
    AppendLossyUtf8(texts[i], false, &whole);
    const std::string decoded = want.value("decoded", whole);
    EXPECT_EQ(tokenizer.Decode(ids, false), decoded);
    EXPECT_EQ(tokenizer.Decode(ids, true), want.value("skipped", decoded));
    EXPECT_EQ(Streamed(tokenizer, ids, false), decoded);
  }
  for (const Json& sequence : golden["sequences"]) {
    SCOPED_TRACE(sequence["ids"].dump());
    const std::vector<TokenId> ids = Ids(sequence["ids"]);
    for (const bool skip : {false, true}) {
      const auto want = sequence[skip ? "skipped" : "decoded"].get<std::string>();
      EXPECT_EQ(tokenizer.Decode(ids, skip), want);
      EXPECT_EQ(Streamed(tokenizer, ids, skip), want);
    }
  }
}

class TokenizerGolden : public testing::TestWithParam<const char*> {};

TEST_P(TokenizerGolden, EncodesAndDecodesAsTokenizersDoes) {
  const std::string name = GetParam();
  CheckGolden(Make(ReadJson(kGolden + name + ".json")), ReadJson(kGolden + name + ".golden.json"),
              Texts());
}

INSTANTIATE_TEST_SUITE_P(Bases, TokenizerGolden,
                         testing::Values("gpt2", "gpt-neox", "llama3", "qwen2", "sentencepiece"));

Json Patched(Json base, const Json& changes) {
  for (const auto& [key, value] : changes.items()) {
    if (key == "model") {
      base["model"].update(value);
    } else {
      base[key] = value;
    }
  }
  return base;
}

TEST(TokenizerGoldenVariants, EncodeAndDecodeAsTokenizersDoes) {
  const std::vector<std::string> texts = Texts();
  const Json variants = ReadJson(kGolden + "variants.json");
  for (const auto& [name, variant] : variants.items()) {
    SCOPED_TRACE(name);
    std::vector<std::string> chosen;
    for (const Json& i : variant["which"]) chosen.push_back(texts[i.get<size_t>()]);
    const Json base = ReadJson(kGolden + variant["base"].get<std::string>() + ".json");
    CheckGolden(Make(Patched(base, variant["changes"])), variant["golden"], chosen);
  }
}

TEST(TokenizerGoldenModels, EncodeAndDecodeAsTokenizersDoes) {
  if (!std::filesystem::exists(kShared)) GTEST_SKIP() << kShared << " is not there";
  for (const std::string name : {"tiny-bamba-4m", "m2-16m"}) {
    SCOPED_TRACE(name);
    auto tokenizer = Tokenizer::Load(kShared + name);
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    CheckGolden(*tokenizer, ReadJson(kGolden + "model-" + name + ".golden.json"), Texts());
    EXPECT_EQ(tokenizer->bos(), tokenizer->TokenToId("<|bos|>"));
    EXPECT_EQ(tokenizer->eos(), TokenId(2));
  }
}

// Byte-level tokenizers without normalizer lose nothing.
TEST(Tokenizer, RoundTripsRandomText) {
  std::mt19937 random(7);
  const auto below = [&](int n) { return static_cast<int>(random() % n); };
  for (const std::string name : {"gpt2", "llama3"}) {
    const Tokenizer tokenizer = Make(ReadJson(kGolden + name + ".json"));
    for (int round = 0; round < 500; ++round) {
      std::string text;
      for (int i = below(40); i > 0; --i) {
        char32_t c = below(3) == 0 ? below(0x80) : below(2) == 0 ? below(0x3000) : below(0x110000);
        if (c >= 0xd800 && c < 0xe000) c = ' ';
        AppendChar(c, &text);
      }
      const std::vector<TokenId> ids = tokenizer.Encode(text, false);
      ASSERT_EQ(tokenizer.Decode(ids, false), text) << name;
      ASSERT_EQ(Streamed(tokenizer, ids, false), text) << name;
    }
  }
}

// A token that ends in mid-character is held back, and what can come out does.
TEST(StreamDecoder, HoldsBackPartialCharactersOnly) {
  const Json json = ReadJson(kGolden + "gpt2.json");
  const Tokenizer tokenizer = Make(json);
  const auto byte = [&](int b) {
    std::string stand_in;
    AppendByteLevel(std::string(1, static_cast<char>(b)), &stand_in);
    return *tokenizer.TokenToId(stand_in);
  };
  StreamDecoder stream(tokenizer, false);
  EXPECT_EQ(stream.Push(byte('a')), "a");
  EXPECT_EQ(stream.Push(byte(0xe6)), "");
  EXPECT_EQ(stream.Push(byte(0x97)), "");
  EXPECT_EQ(stream.Push(byte(0xa5)), "\xe6\x97\xa5");
  EXPECT_EQ(stream.Push(byte(0xf0)), "");
  EXPECT_EQ(stream.Push(byte('b')),
            "\xef\xbf\xbd"
            "b");
  EXPECT_EQ(stream.Push(byte(0xc3)), "");
  EXPECT_EQ(stream.Finish(), "\xef\xbf\xbd");
}

// In SentencePiece-style files one bad byte spoils its whole run, so the run is held back.
TEST(StreamDecoder, HoldsBackByteRuns) {
  const Tokenizer tokenizer = Make(ReadJson(kGolden + "sentencepiece.json"));
  const auto token = [&](const char* text) { return *tokenizer.TokenToId(text); };
  StreamDecoder stream(tokenizer, false);
  EXPECT_EQ(stream.Push(token("\xe2\x96\x81t")), "t");
  EXPECT_EQ(stream.Push(token("\xe2\x96\x81t")), " t");
  EXPECT_EQ(stream.Push(token("<0xC3>")), "");
  EXPECT_EQ(stream.Push(token("<0xA9>")), "");
  EXPECT_EQ(stream.Push(token("e")),
            "\xc3\xa9"
            "e");
  EXPECT_EQ(stream.Push(token("<0xC3>")), "");
  EXPECT_EQ(stream.Finish(), "\xef\xbf\xbd");
}

// The textbook loop: merge the pair of lowest rank, the leftmost first, until there is none.
std::vector<std::string> NaiveBpe(std::vector<std::string> symbols,
                                  const std::map<std::pair<std::string, std::string>, int>& ranks) {
  while (true) {
    std::optional<size_t> best;
    int best_rank = 0;
    for (size_t i = 0; i + 1 < symbols.size(); ++i) {
      const auto found = ranks.find({symbols[i], symbols[i + 1]});
      if (found != ranks.end() && (!best || found->second < best_rank)) {
        best = i;
        best_rank = found->second;
      }
    }
    if (!best) return symbols;
    symbols[*best] += symbols[*best + 1];
    symbols.erase(symbols.begin() + static_cast<int64_t>(*best) + 1);
  }
}

TEST(Bpe, MergesAsTheNaiveLoopDoes) {
  std::mt19937 random(11);
  for (int round = 0; round < 200; ++round) {
    // Random merges over three letters.
    std::vector<std::string> tokens = {"a", "b", "c"};
    std::map<std::pair<std::string, std::string>, int> ranks;
    Json merges = Json::array();
    for (int i = 0; i < 12; ++i) {
      const std::string left = tokens[random() % tokens.size()];
      const std::string right = tokens[random() % tokens.size()];
      if (left.size() + right.size() > 8 || !ranks.try_emplace({left, right}, i).second) continue;
      merges.push_back({left, right});
      if (std::find(tokens.begin(), tokens.end(), left + right) == tokens.end()) {
        tokens.push_back(left + right);
      }
    }
    // Ranks count the merges that were kept.
    int rank = 0;
    for (const Json& merge : merges) ranks[{merge[0], merge[1]}] = rank++;
    Json model = {{"type", "BPE"}, {"merges", merges}};
    for (size_t i = 0; i < tokens.size(); ++i) model["vocab"][tokens[i]] = i;
    const Tokenizer tokenizer = Make({{"model", model}});
    std::string word;
    std::vector<std::string> letters;
    for (int i = random() % 60; i > 0; --i) letters.emplace_back(1, "abc"[random() % 3]);
    for (const std::string& letter : letters) word += letter;
    std::vector<std::string> got;
    for (const TokenId id : tokenizer.Encode(word, false)) got.push_back(tokenizer.IdToToken(id));
    ASSERT_EQ(got, NaiveBpe(letters, ranks)) << word << " " << merges;
  }
}

// A quadratic loop would take minutes here; the count checks the result.
TEST(Bpe, TakesLongWords) {
  const Tokenizer tokenizer = Make({{"model",
                                     {{"type", "BPE"},
                                      {"vocab", {{"a", 0}, {"b", 1}, {"aa", 2}, {"aaaa", 3}}},
                                      {"merges", {"a a", "aa aa"}}}}});
  EXPECT_EQ(tokenizer.Encode(std::string(1'000'001, 'a'), false).size(), 250'001u);
  for (const std::string name : {"gpt2", "llama3", "sentencepiece"}) {
    const Tokenizer real = Make(ReadJson(kGolden + name + ".json"));
    for (const std::string& text : {std::string(100'000, ' ') + "x", std::string(100'000, 'e'),
                                    std::string(100'000, '\n'), std::string(100'000, '-') + "'"}) {
      EXPECT_EQ(real.Decode(real.Encode(text, false), false), text) << name;
    }
  }
}

TEST(Tokenizer, ReadsBothFormsOfMerges) {
  Json json = ReadJson(kGolden + "gpt2.json");
  const Tokenizer strings = Make(json);
  ASSERT_TRUE(json["model"]["merges"][0].is_string());
  for (Json& merge : json["model"]["merges"]) {
    const auto text = merge.get<std::string>();
    const size_t space = text.find(' ');
    merge = Json::array({text.substr(0, space), text.substr(space + 1)});
  }
  const Tokenizer pairs = Make(json);
  for (const std::string& text : Texts()) {
    EXPECT_EQ(Values(strings.Encode(text, false)), Values(pairs.Encode(text, false)));
  }
}

TEST(Tokenizer, KnowsItsVocabulary) {
  const Tokenizer tokenizer = Make(ReadJson(kGolden + "llama3.json"));
  const std::optional<TokenId> bos = tokenizer.TokenToId("<|begin_of_text|>");
  ASSERT_TRUE(bos.has_value());
  EXPECT_EQ(tokenizer.IdToToken(*bos), "<|begin_of_text|>");
  EXPECT_TRUE(tokenizer.IsSpecial(*bos));
  const std::optional<TokenId> e = tokenizer.TokenToId("e");
  ASSERT_TRUE(e.has_value());
  EXPECT_FALSE(tokenizer.IsSpecial(*e));
  EXPECT_EQ(tokenizer.vocab_size(), 706);  // 700 trained, one word and five specials
  EXPECT_EQ(tokenizer.TokenToId("no such token"), std::nullopt);
  for (const int none : {-1, 706, INT32_MAX}) {
    EXPECT_EQ(tokenizer.IdToToken(TokenId(none)), "");
    EXPECT_FALSE(tokenizer.IsSpecial(TokenId(none)));
  }
}

TEST(Tokenizer, IsSafeFromSeveralThreads) {
  const Tokenizer tokenizer = Make(ReadJson(kGolden + "llama3.json"));
  const std::vector<std::string> texts = Texts();
  const Json golden = ReadJson(kGolden + "llama3.golden.json");
  std::vector<int> wrong(4);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < wrong.size(); ++t) {
    threads.emplace_back([&, t] {
      for (size_t i = 0; i < texts.size(); ++i) {
        wrong[t] += Json(Values(tokenizer.Encode(texts[i], false))) != golden["texts"][i]["ids"];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, std::vector<int>(4, 0));
}

TEST(CompareVocabularies, SaysWhereTheyDiffer) {
  Json json = ReadJson(kGolden + "qwen2.json");
  const Tokenizer target = Make(json);
  EXPECT_TRUE(CompareVocabularies(target, target).ok());

  Json longer = json;
  const int size = target.vocab_size();
  longer["added_tokens"].push_back({{"id", size}, {"content", "<|more|>"}, {"special", true}});
  const absl::Status sizes = CompareVocabularies(target, Make(longer));
  EXPECT_EQ(sizes.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(sizes.message()), HasSubstr(absl::StrCat(size + 1)));
  EXPECT_THAT(std::string(sizes.message()), HasSubstr(absl::StrCat(size)));

  Json other = json;
  Json& last = other["added_tokens"].back();
  const int id = last["id"];
  last["content"] = "<|other|>";
  const absl::Status tokens = CompareVocabularies(target, Make(other));
  EXPECT_EQ(tokens.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(tokens.message()),
              testing::AllOf(HasSubstr(absl::StrCat("id ", id)), HasSubstr("<|im_end|>"),
                             HasSubstr("<|other|>")));
}

struct Broken {
  const char* name;
  const char* patch;  // a JSON patch (RFC 6902) of the smallest tokenizer
  absl::StatusCode code;
  std::vector<const char*> says;
};

constexpr char kSmallest[] = R"({
  "added_tokens": [{"id": 3, "content": "<x>", "special": true}],
  "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
  "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
})";

class TokenizerErrors : public testing::TestWithParam<Broken> {};

TEST_P(TokenizerErrors, NameTheConstruct) {
  ASSERT_TRUE(ErrorOf(Json::parse(kSmallest)).ok());
  const absl::Status status = ErrorOf(Json::parse(kSmallest).patch(Json::parse(GetParam().patch)));
  EXPECT_EQ(status.code(), GetParam().code) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("test.json"));
  for (const char* text : GetParam().says) {
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
  }
}

constexpr auto kBad = absl::StatusCode::kInvalidArgument;
constexpr auto kUnknown = absl::StatusCode::kUnimplemented;

INSTANTIATE_TEST_SUITE_P(
    Table, TokenizerErrors,
    testing::Values(
        Broken{"NoModel", R"([{"op":"remove","path":"/model"}])", kBad, {".model", "missing"}},
        Broken{"NoVocab", R"([{"op":"remove","path":"/model/vocab"}])", kBad, {"model.vocab"}},
        Broken{"EmptyVocab",
               R"([{"op":"replace","path":"/model/vocab","value":{}}])",
               kBad,
               {"model.vocab", "empty"}},
        Broken{"Unigram",
               R"([{"op":"replace","path":"/model/type","value":"Unigram"}])",
               kUnknown,
               {"Unigram", "BPE"}},
        Broken{"Dropout",
               R"([{"op":"add","path":"/model/dropout","value":0.1}])",
               kUnknown,
               {"model.dropout"}},
        Broken{"Affix",
               R"([{"op":"add","path":"/model/end_of_word_suffix","value":"</w>"}])",
               kUnknown,
               {"end_of_word_suffix", "</w>"}},
        Broken{"NegativeId",
               R"([{"op":"replace","path":"/model/vocab/a","value":-1}])",
               kBad,
               {"vocab.a", "-1"}},
        Broken{"HugeId",
               R"([{"op":"replace","path":"/model/vocab/a","value":99999999999999}])",
               kBad,
               {"vocab.a", "99999999999999"}},
        Broken{"IdPastTheLimit",
               R"([{"op":"replace","path":"/model/vocab/a","value":4194304}])",
               kBad,
               {"vocab.a", "4194304"}},
        Broken{"FractionalId",
               R"([{"op":"replace","path":"/model/vocab/a","value":0.5}])",
               kBad,
               {"vocab.a", "0.5"}},
        Broken{"IdTwice",
               R"([{"op":"replace","path":"/model/vocab/b","value":0}])",
               kBad,
               {"vocab.b", "id 0"}},
        Broken{"MergeOfUnknown",
               R"([{"op":"add","path":"/model/merges/-","value":["a","z"]}])",
               kBad,
               {"merges[1]", "\"z\""}},
        Broken{"MergeIntoUnknown",
               R"([{"op":"add","path":"/model/merges/-","value":"b a"}])",
               kBad,
               {"merges[1]", "\"ba\""}},
        Broken{"MergeOfOne",
               R"([{"op":"add","path":"/model/merges/-","value":"ab"}])",
               kBad,
               {"merges[1]", "\"ab\""}},
        Broken{"MergeOfThree",
               R"([{"op":"add","path":"/model/merges/-","value":["a","b","a"]}])",
               kBad,
               {"merges[1]"}},
        Broken{"UnknownUnk",
               R"([{"op":"add","path":"/model/unk_token","value":"<unk>"}])",
               kBad,
               {"unk_token", "<unk>"}},
        Broken{"AddedIdTaken",
               R"([{"op":"replace","path":"/added_tokens/0/id","value":1}])",
               kBad,
               {"added_tokens[0].id", "<x>", "\"b\""}},
        Broken{"AddedOtherId",
               R"([{"op":"replace","path":"/added_tokens/0/content","value":"b"}])",
               kBad,
               {"added_tokens[0].id", "\"b\"", "id 1"}},
        Broken{"AddedNegative",
               R"([{"op":"replace","path":"/added_tokens/0/id","value":-3}])",
               kBad,
               {"added_tokens[0].id", "-3"}},
        Broken{"AddedHuge",
               R"([{"op":"replace","path":"/added_tokens/0/id","value":1e18}])",
               kBad,
               {"added_tokens[0].id"}},
        Broken{"AddedHugeInteger",
               R"([{"op":"replace","path":"/added_tokens/0/id","value":18446744073709551615}])",
               kBad,
               {"added_tokens[0].id", "18446744073709551615"}},
        Broken{"AddedEmpty",
               R"([{"op":"replace","path":"/added_tokens/0/content","value":""}])",
               kBad,
               {"added_tokens[0].content", "empty"}},
        Broken{"AddedTwice",
               R"([{"op":"add","path":"/added_tokens/-","value":{"id":4,"content":"<x>"}}])",
               kBad,
               {"added_tokens[1].content", "<x>"}},
        Broken{"Normalizer",
               R"([{"op":"replace","path":"/normalizer","value":{"type":"Precompiled"}}])",
               kUnknown,
               {"normalizer", "Precompiled"}},
        Broken{"NestedNormalizer",
               R"([{"op":"replace","path":"/normalizer","value":
                  {"type":"Sequence","normalizers":[{"type":"NFC"},{"type":"Nmt"}]}}])",
               kUnknown,
               {"normalizers[1]", "Nmt"}},
        Broken{"PreTokenizer",
               R"([{"op":"replace","path":"/pre_tokenizer","value":{"type":"BertPreTokenizer"}}])",
               kUnknown,
               {"pre_tokenizer", "BertPreTokenizer"}},
        Broken{"Behavior",
               R"([{"op":"replace","path":"/pre_tokenizer","value":
                  {"type":"Split","pattern":{"String":"a"},"behavior":"Sideways"}}])",
               kBad,
               {"pre_tokenizer.behavior", "Sideways"}},
        Broken{"Scheme",
               R"([{"op":"replace","path":"/pre_tokenizer","value":
                  {"type":"Metaspace","replacement":"_","prepend_scheme":"last"}}])",
               kBad,
               {"pre_tokenizer.prepend_scheme", "last"}},
        Broken{"LongReplacement",
               R"([{"op":"replace","path":"/pre_tokenizer","value":
                  {"type":"Metaspace","replacement":"__"}}])",
               kBad,
               {"pre_tokenizer.replacement", "__"}},
        Broken{"RegexSyntax",
               R"([{"op":"replace","path":"/pre_tokenizer","value":
                  {"type":"Split","pattern":{"Regex":"(a"},"behavior":"Isolated"}}])",
               kBad,
               {"pre_tokenizer.pattern.Regex", "(a"}},
        Broken{"RegexConstruct",
               R"([{"op":"replace","path":"/pre_tokenizer","value":
                  {"type":"Split","pattern":{"Regex":"[a&&b]"},"behavior":"Isolated"}}])",
               kUnknown,
               {"pre_tokenizer.pattern.Regex", "&&"}},
        Broken{"Decoder",
               R"([{"op":"replace","path":"/decoder","value":{"type":"WordPiece"}}])",
               kUnknown,
               {"decoder", "WordPiece"}},
        Broken{"PostProcessor",
               R"([{"op":"replace","path":"/post_processor","value":{"type":"BertProcessing"}}])",
               kUnknown,
               {"post_processor", "BertProcessing"}},
        Broken{"TemplateWithoutToken",
               R"([{"op":"replace","path":"/post_processor","value":{"type":"TemplateProcessing",
                  "single":[{"SpecialToken":{"id":"<s>","type_id":0}}],"special_tokens":{}}}])",
               kBad,
               {"post_processor.special_tokens", "<s>"}},
        Broken{"TemplateBeyondVocabulary",
               R"([{"op":"replace","path":"/post_processor","value":{"type":"TemplateProcessing",
                  "single":[{"SpecialToken":{"id":"<s>","type_id":0}}],
                  "special_tokens":{"<s>":{"id":"<s>","ids":[9],"tokens":["<s>"]}}}}])",
               kBad,
               {"post_processor", "9"}},
        Broken{"NotAnObject",
               R"([{"op":"replace","path":"/decoder","value":[1]}])",
               kBad,
               {"decoder", "array"}}),
    [](const auto& info) { return info.param.name; });

TEST(TokenizerErrors, TruncatedFilesFail) {
  const std::string whole = ReadFile(kGolden + "sentencepiece.json");
  for (size_t length = 0; length + 2 < whole.size(); length += 97) {
    const auto tokenizer = Tokenizer::FromJson(whole.substr(0, length), "cut.json");
    ASSERT_EQ(tokenizer.status().code(), absl::StatusCode::kInvalidArgument) << length;
    ASSERT_THAT(std::string(tokenizer.status().message()), HasSubstr("cut.json"));
  }
}

TEST(TokenizerErrors, MissingFileIsNamed) {
  const auto tokenizer = Tokenizer::Load("/no/such/folder");
  EXPECT_EQ(tokenizer.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(tokenizer.status().message()),
              HasSubstr("/no/such/folder/tokenizer.json"));
}

TEST(Regex, IsReadAsOnigurumaReadsIt) {
  const auto found = [](const char* pattern, std::string_view text) {
    auto regex = Regex::Compile(pattern);
    EXPECT_TRUE(regex.ok()) << regex.status();
    std::vector<Regex::Match> matches;
    regex->FindAll(text, &matches);
    std::vector<std::string> texts;
    for (const Regex::Match& match : matches) {
      texts.emplace_back(text.substr(match.begin, match.end - match.begin));
    }
    return texts;
  };
  using Found = std::vector<std::string>;
  // U+180E is no white space, U+0085 is.
  EXPECT_EQ(found("\\s", "\xe1\xa0\x8e \xc2\x85\x1c"), (Found{" ", "\xc2\x85"}));
  // {1,3}+ repeats, it is not possessive; ++ is.
  EXPECT_EQ(found("[0-9]{1,3}+", "1234567"), (Found{"1234567"}));
  EXPECT_EQ(found("[0-9]{1,3}+7", "1234567"), (Found{"1234567"}));
  EXPECT_EQ(found("[0-9]++7", "1234567"), (Found{}));
  EXPECT_EQ(found("a{,2}b", "aab"), (Found{"aab"}));
  EXPECT_EQ(found("a{2}?b", "aab b"), (Found{"aab", "b"}));
  // Scripts without extensions: U+3001 has Han among its extensions.
  EXPECT_EQ(found("\\p{Han}", "\xe6\x97\xa5\xe3\x80\x81"), (Found{"\xe6\x97\xa5"}));
  EXPECT_EQ(found("\\h+", "xyzBEEFq 1"), (Found{"BEEF", "1"}));
  EXPECT_EQ(found("^a$", "a\na"), (Found{"a", "a"}));
  EXPECT_EQ(found("'(?i:s)", "'s'S'\xc5\xbf"), (Found{"'s", "'S", "'\xc5\xbf"}));
  EXPECT_EQ(found("x{", "x{"), (Found{"x{"}));
  // An empty match right after a match does not count.
  EXPECT_EQ(found("a*", "baac"), (Found{"", "aa", ""}));
  for (const char* pattern : {"[[:alpha:]]", "[a[bc]]", "a(?i)b", "\\p{Alpha}", "\\K", "(?m:.)",
                              "[]a]", "\\pL", "(*ACCEPT)", "a{3,1}"}) {
    EXPECT_EQ(Regex::Compile(pattern).status().code(), absl::StatusCode::kUnimplemented) << pattern;
  }
  for (const char* pattern : {"(", ")", "[a", "*", "a\\", "\\x{", "\\p{L"}) {
    EXPECT_EQ(Regex::Compile(pattern).status().code(), absl::StatusCode::kInvalidArgument)
        << pattern;
  }
}

}  // namespace
}  // namespace canopy
