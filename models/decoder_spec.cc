#include <algorithm>
#include <initializer_list>
#include <string>
#include <utility>

#include "models/decoder.h"

namespace canopy {
namespace {

// Kernels read whole vectors past a vector's last element.
void Pad(std::vector<float>& values) {
  values.resize(PaddedColumns(static_cast<int>(values.size())), 0.0f);
}

absl::Status Mismatch(int layer, std::string_view what, int64_t got, int64_t expected) {
  return absl::InvalidArgumentError(
      absl::StrCat("layer ", layer, ": ", std::string(what), " is ", got, ", expected ", expected));
}

#define CHECK_DIM(what, got, expected)                             \
  if (static_cast<int64_t>(got) != static_cast<int64_t>(expected)) \
  return Mismatch(layer, what, got, expected)

}  // namespace

absl::Status PrepareSpec(DecoderSpec& spec) {
  ModelInfo& info = spec.info;
  const int hidden = info.hidden_size;
  info.layers = static_cast<int>(spec.blocks.size());
  info.layer_kinds.clear();
  info.weight_bytes = spec.head.bytes() + (spec.embedding ? spec.embedding->bytes() : 0);
  info.layer_parameters = 0;
  const auto count_matrices = [&info](std::initializer_list<const PackedMatrix*> matrices) {
    for (const PackedMatrix* m : matrices) {
      info.layer_parameters += int64_t{m->out_features()} * m->in_features();
      info.weight_bytes += m->bytes();
    }
  };
  const auto vector_bytes = [](std::initializer_list<const std::vector<float>*> vectors) {
    size_t bytes = 0;
    for (const std::vector<float>* v : vectors) bytes += v->size() * sizeof(float);
    return bytes;
  };
  int layer = 0;
  for (BlockSpec& block : spec.blocks) {
    CHECK_DIM("norm weight's length", block.norm.weight.size(), hidden);
    Pad(block.norm.weight);
    info.weight_bytes += vector_bytes({&block.norm.weight});
    if (auto* attention = std::get_if<AttentionSpec>(&block.mixer)) {
      info.layer_kinds.push_back("attention");
      if (attention->heads < 1 || attention->kv_heads < 1 ||
          attention->heads % attention->kv_heads != 0) {
        return absl::InvalidArgumentError(absl::StrCat("layer ", layer, ": ", attention->heads,
                                                       " heads do not divide into ",
                                                       attention->kv_heads, " KV heads"));
      }
      const int rows = (attention->heads + 2 * attention->kv_heads) * attention->head_dim;
      CHECK_DIM("qkv rows", attention->qkv.out_features(), rows);
      CHECK_DIM("qkv columns", attention->qkv.in_features(), hidden);
      CHECK_DIM("attention output rows", attention->out.out_features(), hidden);
      CHECK_DIM("attention output columns", attention->out.in_features(),
                attention->heads * attention->head_dim);
      count_matrices({&attention->qkv, &attention->out});
      for (std::vector<float>* v :
           {&attention->qkv_bias, &attention->out_bias, &attention->q_norm, &attention->k_norm}) {
        Pad(*v);
        info.weight_bytes += vector_bytes({v});
      }
    } else {
      SsdSpec& ssd = std::get<SsdSpec>(block.mixer);
      info.layer_kinds.push_back("ssd");
      if (ssd.heads < 1 || ssd.groups < 1 || ssd.heads % ssd.groups != 0) {
        return absl::InvalidArgumentError(absl::StrCat(
            "layer ", layer, ": ", ssd.heads, " heads do not divide into ", ssd.groups, " groups"));
      }
      const int rows = ssd.inner() + ssd.channels() + ssd.heads;
      CHECK_DIM("in_proj rows", ssd.in_proj.out_features(), rows);
      CHECK_DIM("in_proj columns", ssd.in_proj.in_features(), hidden);
      CHECK_DIM("out_proj rows", ssd.out_proj.out_features(), hidden);
      CHECK_DIM("out_proj columns", ssd.out_proj.in_features(), ssd.inner());
      CHECK_DIM("conv weight's length", ssd.conv_weight.size(), ssd.conv_kernel * ssd.channels());
      CHECK_DIM("A_log's length", ssd.A.size(), ssd.heads);
      CHECK_DIM("D's length", ssd.D.size(), ssd.heads);
      CHECK_DIM("dt_bias's length", ssd.dt_bias.size(), ssd.heads);
      CHECK_DIM("gated norm's length", ssd.norm_weight.size(), ssd.inner());
      if (ssd.conv_bias.empty()) ssd.conv_bias.resize(ssd.channels(), 0.0f);
      CHECK_DIM("conv bias's length", ssd.conv_bias.size(), ssd.channels());
      // Rows of whole vectors.
      const int stride = PaddedColumns(ssd.channels());
      std::vector<float> padded(static_cast<size_t>(ssd.conv_kernel) * stride, 0.0f);
      for (int k = 0; k < ssd.conv_kernel; ++k) {
        std::copy_n(ssd.conv_weight.begin() + static_cast<size_t>(k) * ssd.channels(),
                    ssd.channels(), padded.begin() + static_cast<size_t>(k) * stride);
      }
      ssd.conv_weight = std::move(padded);
      for (std::vector<float>* v : {&ssd.in_proj_bias, &ssd.conv_bias, &ssd.A, &ssd.D, &ssd.dt_bias,
                                    &ssd.norm_weight, &ssd.out_proj_bias}) {
        Pad(*v);
        info.weight_bytes += vector_bytes({v});
      }
      info.weight_bytes += vector_bytes({&ssd.conv_weight});
      count_matrices({&ssd.in_proj, &ssd.out_proj});
    }
    if (block.mlp) {
      MlpSpec& mlp = *block.mlp;
      if (!block.mlp_norm)
        return absl::InvalidArgumentError(absl::StrCat("layer ", layer, ": no MLP norm"));
      CHECK_DIM("MLP norm weight's length", block.mlp_norm->weight.size(), hidden);
      CHECK_DIM("gate and up rows", mlp.gate_up.out_features(), 2 * mlp.intermediate);
      CHECK_DIM("gate and up columns", mlp.gate_up.in_features(), hidden);
      CHECK_DIM("down rows", mlp.down.out_features(), hidden);
      CHECK_DIM("down columns", mlp.down.in_features(), mlp.intermediate);
      for (std::vector<float>* v : {&block.mlp_norm->weight, &mlp.gate_up_bias, &mlp.down_bias}) {
        Pad(*v);
        info.weight_bytes += vector_bytes({v});
      }
      count_matrices({&mlp.gate_up, &mlp.down});
    }
    ++layer;
  }
  CHECK_DIM("final norm weight's length", spec.final_norm.weight.size(), hidden);
  Pad(spec.final_norm.weight);
  info.weight_bytes += vector_bytes({&spec.final_norm.weight});
  CHECK_DIM("head rows", spec.head.out_features(), info.vocab_size);
  CHECK_DIM("head columns", spec.head.in_features(), hidden);
  if (spec.embedding) {
    CHECK_DIM("embedding rows", spec.embedding->out_features(), info.vocab_size);
    CHECK_DIM("embedding columns", spec.embedding->in_features(), hidden);
  }
  return absl::OkStatus();
}

#undef CHECK_DIM

}  // namespace canopy
