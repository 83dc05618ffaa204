#include "experiments/runner.h"

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <tuple>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "core/cpu_backend.h"
#include "experiments/arm.h"
#include "experiments/decode_loop.h"
#include "experiments/progress.h"
#include "experiments/records.h"
#include "experiments/suite.h"
#include "trees/tree_shape.h"

namespace canopy {
namespace {

// Tokens of a warm-up answer: enough to touch all memory, not worth waiting longer for.
constexpr int kWarmupTokens = 64;

using Clock = std::chrono::steady_clock;

double Since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::string Base(const std::string& path) {
  std::filesystem::path p = std::filesystem::path(path).lexically_normal();
  if (!p.has_filename()) p = p.parent_path();
  return p.filename().string();
}

std::string ResultsFolder(const ExperimentConfig& config) {
  return (std::filesystem::path(config.run_results) / config.run_name).string();
}

std::vector<std::pair<std::string, std::string>> AxisValues(const ExperimentConfig& config,
                                                            const std::vector<std::string>& axes) {
  std::vector<std::pair<std::string, std::string>> values;
  for (const ConfigKey& key : ConfigKeys()) {
    if (std::find(axes.begin(), axes.end(), key.name) == axes.end()) continue;
    values.emplace_back(key.name, ValueText(key, config));
  }
  return values;
}

// A file name made of an arm's name.
std::string Slug(const std::string& name) {
  std::string slug;
  for (char c : name) {
    const bool keep = absl::ascii_isalnum(c) || c == '.' || c == '-' || c == '=';
    if (keep) {
      slug += c;
    } else if (!slug.empty() && slug.back() != '_') {
      slug += '_';
    }
  }
  while (!slug.empty() && slug.back() == '_') slug.pop_back();
  return slug.substr(0, 100);
}

// An arm as it is run, and what it needs.
struct Arm {
  std::string name;
  std::string hash;
  bool is_baseline = false;
  ExperimentConfig config;
  std::vector<std::pair<std::string, std::string>> axes;
  RecordContext context;
  std::unique_ptr<ArmDecoder> decoder;
};

// Arms that share a target and everything else that plain decoding depends on.
struct Group {
  std::vector<Arm> arms;  // the baseline first, where there is one
  bool has_baseline = false;
};

std::vector<Group> MakeGroups(const ParsedConfig& parsed) {
  std::vector<Group> groups;
  std::map<std::string, size_t> by_hash;
  std::set<std::string> hashes;
  // Names of baselines tell groups apart by the axes that plain decoding depends on.
  std::vector<std::string> shared_axes;
  for (const ConfigKey& key : ConfigKeys()) {
    if (key.scope == KeyScope::kAll &&
        std::find(parsed.axes.begin(), parsed.axes.end(), key.name) != parsed.axes.end()) {
      shared_axes.push_back(key.name);
    }
  }
  for (const ExperimentConfig& config : parsed.runs) {
    const std::string shared = ConfigHash(config, /*baseline=*/true);
    const auto [found, inserted] = by_hash.emplace(shared, groups.size());
    if (inserted) {
      groups.emplace_back();
      if (config.run_baseline) {
        Arm baseline;
        baseline.is_baseline = true;
        baseline.hash = shared;
        baseline.config = config;
        baseline.config.draft_kind = "none";
        baseline.config.draft_model.clear();
        baseline.name = ArmName(baseline.config, shared_axes);
        baseline.axes = AxisValues(config, shared_axes);
        groups.back().arms.push_back(std::move(baseline));
        groups.back().has_baseline = true;
      }
    }
    // Plain decoding as a method is the baseline itself.
    if (config.draft_kind == "none" && config.run_baseline) continue;
    Arm arm;
    arm.hash = ConfigHash(config, /*baseline=*/false);
    // Points of the sweep that differ only in keys that their drafter does not read are one run.
    if (!hashes.insert(arm.hash).second) continue;
    arm.config = config;
    arm.name = ArmName(config, parsed.axes);
    arm.axes = AxisValues(config, parsed.axes);
    groups[found->second].arms.push_back(std::move(arm));
  }
  // Two folders may end in the same name; a part of the hash tells their arms and files apart.
  std::set<std::string> names;
  for (Group& group : groups) {
    for (Arm& arm : group.arms) {
      if (!names.insert(arm.name).second) absl::StrAppend(&arm.name, " ", arm.hash.substr(0, 6));
    }
  }
  return groups;
}

// The first key in which two configs differ, for saying why results do not fit; null if none does.
const ConfigKey* FirstDifference(const ExperimentConfig& a, const ExperimentConfig& b,
                                 bool baseline) {
  for (const ConfigKey& key : ConfigKeys()) {
    if (key.scope == KeyScope::kAmount) continue;
    if (baseline && key.scope != KeyScope::kAll) continue;
    if (!DrafterReads(key.name, a.draft_kind)) continue;
    if (ValueText(key, a) != ValueText(key, b)) return &key;
  }
  return nullptr;
}

// Results of runs that are not in this experiment do not belong into its folder.
absl::Status CheckOwnResults(RecordFile& file, const std::vector<Group>& groups) {
  std::map<std::string, const Arm*> by_hash;
  for (const Group& group : groups) {
    for (const Arm& arm : group.arms) by_hash[arm.hash] = &arm;
    // The baseline's results stay valid where run.baseline was switched off.
    if (!group.has_baseline) by_hash[ConfigHash(group.arms[0].config, true)] = nullptr;
  }
  for (const RecordFile::Entry& entry : file.entries()) {
    if (by_hash.contains(entry.record.run)) continue;
    const ExperimentConfig& there = entry.context.config;
    const ExperimentConfig& here = groups[0].arms.back().config;
    const ConfigKey* key = FirstDifference(there, here, there.draft_kind == "none");
    std::string difference = "of another sweep";
    if (key != nullptr) {
      difference = absl::StrCat("with ", key->name, " = ", ValueText(*key, there), ", not ",
                                ValueText(*key, here));
    }
    return absl::FailedPreconditionError(
        absl::StrCat(file.path(), " holds results of another config (", difference,
                     "); choose another --run.name, or remove that folder"));
  }
  return absl::OkStatus();
}

// Which of a run's checkpoints is not there; empty if all are.
std::string MissingModel(const ExperimentConfig& config) {
  const auto missing = [](const std::string& folder) {
    std::error_code ignored;
    return !std::filesystem::exists(std::filesystem::path(folder) / "config.json", ignored);
  };
  const auto text = [](const char* key, const std::string& folder) {
    return absl::StrCat(key, " = ", folder,
                        ": there is no checkpoint (a folder with config.json) there");
  };
  if (missing(config.target_model)) return text("target.model", config.target_model);
  if (!config.draft_model.empty() && DrafterReads("draft.model", config.draft_kind) &&
      missing(config.draft_model)) {
    return text("draft.model", config.draft_model);
  }
  return "";
}

// The run of one experiment.
class Runner {
 public:
  Runner(const ParsedConfig& parsed, const RunnerOptions& options)
      : parsed_(parsed), options_(options), first_(parsed.runs.front()) {}

