// One arm of an experiment: target, drafter, rule and tokenizer, answering questions.

#ifndef CANOPY_EXPERIMENTS_ARM_H_
#define CANOPY_EXPERIMENTS_ARM_H_

#include <atomic>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/chat_template.h"
#include "core/cpu_backend.h"
#include "core/language_model.h"
#include "core/status.h"
#include "core/tokenizer.h"
#include "drafting/drafter.h"
#include "drafting/registry.h"
#include "experiments/config.h"
#include "experiments/decode_loop.h"
#include "experiments/records.h"
#include "experiments/suite.h"
#include "verify/acceptance.h"

namespace canopy {

// Models, tokenizers and decode loops by folder, each loaded once. Must outlive what it hands out.
class ModelStore {
 public:
  // device, dtype and threads: as run.device, run.dtype and run.threads. max_nodes: of the largest
  // tree of any arm.
  static absl::StatusOr<std::unique_ptr<ModelStore>> Create(const ExperimentConfig& config,
                                                            int max_nodes);

  Backend& backend() { return *backend_; }
  absl::StatusOr<const LanguageModel*> Model(const std::string& folder);
  absl::StatusOr<const Tokenizer*> TokenizerOf(const std::string& folder);
  // One loop a target: arms take turns with it.
  absl::StatusOr<DecodeLoop*> Loop(const std::string& folder);
  // InvalidArgument unless target and draft share a vocabulary; says where they differ.
  absl::Status CheckPair(const std::string& target, const std::string& draft);

 private:
  ModelStore() = default;

  int max_nodes_ = 0;
  std::string dtype_;
  std::unique_ptr<Backend> backend_;
  std::map<std::string, std::unique_ptr<LanguageModel>> models_;
  std::map<std::string, std::unique_ptr<Tokenizer>> tokenizers_;
  std::map<std::string, std::unique_ptr<DecodeLoop>> loops_;
  std::map<std::pair<std::string, std::string>, absl::Status> pairs_;
};

// Positions of the longest question with all its answers.
int64_t MostPositions(const Tokenizer& tokenizer, const std::vector<Question>& questions,
                      int max_new_tokens);

struct ArmOptions {
  // Prompt and answer of the longest sequence: states are made for that many, or the models' own
  // limits where they are lower.
  int64_t positions = 0;
  // Without a template Prompt and Answer must not be called.
  bool use_template = true;
};

// Not thread-safe. The store must outlive it.
class ArmDecoder {
 public:
  // Loads what the config names. Errors name the file or key that is wrong.
  static absl::StatusOr<std::unique_ptr<ArmDecoder>> Create(ModelStore& store,
                                                            const ExperimentConfig& config,
                                                            const ArmOptions& options);

  // Answers the question, turn by turn: the answer to a turn stands in the prompt of the next, as
  // text without special tokens and without blanks at its ends, as Spec-Bench has it. What fails is
  // named in record->error. False if `stop` was set before the end: there is no record then.
  bool Answer(const Question& question, int max_new_tokens, const std::atomic<bool>* stop,
              QuestionRecord* record);

  // Tokens of a prompt after the chat template.
  absl::StatusOr<std::vector<TokenId>> Prompt(const std::vector<ChatMessage>& messages) const;
  // Told of the target's logits in all that is answered from now on; null for nobody.
  void set_score_sink(ScoreSink* sink) { score_sink_ = sink; }

  const LanguageModel& target() const { return *target_; }
  const Tokenizer& tokenizer() const { return *tokenizer_; }
  DecodeLoop& loop() { return *loop_; }
  // A request with everything but the prompt.
  DecodeRequest Request(uint64_t request) const;
  // For records; the drafter's bytes are those at the time of the call.
  RecordContext context() const;

 private:
  ArmDecoder() = default;
  absl::Status AnswerTurns(const Question& question, int max_new_tokens,
                           const std::atomic<bool>* stop, QuestionRecord* record, bool* whole);

  ExperimentConfig config_;
  std::string device_;
  const LanguageModel* target_ = nullptr;
  const LanguageModel* draft_ = nullptr;  // null without a draft model
  const Tokenizer* tokenizer_ = nullptr;
  std::optional<ChatTemplate> template_;
  DecodeLoop* loop_ = nullptr;
  std::unique_ptr<AcceptanceRule> rule_;
  std::unique_ptr<Drafter> drafter_;
  std::unique_ptr<DraftState> draft_state_;
  ScoreSink* score_sink_ = nullptr;
  Generation generation_;
};

}  // namespace canopy

#endif  // CANOPY_EXPERIMENTS_ARM_H_
