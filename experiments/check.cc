#include "experiments/check.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <string_view>
#include <tuple>
#include <utility>

#include "absl/strings/str_format.h"
#include "core/safetensors.h"
#include "experiments/arm.h"
#include "experiments/progress.h"
#include "experiments/runner.h"
#include "experiments/suite.h"

namespace canopy {
namespace {

// Tokens of a pass when logits are read along an answer.
constexpr int kRows = 64;

// A run of the config, or plain decoding beside it.
struct Method {
  std::string name;
  ExperimentConfig config;
};

// Every run once, plain decoding first where it is to be run.
std::vector<Method> MethodsOf(const ParsedConfig& parsed) {
  std::vector<Method> methods;
  std::set<std::string> seen;
  for (const ExperimentConfig& run : parsed.runs) {
    if (run.run_baseline || run.draft_kind == "none") {
      ExperimentConfig plain = run;
      plain.draft_kind = "none";
      plain.draft_model.clear();
      if (seen.insert(ConfigHash(run, /*baseline=*/true)).second) {
        methods.push_back({ArmName(plain, {}), plain});
      }
    }
    if (run.draft_kind == "none") continue;
    if (seen.insert(ConfigHash(run, /*baseline=*/false)).second) {
      methods.push_back({ArmName(run, parsed.axes), run});
    }
  }
  return methods;
}

absl::StatusOr<std::vector<Question>> QuestionsOf(const ParsedConfig& parsed) {
  const ExperimentConfig& first = parsed.runs.front();
  ASSIGN_OR_RETURN(std::vector<Question> questions, LoadQuestions(first.suite_questions));
  return SelectQuestions(std::move(questions), first);
}

// Models by device, dtype and number of threads, each loaded once.
class Models {
 public:
  absl::StatusOr<std::unique_ptr<ArmDecoder>> Decoder(const ExperimentConfig& config,
                                                      const std::vector<Question>& questions,
                                                      int max_nodes) {
    std::unique_ptr<ModelStore>& store =
        stores_[{config.run_device, config.run_dtype, config.run_threads}];
    if (store == nullptr) {
      ASSIGN_OR_RETURN(store, ModelStore::Create(config, max_nodes));
    }
    ASSIGN_OR_RETURN(const Tokenizer* const tokenizer, store->TokenizerOf(config.target_model));
    ArmOptions options;
    options.positions = MostPositions(*tokenizer, questions, config.suite_max_new_tokens);
    return ArmDecoder::Create(*store, config, options);
  }

 private:
  std::map<std::tuple<std::string, std::string, int>, std::unique_ptr<ModelStore>> stores_;
};

int MostNodes(const std::vector<Method>& methods) {
  int most = 1;
  for (const Method& method : methods) most = std::max(most, method.config.tree_nodes);
  return most;
}

// Where two answers part. turn -1: nowhere.
struct Parting {
  int turn = -1;
  size_t token = 0;
};

Parting FirstParting(const QuestionRecord& a, const QuestionRecord& b) {
  for (size_t t = 0; t < std::min(a.turns.size(), b.turns.size()); ++t) {
    const std::vector<int32_t>& x = a.turns[t].tokens;
    const std::vector<int32_t>& y = b.turns[t].tokens;
    if (x == y) continue;
    const auto at = std::mismatch(x.begin(), x.end(), y.begin(), y.end());
    return {static_cast<int>(t), static_cast<size_t>(at.first - x.begin())};
  }
  return {};
}

std::string TokenText(const std::vector<int32_t>& tokens, size_t at) {
  return at < tokens.size() ? absl::StrCat("id ", tokens[at]) : "the end";
}

// Logits along a token sequence, a pass of kRows tokens at a time.
class Reader {
 public:
  static absl::StatusOr<Reader> Create(const LanguageModel& model, int64_t positions) {
    Reader reader;
    reader.model_ = &model;
    StateOptions options;
    options.max_positions =
        static_cast<int>(std::min<int64_t>(positions, model.info().max_positions));
    options.max_pending = 1;
    ASSIGN_OR_RETURN(reader.state_, model.NewState(options));
    ASSIGN_OR_RETURN(reader.workspace_, model.NewWorkspace(kRows));
    return reader;
  }
  void Reset() { state_->Reset(); }
  // Rows of all tokens, or none.
  absl::StatusOr<ConstMatrix> Read(std::span<const TokenId> tokens, bool logits) {
    const ForwardItem item = {.state = state_.get(),
                              .tokens = tokens,
                              .logits = logits ? LogitsOf::kAll : LogitsOf::kNone,
                              .commit_chain = true};
    ASSIGN_OR_RETURN(const ForwardResult result, model_->Forward({&item, 1}, *workspace_));
    return result.logits;
  }

