#include "experiments/config.h"

#include <algorithm>
#include <array>
#include <boost/program_options.hpp>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <sstream>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "core/chat_template.h"
#include "core/decode_state.h"
#include "core/files.h"
#include "drafting/registry.h"
#include "models/loader.h"
#include "trees/tree_shape.h"
#include "verify/acceptance.h"

namespace canopy {
namespace {

namespace po = boost::program_options;

constexpr double kAny = 0.0;  // of keys that have no range
constexpr bool kSweep = true;
constexpr bool kOnce = false;
constexpr bool kPath = true;
constexpr bool kText = false;
// More runs than anybody means to start; a slip of the pen in an axis is likelier.
constexpr size_t kMaxRuns = 4096;

using C = ExperimentConfig;

constexpr ConfigKey kKeys[] = {
    {"target.model", &C::target_model, kAny, kAny, "folder of the target's checkpoint", kSweep,
     kPath, KeyScope::kAll},
    {"draft.kind", &C::draft_kind, kAny, kAny,
     "drafter: a draft model, prompt look-up, or none (plain decoding)", kSweep, kText,
     KeyScope::kMethod},
    {"draft.model", &C::draft_model, kAny, kAny, "folder of the draft model's checkpoint", kSweep,
     kPath, KeyScope::kMethod},
    {"draft.method", &C::draft_method, kAny, kAny,
     "how a draft model chooses siblings: the most probable, or drawn", kSweep, kText,
     KeyScope::kMethod},
    {"draft.ngram_min", &C::draft_ngram_min, 1, 16, "shortest n-gram that is looked up", kSweep,
     kText, KeyScope::kMethod},
    {"draft.ngram_max", &C::draft_ngram_max, 1, 16, "longest n-gram that is looked up", kSweep,
     kText, KeyScope::kMethod},
    {"draft.ngram_matches", &C::draft_ngram_matches, 1, 4096,
     "earlier matches of an n-gram that are looked at, the latest first", kSweep, kText,
     KeyScope::kMethod},
    {"draft.extra", &C::draft_extra, kAny, kAny, "free text for drafters of your own", kSweep,
     kText, KeyScope::kMethod},
    {"tree.shape", &C::tree_shape, kAny, kAny,
     "draft tree: chain:4, topk:4,2,1, or brackets such as (((),()),())", kSweep, kText,
     KeyScope::kMethod},
    {"tree.nodes", &C::tree_nodes, 1, 512,
     "most nodes of a verify pass, the last output token's included", kSweep, kText,
     KeyScope::kMethod},
    {"acceptance.rule", &C::acceptance_rule, kAny, kAny,
     "auto is greedy at temperature 0 and recursive above", kSweep, kText, KeyScope::kAll},
    {"sampling.temperature", &C::sampling_temperature, 0, 100, "0: greedy", kSweep, kText,
     KeyScope::kAll},
    {"sampling.top_k", &C::sampling_top_k, 0, 1 << 30, "keep the k most probable tokens; 0: all",
     kSweep, kText, KeyScope::kAll},
    {"sampling.top_p", &C::sampling_top_p, 1e-6, 1,
     "keep the fewest most probable tokens whose mass reaches this", kSweep, kText, KeyScope::kAll},
    {"sampling.seed", &C::sampling_seed, 0, 9007199254740992.0, "of all random numbers", kSweep,
     kText, KeyScope::kAll},
    {"suite.questions", &C::suite_questions, kAny, kAny,
     "question file in Spec-Bench's form (JSON lines)", kOnce, kPath, KeyScope::kAll},
    {"suite.categories", &C::suite_categories, kAny, kAny,
     "comma-separated categories to run; mt_bench stands for its eight; empty: all", kOnce, kText,
     KeyScope::kAmount},
    {"suite.every", &C::suite_every, 1, 1000000, "run every k-th question", kOnce, kText,
     KeyScope::kAmount},
    {"suite.sample", &C::suite_sample, 0, 1000000,
     "run this many questions, drawn with sampling.seed; 0: all", kOnce, kText, KeyScope::kAmount},
    {"suite.limit", &C::suite_limit, 0, 1000000, "run the first so many questions; 0: all", kOnce,
     kText, KeyScope::kAmount},
    {"suite.max_new_tokens", &C::suite_max_new_tokens, 1, 1000000,
     "most tokens of an answer (Spec-Bench: 1024)", kOnce, kText, KeyScope::kAll},
    {"suite.template", &C::suite_template, kAny, kAny,
     "built-in chat template: vicuna, llama-2, llama-3 or chatml; empty: the model's own", kOnce,
     kText, KeyScope::kAll},
    {"run.device", &C::run_device, kAny, kAny, "where the models run", kOnce, kText,
     KeyScope::kAll},
    {"run.dtype", &C::run_dtype, kAny, kAny,
     "of weights and activations on a GPU; auto is the checkpoint's", kOnce, kText, KeyScope::kAll},
    {"run.threads", &C::run_threads, 0, 1024, "0: one for each core that the process may use",
     kOnce, kText, KeyScope::kAll},
    {"run.baseline", &C::run_baseline, kAny, kAny,
     "also decode plainly, interleaved, for equality and speed-up", kOnce, kText,
     KeyScope::kAmount},
    {"run.warmup", &C::run_warmup, 0, 1000, "questions that are run before and not counted", kOnce,
     kText, KeyScope::kAmount},
    {"run.repetitions", &C::run_repetitions, 1, 1000, "times that each question is run", kOnce,
     kText, KeyScope::kAmount},
    {"run.results", &C::run_results, kAny, kAny, "folder of results; this run's is run.name in it",
     kOnce, kPath, KeyScope::kAmount},
    {"run.name", &C::run_name, kAny, kAny, "empty: the config file's name without its ending",
     kOnce, kText, KeyScope::kAmount},
};
constexpr int kKeyCount = static_cast<int>(std::size(kKeys));

// The values that a text key may have; empty if it is free.
std::vector<std::string> Choices(const ConfigKey& key) {
  const std::string_view name = key.name;
  std::vector<std::string> choices;
  if (name == "draft.kind") {
    for (const auto& [drafter, help] : ListDrafters()) choices.push_back(drafter);
    return choices;
  }
  if (name == "draft.method") return {"topk", "sampled", "sampled_with_replacement"};
  if (name == "acceptance.rule") {
    choices = {"auto"};
    for (const auto& [rule, help] : ListAcceptanceRules()) choices.emplace_back(rule);
    return choices;
  }
  if (name == "suite.template") {
    choices = ChatTemplate::BuiltinNames();
    choices.insert(choices.begin(), "");
    return choices;
  }
  if (name == "run.dtype") return {"auto", "bf16", "f32"};
  return {};
}

std::string NumberText(double value) {
  if (value == std::floor(value) && std::abs(value) < 1e16) {
    return absl::StrCat(static_cast<int64_t>(value));
  }
  std::array<char, 40> text;
  const auto end = std::to_chars(text.data(), text.data() + text.size(), value);
  return std::string(text.data(), end.ptr);
}

// Levenshtein distance.
int EditDistance(std::string_view a, std::string_view b) {
  std::vector<int> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = static_cast<int>(j);
  for (size_t i = 1; i <= a.size(); ++i) {
    int diagonal = row[0];
    row[0] = static_cast<int>(i);
    for (size_t j = 1; j <= b.size(); ++j) {
      const int substituted = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substituted});
    }
  }
  return row.back();
}