  absl::StatusOr<RunReport> Run() {
    ASSIGN_OR_RETURN(std::vector<Question> questions, LoadQuestions(first_.suite_questions));
    ASSIGN_OR_RETURN(questions_, SelectQuestions(std::move(questions), first_));
    for (const ExperimentConfig& run : parsed_.runs) {
      const std::string missing = MissingModel(run);
      if (!missing.empty()) return absl::NotFoundError(missing);
    }
    groups_ = MakeGroups(parsed_);
    folder_ = ResultsFolder(first_);
    ASSIGN_OR_RETURN(RecordFile file, RecordFile::Open(folder_));
    if (file.repaired()) {
      Note(absl::StrCat("removed a record that was cut short from ", file.path()));
    }
    RETURN_IF_ERROR(CheckOwnResults(file, groups_));
    for (RecordFile::Entry& entry : file.entries()) {
      records_[{entry.record.run, entry.record.repetition, entry.record.question_id}] =
          std::move(entry.record);
    }
    RETURN_IF_ERROR(WriteWhole(folder_ + "/effective.cfg", EffectiveConfigText(parsed_)));

    const int64_t missing = Missing();
    if (missing > 0) {
      int max_nodes = 1;
      ForEachArm([&](Arm& arm) { max_nodes = std::max(max_nodes, arm.config.tree_nodes); });
      ASSIGN_OR_RETURN(models_, ModelStore::Create(first_, max_nodes));
      RETURN_IF_ERROR(LoadArms(file));
      RETURN_IF_ERROR(WarmUp());
      const int64_t total = Total();
      if (missing < total) {
        Note(absl::StrCat("continuing: ", total - missing, " of ", total,
                          " answers are there already"));
      }
      const absl::Status run = RunAll(file, total, total - missing);
      RETURN_IF_ERROR(file.Sync());
      RETURN_IF_ERROR(run);
    } else {
      Note("all answers are there already; nothing is run");
    }
    return Report();
  }