 private:
  const LanguageModel* model_ = nullptr;
  std::unique_ptr<DecodeState> state_;
  std::unique_ptr<Workspace> workspace_;
};

double GreatestDifference(std::span<const float> a, std::span<const float> b) {
  double greatest = 0.0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(double{a[i]} - double{b[i]});
    if (!(difference <= std::numeric_limits<double>::max())) {
      return std::numeric_limits<double>::infinity();
    }
    greatest = std::max(greatest, difference);
  }
  return greatest;
}

// Logits of both models at every place of an answer, all given the same tokens.
absl::Status CompareLogits(Reader& a, Reader& b, std::span<const TokenId> tokens, size_t prompt,
                           double tolerance, const std::string& where, CheckReport* report,
                           Differences* differences) {
  a.Reset();
  b.Reset();
  // The last token of the prompt is the first whose logits choose a token.
  for (size_t at = 0; at + 1 < tokens.size();) {
    const bool logits = at + 1 >= prompt;
    const size_t end = logits ? std::min(tokens.size() - 1, at + kRows) : prompt - 1;
    const std::span<const TokenId> part = tokens.subspan(at, end - at);
    ASSIGN_OR_RETURN(const ConstMatrix x, a.Read(part, logits));
    ASSIGN_OR_RETURN(const ConstMatrix y, b.Read(part, logits));
    for (int row = 0; logits && row < x.rows; ++row) {
      const size_t columns = static_cast<size_t>(x.columns);
      const double difference = GreatestDifference({x.row(row), columns}, {y.row(row), columns});
      ++report->rows;
      report->greatest_difference = std::max(report->greatest_difference, difference);
      if (difference <= tolerance) continue;
      ++report->rows_different;
      differences->Add(absl::StrFormat("logits: %s, token %d: differ by %.3g", where,
                                       at + row + 1 - prompt, difference));
    }
    at = end;
  }
  return absl::OkStatus();
}

std::string SettingText(const ExperimentConfig& config) {
  std::string text = config.run_device;
  if (config.run_dtype != "auto") absl::StrAppend(&text, ", ", config.run_dtype);
  if (config.run_threads != 0) absl::StrAppend(&text, ", ", config.run_threads, " threads");
  return text;
}

absl::Status Stopped() { return absl::CancelledError("interrupted"); }

Digest DigestOf(std::span<const std::byte> bytes) {
  return {XxHash64(bytes, 0), XxHash64(bytes, 0x9e3779b97f4a7c15ull)};
}
Digest Below(const Digest& path, TokenId token) {
  const struct {
    Digest path;
    uint64_t token;
  } node = {path, static_cast<uint64_t>(token.value)};
  return DigestOf(std::as_bytes(std::span(&node, 1)));
}

}  // namespace

void Differences::Add(std::string text) {
  if (static_cast<int>(shown_.size()) < kShown) shown_.push_back(std::move(text));
  ++count_;
}

void Differences::Print(FILE* out) const {
  for (const std::string& text : shown_) absl::FPrintF(out, "  %s\n", text);
  const int64_t more = count_ - static_cast<int64_t>(shown_.size());
  if (more > 0) absl::FPrintF(out, "  and %d more\n", more);
}

void PathScores::Begin(const std::string& model, const std::string& method, int64_t question) {
  model_ = DigestOf(std::as_bytes(std::span(model)));
  method_ = method;
  question_ = question;
}

void PathScores::OnScores(std::span<const TokenId> tokens, const TokenTree& tree,
                          const TargetScores& scores) {
  Digest prefix = model_;
  // All but the last, which is node 0.
  for (const TokenId token : tokens.first(tokens.size() - 1)) prefix = Below(prefix, token);
  paths_.resize(tree.size());
  for (int i = 0; i < tree.size(); ++i) {
    const NodeId node(i), parent = tree.parent(node);
    paths_[i] = Below(parent == kPrefix ? prefix : paths_[parent.value], tree.token(node));
    const Digest row = DigestOf(std::as_bytes(scores.row(node)));
    ++scored_;
    const auto [found, inserted] = rows_.emplace(paths_[i], Entry{row, method_});
    if (inserted) continue;
    ++compared_;
    if (found->second.row == row) continue;
    ++different_;
    differences_->Add(absl::StrFormat(
        "bits: question %d, position %d: the logits of %s differ from those of %s", question_,
        tokens.size() - 1 + tree.depth(node), method_, found->second.method));
  }
}

