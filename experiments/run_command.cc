#include <cstdio>
#include <string>
#include <vector>

#include "experiments/commands.h"
#include "experiments/config.h"
#include "experiments/runner.h"
#include "experiments/signals.h"

namespace canopy {
namespace {

constexpr char kUsage[] =
    "usage: canopy run FILE.cfg [--key=value ...] [--dry-run]\n\n"
    "Runs the experiment in FILE.cfg. A key on the command line takes the place of the file's; a "
    "key\n"
    "with several values (`a | b`, or given twice) is an axis of a sweep. `canopy list` shows all "
    "keys.\n"
    "--dry-run checks everything and prints the effective config and the runs, without models.\n"
    "Started again with the same arguments, a run that was interrupted goes on where it stopped.\n";

}  // namespace

int RunRunCommand(std::span<const std::string> args) {
  std::string file;
  bool dry_run = false;
  std::vector<std::string> keys;
  for (size_t i = 0; i < args.size(); ++i) {
    const std::string& arg = args[i];
    if (arg == "--help" || arg == "-h") {
      std::printf("%s", kUsage);
      return kExitOk;
    }
    if (arg == "--dry-run") {
      dry_run = true;
    } else if (arg.starts_with("--")) {
      keys.push_back(TakeKey(args, &i));
    } else if (arg.starts_with("-")) {
      return ReportUsage("run", absl::StrCat("there is no option '", arg, "'"));
    } else if (file.empty()) {
      file = arg;
    } else {
      return ReportUsage("run", absl::StrCat("one config file is expected; '", file, "' and '", arg,
                                             "' were given"));
    }
  }
  if (file.empty()) return ReportUsage("run", "a config file is expected: canopy run FILE.cfg");

  absl::StatusOr<ParsedConfig> parsed = LoadConfig(file, keys);
  if (!parsed.ok()) return ReportError("run", parsed.status());
  if (dry_run) {
    const absl::Status status = DryRun(*parsed, stdout);
    return status.ok() ? kExitOk : ReportError("run", status);
  }

  RunnerOptions options;
  options.stop = CatchStopSignals();
  absl::StatusOr<RunReport> report = RunExperiment(*parsed, options);
  if (!report.ok()) return ReportError("run", report.status());
  if (report->stopped) {
    return ReportError("run", absl::CancelledError("interrupted; start the same command again to "
                                                   "go on where it stopped"));
  }
  if (report->red) {
    return ReportError(
        "run", absl::InternalError("the method's tokens differ from plain decoding's (see above)"));
  }
  if (report->failed > 0) {
    return ReportError("run", absl::InternalError(absl::StrCat(
                                  report->failed, " questions failed (their records say why)")));
  }
  return kExitOk;
}

}  // namespace canopy
