#include "core/hf_config.h"

#include <cmath>
#include <string>
#include <vector>

#include "core/files.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/checkpoint_files.h"

namespace canopy {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::TempFolder;
using testing::WriteFile;

HfConfig MustParse(const std::string& text) {
  absl::StatusOr<HfConfig> config = HfConfig::Parse(text, "config.json");
  CHECK(config.ok());
  return *std::move(config);
}

std::string Message(const absl::Status& status) { return std::string(status.message()); }

TEST(HfConfig, ReadsTypedValues) {
  const HfConfig config = MustParse(
      R"({"i": 7, "d": 1e-05, "b": true, "s": "silu", "l": [1, 2], "n": null,
          "o": {"inner": 3, "deep": {"x": false}}, "strings": ["a", "b"]})");
  EXPECT_EQ(*config.Int("i"), 7);
  EXPECT_EQ(*config.Double("d"), 1e-05);
  EXPECT_EQ(*config.Double("i"), 7.0);
  EXPECT_EQ(*config.Bool("b"), true);
  EXPECT_EQ(*config.String("s"), "silu");
  EXPECT_THAT(*config.Ints("l"), ElementsAre(1, 2));
  EXPECT_THAT(*config.Ints("i"), ElementsAre(7));
  EXPECT_THAT(*config.Doubles("l"), ElementsAre(1.0, 2.0));
  EXPECT_THAT(*config.Strings("strings"), ElementsAre("a", "b"));
  EXPECT_EQ(*config.Object("o")->Int("inner"), 3);
  EXPECT_EQ(*config.Object("o")->Object("deep")->Bool("x"), false);
}

TEST(HfConfig, AbsentAndNullTakeTheDefault) {
  const HfConfig config = MustParse(R"({"n": null})");
  for (const char* key : {"n", "absent"}) {
    EXPECT_FALSE(config.Has(key));
    EXPECT_EQ(*config.Int(key, {}, 5), 5);
    EXPECT_EQ(*config.Double(key, 0.5), 0.5);
    EXPECT_EQ(*config.Bool(key, true), true);
    EXPECT_EQ(*config.String(key, "x"), "x");
    EXPECT_THAT(*config.Ints(key), IsEmpty());
    EXPECT_THAT(*config.Doubles(key), IsEmpty());
    EXPECT_THAT(*config.Strings(key), IsEmpty());
    EXPECT_FALSE(config.Object(key)->Has("x"));
    EXPECT_EQ(config.Int(key).status().code(), absl::StatusCode::kNotFound);
    EXPECT_EQ(Message(config.Int(key).status()), absl::StrCat("config.json: ", key, " is missing"));
  }
}

TEST(HfConfig, WrongTypesNameFileKeyValueAndExpectation) {
  const HfConfig config = MustParse(
      R"({"i": 7, "f": 1.5, "s": "x", "l": [1, "a"], "o": {"k": []}, "big": 99999999999, "neg": -1,
          "huge": 18446744073709551615})");
  const struct {
    absl::Status status;
    std::string message;
  } cases[] = {
      {config.Int("f").status(), "f is 1.5; expected a whole number from 0 to 2147483647"},
      {config.Int("s").status(), "s is \"x\"; expected a whole number"},
      {config.Int("big").status(), "big is 99999999999"},
      {config.Int("huge").status(), "huge is 18446744073709551615"},
      {config.Int("neg").status(), "neg is -1"},
      {config.Int("i", {.min = 8, .max = 9}).status(),
       "i is 7; expected a whole number from 8 to 9"},
      {config.Double("s").status(), "s is \"x\"; expected a number"},
      {config.Bool("i").status(), "i is 7; expected true or false"},
      {config.String("i").status(), "i is 7; expected a string"},
      {config.Ints("l").status(), "l is [1,\"a\"]; expected a whole number"},
      {config.Doubles("l").status(), "l is [1,\"a\"]; expected a list of numbers"},
      {config.Strings("l").status(), "l is [1,\"a\"]; expected a list of strings"},
      {config.Object("i").status(), "i is 7; expected an object"},
      {config.Object("o")->Int("k").status(), "o.k is []; expected a whole number"},
  };
  for (const auto& bad : cases) {
    EXPECT_EQ(bad.status.code(), absl::StatusCode::kInvalidArgument) << bad.message;
    EXPECT_THAT(Message(bad.status), HasSubstr("config.json: " + bad.message));
  }
}

