// The one forward path: every architecture is a DecoderSpec, a list of blocks in terms of the
// operators. An architecture's file reads config.json and the checkpoint's tensors into a spec and
// nothing more.

#ifndef CANOPY_MODELS_DECODER_H_
#define CANOPY_MODELS_DECODER_H_

#include <memory>
#include <optional>
#include <variant>
#include <vector>

#include "core/cpu_backend.h"
#include "core/language_model.h"
#include "core/ops/activation.h"
#include "core/ops/packed_matrix.h"
#include "core/status.h"

namespace canopy {

// RMSNorm weights, widened to f32.
struct NormSpec {
  std::vector<float> weight;
  float eps = 1e-5f;
};

// Grouped-query attention with RoPE.
struct AttentionSpec {
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  PackedMatrix qkv;             // [(heads + 2 * kv_heads) * head_dim, hidden]: q, k, v rows stacked
  std::vector<float> qkv_bias;  // empty or [(heads + 2 * kv_heads) * head_dim]
  PackedMatrix out;             // [hidden, heads * head_dim]
  std::vector<float> out_bias;  // empty or [hidden]
  std::vector<float> q_norm;    // empty or [head_dim] (Qwen3)
  std::vector<float> k_norm;
  float qk_norm_eps = 1e-6f;
  std::vector<float> rope_inv_freq;  // [rotary_dim / 2]; empty: no position embedding
  float scale = 0.0f;                // of the scores, usually head_dim^-1/2
};

// Mamba-2 (SSD with a scalar decay a head).
struct SsdSpec {
  int heads = 0;
  int head_dim = 0;
  int groups = 0;
  int d_state = 0;
  int conv_kernel = 0;
  PackedMatrix in_proj;             // [z | x | B | C | dt, hidden], as checkpoints have it
  std::vector<float> in_proj_bias;  // empty or as many
  std::vector<float>
      conv_weight;  // [kernel, channels]: transposed from the checkpoint's [channels, 1, kernel]
  std::vector<float>
      conv_bias;         // empty or [channels]; channels = heads * head_dim + 2 * groups * d_state
  std::vector<float> A;  // [heads], -exp(A_log)
  std::vector<float> D;  // [heads]
  std::vector<float> dt_bias;      // [heads]
  float dt_min = 0.0f;             // time_step_limit, after softplus
  float dt_max = 0.0f;             // may be infinite
  std::vector<float> norm_weight;  // [heads * head_dim] of the gated norm
  float norm_eps = 1e-5f;
  int norm_groups = 1;
  PackedMatrix out_proj;  // [hidden, heads * head_dim]
  std::vector<float> out_proj_bias;

  int inner() const { return heads * head_dim; }
  int channels() const { return inner() + 2 * groups * d_state; }
};

// down(act(gate x) * up x)
struct MlpSpec {
  int intermediate = 0;
  Activation activation = Activation::kSilu;
  PackedMatrix gate_up;             // [2 * intermediate, hidden]
  std::vector<float> gate_up_bias;  // empty or [2 * intermediate]
  PackedMatrix down;                // [hidden, intermediate]
  std::vector<float> down_bias;
};

// x += mixer(norm(x)); then, where there is one, x += mlp(mlp_norm(x)).
struct BlockSpec {
  NormSpec norm;
  std::variant<AttentionSpec, SsdSpec> mixer;
  std::optional<NormSpec> mlp_norm;
  std::optional<MlpSpec> mlp;
};

struct DecoderSpec {
  ModelInfo info;  // MakeDecoder fills in layers, layer_kinds, layer_parameters, weight_bytes
  std::optional<PackedMatrix> embedding;  // [vocab, hidden]; absent when tied to the head
  std::vector<BlockSpec> blocks;
  NormSpec final_norm;
  PackedMatrix head;  // [vocab, hidden]
};

// Checks that the spec's dimensions agree, pads its vectors to whole CPU vectors (the convolution's
// to rows of PaddedColumns(channels)), and fills in what ModelInfo says of it.
absl::Status PrepareSpec(DecoderSpec& spec);

// Checks that the spec's dimensions agree. The backend must outlive the model.
absl::StatusOr<std::unique_ptr<LanguageModel>> MakeDecoder(CpuBackend& cpu, DecoderSpec spec);

}  // namespace canopy

#endif  // CANOPY_MODELS_DECODER_H_
