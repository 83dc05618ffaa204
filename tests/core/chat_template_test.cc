#include "core/chat_template.h"

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "core/tokenizer.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace canopy {
namespace {

using ::testing::HasSubstr;
using Json = nlohmann::json;

const std::string kGolden =
    std::string(CANOPY_SOURCE_DIR) + "/tests/core/golden/chat_template/cases.json";
const std::string kShared = std::string(CANOPY_SOURCE_DIR) + "/../shared/models/";

Json ReadJson(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file.good()) << path;
  return Json::parse(file);
}

std::vector<ChatMessage> Messages(const Json& conversation) {
  std::vector<ChatMessage> messages;
  for (const Json& message : conversation)
    messages.push_back({message["role"], message["content"]});
  return messages;
}

TEST(ChatTemplateGolden, RendersAsTransformersDoes) {
  const Json golden = ReadJson(kGolden);
  for (const auto& [name, entry] : golden["templates"].items()) {
    const auto jinja = entry["template"].get<std::string>();
    for (const Json& one : entry["cases"]) {
      SCOPED_TRACE(testing::Message() << name << ", conversation " << one[0] << ": " << jinja);
      absl::StatusOr<std::string> text;
      if (auto chat = ChatTemplate::Parse(jinja, "<s>", "</s>"); !chat.ok()) {
        text = chat.status();
      } else {
        text = chat->Render(Messages(golden["conversations"][one[0].get<size_t>()]), one[1]);
      }
      if (one[2].is_null()) {
        EXPECT_EQ(text.status().code(), absl::StatusCode::kInvalidArgument) << text.status();
        EXPECT_THAT(std::string(text.status().message()), HasSubstr("line "));
      } else {
        ASSERT_TRUE(text.ok()) << text.status();
        EXPECT_EQ(*text, one[2].get<std::string>());
      }
    }
  }
}

std::string Built(const std::string& name, const std::vector<ChatMessage>& messages, bool prompt) {
  auto chat = ChatTemplate::Builtin(name);
  EXPECT_TRUE(chat.ok()) << chat.status();
  auto text = chat->Render(messages, prompt);
  EXPECT_TRUE(text.ok()) << text.status();
  return *text;
}

const std::vector<ChatMessage> kTurns = {{"user", " Q1 "}, {"assistant", "A1"}, {"user", "Q2"}};
const std::vector<ChatMessage> kWithSystem = {{"system", "S"}, {"user", "Q"}};

TEST(ChatTemplateBuiltin, Vicuna) {
  // FastChat's get_prompt() of vicuna_v1.1, and the bos that its tokenizer call puts before it.
  const std::string system =
      "<s>A chat between a curious user and an artificial intelligence assistant. The assistant "
      "gives helpful, detailed, and polite answers to the user's questions. ";
  EXPECT_EQ(Built("vicuna", {{"user", "Hi"}}, true), system + "USER: Hi ASSISTANT:");
  EXPECT_EQ(Built("vicuna", kTurns, true),
            system + "USER:  Q1  ASSISTANT: A1</s>USER: Q2 ASSISTANT:");
  EXPECT_EQ(Built("vicuna", kWithSystem, true), "<s>S USER: Q ASSISTANT:");
}

TEST(ChatTemplateBuiltin, Llama2) {
  EXPECT_EQ(Built("llama-2", kTurns, true), "<s>[INST] Q1 [/INST] A1 </s><s>[INST] Q2 [/INST]");
  EXPECT_EQ(Built("llama-2", kWithSystem, true), "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST]");
}

