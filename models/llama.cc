// Llama (arXiv 2302.13971; transformers' LlamaForCausalLM): grouped-query attention with RoPE and a
// gated MLP, each behind an RMSNorm.

#include "models/architectures.h"
#include "models/transformer_common.h"

namespace canopy {

absl::StatusOr<DecoderSpec> ReadLlama(Checkpoint& checkpoint) {
  TransformerOptions options;
  ASSIGN_OR_RETURN(const bool bias, checkpoint.config().Bool("attention_bias", false));
  options.attention = {.qkv_bias = bias, .out_bias = bias};
  ASSIGN_OR_RETURN(options.mlp_bias, checkpoint.config().Bool("mlp_bias", false));
  return ReadTransformer(checkpoint, options);
}

}  // namespace canopy
