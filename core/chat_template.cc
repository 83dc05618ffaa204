#include "core/chat_template.h"

#include <map>
#include <optional>
#include <utility>

#include "core/jinja/interpreter.h"
#include "core/jinja/syntax.h"
#include "core/tokenization/config_files.h"
#include "core/tokenization/json_fields.h"

namespace canopy {
namespace {

struct BuiltinTemplate {
  const char* name;
  const char* bos;
  const char* eos;
  const char* jinja;
};

// In each, content is as given unless the family's own template trims it.
constexpr BuiltinTemplate kBuiltins[] = {
    {"chatml", "", "<|im_end|>",
     R"({%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- endif -%})"},
    {"llama-2", "<s>", "</s>",
     R"({%- set system = '' -%}
{%- set turns = messages -%}
{%- if messages and messages[0].role == 'system' -%}
  {%- set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' -%}
  {%- set turns = messages[1:] -%}
{%- endif -%}
{%- for message in turns -%}
  {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{ raise_exception('user and assistant must alternate, after an optional system message') }}
  {%- endif -%}
  {%- if message.role == 'user' -%}
    {{ bos_token ~ '[INST] ' + ((system if loop.first else '') + message.content) | trim + ' [/INST]' }}
  {%- else -%}
    {{ ' ' + message.content | trim + ' ' ~ eos_token }}
  {%- endif -%}
{%- endfor -%})"},
    {"llama-3", "<|begin_of_text|>", "<|eot_id|>",
     R"({{- bos_token -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif -%})"},
    {"vicuna", "<s>", "</s>",
     R"({%- set system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions." -%}
{%- set turns = messages -%}
{%- if messages and messages[0].role == 'system' -%}
  {%- set system = messages[0].content -%}
  {%- set turns = messages[1:] -%}
{%- endif -%}
{{ bos_token ~ system + ' ' }}
{%- for message in turns -%}
  {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{ raise_exception('user and assistant must alternate, after an optional system message') }}
  {%- endif -%}
  {%- if message.role == 'user' -%}
    {{ 'USER: ' + message.content + ' ' }}
  {%- else -%}
    {{ 'ASSISTANT: ' + message.content ~ eos_token }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ 'ASSISTANT:' }}
{%- endif -%})"},
};

// "chatml, llama-2, llama-3, vicuna".
std::string NameList() {
  std::string names;
  for (const BuiltinTemplate& each : kBuiltins) {
    absl::StrAppend(&names, names.empty() ? "" : ", ", each.name);
  }
  return names;
}

std::string HowToNameOne() {
  return absl::StrCat("name a built-in template instead (config key suite.template, --template): ",
                      NameList());
}

absl::StatusOr<const BuiltinTemplate*> FindBuiltin(std::string_view name) {
  for (const BuiltinTemplate& each : kBuiltins) {
    if (name == each.name) return &each;
  }
  return absl::InvalidArgumentError(absl::StrCat("no built-in chat template is called \"",
                                                 std::string(name), "\"; there are ", NameList()));
}

// The template of a folder, and the file and key it is from.
struct Source {
  std::string jinja;
  std::string where;
};

absl::StatusOr<Source> FindSource(const std::string& folder) {
  const std::string jinja_path = folder + "/chat_template.jinja";
  ASSIGN_OR_RETURN(std::optional<std::string> jinja, ReadIfThere(jinja_path));
  if (jinja) return Source{*std::move(jinja), jinja_path};

  const std::string path = folder + "/tokenizer_config.json";
  ASSIGN_OR_RETURN(const std::optional<std::string> text, ReadIfThere(path));
  if (text) {
    ASSIGN_OR_RETURN(const Json json, ParseJson(*text, path));
    ASSIGN_OR_RETURN(const JsonFields fields, JsonFields::Of(json, path));
    const std::string where = fields.Path("chat_template");
    const Json* value = fields.Find("chat_template");
    if (value != nullptr && value->is_array()) {
      for (const Json& each : *value) {
        ASSIGN_OR_RETURN(const JsonFields named, JsonFields::Of(each, where));
        ASSIGN_OR_RETURN(const std::string name, named.String("name"));
        if (name != "default") continue;
        ASSIGN_OR_RETURN(std::string named_jinja, named.String("template"));
        return Source{std::move(named_jinja), where};
      }
      return absl::NotFoundError(
          absl::StrCat(where, ": no template in the list is named \"default\"; ", HowToNameOne()));
    }
    if (value != nullptr) {
      ASSIGN_OR_RETURN(std::string whole, fields.String("chat_template"));
      return Source{std::move(whole), where};
    }
  }
  return absl::NotFoundError(
      absl::StrCat(folder, ": no chat template (neither chat_template.jinja nor ",
                   "chat_template in tokenizer_config.json); ", HowToNameOne()));
}

}  // namespace