absl::StatusOr<CheckReport> CheckSettings(const ParsedConfig& a, const ParsedConfig& b,
                                          const CheckOptions& options) {
  const std::vector<Method> methods_a = MethodsOf(a), methods_b = MethodsOf(b);
  if (methods_a.size() != methods_b.size()) {
    return absl::InvalidArgumentError(absl::StrCat("the two settings have ", methods_a.size(),
                                                   " and ", methods_b.size(),
                                                   " runs, which cannot be compared one by one"));
  }
  ASSIGN_OR_RETURN(const std::vector<Question> questions, QuestionsOf(a));
  const int max_nodes = std::max(MostNodes(methods_a), MostNodes(methods_b));
  Models models;
  CheckReport report;
  Differences differences;
  absl::FPrintF(options.out, "tolerance of logits %g, %d questions\n", options.tolerance,
                questions.size());
  absl::FPrintF(options.out, "  %-40s  %-40s  %s  %s\n", "a", "b", "answers equal",
                "greatest difference of logits");
  Progress progress(options.progress, static_cast<int64_t>(methods_a.size() * questions.size()), 0);
  std::set<std::pair<std::string, std::string>> read;  // targets whose logits were compared
  for (size_t m = 0; m < methods_a.size(); ++m) {
    const Method &x = methods_a[m], &y = methods_b[m];
    ASSIGN_OR_RETURN(const auto decoder_a, models.Decoder(x.config, questions, max_nodes));
    ASSIGN_OR_RETURN(const auto decoder_b, models.Decoder(y.config, questions, max_nodes));
    const LanguageModel &model_a = decoder_a->target(), &model_b = decoder_b->target();
    if (model_a.info().vocab_size != model_b.info().vocab_size) {
      return absl::InvalidArgumentError(
          absl::StrCat(x.config.target_model, " has a vocabulary of ", model_a.info().vocab_size,
                       " and ", y.config.target_model, " one of ", model_b.info().vocab_size));
    }
    // Logits depend on the tokens alone, so one method's answers do for a target.
    const bool with_logits = read.insert({x.config.target_model, y.config.target_model}).second;
    std::unique_ptr<Reader> reader_a, reader_b;
    if (with_logits) {
      const int64_t positions =
          MostPositions(decoder_a->tokenizer(), questions, x.config.suite_max_new_tokens);
      ASSIGN_OR_RETURN(Reader made_a, Reader::Create(model_a, positions));
      ASSIGN_OR_RETURN(Reader made_b, Reader::Create(model_b, positions));
      reader_a = std::make_unique<Reader>(std::move(made_a));
      reader_b = std::make_unique<Reader>(std::move(made_b));
    }
    int64_t equal = 0;
    CheckReport part;
    for (const Question& question : questions) {
      QuestionRecord record_a, record_b;
      const int most = x.config.suite_max_new_tokens;
      if (!decoder_a->Answer(question, most, options.stop, &record_a)) return Stopped();
      if (!decoder_b->Answer(question, y.config.suite_max_new_tokens, options.stop, &record_b)) {
        return Stopped();
      }
      progress.Add(record_a.tokens(), record_a.rounds(), record_a.seconds().total);
      for (const QuestionRecord* record : {&record_a, &record_b}) {
        if (record->ok()) continue;
        ++part.failed;
        differences.Add(absl::StrCat("failed: ", x.name, ", ", record->error));
      }
      if (!record_a.ok() || !record_b.ok()) continue;
      ++part.answers;
      const Parting parting = FirstParting(record_a, record_b);
      if (parting.turn < 0) {
        ++equal;
      } else {
        ++part.answers_different;
        differences.Add(
            absl::StrFormat("ids: %s, question %d, turn %d, token %d: %s and %s", x.name,
                            question.id, parting.turn + 1, parting.token,
                            TokenText(record_a.turns[parting.turn].tokens, parting.token),
                            TokenText(record_b.turns[parting.turn].tokens, parting.token)));
      }
      if (!with_logits) continue;
      std::vector<ChatMessage> messages;
      for (size_t t = 0; t < record_a.turns.size(); ++t) {
        messages.push_back({"user", question.turns[t]});
        ASSIGN_OR_RETURN(std::vector<TokenId> tokens, decoder_a->Prompt(messages));
        const size_t prompt = tokens.size();
        for (const int32_t token : record_a.turns[t].tokens) tokens.push_back(TokenId(token));
        RETURN_IF_ERROR(CompareLogits(*reader_a, *reader_b, tokens, prompt, options.tolerance,
                                      absl::StrFormat("question %d, turn %d", question.id, t + 1),
                                      &part, &differences));
        messages.push_back({"assistant", record_a.turns[t].text});
      }
    }
    progress.Clear();
    absl::FPrintF(options.out, "  %-40s  %-40s  %6d of %-4d  %s\n",
                  absl::StrCat(x.name, " (", SettingText(x.config), ")"),
                  absl::StrCat(y.name, " (", SettingText(y.config), ")"), equal, part.answers,
                  with_logits
                      ? absl::StrFormat("%.3g in %d rows, %d above the tolerance",
                                        part.greatest_difference, part.rows, part.rows_different)
                      : "as above");
    report.answers += part.answers;
    report.answers_different += part.answers_different;
    report.failed += part.failed;
    report.rows += part.rows;
    report.rows_different += part.rows_different;
    report.greatest_difference = std::max(report.greatest_difference, part.greatest_difference);
  }
  differences.Print(options.out);
  return report;
}