int FindKey(std::string_view name) {
  for (int i = 0; i < kKeyCount; ++i) {
    if (name == kKeys[i].name) return i;
  }
  return -1;
}

// Text that may come from anywhere, short enough and printable for an error line.
std::string Shown(std::string_view text) {
  std::string shown;
  for (char c : text.substr(0, 80)) shown += absl::ascii_isprint(c) || (c & 0x80) ? c : '?';
  if (text.size() > 80) shown += "...";
  return shown;
}

absl::Status OutOfRange(const ConfigKey& key, const std::string& text, const std::string& origin,
                        const std::string& expected) {
  return absl::InvalidArgumentError(absl::StrCat(origin, ": ", key.name, " = ", Shown(text),
                                                 " is not allowed; expected ", expected));
}

// Parses `text` into the key's member.
absl::Status SetValue(const ConfigKey& key, const std::string& text, const std::string& origin,
                      ExperimentConfig* config) {
  const std::string range = RangeText(key);
  if (const auto* member = std::get_if<std::string C::*>(&key.member)) {
    const std::vector<std::string> choices = Choices(key);
    if (!choices.empty() && std::find(choices.begin(), choices.end(), text) == choices.end()) {
      return OutOfRange(key, text, origin, range);
    }
    if (std::string_view(key.name) == "run.device" && !ParseDevice(text).ok()) {
      return OutOfRange(key, text, origin, range);
    }
    if (std::string_view(key.name) == "tree.shape") {
      if (absl::StatusOr<TreeShape> shape = TreeShape::Parse(text); !shape.ok()) {
        return Annotate(shape.status(), absl::StrCat(origin, ": ", key.name, " = ", Shown(text)));
      }
    }
    config->** member = text;
  } else if (const auto* member = std::get_if<bool C::*>(&key.member)) {
    if (text == "true" || text == "yes" || text == "1") {
      config->** member = true;
    } else if (text == "false" || text == "no" || text == "0") {
      config->** member = false;
    } else {
      return OutOfRange(key, text, origin, range);
    }
  } else if (const auto* member = std::get_if<double C::*>(&key.member)) {
    double value = 0;
    // Written so that NaN is refused.
    if (!absl::SimpleAtod(text, &value) || !(value >= key.min && value <= key.max)) {
      return OutOfRange(key, text, origin, absl::StrCat("a number in ", range));
    }
    config->** member = value;
  } else {
    int64_t value = 0;
    if (!absl::SimpleAtoi(text, &value) || !(static_cast<double>(value) >= key.min) ||
        !(static_cast<double>(value) <= key.max)) {
      return OutOfRange(key, text, origin, absl::StrCat("a whole number in ", range));
    }
    if (const auto* wide = std::get_if<int64_t C::*>(&key.member)) {
      config->** wide = value;
    } else {
      config->*std::get<int C::*>(key.member) = static_cast<int>(value);
    }
  }
  return absl::OkStatus();
}

