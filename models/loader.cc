#include "models/loader.h"

#include <charconv>
#include <span>
#include <string_view>
#include <utility>

#include "absl/strings/str_join.h"
#include "models/architectures.h"
#include "models/synthetic.h"
#ifdef CANOPY_CUDA
#include "models/decoder_cuda.h"
#endif

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

// The spec of a checkpoint, read into `host`, or of a synthetic model, whose matrices are made on
// `synthetic_on` or, where that is null, left to the device.
absl::StatusOr<DecoderSpec> AnySpec(CpuBackend& host, const std::string& folder,
                                    CpuBackend* synthetic_on) {
  if (folder.starts_with(kSyntheticPrefix)) return SyntheticSpec(folder, synthetic_on);
  ASSIGN_OR_RETURN(Checkpoint checkpoint, Checkpoint::Open(host, folder));
  return ReadSpec(checkpoint);
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

absl::StatusOr<std::unique_ptr<LanguageModel>> LoadModel(Backend& backend,
                                                         const std::string& folder,
                                                         std::string_view dtype) {
  if (dtype != "auto" && dtype != "bf16" && dtype != "f32") {
    return absl::InvalidArgumentError(
        absl::StrCat("dtype ", std::string(dtype), ": expected auto, bf16 or f32"));
  }
  if (backend.kind() == DeviceKind::kCpu) {
    auto& cpu = static_cast<CpuBackend&>(backend);
    if (dtype != "auto") {
      return absl::InvalidArgumentError(
          absl::StrCat("dtype ", std::string(dtype),
                       ": the CPU keeps the checkpoint's dtype; leave it at auto"));
    }
    ASSIGN_OR_RETURN(DecoderSpec spec, AnySpec(cpu, folder, &cpu));
    absl::StatusOr<std::unique_ptr<LanguageModel>> model = MakeDecoder(cpu, std::move(spec));
    if (!model.ok()) return Annotate(model.status(), folder);
    return model;
  }
#ifdef CANOPY_CUDA
  // Checkpoints are read into the host's memory first.
  ASSIGN_OR_RETURN(const std::unique_ptr<CpuBackend> host, CpuBackend::Create(1));
  ASSIGN_OR_RETURN(DecoderSpec spec, AnySpec(*host, folder, nullptr));
  const bool bf16 = dtype == "bf16" || (dtype == "auto" && spec.info.dtype == DType::kBF16);
  absl::StatusOr<std::unique_ptr<CudaModel>> model = MakeCudaDecoder(
      static_cast<CudaBackend&>(backend), std::move(spec), bf16 ? DType::kBF16 : DType::kF32);
  if (!model.ok()) return Annotate(model.status(), folder);
  return std::unique_ptr<LanguageModel>(*std::move(model));
#else
  return absl::InternalError("a device that this build does not have");
#endif
}

absl::StatusOr<DeviceName> ParseDevice(std::string_view text) {
  if (text == "cpu") return DeviceName{DeviceKind::kCpu};
  if (text == "cuda") return DeviceName{DeviceKind::kCuda};
  constexpr std::string_view kNumbered = "cuda:";
  int number = 0;
  const char* end = text.data() + text.size();
  if (text.starts_with(kNumbered)) {
    const auto [rest, error] = std::from_chars(text.data() + kNumbered.size(), end, number);
    if (error == std::errc() && rest == end && number >= 0) {
      return DeviceName{DeviceKind::kCuda, number};
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat("device ", std::string(text), ": expected cpu, cuda or cuda:N"));
}

absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(std::string_view device, int threads) {
  ASSIGN_OR_RETURN(const DeviceName name, ParseDevice(device));
  if (name.kind == DeviceKind::kCpu) {
    ASSIGN_OR_RETURN(std::unique_ptr<CpuBackend> cpu, CpuBackend::Create(threads));
    return std::unique_ptr<Backend>(std::move(cpu));
  }
#ifdef CANOPY_CUDA
  ASSIGN_OR_RETURN(std::unique_ptr<CudaBackend> backend, CudaBackend::Create(name.number));
  return std::unique_ptr<Backend>(std::move(backend));
#else
  return absl::InvalidArgumentError(
      absl::StrCat("device ", std::string(device),
                   ": this build of canopy has no CUDA; configure it with -DCANOPY_CUDA=ON"));
#endif
}

}  // namespace canopy
