// What is refused at load, and that it says where and why.

#include "models/loader.h"

#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/checkpoint_files.h"

namespace canopy {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using testing::CopyGolden;
using ::testing::ElementsAre;
using testing::F32Tensor;
using testing::GoldenFolder;
using ::testing::HasSubstr;
using testing::ReadTensors;
using testing::SafetensorsBytes;
using testing::StoredTensors;
using testing::TempFolder;
using testing::WriteFile;

absl::StatusOr<std::unique_ptr<LanguageModel>> Load(CpuBackend& backend, const TempFolder& folder) {
  return LoadModel(backend, folder.path().string());
}

TEST(LoadModel, FillsInTheInfo) {
  const std::unique_ptr<CpuBackend> backend = *CpuBackend::Create(1);
  const TempFolder folder;
  CopyGolden("bamba-whole-row", R"({"eos_token_id": [2, 9]})", folder);
  const auto model = Load(*backend, folder);
  ASSERT_TRUE(model.ok()) << model.status();
  const ModelInfo& info = (*model)->info();
  EXPECT_EQ(info.architecture, "bamba");
  EXPECT_EQ(info.path, folder.path().string());
  EXPECT_EQ(info.checkpoint_hash.size(), 16u);
  EXPECT_EQ(info.dtype, DType::kF32);
  EXPECT_EQ(info.layers, 3);
  EXPECT_EQ(info.hidden_size, 64);
  EXPECT_EQ(info.vocab_size, 192);
  EXPECT_EQ(info.max_positions, 262144);
  EXPECT_EQ(info.parameters, 163824);  // as generate.py printed
  EXPECT_THAT(info.layer_kinds, ElementsAre("ssd", "attention", "ssd"));
  EXPECT_THAT(info.eos_tokens, ElementsAre(TokenId(2), TokenId(9)));
}

TEST(LoadModel, CountsATiedEmbeddingOnce) {
  const std::unique_ptr<CpuBackend> backend = *CpuBackend::Create(1);
  const auto tied = LoadModel(*backend, GoldenFolder("qwen2-tied"));
  ASSERT_TRUE(tied.ok()) << tied.status();
  EXPECT_EQ((*tied)->info().parameters, 71232);
  EXPECT_EQ((*tied)->info().dtype, DType::kBF16);
}

TEST(LoadModel, ReadsTheSingularEmbeddingName) {
  const std::unique_ptr<CpuBackend> backend = *CpuBackend::Create(1);
  const TempFolder folder;
  CopyGolden("mamba2-whole-row", "{}", folder);
  StoredTensors tensors = ReadTensors(folder.File("model.safetensors"));
  auto node = tensors.extract("backbone.embeddings.weight");
  node.key() = "backbone.embedding.weight";
  tensors.insert(std::move(node));
  WriteFile(folder.File("model.safetensors"), SafetensorsBytes(tensors));
  const auto model = Load(*backend, folder);
  EXPECT_TRUE(model.ok()) << model.status();
}

struct ConfigCase {
  const char* name;
  const char* golden;
  const char* patch;
  absl::StatusCode code;
  const char* message;
};

void PrintTo(const ConfigCase& bad, std::ostream* out) { *out << bad.name; }

class BadConfig : public ::testing::TestWithParam<ConfigCase> {};

TEST_P(BadConfig, IsRefusedWithFileAndKey) {
  const std::unique_ptr<CpuBackend> backend = *CpuBackend::Create(1);
  const TempFolder folder;
  CopyGolden(GetParam().golden, GetParam().patch, folder);
  const auto model = Load(*backend, folder);
  ASSERT_FALSE(model.ok());
  EXPECT_EQ(model.status().code(), GetParam().code) << model.status();
  EXPECT_THAT(std::string(model.status().message()),
              AllOf(HasSubstr(folder.path().string()), HasSubstr(GetParam().message)));
}

constexpr absl::StatusCode kInvalid = absl::StatusCode::kInvalidArgument;
constexpr absl::StatusCode kUnimplemented = absl::StatusCode::kUnimplemented;
constexpr absl::StatusCode kNotFound = absl::StatusCode::kNotFound;

INSTANTIATE_TEST_SUITE_P(
    All, BadConfig,
    ::testing::Values(
        ConfigCase{"Architecture", "llama-f16", R"({"model_type": "jamba"})", kUnimplemented,
                   "model_type is jamba; Canopy has bamba, llama, mamba2, qwen2, qwen3"},
        ConfigCase{"NegativeEpsilon", "llama-f16", R"({"rms_norm_eps": -1})", kInvalid,
                   "rms_norm_eps is -1; expected a positive number"},
        ConfigCase{"NoArchitecture", "llama-f16", R"({"model_type": null})", kUnimplemented,
                   "model_type is missing"},
        ConfigCase{"OriginalMamba", "mamba2-groups", R"({"model_type": null, "ssm_cfg": {}})",
                   kUnimplemented, "mamba_ssm's own form"},
        ConfigCase{"ArchitectureNotAString", "llama-f16", R"({"model_type": 3})", kInvalid,
                   "model_type is 3; expected a string"},
        ConfigCase{"Quantised", "llama-f16", R"({"quantization_config": {"bits": 4}})",
                   kUnimplemented, "quantization_config"},
        ConfigCase{"NoVocabulary", "llama-f16", R"({"vocab_size": null})", kNotFound,
                   "vocab_size is missing"},
        ConfigCase{"NoHeads", "llama-f16", R"({"num_attention_heads": 0})", kInvalid,
                   "num_attention_heads is 0; expected a whole number from 1"},
        ConfigCase{"LayersAsText", "llama-f16", R"({"num_hidden_layers": "2"})", kInvalid,
                   "num_hidden_layers is \"2\""},
        ConfigCase{"KvHeads", "llama-f16", R"({"num_key_value_heads": 3})", kInvalid,
                   "num_key_value_heads is 3, which does not divide num_attention_heads 4"},
        ConfigCase{"HeadsDoNotDivide", "llama-f16",
                   R"({"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": null})",
                   kInvalid, "does not divide hidden_size 64"},
        ConfigCase{"OddHeadDim", "llama-f16", R"({"head_dim": 15})", kInvalid, "an even number"},
        ConfigCase{"Activation", "llama-f16", R"({"hidden_act": "mish"})", kUnimplemented,
                   "hidden_act"},
        ConfigCase{"SsdActivation", "mamba2-groups", R"({"hidden_act": "gelu"})", kUnimplemented,
                   "hidden_act is gelu"},
        ConfigCase{"RopeType", "llama-llama3", R"({"rope_parameters": {"rope_type": "yarn"}})",
                   kUnimplemented,
                   "rope_parameters.rope_type is yarn; Canopy has default, linear and llama3"},
        ConfigCase{"OldRopeType", "llama-biases-linear", R"({"rope_scaling": {"type": "dynamic"}})",
                   kUnimplemented, "rope_scaling.rope_type is dynamic"},
        ConfigCase{"RopeByLayer", "llama-f16",
                   R"({"rope_parameters": {"full_attention": {"rope_type": "default"}}})",
                   kUnimplemented, "rope_parameters.full_attention"},
        ConfigCase{"RopeFactorMissing", "llama-llama3", R"({"rope_parameters": {"factor": null}})",
                   kNotFound, "rope_parameters.factor is missing"},
        ConfigCase{"RopeFactorZero", "llama-llama3", R"({"rope_parameters": {"factor": 0}})",
                   kInvalid, "rope_parameters.factor is 0; expected a positive number"},
        ConfigCase{"RopeBoundsEqual", "llama-llama3",
                   R"({"rope_parameters": {"high_freq_factor": 1.0}})", kInvalid,
                   "rope_parameters.high_freq_factor is 1"},
        ConfigCase{"RopeTheta", "llama-biases-linear", R"({"rope_theta": -1})", kInvalid,
                   "rope_theta is -1"},
        ConfigCase{"PartialRotaryBeyondOne", "bamba-groups",
                   R"({"rope_parameters": {"partial_rotary_factor": 1.5}})", kInvalid,
                   "partial_rotary_factor is 1.5"},
        ConfigCase{"PartialRotaryInLlama", "llama-f16", R"({"partial_rotary_factor": 0.5})",
                   kUnimplemented, "partial_rotary_factor"},
        ConfigCase{"SlidingLayer", "qwen3-head-32",
                   R"({"layer_types": ["full_attention", "sliding_attention"]})", kUnimplemented,
                   "layer_types: layer 1 is sliding_attention"},
        ConfigCase{"SlidingWindow", "qwen2-tied",
                   R"({"layer_types": null, "use_sliding_window": true, "max_window_layers": 1})",
                   kUnimplemented, "use_sliding_window"},
        ConfigCase{"AttentionLayerBeyond", "bamba-groups", R"({"attn_layer_indices": [3]})",
                   kInvalid, "attn_layer_indices is [3]"},
        ConfigCase{"SsdHeads", "mamba2-groups", R"({"num_heads": 5})", kInvalid,
                   "5 heads of dimension 24 are 120 columns; expected expand * hidden_size = 96"},
        ConfigCase{"SsdGroups", "mamba2-groups", R"({"n_groups": 3})", kInvalid,
                   "groups 3 does not divide the number of heads 4"},
        ConfigCase{"NormGroups", "mamba2-groups", R"({"norm_groups": 7})", kInvalid, "norm_groups"},
        ConfigCase{"TimeStepLimit", "mamba2-groups", R"({"time_step_limit": [0.5, 0.1]})", kInvalid,
                   "time_step_limit"},
        ConfigCase{"TimeStepLimitLength", "mamba2-groups", R"({"time_step_limit": [0.5]})",
                   kInvalid, "time_step_limit"},
        // Sizes that do not fit the tensors, and biases that config.json does not mention.
        ConfigCase{"VocabularyOtherThanTensor", "llama-f16", R"({"vocab_size": 193})", kInvalid,
                   "model.embed_tokens.weight has shape [192, 64]; config.json asks for [193, 64]"},
        ConfigCase{"HugeHeads", "llama-f16",
                   R"({"num_attention_heads": 2147483647, "num_key_value_heads": 2147483647})",
                   kInvalid, "q_proj.weight has shape [64, 64]"},
        ConfigCase{"TooManyLayers", "llama-f16", R"({"num_hidden_layers": 2000000000})", kNotFound,
                   "model.layers.2.input_layernorm.weight [64] is missing"},
        ConfigCase{"FewerGroups", "mamba2-groups", R"({"n_groups": 1})", kInvalid,
                   "in_proj.weight has shape [388, 48]; config.json asks for [292, 48]"},
        ConfigCase{"ConvKernel", "mamba2-groups", R"({"conv_kernel": 3})", kInvalid,
                   "conv1d.weight has shape [288, 1, 4]; config.json asks for [288, 1, 3]"},
        ConfigCase{"BiasMissing", "llama-f16", R"({"attention_bias": true})", kNotFound,
                   "q_proj.bias [64] is missing"},
        ConfigCase{"BiasNotUsed", "llama-biases-linear", R"({"attention_bias": false})", kInvalid,
                   "model.layers.0.self_attn.k_proj.bias [48] is not used"},
        ConfigCase{"MlpBiasNotUsed", "llama-biases-linear", R"({"mlp_bias": false})", kInvalid,
                   "is not used"},
        ConfigCase{"ConvBiasNotUsed", "mamba2-groups", R"({"use_conv_bias": false})", kInvalid,
                   "conv1d.bias [288] is not used"},
        ConfigCase{"QkNormNotUsed", "qwen3-head-32", R"({"model_type": "llama"})", kInvalid,
                   "k_norm.weight [32] is not used"},
        ConfigCase{"NoHead", "llama-f16", R"({"tie_word_embeddings": false})", kNotFound,
                   "lm_head.weight [192, 64] is missing"}),
    [](const ::testing::TestParamInfo<ConfigCase>& info) { return info.param.name; });

class DamagedTensors : public ::testing::Test {
 protected:
  void SetUp() override {
    CopyGolden("llama-llama3", "{}", folder_);
    tensors_ = ReadTensors(folder_.File("model.safetensors"));
  }
  absl::Status Status() {
    WriteFile(folder_.File("model.safetensors"), SafetensorsBytes(tensors_));
    return Load(*backend_, folder_).status();
  }

