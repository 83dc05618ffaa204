// Experiment configs: every key is declared once, in a table over this struct.
//
//   # question at the top
//   [target]
//   model = ../data/models/tiny-bamba-4m
//   [tree]
//   shape = chain:4 | topk:4,2,1       # two values: a sweep axis
//   nodes = 16
//   nodes = 32                         # a repeated key is an axis as well
//
// The same keys stand on the command line (--tree.nodes=32), where they replace the file's values
// of that key. Values of an axis are separated by " | " (a bar with a blank on both sides), because
// commas and brackets belong to tree shapes. The sweep is the product of its axes, the key that is
// declared last varying fastest. Comments begin with # anywhere in a line. Paths are relative to
// the config file, on the command line to the working folder.

#ifndef CANOPY_EXPERIMENTS_CONFIG_H_
#define CANOPY_EXPERIMENTS_CONFIG_H_

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "core/status.h"
#include "verify/sampling.h"

namespace canopy {

// One run: a point of the sweep. The initialisers are the keys' defaults.
struct ExperimentConfig {
  std::string target_model;

  std::string draft_kind = "model";
  std::string draft_model;
  std::string draft_method = "topk";
  int draft_ngram_min = 1;
  int draft_ngram_max = 3;
  int draft_ngram_matches = 32;
  std::string draft_extra;

  std::string tree_shape = "chain:4";
  int tree_nodes = 64;

  std::string acceptance_rule = "auto";

  double sampling_temperature = 0.0;
  int sampling_top_k = 0;
  double sampling_top_p = 1.0;
  int64_t sampling_seed = 0;

  std::string suite_questions;
  std::string suite_categories;
  int suite_every = 1;
  int suite_sample = 0;
  int suite_limit = 0;
  int suite_max_new_tokens = 1024;
  std::string suite_template;

  std::string run_device = "cpu";
  std::string run_dtype = "auto";
  int run_threads = 0;
  bool run_baseline = true;
  int run_warmup = 1;
  int run_repetitions = 1;
  std::string run_results = "results";
  std::string run_name;

  // Derived from the keys.
  SamplingOptions sampling() const;
  std::string rule() const;  // acceptance_rule with "auto" resolved
  // Whether the answers' token ids are to be plain decoding's: its tokens do not depend on drafts.
  bool equals_plain() const;
};

// What a key has a say in.
enum class KeyScope {
  kAmount,  // how much is run and where the results go: may change when a run is continued
  kMethod,  // the speculative arm's results
  kAll,     // plain decoding's results too
};

struct ConfigKey {
  using Member = std::variant<std::string ExperimentConfig::*, int ExperimentConfig::*,
                              int64_t ExperimentConfig::*, double ExperimentConfig::*,
                              bool ExperimentConfig::*>;
  const char* name;
  Member member;
  // Numbers must lie in [min, max].
  double min;
  double max;
  const char* help;
  // May have several values.
  bool sweep;
  // The value is a path; see the top of this file.
  bool path;
  KeyScope scope;
};

// In the order of the struct.
std::span<const ConfigKey> ConfigKeys();
// The value as it stands in config files, records and listings. Numbers round-trip.
std::string ValueText(const ConfigKey& key, const ExperimentConfig& config);
// What values are allowed: "8 .. 64", "true, false", "one of a, b"; empty if anything is.
std::string RangeText(const ConfigKey& key);
// The declared key that is fewest edits away from `name`.
std::string NearestKey(std::string_view name);

// Values by key, before they are checked and multiplied out.
class ConfigBuilder {
 public:
  // The text of a config file. Errors name file and line. Paths become relative to `folder`
  // instead.
  absl::Status AddFile(std::string_view text, const std::string& file, const std::string& folder);
  // `--key=value` or `--key value`. InvalidArgument for anything else.
  absl::Status AddArguments(std::span<const std::string> args);

  // The runs of the sweep; one where no key has several values. Every value of every axis is
  // checked first: InvalidArgument names key, value, range and where it was set.
  absl::StatusOr<std::vector<ExperimentConfig>> Build() const;
  // Names of keys with several values, in declaration order.
  std::vector<std::string> Axes() const;

 private:
  struct Value {
    std::string text;
    std::string origin;  // "file.cfg:12" or "command line"
  };
  absl::Status Add(std::string_view name, const std::string& text, const std::string& origin,
                   const std::string* folder, std::map<int, std::vector<Value>>* values);

  std::map<int, std::vector<Value>> file_;       // by index of key
  std::map<int, std::vector<Value>> arguments_;  // take the place of the file's
};

// Reads `file` and applies the arguments. run.name defaults to the file's name without its ending.
// NotFound if it cannot be read.
struct ParsedConfig {
  std::vector<ExperimentConfig> runs;  // at least one
  std::vector<std::string> axes;
};
absl::StatusOr<ParsedConfig> LoadConfig(const std::string& file, std::span<const std::string> args);

// Checks of one run across its keys: tree against tree.nodes, rule against temperature, missing
// paths.
absl::Status CheckConfig(const ExperimentConfig& config);

// Whether a built-in drafter's results depend on the key. True for keys that are not a drafter's
// and for drafters that are not built in.
bool DrafterReads(std::string_view key, std::string_view kind);

// Sixteen hex digits over the keys that a record of this run depends on: those of scope kAll, and
// unless `baseline` those of scope kMethod that its drafter reads. acceptance.rule counts as what
// "auto" stands for.
std::string ConfigHash(const ExperimentConfig& config, bool baseline);

}  // namespace canopy

#endif  // CANOPY_EXPERIMENTS_CONFIG_H_
