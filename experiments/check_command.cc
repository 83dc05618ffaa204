// canopy check: whether ids and logits depend on what they must not depend on.

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "experiments/check.h"
#include "experiments/commands.h"
#include "experiments/config.h"
#include "experiments/signals.h"

namespace canopy {
namespace {

constexpr char kUsage[] =
    "usage: canopy check --config FILE.cfg [--against KEY=VALUE ...] [--tolerance X] [--exact]\n"
    "                    [--key=value ...]\n\n"
    "Answers the config's questions under two settings and fails where a token id differs, or a "
    "logit by\n"
    "more than the tolerance. `canopy list` shows all keys; suite.* choose the questions.\n"
    "  --config     a config as for `canopy run`; nothing is written\n"
    "  --against    what is different in the second setting, such as run.dtype=f32; without it, "
    "run.device=cuda\n"
    "  --tolerance  greatest difference of a logit that passes; 0.002 unless given\n"
    "  --exact      instead: one setting, all the config's trees and drafters, plain decoding "
    "among "
    "them; fails\n"
    "               where any bit of the logits of the same token path differs\n";

// Takes the value of `--name=value` or `--name value`; false if args[*i] is another option.
bool TakeValue(std::span<const std::string> args, std::string_view name, size_t* i,
               std::string* value) {
  const std::string& arg = args[*i];
  if (arg == name && *i + 1 < args.size()) {
    *value = args[++*i];
    return true;
  }
  if (!arg.starts_with(absl::StrCat(std::string(name), "="))) return false;
  *value = arg.substr(name.size() + 1);
  return true;
}

// `keys` with those of `against` in place of theirs; a key given twice would be an axis.
std::vector<std::string> Replaced(const std::vector<std::string>& keys,
                                  const std::vector<std::string>& against) {
  const auto name = [](const std::string& arg) { return arg.substr(0, arg.find('=')); };
  std::vector<std::string> result = against;
  for (const std::string& key : keys) {
    const bool replaced = std::any_of(against.begin(), against.end(), [&](const std::string& arg) {
      return name(arg) == name(key);
    });
    if (!replaced) result.push_back(key);
  }
  return result;
}

}  // namespace

int RunCheckCommand(std::span<const std::string> args) {
  std::string file, value;
  bool exact = false;
  CheckOptions options;
  std::vector<std::string> keys, against;
  for (size_t i = 0; i < args.size(); ++i) {
    const std::string& arg = args[i];
    if (arg == "--help" || arg == "-h") {
      std::printf("%s", kUsage);
      return kExitOk;
    }
    if (arg == "--exact") {
      exact = true;
    } else if (TakeValue(args, "--config", &i, &value)) {
      file = value;
    } else if (TakeValue(args, "--against", &i, &value)) {
      if (value.find('=') == std::string::npos) {
        return ReportUsage("check", absl::StrCat("--against ", value,
                                                 ": expected KEY=VALUE, such as "
                                                 "run.dtype=f32"));
      }
      against.push_back(value.starts_with("--") ? value : absl::StrCat("--", value));
    } else if (TakeValue(args, "--tolerance", &i, &value)) {
      if (!absl::SimpleAtod(value, &options.tolerance) || !(options.tolerance >= 0.0)) {
        return ReportUsage("check",
                           absl::StrCat("--tolerance ", value, ": expected a number, 0 or more"));
      }
    } else if (arg.starts_with("--")) {
      keys.push_back(TakeKey(args, &i));
    } else {
      return ReportUsage("check", absl::StrCat("there is no option '", arg, "'"));
    }
  }
  if (file.empty()) {
    return ReportUsage("check", "a config file is expected: canopy check --config FILE.cfg");
  }
  if (exact && !against.empty()) {
    return ReportUsage("check", "--exact has one setting, so --against has no place there");
  }

  absl::StatusOr<ParsedConfig> parsed = LoadConfig(file, keys);
  if (!parsed.ok()) return ReportError("check", parsed.status());
  options.stop = CatchStopSignals();
  absl::StatusOr<CheckReport> report;
  if (exact) {
    report = CheckExact(*parsed, options);
  } else {
    if (against.empty()) against.push_back("--run.device=cuda");
    const std::vector<std::string> other = Replaced(keys, against);
    absl::StatusOr<ParsedConfig> second = LoadConfig(file, other);
    if (!second.ok()) return ReportError("check", second.status());
    report = CheckSettings(*parsed, *second, options);
  }
  if (!report.ok()) return ReportError("check", report.status());
  if (report->passed()) {
    std::printf("passed\n");
    return kExitOk;
  }
  std::string what;
  if (report->failed > 0) {
    what = absl::StrCat(report->failed, " answers failed");
  } else if (report->rows == 0) {
    what = "no two logits could be compared; take more methods or more questions";
  } else {
    what = absl::StrCat(report->answers_different, " of ", report->answers,
                        " answers differ in a token id, and ", report->rows_different, " of ",
                        report->rows, " rows of logits",
                        exact ? " in a bit" : " by more than the tolerance");
  }
  return ReportError("check", absl::FailedPreconditionError(what));
}

}  // namespace canopy
