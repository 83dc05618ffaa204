// Any text is read as a config or refused; what is read has values in range and reads back the
// same.

#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "experiments/config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace canopy;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  ConfigBuilder builder;
  if (!builder.AddFile(text, "fuzz.cfg", "folder").ok()) return 0;
  const auto runs = builder.Build();
  if (!runs.ok()) return 0;
  if (runs->empty()) std::abort();
  for (const ExperimentConfig& run : *runs) {
    if (run.tree_nodes < 1 || run.tree_nodes > 512) std::abort();
    if (!(run.sampling_temperature >= 0)) std::abort();
    (void)CheckConfig(run);
  }
  // The first run as arguments is the same run. Paths are left out: those of a file are joined to
  // its folder, and may then begin with a blank that an argument would lose.
  ConfigBuilder again;
  std::vector<std::string> arguments;
  for (const ConfigKey& key : ConfigKeys()) {
    if (key.path) continue;
    arguments.push_back("--" + std::string(key.name) + "=" + ValueText(key, runs->front()));
  }
  if (!again.AddArguments(arguments).ok()) std::abort();
  const auto same = again.Build();
  if (!same.ok() || same->size() != 1) std::abort();
  for (const ConfigKey& key : ConfigKeys()) {
    if (key.path) continue;
    if (ValueText(key, same->front()) != ValueText(key, runs->front())) std::abort();
  }
  return 0;
}
