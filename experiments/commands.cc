#include "experiments/commands.h"

#include <cstdio>
#include <exception>
#include <new>
#include <sstream>
#include <string_view>
#include <vector>

#include "experiments/version.h"

namespace canopy {
namespace {

namespace po = boost::program_options;

constexpr Command kCommands[] = {
    {"run", "FILE.cfg [--key=value ...] [--dry-run]", "run an experiment or a sweep",
     RunRunCommand},
    {"generate", "--target DIR [--draft DIR] --prompt TEXT [--max-new-tokens N] ...",
     "answer one prompt, streaming (`canopy generate --help`)", RunGenerateCommand},
    {"golden", "--model DIR --golden FILE [--tolerance X] [--threads N]",
     "compare a model with a file of logits from another implementation", RunGoldenCommand},
    {"check", "--config FILE.cfg [--against KEY=VALUE] [--tolerance X] [--exact] [--key=value ...]",
     "run a config under two settings and compare ids and logits; --exact: compare bits across "
     "trees and drafters",
     RunCheckCommand},
    {"inspect", "DIR [--check]",
     "architecture, layers, parameters and memory of a checkpoint; --check scans its weights",
     RunInspectCommand},
    {"bench", "--model DIR [--device cuda] [--nodes 1,2,...] [--context N,...] [--compare]",
     "what a pass costs on a GPU by its number of nodes (`canopy bench --help`)", RunBenchCommand},
    {"list", "", "what there is: architectures, drafters, acceptance rules, config keys",
     RunListCommand},
};

std::string OneLine(std::string_view text) {
  std::string line(text);
  for (char& c : line) {
    if (c == '\n' || c == '\r') c = ' ';
  }
  return line;
}

void PrintHelp(FILE* out) {
  std::fprintf(out,
               "Canopy: speculative decoding with token trees.\n\n"
               "usage: canopy COMMAND [ARGUMENTS]\n\n");
  for (const Command& command : Commands()) {
    std::fprintf(out, "  canopy %s %s\n      %s\n", command.name, command.usage, command.help);
  }
  std::fprintf(out, "  canopy help\n  canopy --version\n");
}

}  // namespace

std::span<const Command> Commands() { return kCommands; }

int ReportError(const char* command, const absl::Status& status) {
  const std::string_view message(status.message().data(), status.message().size());
  std::fprintf(stderr, "canopy %s: %s\n", command, OneLine(message).c_str());
  return kExitError;
}

int ReportUsage(const char* command, const std::string& message) {
  std::fprintf(stderr, "canopy %s: %s (see `canopy help`)\n", command, OneLine(message).c_str());
  return kExitUsage;
}

int ReadFlags(const char* command, std::span<const std::string> args,
              const po::options_description& flags, const std::string& positional,
              po::variables_map* values) {
  try {
    po::positional_options_description places;
    if (!positional.empty()) places.add(positional.c_str(), 1);
    po::store(po::command_line_parser(std::vector<std::string>(args.begin(), args.end()))
                  .options(flags)
                  .positional(places)
                  .run(),
              *values);
    if (values->count("help") > 0) {
      std::ostringstream text;
      text << flags;
      std::fputs(text.str().c_str(), stdout);
      return kExitOk;
    }
    po::notify(*values);
  } catch (const po::error& error) {
    return ReportUsage(command, error.what());
  }
  return -1;
}

std::string TakeKey(std::span<const std::string> args, size_t* i) {
  const std::string& arg = args[*i];
  const bool value_follows =
      arg.find('=') == std::string::npos && *i + 1 < args.size() && !args[*i + 1].starts_with("--");
  return value_follows ? absl::StrCat(arg, "=", args[++*i]) : arg;
}

int RunCanopy(std::span<const std::string> args) {
  if (args.empty()) {
    PrintHelp(stderr);
    return kExitUsage;
  }
  const std::string& name = args[0];
  if (name == "help" || name == "--help" || name == "-h") {
    PrintHelp(stdout);
    return kExitOk;
  }
  if (name == "--version" || name == "version") {
    std::printf("canopy %s (%s)\n", kVersion, GitRevision());
    return kExitOk;
  }
  for (const Command& command : Commands()) {
    if (name != command.name) continue;
    try {
      const int code = command.run(args.subspan(1));
      const bool lost = std::fflush(stdout) != 0 || std::ferror(stdout) != 0;
      if (lost && code == kExitOk) {
        return ReportError(command.name, absl::DataLossError("cannot write to standard output"));
      }
      return code;
    } catch (const std::bad_alloc&) {
      return ReportError(command.name, absl::ResourceExhaustedError("out of memory"));
    } catch (const std::exception& error) {
      return ReportError(command.name, absl::InternalError(error.what()));
    }
  }
  std::fprintf(stderr, "canopy: there is no command '%s' (see `canopy help`)\n",
               OneLine(name).c_str());
  return kExitUsage;
}

}  // namespace canopy
