#include "models/transformer_common.h"

#include <cmath>
#include <utility>

#include "core/ops/rope.h"

namespace canopy {
absl::StatusOr<Activation> ReadActivation(const HfConfig& config) {
  ASSIGN_OR_RETURN(const std::string name, config.String("hidden_act", "silu"));
  absl::StatusOr<Activation> activation = ParseActivation(name);
  if (!activation.ok()) return Annotate(activation.status(), config.Where("hidden_act"));
  return activation;
}

absl::StatusOr<std::vector<float>> ReadRope(const HfConfig& config, const RopeOptions& options) {
  const char* key = config.Has("rope_scaling") ? "rope_scaling" : "rope_parameters";
  ASSIGN_OR_RETURN(const HfConfig rope, config.Object(key));
  ASSIGN_OR_RETURN(const double outer_theta, config.PositiveDouble("rope_theta", 10000.0));
  ASSIGN_OR_RETURN(const double theta, rope.PositiveDouble("rope_theta", outer_theta));
  ASSIGN_OR_RETURN(const double partial,
                   rope.PositiveDouble("partial_rotary_factor", options.partial_rotary_factor));
  ASSIGN_OR_RETURN(const std::string old_type, rope.String("type", "default"));
  ASSIGN_OR_RETURN(const std::string type, rope.String("rope_type", old_type));
  for (const char* kind : {"full_attention", "sliding_attention"}) {
    if (rope.Has(kind)) {
      return absl::UnimplementedError(absl::StrCat(
          rope.Where(kind), ": RoPE that differs between layers; Canopy has one for all layers"));
    }
  }
  if (partial > 1) {
    return absl::InvalidArgumentError(
        absl::StrCat(rope.Where("partial_rotary_factor"), " is ", partial, "; expected at most 1"));
  }
  const int rotary_dim = static_cast<int>(options.head_dim * partial);
  if (rotary_dim < 2 || rotary_dim % 2 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(config.file(), ": ", rotary_dim, " of ", options.head_dim,
                     " columns of a head would be rotated; expected an even number"));
  }
  if (type == "default") return RopeInverseFrequencies(rotary_dim, theta, nullptr);
  if (type == "linear") {
    ASSIGN_OR_RETURN(const double factor, rope.PositiveDouble("factor"));
    return RopeInverseFrequencies(rotary_dim, theta, nullptr, factor);
  }
  if (type == "llama3") {
    Llama3RopeScaling scaling;
    ASSIGN_OR_RETURN(scaling.factor, rope.PositiveDouble("factor"));
    ASSIGN_OR_RETURN(scaling.low_freq_factor, rope.PositiveDouble("low_freq_factor"));
    ASSIGN_OR_RETURN(scaling.high_freq_factor, rope.PositiveDouble("high_freq_factor"));
    ASSIGN_OR_RETURN(
        scaling.original_max_positions,
        rope.PositiveDouble("original_max_position_embeddings", options.max_positions));
    if (scaling.high_freq_factor <= scaling.low_freq_factor) {
      return absl::InvalidArgumentError(
          absl::StrCat(rope.Where("high_freq_factor"), " is ", scaling.high_freq_factor,
                       "; expected more than low_freq_factor ", scaling.low_freq_factor));
    }
    return RopeInverseFrequencies(rotary_dim, theta, &scaling);
  }
  return absl::UnimplementedError(absl::StrCat(rope.Where("rope_type"), " is ", type,
                                               "; Canopy has default, linear and llama3"));
}

absl::StatusOr<AttentionSizes> ReadAttentionSizes(const HfConfig& config, int hidden_size,
                                                  int head_dim) {
  AttentionSizes shape;
  ASSIGN_OR_RETURN(shape.heads, config.Int("num_attention_heads", {.min = 1}));
  ASSIGN_OR_RETURN(shape.kv_heads, config.Int("num_key_value_heads", {.min = 1}, shape.heads));
  if (shape.heads % shape.kv_heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(config.Where("num_key_value_heads"), " is ", shape.kv_heads,
                     ", which does not divide num_attention_heads ", shape.heads));
  }
  if (head_dim == 0 && !config.Has("head_dim") && hidden_size % shape.heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(config.Where("num_attention_heads"), " is ", shape.heads,
                     ", which does not divide hidden_size ", hidden_size, "; set head_dim"));
  }
  ASSIGN_OR_RETURN(shape.head_dim,
                   config.Int("head_dim", {.min = 1, .max = 1 << 16},
                              head_dim != 0 ? head_dim : hidden_size / shape.heads));
  return shape;
}