 private:
  using RecordKey = std::tuple<std::string, int, int64_t>;

  void Note(const std::string& text) {
    std::fprintf(options_.progress, "%s\n", text.c_str());
    std::fflush(options_.progress);
  }
  bool Stopped() const {
    return options_.stop != nullptr && options_.stop->load(std::memory_order_relaxed);
  }
  // A failed answer is tried again when a run is continued.
  bool IsDone(const Arm& arm, int repetition, const Question& question) const {
    const auto found = records_.find({arm.hash, repetition, question.id});
    return found != records_.end() && found->second.ok();
  }
  template <typename F>
  void ForEachArm(const F& function) {
    for (Group& group : groups_) {
      for (Arm& arm : group.arms) function(arm);
    }
  }
  int64_t Total() {
    int64_t arms = 0;
    ForEachArm([&](Arm&) { ++arms; });
    return arms * static_cast<int64_t>(questions_.size()) * first_.run_repetitions;
  }
  int64_t Missing() {
    int64_t missing = 0;
    ForEachArm([&](Arm& arm) {
      for (int r = 0; r < first_.run_repetitions; ++r) {
        for (const Question& question : questions_) missing += !IsDone(arm, r, question);
      }
    });
    return missing;
  }

  absl::Status LoadArms(RecordFile& file) {
    for (Group& group : groups_) {
      ASSIGN_OR_RETURN(const Tokenizer* const tokenizer,
                       models_->TokenizerOf(group.arms[0].config.target_model));
      // States are made for the longest question at once, so that no answer waits for memory.
      ArmOptions options;
      options.positions = MostPositions(*tokenizer, questions_, first_.suite_max_new_tokens);
      for (Arm& arm : group.arms) {
        if (Stopped()) return absl::CancelledError("interrupted before the first answer");
        ASSIGN_OR_RETURN(arm.decoder, ArmDecoder::Create(*models_, arm.config, options));
        arm.context = arm.decoder->context();
      }
    }
    // The same path may hold another checkpoint by now.
    std::map<std::string, const Arm*> by_hash;
    ForEachArm([&](Arm& arm) { by_hash[arm.hash] = &arm; });
    for (const RecordFile::Entry& entry : file.entries()) {
      const auto found = by_hash.find(entry.record.run);
      if (found == by_hash.end()) continue;
      const RecordContext& here = found->second->context;
      const bool target = entry.context.target_hash != here.target_hash;
      if (target || entry.context.draft_hash != here.draft_hash) {
        const ExperimentConfig& config = found->second->config;
        return absl::FailedPreconditionError(
            absl::StrCat(file.path(), " holds results of another checkpoint than ",
                         target ? config.target_model : config.draft_model,
                         " is now; choose another --run.name, or remove that folder"));
      }
    }
    return absl::OkStatus();
  }

  absl::Status WarmUp() {
    const int count = std::min<int>(first_.run_warmup, static_cast<int>(questions_.size()));
    for (int q = 0; q < count; ++q) {
      for (Group& group : groups_) {
        for (Arm& arm : group.arms) {
          if (Stopped()) return absl::OkStatus();
          // What fails here fails again, and is recorded, when the question has its turn.
          QuestionRecord ignored;
          arm.decoder->Answer(questions_[q], std::min(kWarmupTokens, first_.suite_max_new_tokens),
                              options_.stop, &ignored);
        }
      }
    }
    return absl::OkStatus();
  }

