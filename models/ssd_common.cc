#include "models/ssd_common.h"

#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

namespace canopy {
namespace {

// Whether the transformers version that wrote the config normalises the whole row.
absl::StatusOr<bool> NormalisesWholeRow(const HfConfig& config) {
  ASSIGN_OR_RETURN(const std::string version, config.String("transformers_version", ""));
  int major = 0;
  int minor = 0;
  if (std::sscanf(version.c_str(), "%5d.%5d", &major, &minor) != 2) return false;
  return major < 5 || (major == 5 && minor < 23);
}

absl::Status RequireSilu(const HfConfig& config) {
  ASSIGN_OR_RETURN(const std::string name, config.String("hidden_act", "silu"));
  if (name == "silu" || name == "swish") return absl::OkStatus();
  return absl::UnimplementedError(absl::StrCat(config.Where("hidden_act"), " is ", name,
                                               "; Canopy has silu for Mamba-2's convolution"));
}

}  // namespace

absl::Status FinishSsdSizes(const HfConfig& config, SsdSizes* shape) {
  RETURN_IF_ERROR(RequireSilu(config));
  const int64_t inner = int64_t{shape->heads} * shape->head_dim;
  if (inner != int64_t{shape->expand} * shape->hidden_size) {
    return absl::InvalidArgumentError(absl::StrCat(
        config.file(), ": ", shape->heads, " heads of dimension ", shape->head_dim, " are ", inner,
        " columns; expected expand * hidden_size = ", int64_t{shape->expand} * shape->hidden_size));
  }
  if (shape->heads % shape->groups != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(config.file(), ": the number of groups ", shape->groups,
                     " does not divide the number of heads ", shape->heads));
  }
  shape->dt_min = 0.0;
  shape->dt_max = std::numeric_limits<double>::infinity();
  ASSIGN_OR_RETURN(const std::vector<double> limit, config.Doubles("time_step_limit"));
  if (!limit.empty()) {
    if (limit.size() != 2 || !(limit[0] >= 0) || !(limit[0] <= limit[1])) {
      return absl::InvalidArgumentError(absl::StrCat(
          config.Where("time_step_limit"), ": expected two numbers, 0 <= the first <= the second"));
    }
    shape->dt_min = limit[0];
    shape->dt_max = limit[1];
  }
  ASSIGN_OR_RETURN(const bool whole_row, NormalisesWholeRow(config));
  ASSIGN_OR_RETURN(shape->norm_groups,
                   config.Int("norm_groups", {.min = 1}, whole_row ? 1 : shape->groups));
  if (inner % shape->norm_groups != 0) {
    return absl::InvalidArgumentError(absl::StrCat(config.Where("norm_groups"), ": ",
                                                   shape->norm_groups,
                                                   " does not divide heads * head_dim = ", inner));
  }
  return absl::OkStatus();
}

absl::StatusOr<SsdSpec> ReadSsd(Checkpoint& checkpoint, const std::string& prefix,
                                const SsdSizes& shape) {
  const int64_t inner = int64_t{shape.heads} * shape.head_dim;
  const int64_t channels = inner + 2 * int64_t{shape.groups} * shape.d_state;
  const int64_t projected = inner + channels + shape.heads;
  SsdSpec spec;
  spec.heads = shape.heads;
  spec.head_dim = shape.head_dim;
  spec.groups = shape.groups;
  spec.d_state = shape.d_state;
  spec.conv_kernel = shape.conv_kernel;
  spec.norm_eps = static_cast<float>(shape.norm_eps);
  spec.norm_groups = shape.norm_groups;
  spec.dt_min = static_cast<float>(shape.dt_min);
  spec.dt_max = static_cast<float>(shape.dt_max);
  ASSIGN_OR_RETURN(spec.in_proj,
                   checkpoint.Matrix({{prefix + "in_proj.weight", projected}}, shape.hidden_size));
  ASSIGN_OR_RETURN(spec.out_proj,
                   checkpoint.Matrix({{prefix + "out_proj.weight", shape.hidden_size}}, inner));
  if (shape.proj_bias) {
    ASSIGN_OR_RETURN(spec.in_proj_bias, checkpoint.Vector(prefix + "in_proj.bias", projected));
    ASSIGN_OR_RETURN(spec.out_proj_bias,
                     checkpoint.Vector(prefix + "out_proj.bias", shape.hidden_size));
  }
  const std::vector<int64_t> conv_shape = {channels, 1, shape.conv_kernel};
  ASSIGN_OR_RETURN(const std::vector<float> conv,
                   checkpoint.Floats(prefix + "conv1d.weight", conv_shape));
  spec.conv_weight.resize(conv.size());
  for (int64_t channel = 0; channel < channels; ++channel) {
    for (int tap = 0; tap < shape.conv_kernel; ++tap) {
      spec.conv_weight[tap * channels + channel] = conv[channel * shape.conv_kernel + tap];
    }
  }
  if (shape.conv_bias) {
    ASSIGN_OR_RETURN(spec.conv_bias, checkpoint.Vector(prefix + "conv1d.bias", channels));
  }
  ASSIGN_OR_RETURN(spec.A, checkpoint.Vector(prefix + "A_log", shape.heads));
  for (float& a : spec.A) a = -std::exp(a);
  ASSIGN_OR_RETURN(spec.D, checkpoint.Vector(prefix + "D", shape.heads));
  ASSIGN_OR_RETURN(spec.dt_bias, checkpoint.Vector(prefix + "dt_bias", shape.heads));
  ASSIGN_OR_RETURN(spec.norm_weight, checkpoint.Vector(prefix + "norm.weight", inner));
  return spec;
}

}  // namespace canopy