absl::StatusOr<AttentionSpec> ReadAttention(Checkpoint& checkpoint, const std::string& prefix,
                                            int hidden_size, const AttentionSizes& shape,
                                            const AttentionParts& parts) {
  AttentionSpec spec;
  spec.heads = shape.heads;
  spec.kv_heads = shape.kv_heads;
  spec.head_dim = shape.head_dim;
  spec.rope_inv_freq = shape.rope_inv_freq;
  spec.scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  const int64_t q_rows = int64_t{shape.heads} * shape.head_dim;
  const int64_t kv_rows = int64_t{shape.kv_heads} * shape.head_dim;
  ASSIGN_OR_RETURN(spec.qkv, checkpoint.Matrix({{prefix + "q_proj.weight", q_rows},
                                                {prefix + "k_proj.weight", kv_rows},
                                                {prefix + "v_proj.weight", kv_rows}},
                                               hidden_size));
  ASSIGN_OR_RETURN(spec.out, checkpoint.Matrix({{prefix + "o_proj.weight", hidden_size}}, q_rows));
  if (parts.qkv_bias) {
    ASSIGN_OR_RETURN(spec.qkv_bias, checkpoint.Vector({{prefix + "q_proj.bias", q_rows},
                                                       {prefix + "k_proj.bias", kv_rows},
                                                       {prefix + "v_proj.bias", kv_rows}}));
  }
  if (parts.out_bias) {
    ASSIGN_OR_RETURN(spec.out_bias, checkpoint.Vector(prefix + "o_proj.bias", hidden_size));
  }
  if (parts.qk_norm) {
    ASSIGN_OR_RETURN(spec.q_norm, checkpoint.Vector(prefix + "q_norm.weight", shape.head_dim));
    ASSIGN_OR_RETURN(spec.k_norm, checkpoint.Vector(prefix + "k_norm.weight", shape.head_dim));
    spec.qk_norm_eps = static_cast<float>(parts.norm_eps);
  }
  return spec;
}

absl::StatusOr<MlpSpec> ReadMlp(Checkpoint& checkpoint, const std::string& prefix,
                                const MlpSizes& shape) {
  MlpSpec spec;
  spec.intermediate = shape.intermediate;
  spec.activation = shape.activation;
  ASSIGN_OR_RETURN(spec.gate_up,
                   checkpoint.Matrix({{prefix + "gate_proj.weight", shape.intermediate},
                                      {prefix + "up_proj.weight", shape.intermediate}},
                                     shape.hidden_size));
  ASSIGN_OR_RETURN(spec.down, checkpoint.Matrix({{prefix + "down_proj.weight", shape.hidden_size}},
                                                shape.intermediate));
  if (shape.bias) {
    ASSIGN_OR_RETURN(spec.gate_up_bias,
                     checkpoint.Vector({{prefix + "gate_proj.bias", shape.intermediate},
                                        {prefix + "up_proj.bias", shape.intermediate}}));
    ASSIGN_OR_RETURN(spec.down_bias,
                     checkpoint.Vector(prefix + "down_proj.bias", shape.hidden_size));
  }
  return spec;
}

absl::StatusOr<NormSpec> ReadNorm(Checkpoint& checkpoint, const std::string& name, int hidden_size,
                                  double eps) {
  NormSpec spec;
  ASSIGN_OR_RETURN(spec.weight, checkpoint.Vector(name, hidden_size));
  spec.eps = static_cast<float>(eps);
  return spec;
}

absl::Status ReadEmbeddingAndHead(Checkpoint& checkpoint, const std::string& embedding,
                                  DecoderSpec* spec) {
  const int vocab = spec->info.vocab_size;
  const int hidden = spec->info.hidden_size;
  ASSIGN_OR_RETURN(const bool tied, checkpoint.config().Bool("tie_word_embeddings", false));
  if (!tied) {
    ASSIGN_OR_RETURN(spec->embedding, checkpoint.Matrix({{embedding, vocab}}, hidden));
  }
  ASSIGN_OR_RETURN(spec->head,
                   checkpoint.Matrix({{tied ? embedding : "lm_head.weight", vocab}}, hidden));
  return absl::OkStatus();
}

