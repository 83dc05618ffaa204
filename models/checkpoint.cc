#include "models/checkpoint.h"

#include <charconv>
#include <filesystem>

#include "absl/strings/str_join.h"

namespace canopy {
namespace {

std::string ShapeString(std::span<const int64_t> shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

}  // namespace

absl::StatusOr<Checkpoint> Checkpoint::Open(CpuBackend& backend, const std::string& folder) {
  std::error_code ignored;
  if (!std::filesystem::is_directory(folder, ignored)) {
    return absl::NotFoundError(
        absl::StrCat(folder, ": is not a folder; expected a checkpoint in Hugging Face form"));
  }
  ASSIGN_OR_RETURN(HfConfig config,
                   HfConfig::Load((std::filesystem::path(folder) / "config.json").string()));
  ASSIGN_OR_RETURN(Safetensors tensors, Safetensors::OpenFolder(folder));
  return Checkpoint(backend, folder, std::move(config), std::move(tensors));
}

Checkpoint::Checkpoint(CpuBackend& backend, std::string folder, HfConfig config,
                       Safetensors tensors)
    : backend_(&backend),
      folder_(std::move(folder)),
      config_(std::move(config)),
      tensors_(std::move(tensors)) {}

absl::StatusOr<const SafetensorsEntry*> Checkpoint::Get(const std::string& name,
                                                        std::span<const int64_t> shape) {
  const SafetensorsEntry* entry = tensors_.Find(name);
  if (entry == nullptr) {
    return absl::NotFoundError(absl::StrCat(folder_, ": tensor ", name, " ", ShapeString(shape),
                                            " is missing; config.json asks for it"));
  }
  if (!std::equal(shape.begin(), shape.end(), entry->shape.begin(), entry->shape.end())) {
    return absl::InvalidArgumentError(absl::StrCat(tensors_.files()[entry->file], ": tensor ", name,
                                                   " has shape ", entry->ShapeString(),
                                                   "; config.json asks for ", ShapeString(shape)));
  }
  if (entry->dtype != DType::kF32 && entry->dtype != DType::kBF16 && entry->dtype != DType::kF16) {
    return absl::UnimplementedError(absl::StrCat(tensors_.files()[entry->file], ": tensor ", name,
                                                 " has dtype ", entry->dtype_name,
                                                 "; Canopy computes with F32, BF16 and F16"));
  }
  if (read_.insert(entry).second) parameters_ += entry->elements();
  return entry;
}

absl::StatusOr<PackedMatrix> Checkpoint::Matrix(std::initializer_list<Rows> parts,
                                                int64_t columns) {
  std::vector<PackedMatrix::Source> sources;
  const SafetensorsEntry* first = nullptr;
  int64_t rows = 0;
  for (const Rows& part : parts) {
    ASSIGN_OR_RETURN(const SafetensorsEntry* entry,
                     Get(part.name, std::vector<int64_t>{part.rows, columns}));
    if (first == nullptr) first = entry;
    if (entry->dtype != first->dtype) {
      return absl::UnimplementedError(
          absl::StrCat(tensors_.files()[entry->file], ": tensor ", part.name, " has dtype ",
                       entry->dtype_name, " and ", parts.begin()->name, " has ", first->dtype_name,
                       "; they are used as one matrix and must have one dtype"));
    }
    rows += part.rows;
    if (rows > INT32_MAX || columns > INT32_MAX) {
      return absl::UnimplementedError(absl::StrCat(folder_, ": tensor ", part.name, " ",
                                                   entry->ShapeString(), " has too many rows"));
    }
    sources.push_back({entry->data, static_cast<int>(part.rows)});
  }
  absl::StatusOr<PackedMatrix> matrix =
      PackedMatrix::Pack(*backend_, *first->dtype, static_cast<int>(columns), sources);
  if (!matrix.ok())
    return Annotate(matrix.status(), absl::StrCat(folder_, ": ", parts.begin()->name));
  return matrix;
}

absl::StatusOr<std::vector<float>> Checkpoint::Floats(const std::string& name,
                                                      std::span<const int64_t> shape) {
  ASSIGN_OR_RETURN(const SafetensorsEntry* entry, Get(name, shape));
  std::vector<float> values(entry->elements());
  RETURN_IF_ERROR(Annotate(ReadFloats(*entry, values), name));
  return values;
}

absl::StatusOr<std::vector<float>> Checkpoint::Vector(std::initializer_list<Rows> parts) {
  std::vector<float> result;
  for (const Rows& part : parts) {
    ASSIGN_OR_RETURN(const std::vector<float> values,
                     Floats(part.name, std::vector<int64_t>{part.rows}));
    result.insert(result.end(), values.begin(), values.end());
  }
  return result;
}

absl::StatusOr<std::vector<float>> Checkpoint::Vector(const std::string& name, int64_t size) {
  return Vector({{name, size}});
}

absl::Status Checkpoint::CheckLayersFullyRead(std::string_view layer_prefix, int layers) const {
  for (const auto& [name, entry] : tensors_.entries()) {
    if (read_.contains(&entry) || !name.starts_with(layer_prefix)) continue;
    const char* begin = name.data() + layer_prefix.size();
    const char* end = name.data() + name.size();
    int layer = -1;
    const auto [rest, error] = std::from_chars(begin, end, layer);
    if (error != std::errc() || rest == end || *rest != '.' || layer < 0 || layer >= layers)
      continue;
    if (name.ends_with(".rotary_emb.inv_freq")) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        tensors_.files()[entry.file], ": tensor ", name, " ", entry.ShapeString(),
        " is not used by the architecture with this config.json, so the results would "
        "differ; is a key such as attention_bias wrong, or the checkpoint quantised?"));
  }
  return absl::OkStatus();
}

}  // namespace canopy
