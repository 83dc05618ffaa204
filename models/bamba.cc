// Bamba (transformers' BambaForCausalLM): Mamba-2 mixers, attention in the layers that
// attn_layer_indices names, and a gated MLP in every layer.

#include <algorithm>
#include <vector>

#include "models/architectures.h"
#include "models/ssd_common.h"
#include "models/transformer_common.h"

namespace canopy {
namespace {

absl::StatusOr<SsdSizes> ReadShape(const HfConfig& config, int hidden) {
  SsdSizes shape{.hidden_size = hidden};
  ASSIGN_OR_RETURN(shape.expand, config.Int("mamba_expand", {.min = 1}, 2));
  ASSIGN_OR_RETURN(shape.heads, config.Int("mamba_n_heads", {.min = 1}, 128));
  const absl::StatusOr<std::string> head_dim = config.String("mamba_d_head", "auto");
  if (head_dim.ok() && *head_dim == "auto") {
    shape.head_dim = static_cast<int>(int64_t{shape.expand} * hidden / shape.heads);
  } else {
    ASSIGN_OR_RETURN(shape.head_dim, config.Int("mamba_d_head", {.min = 1}));
  }
  ASSIGN_OR_RETURN(shape.groups, config.Int("mamba_n_groups", {.min = 1}, 1));
  ASSIGN_OR_RETURN(shape.d_state, config.Int("mamba_d_state", {.min = 1}, 256));
  ASSIGN_OR_RETURN(shape.conv_kernel, config.Int("mamba_d_conv", {.min = 1, .max = 64}, 4));
  ASSIGN_OR_RETURN(shape.proj_bias, config.Bool("mamba_proj_bias", false));
  ASSIGN_OR_RETURN(shape.conv_bias, config.Bool("mamba_conv_bias", true));
  ASSIGN_OR_RETURN(shape.norm_eps, config.PositiveDouble("rms_norm_eps", 1e-5));
  RETURN_IF_ERROR(FinishSsdSizes(config, &shape));
  return shape;
}

}  // namespace

absl::StatusOr<DecoderSpec> ReadBamba(Checkpoint& checkpoint) {
  const HfConfig& config = checkpoint.config();
  DecoderSpec spec;
  ASSIGN_OR_RETURN(spec.info, ReadSizes(config, 262144));
  const int hidden = spec.info.hidden_size;
  const int layers = spec.info.layers;
  ASSIGN_OR_RETURN(const double eps, config.PositiveDouble("rms_norm_eps", 1e-5));
  ASSIGN_OR_RETURN(const SsdSizes ssd, ReadShape(config, hidden));
  ASSIGN_OR_RETURN(const std::vector<int> attention_layers,
                   config.Ints("attn_layer_indices", {.max = layers - 1}));
  AttentionSizes attention;
  AttentionParts parts;
  if (!attention_layers.empty()) {
    ASSIGN_OR_RETURN(attention, ReadAttentionSizes(config, hidden));
    // transformers rotates half of each head unless rope_parameters says otherwise, whatever the
    // top-level partial_rotary_factor.
    ASSIGN_OR_RETURN(attention.rope_inv_freq,
                     ReadRope(config, {.head_dim = attention.head_dim,
                                       .max_positions = spec.info.max_positions,
                                       .partial_rotary_factor = 0.5}));
    ASSIGN_OR_RETURN(const bool bias, config.Bool("attention_bias", false));
    parts = {.qkv_bias = bias, .out_bias = bias};
  } else {
    spec.info.max_positions = INT32_MAX;
  }
  MlpSizes mlp{.hidden_size = hidden};
  ASSIGN_OR_RETURN(mlp.intermediate, config.Int("intermediate_size", {.min = 1}));
  ASSIGN_OR_RETURN(mlp.activation, ReadActivation(config));
  ASSIGN_OR_RETURN(mlp.bias, config.Bool("mlp_bias", false));

  RETURN_IF_ERROR(ReadEmbeddingAndHead(checkpoint, "model.embed_tokens.weight", &spec));
  ASSIGN_OR_RETURN(spec.final_norm,
                   ReadNorm(checkpoint, "model.final_layernorm.weight", hidden, eps));
  for (int layer = 0; layer < layers; ++layer) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    BlockSpec block;
    ASSIGN_OR_RETURN(block.norm,
                     ReadNorm(checkpoint, prefix + "input_layernorm.weight", hidden, eps));
    if (std::find(attention_layers.begin(), attention_layers.end(), layer) !=
        attention_layers.end()) {
      ASSIGN_OR_RETURN(block.mixer,
                       ReadAttention(checkpoint, prefix + "self_attn.", hidden, attention, parts));
    } else {
      ASSIGN_OR_RETURN(block.mixer, ReadSsd(checkpoint, prefix + "mamba.", ssd));
    }
    ASSIGN_OR_RETURN(block.mlp_norm,
                     ReadNorm(checkpoint, prefix + "pre_ff_layernorm.weight", hidden, eps));
    ASSIGN_OR_RETURN(block.mlp, ReadMlp(checkpoint, prefix + "feed_forward.", mlp));
    spec.blocks.push_back(std::move(block));
  }
  RETURN_IF_ERROR(checkpoint.CheckLayersFullyRead("model.layers.", layers));
  return spec;
}

}  // namespace canopy