TEST(HfConfig, ReadsInfinityOfBothTransformersVersions) {
  const HfConfig config = MustParse(R"({
    "four": [0.0, Infinity], "negative": -Infinity, "nan": NaN, "flat":[Infinity,-Infinity,NaN],
    "five": [0.0, {"__float__": "Infinity"}], "five_negative": {"__float__": "-Infinity"},
    "five_nan": {"__float__": "NaN"},
    "Infinity": "Infinity", "text": "a \"-Infinity\" , NaN", "slash": "\\", "after": Infinity})");
  EXPECT_EQ((*config.Doubles("four"))[1], INFINITY);
  EXPECT_EQ(*config.Double("negative"), -INFINITY);
  EXPECT_TRUE(std::isnan(*config.Double("nan")));
  EXPECT_EQ((*config.Doubles("flat"))[0], INFINITY);
  EXPECT_EQ((*config.Doubles("flat"))[1], -INFINITY);
  EXPECT_EQ((*config.Doubles("five"))[1], INFINITY);
  EXPECT_EQ(*config.Double("five_negative"), -INFINITY);
  EXPECT_TRUE(std::isnan(*config.Double("five_nan")));
  EXPECT_EQ(*config.String("Infinity"), "Infinity");
  EXPECT_EQ(*config.String("text"), "a \"-Infinity\" , NaN");
  EXPECT_EQ(*config.Double("after"), INFINITY);
  EXPECT_FALSE(config.Int("after").ok());
}

TEST(HfConfig, RefusesWhatIsNotAJsonObject) {
  const struct {
    std::string text, message;
  } cases[] = {
      {"", "is not JSON"},
      {"{\n\"a\": 1,\n}", "line 3"},
      {"{\"a\": Infinityx}", "is not JSON"},
      {"{\"a\": xInfinity}", "is not JSON"},
      {"[1]", "expected a JSON object, found [1]"},
      {"{\"a\": \"\xff\"}", "is not JSON"},
      {"{\"a\": 1e999}", "is not JSON"},
      {"{\"a\":" + std::string(100'000, '['), "nest 100001 deep"},
  };
  for (const auto& bad : cases) {
    const absl::StatusOr<HfConfig> config = HfConfig::Parse(bad.text, "config.json");
    ASSERT_FALSE(config.ok()) << bad.text.substr(0, 40);
    EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(Message(config.status()),
                AllOf(HasSubstr("config.json: "), HasSubstr(bad.message)));
    EXPECT_EQ(Message(config.status()).find('\n'), std::string::npos);
  }
}

TEST(HfConfig, LoadNamesAMissingFile) {
  const TempFolder folder;
  const absl::Status status = HfConfig::Load(folder.File("config.json")).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(Message(status), HasSubstr(folder.File("config.json")));
  EXPECT_EQ(HfConfig::Load(folder.path().string()).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(ReadEosTokens, GenerationConfigComesFirst) {
  const TempFolder folder;
  const std::string root = folder.path().string();
  const HfConfig config = MustParse(R"({"eos_token_id": 2})");
  EXPECT_THAT(*ReadEosTokens(root, config), ElementsAre(TokenId(2)));
  EXPECT_THAT(*ReadEosTokens(root, MustParse("{}")), IsEmpty());
  EXPECT_THAT(*ReadEosTokens(root, MustParse(R"({"eos_token_id": [5, 6, 5]})")),
              ElementsAre(TokenId(5), TokenId(6)));
  WriteFile(folder.File("generation_config.json"), R"({"eos_token_id": [7, 8]})");
  EXPECT_THAT(*ReadEosTokens(root, config), ElementsAre(TokenId(7), TokenId(8)));
  WriteFile(folder.File("generation_config.json"), R"({"eos_token_id": null})");
  EXPECT_THAT(*ReadEosTokens(root, config), ElementsAre(TokenId(2)));
  WriteFile(folder.File("generation_config.json"), R"({"eos_token_id": "x"})");
  EXPECT_THAT(Message(ReadEosTokens(root, config).status()),
              HasSubstr("generation_config.json: eos_token_id"));
}

TEST(ReadFile, ReadsBytes) {
  const TempFolder folder;
  const std::string bytes = std::string("a\0b\n", 4) + std::string(200'000, 'x');
  WriteFile(folder.File("f"), bytes);
  EXPECT_EQ(*ReadFile(folder.File("f")), bytes);
  EXPECT_EQ(ReadFile(folder.File("g")).status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace canopy
