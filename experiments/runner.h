// Runs an experiment: every run of the sweep over the chosen questions, plain decoding beside it.
//
// Runs that share target, sampling and suite share one baseline; its answers and the runs' are
// interleaved question by question, each question starting with another arm, so that a machine that
// slows down slows down all of them. Models are loaded once.

#ifndef CANOPY_EXPERIMENTS_RUNNER_H_
#define CANOPY_EXPERIMENTS_RUNNER_H_

#include <atomic>
#include <cstdio>
#include <string>
#include <vector>

#include "core/status.h"
#include "experiments/config.h"
#include "experiments/report.h"

namespace canopy {

struct RunnerOptions {
  FILE* out = stdout;                       // tables
  FILE* progress = stderr;                  // progress and notes
  const std::atomic<bool>* stop = nullptr;  // set by Ctrl-C; looked at after every round
};

// What became of a run.
struct RunReport {
  std::vector<ArmReport> arms;
  int64_t failed = 0;    // answers that failed
  bool red = false;      // some arm's gate is red
  bool stopped = false;  // by options.stop; the records of what was finished are kept
};

// Results go to run.results/run.name: records.jsonl, answers/, summary.csv, summary.txt and
// effective.cfg. What is already there of the same experiment is not run again. FailedPrecondition
// if the folder holds another experiment's results.
absl::StatusOr<RunReport> RunExperiment(const ParsedConfig& parsed, const RunnerOptions& options);

// Checks everything that can be checked without loading a model and prints the effective config and
// the list of runs. Folders that do not exist are noted.
absl::Status DryRun(const ParsedConfig& parsed, FILE* out);

// The effective config as a config file, axes with all their values.
std::string EffectiveConfigText(const ParsedConfig& parsed);
// A short name of a run, telling it from the others of the sweep.
std::string ArmName(const ExperimentConfig& config, const std::vector<std::string>& axes);

}  // namespace canopy

#endif  // CANOPY_EXPERIMENTS_RUNNER_H_
