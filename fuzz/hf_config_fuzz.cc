// Any bytes as a config.json: refused, or every key can be asked for as every type.

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "core/hf_config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::StatusOr<canopy::HfConfig> config = canopy::HfConfig::Parse(
      std::string_view(reinterpret_cast<const char*>(data), size), "fuzz.json");
  if (!config.ok()) return 0;
  for (const char* key : {"a", "b", "eos_token_id", "time_step_limit", "rope_parameters"}) {
    (void)config->Has(key);
    (void)config->Int(key);
    (void)config->Double(key);
    (void)config->Bool(key);
    (void)config->String(key);
    (void)config->Ints(key);
    (void)config->Doubles(key);
    (void)config->Strings(key);
    const absl::StatusOr<canopy::HfConfig> inner = config->Object(key);
    if (inner.ok()) (void)inner->Double("a");
  }
  return 0;
}