std::string Trimmed(std::string_view text) {
  return std::string(absl::StripAsciiWhitespace(absl::string_view(text.data(), text.size())));
}

uint64_t Fnv1a(std::string_view text, uint64_t hash) {
  for (char c : text) hash = (hash ^ static_cast<uint8_t>(c)) * 1099511628211ull;
  return hash;
}

}  // namespace

SamplingOptions ExperimentConfig::sampling() const {
  SamplingOptions options;
  options.temperature = sampling_temperature;
  options.top_k = sampling_top_k;
  options.top_p = sampling_top_p;
  return options;
}

bool ExperimentConfig::equals_plain() const {
  const std::string name = rule();
  return name == "greedy" || name == "gumbel" || sampling_temperature == 0.0;
}

std::string ExperimentConfig::rule() const {
  if (acceptance_rule != "auto") return acceptance_rule;
  return sampling_temperature == 0.0 ? "greedy" : "recursive";
}

std::span<const ConfigKey> ConfigKeys() { return kKeys; }

std::string ValueText(const ConfigKey& key, const ExperimentConfig& config) {
  if (const auto* member = std::get_if<std::string C::*>(&key.member)) return config.**member;
  if (const auto* member = std::get_if<bool C::*>(&key.member)) {
    return config.**member ? "true" : "false";
  }
  if (const auto* member = std::get_if<double C::*>(&key.member)) {
    return NumberText(config.**member);
  }
  if (const auto* member = std::get_if<int64_t C::*>(&key.member)) {
    return absl::StrCat(config.**member);
  }
  return absl::StrCat(config.*std::get<int C::*>(key.member));
}