  std::unique_ptr<CpuBackend> backend_ = *CpuBackend::Create(1);
  TempFolder folder_;
  StoredTensors tensors_;
};

TEST_F(DamagedTensors, EveryMissingTensorIsNamed) {
  const StoredTensors good = tensors_;
  for (const auto& [name, tensor] : good) {
    tensors_ = good;
    tensors_.erase(name);
    const absl::Status status = Status();
    EXPECT_EQ(status.code(), kNotFound) << name;
    EXPECT_THAT(std::string(status.message()), HasSubstr(absl::StrCat("tensor ", name, " [")));
  }
}

TEST_F(DamagedTensors, EveryTensorOfAnotherShapeIsNamed) {
  const StoredTensors good = tensors_;
  for (const auto& [name, tensor] : good) {
    tensors_ = good;
    tensors_[name] = F32Tensor({2, 5}, std::vector<float>(10));
    const absl::Status status = Status();
    EXPECT_EQ(status.code(), kInvalid) << name;
    EXPECT_THAT(
        std::string(status.message()),
        HasSubstr(absl::StrCat("tensor ", name, " has shape [2, 5]; config.json asks for")));
  }
}

TEST_F(DamagedTensors, OtherDtypesAreRefused) {
  auto& norm = tensors_.at("model.norm.weight");
  norm = {"F64", {64}, std::string(64 * 8, '\0')};
  const absl::Status status = Status();
  EXPECT_EQ(status.code(), kUnimplemented);
  EXPECT_THAT(std::string(status.message()), HasSubstr("model.norm.weight has dtype F64"));
}

TEST_F(DamagedTensors, StackedTensorsHaveOneDtype) {
  auto& k = tensors_.at("model.layers.1.self_attn.k_proj.weight");
  k = {"BF16", {64, 64}, std::string(64 * 64 * 2, '\0')};
  const absl::Status status = Status();
  EXPECT_EQ(status.code(), kUnimplemented);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("k_proj.weight has dtype BF16"), HasSubstr("q_proj.weight has F32")));
}

