// The commands of the `canopy` binary.
//
// A command gets what follows its name on the command line and returns the exit code: 0, 1 for an
// error (one line on stderr, "canopy NAME: what went wrong"), 2 for wrong usage. To add one,
// declare it here, write it in a file of its own, and add its row to kCommands in commands.cc.

#ifndef CANOPY_EXPERIMENTS_COMMANDS_H_
#define CANOPY_EXPERIMENTS_COMMANDS_H_

#include <boost/program_options.hpp>
#include <span>
#include <string>

#include "core/status.h"

namespace canopy {

inline constexpr int kExitOk = 0;
inline constexpr int kExitError = 1;
inline constexpr int kExitUsage = 2;

struct Command {
  const char* name;
  const char* usage;  // what follows the name
  const char* help;   // one line
  int (*run)(std::span<const std::string> args);
};

// In the order in which help lists them.
std::span<const Command> Commands();

int RunRunCommand(std::span<const std::string> args);
int RunGenerateCommand(std::span<const std::string> args);
int RunListCommand(std::span<const std::string> args);
int RunGoldenCommand(std::span<const std::string> args);
int RunCheckCommand(std::span<const std::string> args);
int RunBenchCommand(std::span<const std::string> args);
int RunInspectCommand(std::span<const std::string> args);

// Prints "canopy NAME: message" as one line on stderr and returns kExitError.
int ReportError(const char* command, const absl::Status& status);
// Likewise with where to find the usage; returns kExitUsage.
int ReportUsage(const char* command, const std::string& message);

// Reads a command's flags, which must have "help"; `positional` names the flag that an argument
// without a name is for, or is empty. The exit code where the command ends here (help was asked
// for, or the usage is wrong), and otherwise -1.
int ReadFlags(const char* command, std::span<const std::string> args,
              const boost::program_options::options_description& flags,
              const std::string& positional, boost::program_options::variables_map* values);

// Takes the config key that begins at args[*i], with its value where that is the next argument, as
// one "--key=value". *i ends at the last argument that belongs to it.
std::string TakeKey(std::span<const std::string> args, size_t* i);

// The whole binary but for main: picks the command and catches what it throws. Never throws.
int RunCanopy(std::span<const std::string> args);

}  // namespace canopy

#endif  // CANOPY_EXPERIMENTS_COMMANDS_H_
