// A conversation to the text that a model was trained on.
//
//   ASSIGN_OR_RETURN(const ChatTemplate chat, ChatTemplate::Load("models/tiny-bamba-4m", ""));
//   ASSIGN_OR_RETURN(const std::string prompt, chat.Render(messages,
//   /*add_generation_prompt=*/true)); const std::vector<TokenId> ids = tokenizer.Encode(prompt,
//   /*add_special_tokens=*/false);
//
// The prompt has its special tokens, bos included, so the tokenizer must not add them again.
// Templates are Jinja as transformers runs it (trim_blocks and lstrip_blocks on): loops,
// conditions, assignments, namespaces, slices, string methods and the usual filters and tests.
// Anything else is refused by name and line. Two things are as if transformers had been called
// without them: tools and documents are none, and there is no strftime_now, so that a prompt does
// not depend on the day.

#ifndef CANOPY_CORE_CHAT_TEMPLATE_H_
#define CANOPY_CORE_CHAT_TEMPLATE_H_

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/status.h"

namespace canopy {

struct ChatMessage {
  std::string role;  // "system", "user" or "assistant"
  std::string content;
};

// Const after loading and safe from several threads. Cheap to copy.
class ChatTemplate {
 public:
  // The built-in template of that name, with the folder's bos and eos where it names them. With an
  // empty name, FOLDER/chat_template.jinja, or else "chat_template" of FOLDER/tokenizer_config.json
  // (of several, the one named "default"). NotFound if there is none, Unimplemented for a construct
  // outside the subset that rendering a plain conversation meets; both say how to name a built-in
  // one.
  static absl::StatusOr<ChatTemplate> Load(const std::string& folder,
                                           const std::string& builtin_name);
  // vicuna (FastChat's vicuna_v1.1), llama-2, llama-3 or chatml, with that family's bos and eos.
  static absl::StatusOr<ChatTemplate> Builtin(std::string_view name);
  // An empty bos or eos is undefined in the template.
  static absl::StatusOr<ChatTemplate> Parse(std::string_view jinja, std::string bos,
                                            std::string eos);

  // InvalidArgument if the template raises an exception, such as for roles that do not alternate.
  absl::StatusOr<std::string> Render(std::span<const ChatMessage> messages,
                                     bool add_generation_prompt) const;

  static std::vector<std::string> BuiltinNames();

 private:
  struct Program;
  explicit ChatTemplate(std::shared_ptr<const Program> program) : program_(std::move(program)) {}
  std::shared_ptr<const Program> program_;
};

}  // namespace canopy

#endif  // CANOPY_CORE_CHAT_TEMPLATE_H_