absl::StatusOr<CheckReport> CheckExact(const ParsedConfig& parsed, const CheckOptions& options) {
  const std::vector<Method> methods = MethodsOf(parsed);
  ASSIGN_OR_RETURN(const std::vector<Question> questions, QuestionsOf(parsed));
  const int max_nodes = MostNodes(methods);
  Models models;
  CheckReport report;
  Differences differences;
  PathScores scores(&differences);
  // Plain decoding's answers, by what they depend on.
  std::map<std::pair<std::string, int64_t>, QuestionRecord> plain;
  absl::FPrintF(options.out, "to the last bit, %d questions\n", questions.size());
  absl::FPrintF(options.out, "  %-40s  %12s  %18s  %9s  %s\n", "method", "nodes scored",
                "of paths seen before", "different", "answers equal plain decoding's");
  Progress progress(options.progress, static_cast<int64_t>(methods.size() * questions.size()), 0);
  for (const Method& method : methods) {
    ASSIGN_OR_RETURN(const auto decoder, models.Decoder(method.config, questions, max_nodes));
    decoder->set_score_sink(&scores);
    const std::string shared = ConfigHash(method.config, /*baseline=*/true);
    const bool is_plain = method.config.draft_kind == "none";
    const int64_t scored = scores.scored(), compared = scores.compared(),
                  different = scores.different();
    int64_t equal = 0, answers = 0;
    for (const Question& question : questions) {
      // Scores are the target's, on its device and in its dtype, whatever the number of threads.
      scores.Begin(absl::StrCat(method.config.target_model, "|", method.config.run_device, "|",
                                method.config.run_dtype),
                   method.name, question.id);
      QuestionRecord record;
      if (!decoder->Answer(question, method.config.suite_max_new_tokens, options.stop, &record)) {
        return Stopped();
      }
      progress.Add(record.tokens(), record.rounds(), record.seconds().total);
      if (!record.ok()) {
        ++report.failed;
        differences.Add(absl::StrCat("failed: ", method.name, ", ", record.error));
        continue;
      }
      if (is_plain) {
        plain.emplace(std::pair(shared, question.id), std::move(record));
        continue;
      }
      const auto found = plain.find({shared, question.id});
      if (found == plain.end() || !method.config.equals_plain()) continue;
      ++answers;
      const Parting parting = FirstParting(found->second, record);
      if (parting.turn < 0) {
        ++equal;
        continue;
      }
      differences.Add(
          absl::StrFormat("ids: %s, question %d, turn %d, token %d: %s, plain decoding %s",
                          method.name, question.id, parting.turn + 1, parting.token,
                          TokenText(record.turns[parting.turn].tokens, parting.token),
                          TokenText(found->second.turns[parting.turn].tokens, parting.token)));
    }
    progress.Clear();
    absl::FPrintF(options.out, "  %-40s  %12d  %20d  %9d  %s\n", method.name,
                  scores.scored() - scored, scores.compared() - compared,
                  scores.different() - different,
                  answers > 0 ? absl::StrCat(equal, " of ", answers) : std::string("-"));
    report.answers += answers;
    report.answers_different += answers - equal;
  }
  report.rows = scores.compared();
  report.rows_different = scores.different();
  differences.Print(options.out);
  return report;
}

}  // namespace canopy
