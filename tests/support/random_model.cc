#include "tests/support/random_model.h"

#include <cmath>
#include <cstdlib>
#include <utility>

#include "core/dtype.h"
#include "core/status.h"

namespace canopy::testing {
namespace {

class SpecMaker {
 public:
  SpecMaker(CpuBackend& cpu, const RandomModelOptions& options)
      : cpu_(cpu), options_(options), rng_(options.seed) {}

  DecoderSpec Make() {
    const RandomModelOptions& o = options_;
    DecoderSpec spec;
    spec.info.architecture = o.kind;
    spec.info.path = "random";
    spec.info.dtype = o.dtype;
    spec.info.hidden_size = o.hidden;
    spec.info.vocab_size = o.vocab;
    spec.info.max_positions = 4096;
    for (int i = 0; i < o.layers; ++i) {
      BlockSpec block;
      block.norm = Norm(o.hidden);
      const bool attention = o.kind == "attention" || (o.kind == "hybrid" && i % 2 == 1);
      if (attention) {
        block.mixer = Attention();
      } else {
        block.mixer = Ssd();
      }
      if (o.kind != "ssd") {
        block.mlp_norm = Norm(o.hidden);
        MlpSpec mlp;
        mlp.intermediate = 40;
        mlp.gate_up = Weights(2 * mlp.intermediate, o.hidden);
        mlp.down = Weights(o.hidden, mlp.intermediate);
        block.mlp = std::move(mlp);
      }
      spec.blocks.push_back(std::move(block));
    }
    spec.final_norm = Norm(o.hidden);
    spec.head = Weights(o.vocab, o.hidden);
    return spec;
  }

 private:
  float Normal() { return normal_(rng_); }

  std::vector<float> Vector(int count, float mean, float spread) {
    std::vector<float> values(count);
    for (float& v : values) v = mean + spread * Normal();
    return values;
  }

  NormSpec Norm(int size) { return {Vector(size, 1.0f, 0.1f), 1e-5f}; }

  PackedMatrix Weights(int out, int in) {
    const float scale = 1.2f / std::sqrt(static_cast<float>(in));
    const std::vector<float> values = Vector(out * in, 0.0f, scale);
    std::vector<uint16_t> narrow;
    PackedMatrix::Source source{values.data(), out};
    if (options_.dtype == DType::kBF16) {
      for (float v : values) narrow.push_back(F32ToBF16(v));
      source.data = narrow.data();
    }
    absl::StatusOr<PackedMatrix> packed =
        PackedMatrix::Pack(cpu_, options_.dtype, in, std::span(&source, 1));
    CHECK(packed.ok());
    return *std::move(packed);
  }

  AttentionSpec Attention() {
    const RandomModelOptions& o = options_;
    AttentionSpec spec;
    spec.heads = o.heads;
    spec.kv_heads = o.kv_heads;
    spec.head_dim = o.head_dim;
    spec.qkv = Weights((o.heads + 2 * o.kv_heads) * o.head_dim, o.hidden);
    spec.out = Weights(o.hidden, o.heads * o.head_dim);
    for (int i = 0; i < o.head_dim / 2; ++i) {
      spec.rope_inv_freq.push_back(static_cast<float>(std::pow(10000.0, -2.0 * i / o.head_dim)));
    }
    spec.scale = 1.0f / std::sqrt(static_cast<float>(o.head_dim));
    return spec;
  }

  SsdSpec Ssd() {
    const RandomModelOptions& o = options_;
    SsdSpec spec;
    spec.heads = o.heads;
    spec.head_dim = o.head_dim;
    spec.groups = o.groups;
    spec.norm_groups = o.norm_groups;
    spec.d_state = o.d_state;
    spec.conv_kernel = o.conv_kernel;
    spec.in_proj = Weights(spec.inner() + spec.channels() + spec.heads, o.hidden);
    spec.conv_weight = Vector(o.conv_kernel * spec.channels(), 0.0f, 0.5f);
    spec.conv_bias = Vector(spec.channels(), 0.0f, 0.1f);
    for (int h = 0; h < o.heads; ++h) spec.A.push_back(-std::exp(0.5f * Normal()));
    spec.D = Vector(o.heads, 1.0f, 0.1f);
    spec.dt_bias = Vector(o.heads, -2.0f, 0.7f);
    spec.dt_max = INFINITY;
    spec.norm_weight = Vector(spec.inner(), 1.0f, 0.1f);
    spec.out_proj = Weights(o.hidden, spec.inner());
    return spec;
  }

  CpuBackend& cpu_;
  RandomModelOptions options_;
  std::mt19937_64 rng_;
  std::normal_distribution<float> normal_;
};

}  // namespace

DecoderSpec MakeRandomSpec(CpuBackend& cpu, const RandomModelOptions& options) {
  return SpecMaker(cpu, options).Make();
}

std::unique_ptr<LanguageModel> MakeRandomModel(CpuBackend& cpu, const RandomModelOptions& options) {
  absl::StatusOr<std::unique_ptr<LanguageModel>> model =
      MakeDecoder(cpu, MakeRandomSpec(cpu, options));
  if (!model.ok()) {
    fprintf(stderr, "%s\n", std::string(model.status().message()).c_str());
    abort();
  }
  return *std::move(model);
}

TokenTree RandomTree(std::mt19937_64& rng, int nodes, int max_height, int vocab) {
  TokenTree tree;
  const double depth_first = std::uniform_real_distribution<double>(0.0, 1.0)(rng);
  CHECK(tree.AddNode(kPrefix, TokenId(static_cast<int>(rng() % vocab))).ok());
  while (tree.size() < nodes) {
    NodeId parent(static_cast<int>(rng() % tree.size()));
    if (std::uniform_real_distribution<double>(0.0, 1.0)(rng) < depth_first) {
      parent = NodeId(tree.size() - 1);
    }
    if (tree.depth(parent) + 1 >= max_height) continue;
    (void)tree.AddNode(parent, TokenId(static_cast<int>(rng() % vocab)));
  }
  return tree;
}

std::vector<TokenId> RandomTokens(std::mt19937_64& rng, int count, int vocab) {
  std::vector<TokenId> tokens(count);
  for (TokenId& token : tokens) token = TokenId(static_cast<int>(rng() % vocab));
  return tokens;
}

}  // namespace canopy::testing
