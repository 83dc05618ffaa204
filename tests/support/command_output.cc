#include "tests/support/command_output.h"

#include "experiments/commands.h"
#include "gtest/gtest.h"

namespace canopy::testing {

CommandOutput RunCommand(const std::vector<std::string>& args) {
  CommandOutput output;
  ::testing::internal::CaptureStdout();
  ::testing::internal::CaptureStderr();
  output.code = RunCanopy(args);
  output.out = ::testing::internal::GetCapturedStdout();
  output.err = ::testing::internal::GetCapturedStderr();
  return output;
}

}  // namespace canopy::testing