std::string RangeText(const ConfigKey& key) {
  if (std::holds_alternative<bool C::*>(key.member)) return "true or false";
  if (std::string_view(key.name) == "run.device") return "cpu, cuda or cuda:N";
  if (std::holds_alternative<std::string C::*>(key.member)) {
    std::vector<std::string> choices = Choices(key);
    for (std::string& choice : choices) {
      if (choice.empty()) choice = "(empty)";
    }
    return absl::StrJoin(choices, ", ");
  }
  return absl::StrCat("[", NumberText(key.min), ", ", NumberText(key.max), "]");
}

std::string NearestKey(std::string_view name) {
  name = name.substr(0, 200);
  const ConfigKey* nearest = &kKeys[0];
  int fewest = std::numeric_limits<int>::max();
  for (const ConfigKey& key : kKeys) {
    int edits = EditDistance(name, key.name);
    // A key without its section ("nodes"), or under the wrong one, is meant more often than chance
    // edits of the section's name.
    const std::string_view declared = key.name;
    const size_t dot = name.find('.');
    const std::string_view last = dot == std::string_view::npos ? name : name.substr(dot + 1);
    edits = std::min(edits, EditDistance(last, declared.substr(declared.find('.') + 1)) + 1);
    if (edits < fewest) {
      fewest = edits;
      nearest = &key;
    }
  }
  return nearest->name;
}

absl::Status ConfigBuilder::Add(std::string_view name, const std::string& text,
                                const std::string& origin, const std::string* folder,
                                std::map<int, std::vector<Value>>* values) {
  const int index = FindKey(name);
  if (index < 0) {
    return absl::InvalidArgumentError(absl::StrCat(origin, ": unknown key '", Shown(name),
                                                   "'; did you mean '", NearestKey(name), "'?"));
  }
  const ConfigKey& key = kKeys[index];
  std::vector<Value>& list = (*values)[index];
  if (!key.sweep && !list.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(origin, ": ", key.name,
                                                   " takes one value, and it was already set at ",
                                                   list.front().origin));
  }
  std::vector<std::string> parts;
  if (key.sweep) {
    parts = absl::StrSplit(text, " | ");
  } else {
    parts = {text};
  }
  for (const std::string& part : parts) {
    std::string value = Trimmed(part);
    if (parts.size() > 1 && value.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat(origin, ": ", key.name, " = ", Shown(text), " has an empty value"));
    }
    if (key.path && folder != nullptr && !value.empty()) {
      value = (std::filesystem::path(*folder) / value).lexically_normal().string();
    }
    for (const Value& other : list) {
      if (other.text == value) {
        return absl::InvalidArgumentError(absl::StrCat(origin, ": ", key.name, " = ", Shown(value),
                                                       " stands twice (first at ", other.origin,
                                                       "); a sweep's values must differ"));
      }
    }
    list.push_back({std::move(value), origin});
  }
  return absl::OkStatus();
}

absl::Status ConfigBuilder::AddFile(std::string_view text, const std::string& file,
                                    const std::string& folder) {
  std::string section;
  int number = 0;
  // Boost reads the syntax, one line at a time so that errors can name the line.
  for (absl::string_view line : absl::StrSplit(absl::string_view(text.data(), text.size()), '\n')) {
    ++number;
    const std::string origin = absl::StrCat(file, ":", number);
    if (line.size() > 65536 || absl::StrContains(line, absl::string_view("\0", 1))) {
      return absl::InvalidArgumentError(
          absl::StrCat(origin, ": this is not a line of text of at most 65536 characters"));
    }
    std::string stripped(absl::StripAsciiWhitespace(line.substr(0, line.find('#'))));
    if (stripped.empty()) continue;
    if (stripped.front() == '[' && stripped.back() == ']') {
      section = Trimmed(std::string_view(stripped).substr(1, stripped.size() - 2));
      continue;
    }
    try {
      std::istringstream stream(stripped + "\n");
      const po::options_description none;
      const auto parsed = po::parse_config_file(stream, none, /*allow_unregistered=*/true);
      for (const auto& option : parsed.options) {
        const std::string key =
            section.empty() ? option.string_key : absl::StrCat(section, ".", option.string_key);
        const std::string value = option.value.empty() ? "" : option.value.front();
        RETURN_IF_ERROR(Add(key, value, origin, &folder, &file_));
      }
    } catch (const po::error&) {
      return absl::InvalidArgumentError(absl::StrCat(origin, ": '", Shown(stripped),
                                                     "' is neither `key = value` nor `[section]`"));
    }
  }
  return absl::OkStatus();
}

