// Small random models of every kind of mixer, for property tests.

#ifndef CANOPY_TESTS_SUPPORT_RANDOM_MODEL_H_
#define CANOPY_TESTS_SUPPORT_RANDOM_MODEL_H_

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/cpu_backend.h"
#include "core/language_model.h"
#include "models/decoder.h"
#include "trees/token_tree.h"

namespace canopy::testing {

struct RandomModelOptions {
  std::string kind = "hybrid";  // "ssd", "attention" or "hybrid" (alternating, with MLPs)
  DType dtype = DType::kBF16;
  int hidden = 48;
  int layers = 2;
  int vocab = 97;
  int heads = 4;
  int head_dim = 16;
  int groups = 1;
  int norm_groups = 1;
  int d_state = 16;
  int kv_heads = 2;
  int conv_kernel = 4;
  uint64_t seed = 1;
};

// The spec alone, for other devices than the CPU.
DecoderSpec MakeRandomSpec(CpuBackend& cpu, const RandomModelOptions& options);

// Aborts if the spec is refused: the options are the test's.
std::unique_ptr<LanguageModel> MakeRandomModel(CpuBackend& cpu, const RandomModelOptions& options);

// A tree of `nodes` nodes with at most `max_height` levels, one root, tokens below `vocab`. Chains
// and bushes both occur.
TokenTree RandomTree(std::mt19937_64& rng, int nodes, int max_height, int vocab);

std::vector<TokenId> RandomTokens(std::mt19937_64& rng, int count, int vocab);

}  // namespace canopy::testing

#endif  // CANOPY_TESTS_SUPPORT_RANDOM_MODEL_H_
