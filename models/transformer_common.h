// What transformer checkpoints have in common: attention, MLP, RoPE, embedding and head.

#ifndef CANOPY_MODELS_TRANSFORMER_COMMON_H_
#define CANOPY_MODELS_TRANSFORMER_COMMON_H_

#include <string>
#include <vector>

#include "models/checkpoint.h"
#include "models/decoder.h"

namespace canopy {

// The config's hidden_act; Unimplemented, with file and key, for one that Canopy does not have.
absl::StatusOr<Activation> ReadActivation(const HfConfig& config);

struct RopeOptions {
  int head_dim = 0;
  int max_positions = 0;  // for rope type llama3 without original_max_position_embeddings
  double partial_rotary_factor = 1.0;  // where the rope parameters do not say
};

// RoPE frequencies [rotary_dim / 2] from rope_parameters (transformers 5) or rope_theta and
// rope_scaling (4). Types default, linear and llama3; Unimplemented for others.
absl::StatusOr<std::vector<float>> ReadRope(const HfConfig& config, const RopeOptions& options);

struct AttentionSizes {
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  std::vector<float> rope_inv_freq;
};

// num_attention_heads, num_key_value_heads and head_dim; the frequencies stay empty. `head_dim`, if
// not 0, is for configs without the key; hidden_size / heads otherwise.
absl::StatusOr<AttentionSizes> ReadAttentionSizes(const HfConfig& config, int hidden_size,
                                                  int head_dim = 0);

struct AttentionParts {
  bool qkv_bias = false;
  bool out_bias = false;
  bool qk_norm = false;  // RMSNorm of each q and k head
  double norm_eps = 1e-6;
};

// q_proj, k_proj, v_proj, o_proj (and q_norm, k_norm) below `prefix`, "model.layers.0.self_attn.".
absl::StatusOr<AttentionSpec> ReadAttention(Checkpoint& checkpoint, const std::string& prefix,
                                            int hidden_size, const AttentionSizes& shape,
                                            const AttentionParts& parts);

struct MlpSizes {
  int hidden_size = 0;
  int intermediate = 0;
  Activation activation = Activation::kSilu;
  bool bias = false;
};

// gate_proj, up_proj and down_proj below `prefix`, "model.layers.0.mlp.".
absl::StatusOr<MlpSpec> ReadMlp(Checkpoint& checkpoint, const std::string& prefix,
                                const MlpSizes& shape);

absl::StatusOr<NormSpec> ReadNorm(Checkpoint& checkpoint, const std::string& name, int hidden_size,
                                  double eps);

// Sets embedding and head of `spec` from tensors [info.vocab_size, info.hidden_size]: the one
// tensor `embedding` where config.json says tie_word_embeddings, else that and lm_head.weight.
absl::Status ReadEmbeddingAndHead(Checkpoint& checkpoint, const std::string& embedding,
                                  DecoderSpec* spec);

// vocab_size, hidden_size, num_hidden_layers, and max_position_embeddings with that default.
absl::StatusOr<ModelInfo> ReadSizes(const HfConfig& config, int default_max_positions);

// What tells the members of the Llama family apart.
struct TransformerOptions {
  int max_positions = 2048;  // where config.json does not say
  int head_dim = 0;          // likewise; 0: hidden_size / heads
  bool mlp_bias = false;
  AttentionParts attention;
};

// A model with Llama's tensor names and its order of norms and residuals.
absl::StatusOr<DecoderSpec> ReadTransformer(Checkpoint& checkpoint,
                                            const TransformerOptions& options);

// Unimplemented if any layer of a Qwen config attends over a sliding window.
absl::Status CheckNoSlidingWindow(const HfConfig& config);

}  // namespace canopy

#endif  // CANOPY_MODELS_TRANSFORMER_COMMON_H_
