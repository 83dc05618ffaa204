// Qwen3 (arXiv 2505.09388; transformers' Qwen3ForCausalLM): Llama with an RMSNorm of each q and k
// head before RoPE, and a head_dim that need not be hidden_size / heads.

#include "models/architectures.h"
#include "models/transformer_common.h"

namespace canopy {

absl::StatusOr<DecoderSpec> ReadQwen3(Checkpoint& checkpoint) {
  RETURN_IF_ERROR(CheckNoSlidingWindow(checkpoint.config()));
  TransformerOptions options;
  options.max_positions = 32768;
  options.head_dim = 128;
  ASSIGN_OR_RETURN(const bool bias, checkpoint.config().Bool("attention_bias", false));
  options.attention = {.qkv_bias = bias, .out_bias = bias, .qk_norm = true};
  return ReadTransformer(checkpoint, options);
}

}  // namespace canopy
