// Qwen2 and Qwen2.5 (arXiv 2407.10671; transformers' Qwen2ForCausalLM): Llama with biases on q, k
// and v.

#include "models/architectures.h"
#include "models/transformer_common.h"

namespace canopy {

absl::StatusOr<DecoderSpec> ReadQwen2(Checkpoint& checkpoint) {
  RETURN_IF_ERROR(CheckNoSlidingWindow(checkpoint.config()));
  TransformerOptions options;
  options.max_positions = 32768;
  options.attention = {.qkv_bias = true};
  return ReadTransformer(checkpoint, options);
}

}  // namespace canopy