  absl::Status RunAll(RecordFile& file, int64_t total, int64_t done) {
    bool any_method = false;
    ForEachArm([&](Arm& arm) { any_method = any_method || !arm.is_baseline; });
    Progress progress(options_.progress, total, done);
    const Clock::time_point start = Clock::now();
    for (int r = 0; r < first_.run_repetitions; ++r) {
      for (size_t q = 0; q < questions_.size(); ++q) {
        for (Group& group : groups_) {
          const size_t arms = group.arms.size();
          for (size_t k = 0; k < arms; ++k) {
            Arm& arm = group.arms[(q + r + k) % arms];
            if (IsDone(arm, r, questions_[q])) continue;
            if (Stopped()) return absl::OkStatus();
            RETURN_IF_ERROR(RunOne(file, arm, r, questions_[q], any_method, &progress));
          }
        }
      }
    }
    elapsed_ = Since(start);
    return absl::OkStatus();
  }

  absl::Status RunOne(RecordFile& file, Arm& arm, int repetition, const Question& question,
                      bool any_method, Progress* progress) {
    QuestionRecord record;
    const bool whole =
        arm.decoder->Answer(question, arm.config.suite_max_new_tokens, options_.stop, &record);
    if (!whole) return absl::OkStatus();  // stopped: the loops above see it
    record.run = arm.hash;
    record.arm = arm.name;
    record.repetition = repetition;
    if (!record.ok()) {
      progress->Clear();
      Note(absl::StrCat("failed: ", arm.name, ", ", record.error));
    }
    const PhaseSeconds seconds = record.seconds();
    model_seconds_ += seconds.prefill + seconds.draft + seconds.verify;
    arm.context = arm.decoder->context();
    RETURN_IF_ERROR(file.Append(record, arm.context));
    if (arm.is_baseline && any_method) {
      progress->Add(0, 0, 0);
    } else {
      progress->Add(record.tokens(), record.rounds(), seconds.total);
    }
    records_[{arm.hash, repetition, question.id}] = std::move(record);
    return absl::OkStatus();
  }

  std::vector<const QuestionRecord*> RecordsOf(const std::string& hash) const {
    std::vector<const QuestionRecord*> list;
    for (int r = 0; r < first_.run_repetitions; ++r) {
      for (const Question& question : questions_) {
        const auto found = records_.find({hash, r, question.id});
        if (found != records_.end()) list.push_back(&found->second);
      }
    }
    return list;
  }