TEST(ChatTemplateBuiltin, Llama3) {
  EXPECT_EQ(Built("llama-3", kTurns, true),
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n");
  EXPECT_EQ(Built("llama-3", {{"user", "x"}}, false),
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nx<|eot_id|>");
}

TEST(ChatTemplateBuiltin, ChatMl) {
  EXPECT_EQ(Built("chatml", kWithSystem, true),
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
            "<|im_start|>assistant\n");
  EXPECT_EQ(Built("chatml", {{"user", "x"}}, false), "<|im_start|>user\nx<|im_end|>\n");
}

TEST(ChatTemplateBuiltin, RolesMustAlternateWhereTheFamilyHasOnlyTwo) {
  for (const char* name : {"vicuna", "llama-2"}) {
    auto chat = ChatTemplate::Builtin(name);
    ASSERT_TRUE(chat.ok());
    const std::vector<ChatMessage> messages = {{"user", "a"}, {"user", "b"}};
    EXPECT_EQ(chat->Render(messages, true).status().code(), absl::StatusCode::kInvalidArgument);
  }
}

TEST(ChatTemplateBuiltin, UnknownNameListsTheKnownOnes) {
  const absl::Status status = ChatTemplate::Builtin("vikuna").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ChatTemplate::BuiltinNames().size(), 4u);
  EXPECT_THAT(std::string(status.message()), HasSubstr("vikuna"));
  for (const std::string& name : ChatTemplate::BuiltinNames()) {
    EXPECT_TRUE(ChatTemplate::Builtin(name).ok()) << name;
    EXPECT_THAT(std::string(status.message()), HasSubstr(name));
  }
}

struct Refused {
  const char* jinja;
  const char* construct;
  int line;
};

TEST(ChatTemplateErrors, UnsupportedConstructsAreNamedAtOnce) {
  for (const Refused& each : std::vector<Refused>{
           {"{% macro m() %}x{% endmacro %}", "macro", 1},
           {"a\n{% include 'x' %}", "include", 2},
           {"{% filter upper %}x{% endfilter %}", "filter", 1},
           {"{% raw %}x{% endraw %}", "raw", 1},
           {"\n\n{{ messages | tojson }}", "'tojson'", 3},
           {"{{ messages | map(attribute='role') }}", "'map'", 1},
           {"{{ messages }}", "a list", 1},
           {"{{ messages[0] }}", "a dictionary", 1},
           {"{{ 1.5 }}", "1.", 1},
           {"{{ 1 / 2 }}", "'/'", 1},
           {"{{ 2 ** 2 }}", "'**'", 1},
           {"{{ (1, 2) }}", "a tuple", 1},
           {"{{ strftime_now('%d') }}", "strftime_now", 1},
           {"{{ lipsum() }}", "lipsum", 1},
           {"{{ 'a' is filter }}", "'is filter'", 1},
           {"{{ 'a'.encode() }}", "encode", 1},
           {"{{ messages.append(1) }}", "append", 1},
           {"{{ '\xc3\xa9' | upper }}", "upper", 1},
           {"{% for m in messages recursive %}{% endfor %}", "recursive", 1},
           {"{% set a, b = messages %}", "several names", 1},
           // In the second turn only.
           {"{% for m in messages %}\n{% if m.role == 'assistant' %}{{ m | tojson }}{% endif %}"
            "{% endfor %}",
            "'tojson'", 2},
       }) {
    SCOPED_TRACE(each.jinja);
    const absl::Status status = ChatTemplate::Parse(each.jinja, "<s>", "</s>").status();
    EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented) << status;
    const std::string message(status.message());
    EXPECT_THAT(message, HasSubstr(each.construct));
    EXPECT_THAT(message, HasSubstr(absl::StrCat("line ", each.line, ":")));
    EXPECT_THAT(message, HasSubstr("suite.template"));
    EXPECT_THAT(message, HasSubstr("--template"));
    EXPECT_THAT(message, HasSubstr("chatml, llama-2, llama-3, vicuna"));
  }
}

