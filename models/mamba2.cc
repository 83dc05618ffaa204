// Mamba-2 (arXiv 2405.21060; transformers' Mamba2ForCausalLM): SSD mixers behind an RMSNorm each,
// no MLP. residual_in_fp32 changes nothing here, activations are f32.

#include "models/architectures.h"
#include "models/ssd_common.h"
#include "models/transformer_common.h"

namespace canopy {

absl::StatusOr<DecoderSpec> ReadMamba2(Checkpoint& checkpoint) {
  const HfConfig& config = checkpoint.config();
  DecoderSpec spec;
  ASSIGN_OR_RETURN(spec.info, ReadSizes(config, INT32_MAX));
  const int hidden = spec.info.hidden_size;
  SsdSizes shape{.hidden_size = hidden};
  ASSIGN_OR_RETURN(shape.heads, config.Int("num_heads", {.min = 1}, 128));
  ASSIGN_OR_RETURN(shape.head_dim, config.Int("head_dim", {.min = 1}, 64));
  ASSIGN_OR_RETURN(shape.groups, config.Int("n_groups", {.min = 1}, 8));
  ASSIGN_OR_RETURN(shape.d_state, config.Int("state_size", {.min = 1}, 128));
  ASSIGN_OR_RETURN(shape.conv_kernel, config.Int("conv_kernel", {.min = 1, .max = 64}, 4));
  ASSIGN_OR_RETURN(shape.expand, config.Int("expand", {.min = 1}, 2));
  ASSIGN_OR_RETURN(shape.proj_bias, config.Bool("use_bias", false));
  ASSIGN_OR_RETURN(shape.conv_bias, config.Bool("use_conv_bias", true));
  ASSIGN_OR_RETURN(shape.norm_eps, config.PositiveDouble("layer_norm_epsilon", 1e-5));
  RETURN_IF_ERROR(FinishSsdSizes(config, &shape));

  // mamba_ssm spells it in the singular, and so do early conversions.
  const bool singular = checkpoint.Has("backbone.embedding.weight");
  RETURN_IF_ERROR(ReadEmbeddingAndHead(
      checkpoint, singular ? "backbone.embedding.weight" : "backbone.embeddings.weight", &spec));
  ASSIGN_OR_RETURN(spec.final_norm,
                   ReadNorm(checkpoint, "backbone.norm_f.weight", hidden, shape.norm_eps));
  for (int layer = 0; layer < spec.info.layers; ++layer) {
    const std::string prefix = absl::StrCat("backbone.layers.", layer, ".");
    BlockSpec block;
    ASSIGN_OR_RETURN(block.norm,
                     ReadNorm(checkpoint, prefix + "norm.weight", hidden, shape.norm_eps));
    ASSIGN_OR_RETURN(block.mixer, ReadSsd(checkpoint, prefix + "mixer.", shape));
    spec.blocks.push_back(std::move(block));
  }
  RETURN_IF_ERROR(checkpoint.CheckLayersFullyRead("backbone.layers.", spec.info.layers));
  return spec;
}

}  // namespace canopy