  absl::Status WriteAnswers(const Arm& arm, const std::vector<const QuestionRecord*>& records) {
    for (int r = 0; r < first_.run_repetitions; ++r) {
      std::vector<const QuestionRecord*> of_repetition;
      for (const QuestionRecord* record : records) {
        if (record->repetition == r) of_repetition.push_back(record);
      }
      const std::string folder = absl::StrCat(folder_, "/answers/run_", r + 1);
      std::error_code error;
      std::filesystem::create_directories(folder, error);
      if (error) {
        return absl::PermissionDeniedError(
            absl::StrCat("cannot make the folder ", folder, ": ", error.message()));
      }
      ASSIGN_OR_RETURN(const std::string text, SpecBenchAnswers(of_repetition, arm.name));
      RETURN_IF_ERROR(WriteWhole(absl::StrCat(folder, "/", Slug(arm.name), ".jsonl"), text));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<RunReport> Report() {
    RunReport report;
    report.stopped = Stopped() && Missing() > 0;
    std::string tables;
    for (const Group& group : groups_) {
      const std::string shared = ConfigHash(group.arms[0].config, /*baseline=*/true);
      const std::vector<const QuestionRecord*> baseline = RecordsOf(shared);
      for (const Arm& arm : group.arms) {
        ArmRecords records;
        records.name = arm.name;
        records.is_baseline = arm.is_baseline;
        records.must_equal_baseline = arm.config.equals_plain();
        records.axes = arm.axes;
        records.records = RecordsOf(arm.hash);
        if (group.has_baseline) records.baseline = baseline;
        RETURN_IF_ERROR(WriteAnswers(arm, records.records));
        if (records.records.empty()) continue;
        report.arms.push_back(MakeArmReport(records));
        const ArmReport& made = report.arms.back();
        report.failed += made.failed();
        report.red = report.red || made.gate.red();
        // A baseline's figures stand beside each method's; alone it has no other table.
        if (!arm.is_baseline || group.arms.size() == 1) {
          absl::StrAppend(&tables, "\n", ArmTable(made));
        }
      }
    }
    if (report.arms.size() > 2) {
      absl::StrAppend(&tables, "\nAll runs (overall)\n", ComparisonTable(report.arms));
    }
    if (elapsed_ > 0) {
      absl::StrAppend(
          &tables, absl::StrFormat("\n%s for this run's answers, %.1f%% of it outside "
                                   "model passes\n",
                                   DurationText(elapsed_), 100 * (1 - model_seconds_ / elapsed_)));
    }
    RETURN_IF_ERROR(WriteWhole(folder_ + "/summary.csv", ReportCsv(report.arms)));
    RETURN_IF_ERROR(WriteWhole(folder_ + "/summary.txt", tables));
    std::fprintf(options_.out, "%s\nresults: %s\n", tables.c_str(), folder_.c_str());
    std::fflush(options_.out);
    return report;
  }

  const ParsedConfig& parsed_;
  const RunnerOptions& options_;
  const ExperimentConfig& first_;  // for the keys that cannot be axes
  std::string folder_;
  std::vector<Question> questions_;
  std::unique_ptr<ModelStore> models_;  // outlives groups_' decoders
  std::vector<Group> groups_;
  std::map<RecordKey, QuestionRecord> records_;
  double model_seconds_ = 0;
  double elapsed_ = 0;
};

}  // namespace

std::string ArmName(const ExperimentConfig& config, const std::vector<std::string>& axes) {
  std::string name;
  if (std::find(axes.begin(), axes.end(), "target.model") != axes.end()) {
    name = absl::StrCat(Base(config.target_model), ": ");
  }
  if (config.draft_kind == "none") {
    name += "plain decoding";
  } else {
    const bool model = config.draft_kind == "model";
    absl::StrAppend(&name, model ? Base(config.draft_model) : config.draft_kind, " ",
                    config.tree_shape);
  }
  const std::set<std::string_view> said = {"target.model", "draft.kind", "draft.model",
                                           "tree.shape"};
  for (const auto& [key, value] : AxisValues(config, axes)) {
    if (said.contains(key) || !DrafterReads(key, config.draft_kind)) continue;
    absl::StrAppend(&name, " ", key, "=", value);
  }
  return name;
}

std::string EffectiveConfigText(const ParsedConfig& parsed) {
  std::string text;
  std::string section;
  for (const ConfigKey& key : ConfigKeys()) {
    const std::string_view name = key.name;
    const std::string_view own = name.substr(0, name.find('.'));
    if (own != section) {
      section = std::string(own);
      absl::StrAppend(&text, text.empty() ? "" : "\n", "[", section, "]\n");
    }
    std::vector<std::string> values;
    for (const ExperimentConfig& run : parsed.runs) {
      const std::string value = ValueText(key, run);
      if (std::find(values.begin(), values.end(), value) == values.end()) values.push_back(value);
    }
    absl::StrAppend(&text, std::string(name.substr(name.find('.') + 1)), " = ",
                    absl::StrJoin(values, " | "), "\n");
  }
  return text;
}

absl::StatusOr<RunReport> RunExperiment(const ParsedConfig& parsed, const RunnerOptions& options) {
  return Runner(parsed, options).Run();
}

absl::Status DryRun(const ParsedConfig& parsed, FILE* out) {
  const ExperimentConfig& first = parsed.runs.front();
  ASSIGN_OR_RETURN(std::vector<Question> all, LoadQuestions(first.suite_questions));
  const size_t in_file = all.size();
  ASSIGN_OR_RETURN(const std::vector<Question> questions, SelectQuestions(std::move(all), first));
  std::fprintf(out, "%s\n", EffectiveConfigText(parsed).c_str());
  std::fprintf(out, "%zu of %zu questions, %d times each\n", questions.size(), in_file,
               first.run_repetitions);
  int number = 0;
  for (const Group& group : MakeGroups(parsed)) {
    for (const Arm& arm : group.arms) {
      std::fprintf(out, "run %d: %s (%s, temperature %s)\n", ++number, arm.name.c_str(),
                   arm.config.rule().c_str(),
                   absl::StrFormat("%g", arm.config.sampling_temperature).c_str());
    }
  }
  std::set<std::string> missing;
  for (const ExperimentConfig& run : parsed.runs) missing.insert(MissingModel(run));
  for (const std::string& note : missing) {
    if (!note.empty()) std::fprintf(out, "note: %s\n", note.c_str());
  }
  std::fprintf(out, "results would go to %s\n", ResultsFolder(first).c_str());
  return absl::OkStatus();
}

}  // namespace canopy
