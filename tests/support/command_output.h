// A command of the binary, run inside the test.

#ifndef CANOPY_TESTS_SUPPORT_COMMAND_OUTPUT_H_
#define CANOPY_TESTS_SUPPORT_COMMAND_OUTPUT_H_

#include <string>
#include <vector>

namespace canopy::testing {

struct CommandOutput {
  int code = 0;
  std::string out;
  std::string err;
};

// What RunCanopy prints and returns.
CommandOutput RunCommand(const std::vector<std::string>& args);

}  // namespace canopy::testing

#endif  // CANOPY_TESTS_SUPPORT_COMMAND_OUTPUT_H_