TEST_F(DamagedTensors, ExtraTensorsMatterInsideALayerOnly) {
  tensors_["model.layers.0.self_attn.rotary_emb.inv_freq"] = F32Tensor({8}, std::vector<float>(8));
  tensors_["model.layers.2.mlp.gate_proj.weight"] = F32Tensor({1}, {0});  // past the last layer
  tensors_["model.layers.x"] = F32Tensor({1}, {0});
  tensors_["something.else"] = F32Tensor({1}, {0});
  EXPECT_TRUE(Status().ok()) << Status();
  tensors_["model.layers.1.mlp.gate_proj.scales"] = F32Tensor({1}, {0});
  EXPECT_THAT(std::string(Status().message()),
              HasSubstr("model.layers.1.mlp.gate_proj.scales [1] is not used"));
}

TEST(LoadModel, SaysWhatIsMissingOnDisk) {
  const std::unique_ptr<CpuBackend> backend = *CpuBackend::Create(1);
  const TempFolder folder;
  EXPECT_EQ(LoadModel(*backend, folder.File("none")).status().code(), kNotFound);
  EXPECT_THAT(std::string(Load(*backend, folder).status().message()),
              HasSubstr(folder.File("config.json")));
  CopyGolden("llama-f16", "{}", folder);
  fs::remove(folder.File("model.safetensors"));
  EXPECT_THAT(std::string(Load(*backend, folder).status().message()),
              HasSubstr("neither model.safetensors nor"));
  WriteFile(folder.File("model.safetensors"), "12345678{}");
  EXPECT_THAT(std::string(Load(*backend, folder).status().message()),
              HasSubstr("header's length is"));
}

// A failed load leaves nothing behind.
TEST(LoadModel, FailureGivesAllMemoryBack) {
  const std::unique_ptr<CpuBackend> backend = *CpuBackend::Create(1);
  const TempFolder folder;
  CopyGolden("llama-biases-linear", R"({"mlp_bias": false})", folder);
  EXPECT_FALSE(Load(*backend, folder).ok());
  EXPECT_GT(backend->memory().peak_bytes, 0u);
  EXPECT_EQ(backend->memory().bytes_in_use, 0u);
}

TEST(ListArchitectures, NamesAll) {
  EXPECT_THAT(ListArchitectures(), ElementsAre("bamba", "llama", "mamba2", "qwen2", "qwen3"));
}

}  // namespace
}  // namespace canopy
