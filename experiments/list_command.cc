#include <cstdio>
#include <string>

#include "core/chat_template.h"
#include "drafting/registry.h"
#include "experiments/commands.h"
#include "experiments/config.h"
#include "models/loader.h"
#include "models/synthetic.h"
#include "verify/acceptance.h"

namespace canopy {

int RunListCommand(std::span<const std::string> args) {
  if (!args.empty()) return ReportUsage("list", "takes no arguments");
  std::printf("architectures (model_type of config.json)\n");
  for (const std::string& name : ListArchitectures()) std::printf("  %s\n", name.c_str());
  std::printf("\nsynthetic models (a path to a model with random weights)\n");
  for (const auto& [name, source] : ListSyntheticModels()) {
    std::printf("  %-34s sizes of %s\n", name.c_str(), source.c_str());
  }
  std::printf("\ndrafters (draft.kind)\n");
  for (const auto& [name, help] : ListDrafters()) {
    std::printf("  %-12s %s\n", name.c_str(), help.c_str());
  }
  std::printf("\nacceptance rules (acceptance.rule)\n");
  for (const auto& [name, help] : ListAcceptanceRules()) {
    std::printf("  %-12s %s\n", std::string(name).c_str(), std::string(help).c_str());
  }
  std::printf("\nbuilt-in chat templates (suite.template)\n");
  for (const std::string& name : ChatTemplate::BuiltinNames()) std::printf("  %s\n", name.c_str());
  std::printf("\nconfig keys (--key=value, or [section] key = value in a .cfg file)\n");
  const ExperimentConfig defaults;
  for (const ConfigKey& key : ConfigKeys()) {
    std::string value = ValueText(key, defaults);
    if (value.empty()) value = "(empty)";
    const std::string range = RangeText(key);
    std::printf("  %-22s %s%s\n", key.name, key.help, key.sweep ? "" : " [one value]");
    std::printf("  %-22s   default %s%s%s\n", "", value.c_str(), range.empty() ? "" : "; allowed ",
                range.c_str());
  }
  return kExitOk;
}

}  // namespace canopy
