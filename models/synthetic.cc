#include "models/synthetic.h"

#include <cmath>
#include <limits>

#include "absl/strings/str_join.h"
#include "core/dtype.h"
#include "core/ops/rope.h"
#include "core/random.h"

namespace canopy {
namespace {

struct Shape {
  std::string_view name;
  std::string_view source;
  int layers, hidden, vocab;
  // SSD mixers; attention in every attention_every-th layer, beginning with attention_first.
  int ssd_heads, ssd_head_dim, groups, d_state;
  int attention_every, attention_first;
  int heads, kv_heads, head_dim;
  int intermediate;  // of an MLP in every layer; 0: none
  bool tied;
};

// Sizes as the named checkpoints' config.json has them. mamba2-llama3-8b-hybrid has the sizes of
// Llama-3-8B with every other mixer a Mamba-2 one of as many columns, as in the distillations of
// arXiv 2408.15237; theirs repeat B and C over heads, for which it has 8 groups.
constexpr Shape kShapes[] = {
    {"mamba2-130m", "state-spaces/mamba2-130m", 24, 768, 50288, 24, 64, 1, 128, 0, 0, 0, 0, 0, 0,
     true},
    {"mamba2-2.7b", "state-spaces/mamba2-2.7b", 64, 2560, 50288, 80, 64, 1, 128, 0, 0, 0, 0, 0, 0,
     true},
    {"llama-8b", "meta-llama/Llama-3.1-8B", 32, 4096, 128256, 0, 0, 0, 0, 1, 0, 32, 8, 128, 14336,
     false},
    {"bamba-9b", "ibm-ai-platform/Bamba-9B-v1", 32, 4096, 128256, 128, 64, 1, 128, 9, 9, 32, 8, 128,
     14336, false},
    {"mamba2-llama3-8b-hybrid", "Llama-3-8B, half of the mixers Mamba-2 (arXiv 2408.15237)", 32,
     4096, 128256, 32, 128, 8, 128, 2, 1, 32, 8, 128, 14336, false},
};

class Maker {
 public:
  Maker(const Shape& shape, CpuBackend* cpu) : shape_(shape), cpu_(cpu) {}

  absl::StatusOr<DecoderSpec> Make() {
    DecoderSpec spec;
    spec.info.architecture = "synthetic";
    spec.info.path = absl::StrCat(std::string(kSyntheticPrefix), std::string(shape_.name));
    spec.info.checkpoint_hash = "synthetic";
    spec.info.dtype = DType::kBF16;
    spec.info.hidden_size = shape_.hidden;
    spec.info.vocab_size = shape_.vocab;
    spec.info.max_positions = 131072;
    for (int i = 0; i < shape_.layers; ++i) {
      BlockSpec block;
      block.norm = Norm();
      const bool attention = shape_.attention_every > 0 && i >= shape_.attention_first &&
                             (i - shape_.attention_first) % shape_.attention_every == 0;
      if (attention) {
        ASSIGN_OR_RETURN(block.mixer, Attention());
      } else {
        ASSIGN_OR_RETURN(block.mixer, Ssd());
      }
      if (shape_.intermediate > 0) {
        block.mlp_norm = Norm();
        MlpSpec mlp;
        mlp.intermediate = shape_.intermediate;
        ASSIGN_OR_RETURN(mlp.gate_up, Matrix(2 * mlp.intermediate, shape_.hidden));
        ASSIGN_OR_RETURN(mlp.down, Matrix(shape_.hidden, mlp.intermediate));
        block.mlp = std::move(mlp);
      }
      spec.blocks.push_back(std::move(block));
    }
    spec.final_norm = Norm();
    ASSIGN_OR_RETURN(spec.head, Matrix(shape_.vocab, shape_.hidden));
    if (!shape_.tied) {
      ASSIGN_OR_RETURN(spec.embedding, Matrix(shape_.vocab, shape_.hidden));
    }
    spec.info.parameters = parameters_;
    return spec;
  }

