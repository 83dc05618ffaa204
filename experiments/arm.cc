#include "experiments/arm.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "models/loader.h"
#include "trees/tree_shape.h"

namespace canopy {
namespace {

// Turns of a question have noise of their own; questions have fewer turns than this.
constexpr uint64_t kTurnsPerQuestion = 256;
// Added to the estimate of a question's length for the template's tokens around each turn.
constexpr int kTurnSlack = 64;

// The counts up to the last level that was proposed at.
template <size_t kSize>
void AddCounts(const std::array<NodeCounts, kSize>& counts, size_t first,
               std::vector<NodeCounts>* sum) {
  size_t used = kSize;
  while (used > first && counts[used - 1].proposed == 0) --used;
  if (sum->size() < used - first) sum->resize(used - first);
  for (size_t i = first; i < used; ++i) (*sum)[i - first] += counts[i];
}

}  // namespace

absl::StatusOr<std::unique_ptr<ModelStore>> ModelStore::Create(const ExperimentConfig& config,
                                                               int max_nodes) {
  std::unique_ptr<ModelStore> store(new ModelStore());
  store->max_nodes_ = max_nodes;
  store->dtype_ = config.run_dtype;
  ASSIGN_OR_RETURN(store->backend_, MakeBackend(config.run_device, config.run_threads));
  return store;
}

absl::StatusOr<const LanguageModel*> ModelStore::Model(const std::string& folder) {
  std::unique_ptr<LanguageModel>& model = models_[folder];
  if (model == nullptr) {
    ASSIGN_OR_RETURN(model, LoadModel(*backend_, folder, dtype_));
  }
  return model.get();
}

absl::StatusOr<const Tokenizer*> ModelStore::TokenizerOf(const std::string& folder) {
  std::unique_ptr<Tokenizer>& tokenizer = tokenizers_[folder];
  if (tokenizer == nullptr) {
    ASSIGN_OR_RETURN(Tokenizer loaded, Tokenizer::Load(folder));
    tokenizer = std::make_unique<Tokenizer>(std::move(loaded));
  }
  return tokenizer.get();
}

absl::StatusOr<DecodeLoop*> ModelStore::Loop(const std::string& folder) {
  std::unique_ptr<DecodeLoop>& loop = loops_[folder];
  if (loop == nullptr) {
    ASSIGN_OR_RETURN(const LanguageModel* const model, Model(folder));
    ASSIGN_OR_RETURN(loop, DecodeLoop::Create(*model, max_nodes_));
  }
  return loop.get();
}

absl::Status ModelStore::CheckPair(const std::string& target, const std::string& draft) {
  const auto found = pairs_.find({target, draft});
  if (found != pairs_.end()) return found->second;
  ASSIGN_OR_RETURN(const Tokenizer* const target_tokenizer, TokenizerOf(target));
  ASSIGN_OR_RETURN(const Tokenizer* const draft_tokenizer, TokenizerOf(draft));
  const absl::Status status =
      Annotate(CompareVocabularies(*target_tokenizer, *draft_tokenizer),
               absl::StrCat("the draft ", draft, " does not fit the target ", target));
  pairs_[{target, draft}] = status;
  return status;
}

int64_t MostPositions(const Tokenizer& tokenizer, const std::vector<Question>& questions,
                      int max_new_tokens) {
  int64_t most = 0;
  for (const Question& question : questions) {
    int64_t tokens = 0;
    for (const std::string& turn : question.turns) {
      tokens +=
          static_cast<int64_t>(tokenizer.Encode(turn, false).size()) + max_new_tokens + kTurnSlack;
    }
    most = std::max(most, tokens);
  }
  return most;
}

absl::StatusOr<std::unique_ptr<ArmDecoder>> ArmDecoder::Create(ModelStore& store,
                                                               const ExperimentConfig& config,
                                                               const ArmOptions& options) {
  std::unique_ptr<ArmDecoder> arm(new ArmDecoder());
  arm->config_ = config;
  arm->device_ = store.backend().Description();
  ASSIGN_OR_RETURN(arm->target_, store.Model(config.target_model));
  ASSIGN_OR_RETURN(arm->tokenizer_, store.TokenizerOf(config.target_model));
  if (options.use_template) {
    ASSIGN_OR_RETURN(arm->template_,
                     ChatTemplate::Load(config.target_model, config.suite_template));
  }
  ASSIGN_OR_RETURN(arm->loop_, store.Loop(config.target_model));
  ASSIGN_OR_RETURN(arm->rule_, MakeAcceptanceRule(config.rule()));
  RETURN_IF_ERROR(arm->loop_->Reserve(options.positions));

  DrafterOptions drafter;
  drafter.shape = config.tree_shape;
  drafter.method = config.draft_method;
  drafter.ngram_min = config.draft_ngram_min;
  drafter.ngram_max = config.draft_ngram_max;
  drafter.ngram_matches = config.draft_ngram_matches;
  drafter.extra = config.draft_extra;
  drafter.vocab_size = arm->target_->info().vocab_size;
  drafter.max_positions =
      static_cast<int>(std::min<int64_t>(options.positions, arm->target_->info().max_positions));
  // A drafter of one's own may have a model too.
  if (!config.draft_model.empty() && DrafterReads("draft.model", config.draft_kind)) {
    RETURN_IF_ERROR(store.CheckPair(config.target_model, config.draft_model));
    ASSIGN_OR_RETURN(arm->draft_, store.Model(config.draft_model));
    drafter.model = arm->draft_;
  }
  ASSIGN_OR_RETURN(arm->drafter_, MakeDrafter(config.draft_kind, drafter));
  ASSIGN_OR_RETURN(arm->draft_state_, arm->drafter_->NewState());
  return arm;
}

absl::StatusOr<std::vector<TokenId>> ArmDecoder::Prompt(
    const std::vector<ChatMessage>& messages) const {
  CHECK(template_.has_value());
  ASSIGN_OR_RETURN(const std::string text,
                   template_->Render(messages, /*add_generation_prompt=*/true));
  // The template writes the special tokens itself.
  return tokenizer_->Encode(text, /*add_special_tokens=*/false);
}

DecodeRequest ArmDecoder::Request(uint64_t request) const {
  DecodeRequest made;
  made.drafter = drafter_.get();
  made.draft_state = draft_state_.get();
  made.rule = rule_.get();
  made.sampling = config_.sampling();
  made.noise = NoiseStream(static_cast<uint64_t>(config_.sampling_seed), request);
  made.max_new_tokens = config_.suite_max_new_tokens;
  made.max_nodes = config_.tree_nodes;
  made.scores = score_sink_;
  return made;
}

RecordContext ArmDecoder::context() const {
  RecordContext context;
  context.config = config_;
  context.device = device_;
  context.target_hash = target_->info().checkpoint_hash;
  context.target_dtype = std::string(Name(target_->info().dtype));
  if (draft_ != nullptr) {
    context.draft_hash = draft_->info().checkpoint_hash;
    context.draft_dtype = std::string(Name(draft_->info().dtype));
  }
  context.draft_bytes = drafter_->MemoryBytes(*draft_state_);
  return context;
}

bool ArmDecoder::Answer(const Question& question, int max_new_tokens, const std::atomic<bool>* stop,
                        QuestionRecord* record) {
  *record = QuestionRecord();
  record->question_id = question.id;
  record->category = question.category;
  bool whole = true;
  const absl::Status status = AnswerTurns(question, max_new_tokens, stop, record, &whole);
  if (!status.ok()) {
    record->error = absl::StrCat("question ", question.id, ", turn ", record->turns.size() + 1,
                                 ": ", status.message());
  }
  if (loop_->has_state()) {
    const StateMemory& memory = loop_->state().memory();
    record->state.checkpoint = static_cast<int64_t>(memory.checkpoint_bytes);
    record->state.ring = static_cast<int64_t>(memory.ring_bytes);
    record->state.kv_per_position = static_cast<int64_t>(memory.kv_bytes_per_position);
    record->state.pending_per_node = static_cast<int64_t>(memory.pending_bytes_per_node);
    record->state.total = static_cast<int64_t>(memory.total_bytes);
  }
  return whole;
}

absl::Status ArmDecoder::AnswerTurns(const Question& question, int max_new_tokens,
                                     const std::atomic<bool>* stop, QuestionRecord* record,
                                     bool* whole) {
  std::vector<ChatMessage> messages;
  for (size_t t = 0; t < question.turns.size(); ++t) {
    messages.push_back({"user", question.turns[t]});
    ASSIGN_OR_RETURN(const std::vector<TokenId> prompt, Prompt(messages));
    DecodeRequest request = Request(static_cast<uint64_t>(question.id) * kTurnsPerQuestion + t);
    request.prompt = prompt;
    request.max_new_tokens = max_new_tokens;
    request.stop = stop;
    RETURN_IF_ERROR(loop_->Decode({&request, 1}, {&generation_, 1}));
    if (generation_.finish == Finish::kStopped) {
      *whole = false;
      return absl::OkStatus();
    }
    TurnRecord turn;
    turn.prompt_tokens = static_cast<int>(prompt.size());
    for (TokenId token : generation_.tokens) turn.tokens.push_back(token.value);
    const std::string text = tokenizer_->Decode(generation_.tokens, /*skip_special_tokens=*/true);
    turn.text = std::string(absl::StripAsciiWhitespace(text));
    turn.finish = std::string(Name(generation_.finish));
    turn.accept_lengths = generation_.accept_lengths;
    turn.seconds = generation_.seconds;
    AddCounts(generation_.by_depth, 1, &record->by_depth);
    AddCounts(generation_.by_rank, 0, &record->by_rank);
    record->state.max_pending_nodes =
        std::max<int64_t>(record->state.max_pending_nodes, generation_.max_pending);
    messages.push_back({"assistant", turn.text});
    record->turns.push_back(std::move(turn));
  }
  return absl::OkStatus();
}

}  // namespace canopy