struct ChatTemplate::Program {
  jinja::Block block;
  jinja::Globals globals;
  std::string where;

  static absl::StatusOr<std::shared_ptr<const Program>> Make(std::string_view jinja,
                                                             const SpecialTokenNames& names,
                                                             std::string where) {
    auto program = std::make_shared<Program>();
    program->where = std::move(where);
    for (const auto& [role, token] : names) program->globals[role] = token;
    program->globals["tools"] = jinja::None{};
    program->globals["documents"] = jinja::None{};
    auto block = jinja::ParseTemplate(jinja);
    if (!block.ok()) return program->Explain(block.status());
    program->block = *std::move(block);
    // What is not supported is found only where a template gets to it, so plain conversations
    // are tried now rather than in mid-run. That a template refuses some of them is its own affair.
    const ChatMessage system{"system", "s"}, user{"user", "u"}, assistant{"assistant", "a"};
    for (const std::vector<ChatMessage>& messages :
         {std::vector<ChatMessage>{user}, std::vector<ChatMessage>{system, user},
          std::vector<ChatMessage>{user, assistant, user}}) {
      const absl::Status tried = program->Render(messages, true).status();
      if (absl::IsUnimplemented(tried)) return tried;
    }
    return std::shared_ptr<const Program>(std::move(program));
  }

  absl::Status Explain(const absl::Status& status) const {
    const absl::Status placed = Annotate(status, where);
    if (!absl::IsUnimplemented(placed)) return placed;
    return absl::UnimplementedError(
        absl::StrCat(std::string(placed.message()), "; ", HowToNameOne()));
  }

  absl::StatusOr<std::string> Render(std::span<const ChatMessage> messages,
                                     bool add_generation_prompt) const {
    jinja::Globals all = globals;
    jinja::List list;
    for (const ChatMessage& message : messages) {
      list.emplace_back(jinja::Dict{{"role", message.role}, {"content", message.content}});
    }
    all["messages"] = std::move(list);
    all["add_generation_prompt"] = add_generation_prompt;
    auto text = jinja::RenderTemplate(block, all);
    if (!text.ok()) return Explain(text.status());
    return text;
  }
};

absl::StatusOr<ChatTemplate> ChatTemplate::Load(const std::string& folder,
                                                const std::string& builtin_name) {
  ASSIGN_OR_RETURN(SpecialTokenNames names, ReadSpecialTokenNames(folder));
  if (builtin_name.empty()) {
    ASSIGN_OR_RETURN(const Source source, FindSource(folder));
    ASSIGN_OR_RETURN(auto program, Program::Make(source.jinja, names, source.where));
    return ChatTemplate(std::move(program));
  }
  ASSIGN_OR_RETURN(const BuiltinTemplate* builtin, FindBuiltin(builtin_name));
  if (names.empty()) return Builtin(builtin_name);
  ASSIGN_OR_RETURN(auto program, Program::Make(builtin->jinja, names,
                                               absl::StrCat("the template ", builtin_name)));
  return ChatTemplate(std::move(program));
}

absl::StatusOr<ChatTemplate> ChatTemplate::Builtin(std::string_view name) {
  ASSIGN_OR_RETURN(const BuiltinTemplate* builtin, FindBuiltin(name));
  return Parse(builtin->jinja, builtin->bos, builtin->eos);
}

absl::StatusOr<ChatTemplate> ChatTemplate::Parse(std::string_view jinja, std::string bos,
                                                 std::string eos) {
  SpecialTokenNames names;
  if (!bos.empty()) names["bos_token"] = std::move(bos);
  if (!eos.empty()) names["eos_token"] = std::move(eos);
  ASSIGN_OR_RETURN(auto program, Program::Make(jinja, names, "the chat template"));
  return ChatTemplate(std::move(program));
}

absl::StatusOr<std::string> ChatTemplate::Render(std::span<const ChatMessage> messages,
                                                 bool add_generation_prompt) const {
  return program_->Render(messages, add_generation_prompt);
}

std::vector<std::string> ChatTemplate::BuiltinNames() {
  std::vector<std::string> names;
  for (const BuiltinTemplate& each : kBuiltins) names.emplace_back(each.name);
  return names;
}

}  // namespace canopy