 private:
  float Uniform(float low, float high) {
    const double unit = noise_.Uniform(static_cast<int64_t>(drawn_++), Purpose::kDraft);
    return low + (high - low) * static_cast<float>(unit);
  }
  std::vector<float> Vector(int size, float low, float high) {
    parameters_ += size;
    std::vector<float> values(size);
    for (float& v : values) v = Uniform(low, high);
    return values;
  }
  NormSpec Norm() { return {Vector(shape_.hidden, 0.9f, 1.1f), 1e-5f}; }

  absl::StatusOr<PackedMatrix> Matrix(int out, int in) {
    parameters_ += int64_t{out} * in;
    if (cpu_ == nullptr) return PackedMatrix::Blank(DType::kBF16, out, in);
    const float bound = std::sqrt(3.0f / static_cast<float>(in));
    std::vector<uint16_t> values(static_cast<size_t>(out) * in);
    for (uint16_t& v : values) v = F32ToBF16(Uniform(-bound, bound));
    const PackedMatrix::Source source{values.data(), out};
    return PackedMatrix::Pack(*cpu_, DType::kBF16, in, {&source, 1});
  }

  absl::StatusOr<AttentionSpec> Attention() {
    AttentionSpec spec;
    spec.heads = shape_.heads;
    spec.kv_heads = shape_.kv_heads;
    spec.head_dim = shape_.head_dim;
    ASSIGN_OR_RETURN(spec.qkv,
                     Matrix((spec.heads + 2 * spec.kv_heads) * spec.head_dim, shape_.hidden));
    ASSIGN_OR_RETURN(spec.out, Matrix(shape_.hidden, spec.heads * spec.head_dim));
    spec.rope_inv_freq = RopeInverseFrequencies(spec.head_dim, 500000.0, nullptr);
    spec.scale = 1.0f / std::sqrt(static_cast<float>(spec.head_dim));
    return spec;
  }

  absl::StatusOr<SsdSpec> Ssd() {
    SsdSpec spec;
    spec.heads = shape_.ssd_heads;
    spec.head_dim = shape_.ssd_head_dim;
    spec.groups = shape_.groups;
    spec.d_state = shape_.d_state;
    spec.conv_kernel = 4;
    ASSIGN_OR_RETURN(spec.in_proj,
                     Matrix(spec.inner() + spec.channels() + spec.heads, shape_.hidden));
    ASSIGN_OR_RETURN(spec.out_proj, Matrix(shape_.hidden, spec.inner()));
    spec.conv_weight = Vector(spec.conv_kernel * spec.channels(), -0.5f, 0.5f);
    spec.conv_bias = Vector(spec.channels(), -0.1f, 0.1f);
    spec.A = Vector(spec.heads, -16.0f, -1.0f);  // as Mamba-2 is initialised
    spec.D = Vector(spec.heads, 0.9f, 1.1f);
    spec.dt_bias = Vector(spec.heads, -6.0f, -2.5f);  // softplus^-1 of 0.001 to 0.1, about
    spec.dt_max = std::numeric_limits<float>::infinity();
    spec.norm_weight = Vector(spec.inner(), 0.9f, 1.1f);
    spec.norm_groups = spec.groups;
    return spec;
  }

  const Shape& shape_;
  CpuBackend* cpu_;
  NoiseStream noise_{1, 0};
  uint64_t drawn_ = 0;
  int64_t parameters_ = 0;
};

}  // namespace

absl::StatusOr<DecoderSpec> SyntheticSpec(const std::string& path, CpuBackend* cpu) {
  const std::string_view name = std::string_view(path).substr(kSyntheticPrefix.size());
  std::vector<std::string> known;
  for (const Shape& shape : kShapes) {
    if (shape.name == name) return Maker(shape, cpu).Make();
    known.emplace_back(shape.name);
  }
  return absl::NotFoundError(absl::StrCat(
      path, ": there is no synthetic model of that name; there are ", absl::StrJoin(known, ", ")));
}

std::vector<std::pair<std::string, std::string>> ListSyntheticModels() {
  std::vector<std::pair<std::string, std::string>> models;
  for (const Shape& shape : kShapes) {
    models.emplace_back(std::string(kSyntheticPrefix) + std::string(shape.name),
                        std::string(shape.source));
  }
  return models;
}

}  // namespace canopy
