#include "models/loader.h"

#include <span>
#include <string_view>
#include <utility>

#include "absl/strings/str_join.h"
#include "models/architectures.h"

namespace canopy {
namespace {

struct Architecture {
  std::string_view model_type;  // of config.json
  absl::StatusOr<DecoderSpec> (*read)(Checkpoint& checkpoint);
};

// Every architecture that Canopy runs, by name.
constexpr Architecture kArchitectures[] = {
    {"bamba", &ReadBamba}, {"llama", &ReadLlama}, {"mamba2", &ReadMamba2},
    {"qwen2", &ReadQwen2}, {"qwen3", &ReadQwen3},
};

absl::StatusOr<const Architecture*> FindArchitecture(const HfConfig& config) {
  const std::string known = absl::StrJoin(ListArchitectures(), ", ");
  if (!config.Has("model_type")) {
    const bool original = config.Has("ssm_cfg");
    return absl::UnimplementedError(absl::StrCat(
        config.Where("model_type"), " is missing",
        original ? "; this is mamba_ssm's own form, use the model's conversion for transformers"
                 : absl::StrCat("; expected one of ", known)));
  }
  ASSIGN_OR_RETURN(const std::string type, config.String("model_type"));
  for (const Architecture& architecture : kArchitectures) {
    if (architecture.model_type == type) return &architecture;
  }
  return absl::UnimplementedError(
      absl::StrCat(config.Where("model_type"), " is ", type, "; Canopy has ", known));
}

}  // namespace

std::vector<std::string> ListArchitectures() {
  std::vector<std::string> names;
  for (const Architecture& architecture : kArchitectures) {
    names.emplace_back(architecture.model_type);
  }
  return names;
}

absl::StatusOr<DecoderSpec> ReadSpec(Checkpoint& checkpoint) {
  const HfConfig& config = checkpoint.config();
  ASSIGN_OR_RETURN(const Architecture* architecture, FindArchitecture(config));
  if (config.Has("quantization_config")) {
    return absl::UnimplementedError(
        absl::StrCat(config.Where("quantization_config"),
                     " is set; Canopy reads weights of F32, BF16 and F16, not quantised ones"));
  }
  ASSIGN_OR_RETURN(DecoderSpec spec, architecture->read(checkpoint));
  spec.info.architecture = architecture->model_type;
  spec.info.path = checkpoint.folder();
  spec.info.dtype = spec.head.dtype();
  spec.info.parameters = checkpoint.parameters();
  spec.info.checkpoint_hash = checkpoint.tensors().Hash();
  ASSIGN_OR_RETURN(spec.info.eos_tokens, ReadEosTokens(checkpoint.folder(), config));
  return spec;
}

absl::StatusOr<std::unique_ptr<LanguageModel>> LoadModel(CpuBackend& backend,
                                                         const std::string& folder) {
  ASSIGN_OR_RETURN(Checkpoint checkpoint, Checkpoint::Open(backend, folder));
  ASSIGN_OR_RETURN(DecoderSpec spec, ReadSpec(checkpoint));
  absl::StatusOr<std::unique_ptr<LanguageModel>> model = MakeDecoder(backend, std::move(spec));
  if (!model.ok()) return Annotate(model.status(), folder);
  return model;
}

}  // namespace canopy