absl::Status ConfigBuilder::AddArguments(std::span<const std::string> args) {
  static constexpr char kOrigin[] = "command line";
  po::options_description options;
  for (const ConfigKey& key : kKeys) {
    options.add_options()(key.name, po::value<std::vector<std::string>>());
  }
  std::vector<std::string> rest;
  for (const std::string& arg : args) {
    // Boost takes `--key=` for a mistake; here it is how a key is emptied.
    if (arg.size() > 3 && arg.starts_with("--") && arg.find('=') == arg.size() - 1) {
      RETURN_IF_ERROR(
          Add(std::string_view(arg).substr(2, arg.size() - 3), "", kOrigin, nullptr, &arguments_));
    } else {
      rest.push_back(arg);
    }
  }
  try {
    namespace style = po::command_line_style;
    const auto parsed =
        po::command_line_parser(rest)
            .options(options)
            .style(style::allow_long | style::long_allow_adjacent | style::long_allow_next)
            .allow_unregistered()
            .run();
    for (const auto& option : parsed.options) {
      if (option.position_key >= 0 || option.string_key.empty()) {
        return absl::InvalidArgumentError(absl::StrCat(
            kOrigin, ": '", Shown(option.original_tokens.empty() ? "" : option.original_tokens[0]),
            "' is not of the form --key=value"));
      }
      for (const std::string& value : option.value) {
        RETURN_IF_ERROR(Add(option.string_key, value, kOrigin, nullptr, &arguments_));
      }
      if (option.value.empty()) {
        RETURN_IF_ERROR(Add(option.string_key, "", kOrigin, nullptr, &arguments_));
      }
    }
  } catch (const po::error& error) {
    return absl::InvalidArgumentError(absl::StrCat(kOrigin, ": ", error.what()));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<ExperimentConfig>> ConfigBuilder::Build() const {
  std::vector<ExperimentConfig> runs(1);
  for (int i = 0; i < kKeyCount; ++i) {
    auto found = arguments_.find(i);
    if (found == arguments_.end()) {
      found = file_.find(i);
      if (found == file_.end()) continue;
    }
    const std::vector<Value>& values = found->second;
    ExperimentConfig scratch;
    for (const Value& value : values) {
      RETURN_IF_ERROR(SetValue(kKeys[i], value.text, value.origin, &scratch));
    }
    if (runs.size() * values.size() > kMaxRuns) {
      return absl::InvalidArgumentError(absl::StrCat("the sweep has more than ", kMaxRuns,
                                                     " runs; ", kKeys[i].name, " is one axis of ",
                                                     absl::StrJoin(Axes(), ", ")));
    }
    std::vector<ExperimentConfig> product;
    product.reserve(runs.size() * values.size());
    for (const ExperimentConfig& run : runs) {
      for (const Value& value : values) {
        product.push_back(run);
        RETURN_IF_ERROR(SetValue(kKeys[i], value.text, value.origin, &product.back()));
      }
    }
    runs = std::move(product);
  }
  return runs;
}

std::vector<std::string> ConfigBuilder::Axes() const {
  std::vector<std::string> axes;
  for (int i = 0; i < kKeyCount; ++i) {
    auto found = arguments_.find(i);
    if (found == arguments_.end()) {
      found = file_.find(i);
      if (found == file_.end()) continue;
    }
    if (found->second.size() > 1) axes.push_back(kKeys[i].name);
  }
  return axes;
}

absl::StatusOr<ParsedConfig> LoadConfig(const std::string& file,
                                        std::span<const std::string> args) {
  absl::StatusOr<std::string> text = ReadFile(file);
  if (!text.ok()) return Annotate(text.status(), "cannot read the config file");
  const std::filesystem::path path(file);
  ConfigBuilder builder;
  RETURN_IF_ERROR(builder.AddFile(*text, file, path.parent_path().string()));
  RETURN_IF_ERROR(builder.AddArguments(args));
  ParsedConfig parsed;
  ASSIGN_OR_RETURN(parsed.runs, builder.Build());
  parsed.axes = builder.Axes();
  for (ExperimentConfig& run : parsed.runs) {
    if (run.run_name.empty()) run.run_name = path.stem().string();
    RETURN_IF_ERROR(CheckConfig(run));
  }
  return parsed;
}

absl::Status CheckConfig(const ExperimentConfig& config) {
  const auto missing = [](const char* key, const char* what) {
    return absl::InvalidArgumentError(absl::StrCat(key, " is not set; it must name ", what,
                                                   " (in the config file or as --", key, "=PATH)"));
  };
  if (config.target_model.empty()) return missing("target.model", "the target's folder");
  if (config.suite_questions.empty()) return missing("suite.questions", "a question file");
  if (config.draft_kind == "model" && config.draft_model.empty()) {
    return missing("draft.model", "the draft model's folder");
  }
  if (config.draft_ngram_min > config.draft_ngram_max) {
    return absl::InvalidArgumentError(
        absl::StrCat("draft.ngram_min = ", config.draft_ngram_min,
                     " is above draft.ngram_max = ", config.draft_ngram_max));
  }
  if (config.run_name.empty() || config.run_name == "." || config.run_name == ".." ||
      config.run_name.find('/') != std::string::npos) {
    return absl::InvalidArgumentError(
        absl::StrCat("run.name = ", Shown(config.run_name),
                     " is not allowed; it names one folder in run.results"));
  }
  if (config.run_results.empty()) {
    return absl::InvalidArgumentError("run.results is empty; it must name a folder");
  }
  RETURN_IF_ERROR(Validate(config.sampling()));
  ASSIGN_OR_RETURN(const TreeShape shape, TreeShape::Parse(config.tree_shape));
  if (config.draft_kind != "none") {
    if (shape.size() > config.tree_nodes) {
      return absl::InvalidArgumentError(
          absl::StrCat("tree.shape = ", Shown(config.tree_shape), " has ", shape.size(),
                       " nodes with the last output token's, and tree.nodes = ", config.tree_nodes,
                       "; raise tree.nodes or take a smaller shape"));
    }
    if (shape.height() > kMaxTreeHeight) {
      return absl::InvalidArgumentError(
          absl::StrCat("tree.shape = ", Shown(config.tree_shape), " drafts ", shape.height() - 1,
                       " levels; at most ", kMaxTreeHeight - 1, " are supported"));
    }
  }
  if (config.rule() == "greedy" && config.sampling_temperature != 0.0) {
    return absl::InvalidArgumentError(
        absl::StrCat("acceptance.rule = greedy needs sampling.temperature = 0, not ",
                     NumberText(config.sampling_temperature)));
  }
  return absl::OkStatus();
}

bool DrafterReads(std::string_view key, std::string_view kind) {
  const bool tree = key.starts_with("tree.");
  const bool ngram = key.starts_with("draft.ngram_");
  const bool model = key == "draft.model" || key == "draft.method";
  if (kind == "none") return !tree && !ngram && !model;
  if (kind == "model") return !ngram;
  if (kind == "ngram") return !model;
  return true;
}

std::string ConfigHash(const ExperimentConfig& config, bool baseline) {
  uint64_t hash = 14695981039346656037ull;
  const std::string& kind = config.draft_kind;
  for (const ConfigKey& key : kKeys) {
    if (key.scope == KeyScope::kAmount) continue;
    if (baseline && key.scope != KeyScope::kAll) continue;
    if (!DrafterReads(key.name, kind)) continue;
    const std::string value =
        std::string_view(key.name) == "acceptance.rule" ? config.rule() : ValueText(key, config);
    hash = Fnv1a(absl::StrCat(key.name, "=", value, "\n"), hash);
  }
  return absl::StrCat(absl::Hex(hash, absl::kZeroPad16));
}

}  // namespace canopy