absl::StatusOr<ModelInfo> ReadSizes(const HfConfig& config, int default_max_positions) {
  ModelInfo info;
  ASSIGN_OR_RETURN(info.vocab_size, config.Int("vocab_size", {.min = 1}));
  ASSIGN_OR_RETURN(info.hidden_size, config.Int("hidden_size", {.min = 1}));
  ASSIGN_OR_RETURN(info.layers, config.Int("num_hidden_layers", {.min = 1}));
  ASSIGN_OR_RETURN(info.max_positions,
                   config.Int("max_position_embeddings", {.min = 1}, default_max_positions));
  return info;
}

absl::StatusOr<DecoderSpec> ReadTransformer(Checkpoint& checkpoint,
                                            const TransformerOptions& options) {
  const HfConfig& config = checkpoint.config();
  DecoderSpec spec;
  ASSIGN_OR_RETURN(spec.info, ReadSizes(config, options.max_positions));
  const int hidden = spec.info.hidden_size;
  ASSIGN_OR_RETURN(const double eps, config.PositiveDouble("rms_norm_eps", 1e-6));
  ASSIGN_OR_RETURN(AttentionSizes attention, ReadAttentionSizes(config, hidden, options.head_dim));
  ASSIGN_OR_RETURN(const double partial, config.Double("partial_rotary_factor", 1.0));
  ASSIGN_OR_RETURN(attention.rope_inv_freq,
                   ReadRope(config, {.head_dim = attention.head_dim,
                                     .max_positions = spec.info.max_positions,
                                     .partial_rotary_factor = partial}));
  if (2 * static_cast<int>(attention.rope_inv_freq.size()) != attention.head_dim) {
    return absl::UnimplementedError(
        absl::StrCat(config.Where("partial_rotary_factor"),
                     " is below 1, which this architecture does not have in transformers either"));
  }
  MlpSizes mlp{.hidden_size = hidden, .bias = options.mlp_bias};
  ASSIGN_OR_RETURN(mlp.intermediate, config.Int("intermediate_size", {.min = 1}));
  ASSIGN_OR_RETURN(mlp.activation, ReadActivation(config));
  AttentionParts parts = options.attention;
  parts.norm_eps = eps;

  RETURN_IF_ERROR(ReadEmbeddingAndHead(checkpoint, "model.embed_tokens.weight", &spec));
  ASSIGN_OR_RETURN(spec.final_norm, ReadNorm(checkpoint, "model.norm.weight", hidden, eps));
  for (int layer = 0; layer < spec.info.layers; ++layer) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    BlockSpec block;
    ASSIGN_OR_RETURN(block.norm,
                     ReadNorm(checkpoint, prefix + "input_layernorm.weight", hidden, eps));
    ASSIGN_OR_RETURN(block.mixer,
                     ReadAttention(checkpoint, prefix + "self_attn.", hidden, attention, parts));
    ASSIGN_OR_RETURN(block.mlp_norm,
                     ReadNorm(checkpoint, prefix + "post_attention_layernorm.weight", hidden, eps));
    ASSIGN_OR_RETURN(block.mlp, ReadMlp(checkpoint, prefix + "mlp.", mlp));
    spec.blocks.push_back(std::move(block));
  }
  RETURN_IF_ERROR(checkpoint.CheckLayersFullyRead("model.layers.", spec.info.layers));
  return spec;
}

absl::Status CheckNoSlidingWindow(const HfConfig& config) {
  const auto refuse = [&config](std::string_view key, const std::string& what) {
    return absl::UnimplementedError(
        absl::StrCat(config.Where(key), what, "; Canopy has attention over the whole prefix only"));
  };
  ASSIGN_OR_RETURN(const std::vector<std::string> types, config.Strings("layer_types"));
  for (size_t layer = 0; layer < types.size(); ++layer) {
    if (types[layer] != "full_attention") {
      return refuse("layer_types", absl::StrCat(": layer ", layer, " is ", types[layer]));
    }
  }
  if (!types.empty()) return absl::OkStatus();
  // Before layer_types existed: the layers from max_window_layers on slide.
  ASSIGN_OR_RETURN(const bool sliding, config.Bool("use_sliding_window", false));
  ASSIGN_OR_RETURN(const int first, config.Int("max_window_layers", {}, 28));
  ASSIGN_OR_RETURN(const int layers, config.Int("num_hidden_layers", {.min = 1}));
  if (sliding && first < layers) {
    return refuse("use_sliding_window", absl::StrCat(" is true for layers from ", first, " on"));
  }
  return absl::OkStatus();
}

}  // namespace canopy
