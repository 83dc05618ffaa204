// What checkpoints with Mamba-2 mixers have in common.

#ifndef CANOPY_MODELS_SSD_COMMON_H_
#define CANOPY_MODELS_SSD_COMMON_H_

#include <string>

#include "models/checkpoint.h"
#include "models/decoder.h"

namespace canopy {

struct SsdSizes {
  int hidden_size = 0;
  int heads = 0;
  int head_dim = 0;
  int groups = 0;
  int d_state = 0;
  int conv_kernel = 0;
  int expand = 2;
  bool proj_bias = false;
  bool conv_bias = true;
  double norm_eps = 1e-5;
  int norm_groups = 1;
  double dt_min = 0.0;
  double dt_max = 0.0;
};

// Sets dt_min and dt_max from time_step_limit (0 and infinity without the key) and norm_groups, and
// checks that the sizes agree. `shape` has its sizes already.
//
// norm_groups: over how many equal slices of the row the gated norm takes its mean where n_groups
// > 1. mamba_ssm uses n_groups slices; transformers took the whole row before version 5.23 and
// n_groups slices since. A checkpoint is read as the version that wrote it (config.json's
// transformers_version) computes it, and with n_groups slices where no version is given. A key
// norm_groups in config.json overrides this: set it to n_groups for weights that were trained with
// mamba_ssm and converted by an earlier transformers.
absl::Status FinishSsdSizes(const HfConfig& config, SsdSizes* shape);

// in_proj, conv1d, A_log, D, dt_bias, norm and out_proj below `prefix`, "backbone.layers.0.mixer.".
absl::StatusOr<SsdSpec> ReadSsd(Checkpoint& checkpoint, const std::string& prefix,
                                const SsdSizes& shape);

}  // namespace canopy

#endif  // CANOPY_MODELS_SSD_COMMON_H_
