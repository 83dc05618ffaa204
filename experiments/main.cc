#include <string>
#include <vector>

#include "experiments/commands.h"

int main(int argc, char** argv) {
  const std::vector<std::string> args(argv + 1, argv + argc);
  return canopy::RunCanopy(args);
}