TEST(ChatTemplateErrors, DeepNestingIsRefused) {
  std::string open, close, sum = "{{ 1";
  for (int i = 0; i < 100'000; ++i) {
    open += "(";
    close += ")";
    sum += " + 1";
  }
  std::string blocks;
  for (int i = 0; i < 100'000; ++i) blocks += "{% if true %}";
  for (const std::string& jinja : {"{{ " + open + "1" + close + " }}", sum + " }}", blocks}) {
    EXPECT_EQ(ChatTemplate::Parse(jinja, "", "").status().code(), absl::StatusCode::kUnimplemented);
  }
}

class Folder {
 public:
  Folder() : path_(testing::TempDir() + "/chat_template_" + std::to_string(getpid())) {
    std::filesystem::create_directories(path_);
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  void Write(const std::string& name, const std::string& text) const {
    std::ofstream(path_ + "/" + name, std::ios::binary) << text;
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

std::string Rendered(const absl::StatusOr<ChatTemplate>& chat) {
  if (!chat.ok()) return std::string(chat.status().message());
  const std::vector<ChatMessage> messages = {{"user", "Q"}};
  auto text = chat->Render(messages, true);
  return text.ok() ? *text : std::string(text.status().message());
}

TEST(ChatTemplateLoad, FindsTheTemplateOfAFolder) {
  const Folder folder;
  EXPECT_EQ(ChatTemplate::Load(folder.path(), "").status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(Rendered(ChatTemplate::Load(folder.path(), "")), HasSubstr("suite.template"));
  // No names in the folder: the family's own.
  EXPECT_EQ(Rendered(ChatTemplate::Load(folder.path(), "llama-2")), "<s>[INST] Q [/INST]");

  folder.Write("tokenizer_config.json",
               R"({"bos_token": {"content": "<B>"}, "eos_token": "<E>",
                   "chat_template": "{{ bos_token + messages[0].content + eos_token }}"})");
  EXPECT_EQ(Rendered(ChatTemplate::Load(folder.path(), "")), "<B>Q<E>");
  EXPECT_EQ(Rendered(ChatTemplate::Load(folder.path(), "llama-2")), "<B>[INST] Q [/INST]");

  folder.Write("tokenizer_config.json", R"({"bos_token": null, "chat_template": [
      {"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes{{ eos_token }}"}]})");
  folder.Write("special_tokens_map.json", R"({"eos_token": "<M>"})");
  EXPECT_EQ(Rendered(ChatTemplate::Load(folder.path(), "")), "yes<M>");

  folder.Write("chat_template.jinja", "from the file");
  EXPECT_EQ(Rendered(ChatTemplate::Load(folder.path(), "")), "from the file");
  EXPECT_EQ(ChatTemplate::Load(folder.path(), "nope").status().code(),
            absl::StatusCode::kInvalidArgument);

  folder.Write("chat_template.jinja", "\n{% macro x() %}");
  EXPECT_THAT(Rendered(ChatTemplate::Load(folder.path(), "")),
              testing::AllOf(HasSubstr("chat_template.jinja: line 2:"), HasSubstr("macro")));

  folder.Write("tokenizer_config.json", "{\"bos_token\"");
  EXPECT_THAT(Rendered(ChatTemplate::Load(folder.path(), "")),
              HasSubstr("tokenizer_config.json: not valid JSON"));
}

TEST(ChatTemplateLoad, RendersTheModelsOwn) {
  if (!std::filesystem::exists(kShared)) GTEST_SKIP() << kShared << " is not there";
  const std::string folder = kShared + "tiny-bamba-4m";
  auto chat = ChatTemplate::Load(folder, "");
  ASSERT_TRUE(chat.ok()) << chat.status();
  auto text = chat->Render(kTurns, true);
  ASSERT_TRUE(text.ok()) << text.status();
  EXPECT_EQ(*text, "<|bos|><|user|> Q1 <|assistant|>A1<|end|><|user|>Q2<|assistant|>");
  // Its special tokens are recognised, so nothing is to be added.
  auto tokenizer = Tokenizer::Load(folder);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const std::vector<TokenId> ids = tokenizer->Encode(*text, false);
  EXPECT_EQ(ids.front(), tokenizer->bos());
  EXPECT_EQ(ids.back(), tokenizer->TokenToId("<|assistant|>"));
}

}  // namespace
}  // namespace canopy
