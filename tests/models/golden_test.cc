// Every model against what transformers computes: tests/models/golden/ (see its generate.py) and
// the bundled pair (make_golden.py) always, ../shared where it is there.

#include "models/golden.h"

#include <cmath>
#include <filesystem>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "models/loader.h"
#include "nlohmann/json.hpp"
#include "tests/support/checkpoint_files.h"

namespace canopy {
namespace {

namespace fs = std::filesystem;
using testing::CopyGolden;
using testing::F32Tensor;
using testing::GoldenFolder;
using ::testing::HasSubstr;
using testing::ReadTensors;
using testing::SafetensorsBytes;
using testing::StoredTensors;
using testing::TempFolder;
using testing::WriteFile;

// An order of magnitude above the rounding that is seen, two below the specified tolerance of 2e-3.
constexpr double kTolerance = 2e-4;

absl::StatusOr<GoldenReport> Compare(const std::string& folder, const std::string& golden,
                                     int threads = 2) {
  ASSIGN_OR_RETURN(const std::unique_ptr<CpuBackend> backend, CpuBackend::Create(threads));
  ASSIGN_OR_RETURN(const std::unique_ptr<LanguageModel> model, LoadModel(*backend, folder));
  return CompareWithGolden(*model, golden, kTolerance);
}

void ExpectEqual(const absl::StatusOr<GoldenReport>& report, bool has_greedy) {
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_LE(report->context_max_abs_err, kTolerance);
  EXPECT_LE(report->tree_max_abs_err, kTolerance);
  EXPECT_EQ(report->tree_argmax_equal, 1.0);
  ASSERT_EQ(report->greedy.has_value(), has_greedy);
  if (has_greedy && !report->greedy->equal) {
    EXPECT_LT(report->greedy->gap_there, kGreedyGap)
        << "at step " << report->greedy->first_difference;
  }
  EXPECT_TRUE(report->passed) << report->ToJson();
}

class CommittedGolden : public ::testing::TestWithParam<const char*> {};

TEST_P(CommittedGolden, MatchesTransformers) {
  const std::string folder = GoldenFolder(GetParam());
  const std::string golden = folder + "/golden.safetensors";
  ExpectEqual(Compare(folder, golden), ReadTensors(golden).contains("greedy_ids"));
}

INSTANTIATE_TEST_SUITE_P(All, CommittedGolden,
                         ::testing::Values("bamba-groups", "bamba-whole-row", "llama-biases-linear",
                                           "llama-f16", "llama-llama3", "mamba2-bf16",
                                           "mamba2-groups", "mamba2-whole-row", "qwen2-tied",
                                           "qwen3-head-32"));

TEST(CommittedGolden, NoneIsForgotten) {
  int folders = 0;
  for (const fs::directory_entry& entry : fs::directory_iterator(GoldenFolder(""))) {
    folders += entry.is_directory();
  }
  EXPECT_EQ(folders, 10);
}

class BundledGolden : public ::testing::TestWithParam<const char*> {};

TEST_P(BundledGolden, MatchesTransformers) {
  const std::string folder = std::string(CANOPY_SOURCE_DIR "/data/models/") + GetParam();
  ExpectEqual(Compare(folder, folder + "/golden.safetensors"), /*has_greedy=*/true);
}

INSTANTIATE_TEST_SUITE_P(All, BundledGolden, ::testing::Values("tiny-bamba-4m", "tiny-draft-m2"));

class SharedGolden : public ::testing::TestWithParam<const char*> {
 protected:
  // Skips the test where the folder that lies beside the project's is not there.
  static std::string Shared() { return CANOPY_SOURCE_DIR "/../shared"; }
};

#define SKIP_WITHOUT_SHARED()                                                       \
  if (!fs::is_directory(Shared())) {                                                \
    GTEST_SKIP() << Shared() << " is not there: its golden files are not compared"; \
  }

class SharedZoo : public SharedGolden {};

TEST_P(SharedZoo, MatchesTransformers) {
  SKIP_WITHOUT_SHARED();
  const std::string folder = Shared() + "/zoo/" + GetParam();
  ExpectEqual(Compare(folder, folder + "/golden.safetensors"), /*has_greedy=*/false);
}

INSTANTIATE_TEST_SUITE_P(All, SharedZoo,
                         ::testing::Values("bamba", "llama", "mamba2", "qwen2", "qwen3"));

TEST_P(SharedGolden, MatchesTransformers) {
  SKIP_WITHOUT_SHARED();
  ExpectEqual(Compare(Shared() + "/models/" + GetParam(),
                      Shared() + "/golden/" + GetParam() + ".safetensors"),
              /*has_greedy=*/true);
}

INSTANTIATE_TEST_SUITE_P(All, SharedGolden,
                         ::testing::Values("bamba-16m", "draft-llama-2m", "draft-m2-2m",
                                           "llama-16m", "m2-16m", "sorted-llama-5m",
                                           "tiny-bamba-4m", "tiny-draft-m2"));

// The comparison must see the mistakes that it is there for.
TEST(GoldenComparison, SeesAWrongModel) {
  const struct {
    const char* golden;
    const char* patch;  // of config.json
  } cases[] = {
      {"mamba2-whole-row", R"({"norm_groups": 2})"},
      {"mamba2-groups", R"({"norm_groups": 1})"},
      {"mamba2-groups", R"({"transformers_version": "5.22.0"})"},
      {"mamba2-groups", R"({"time_step_limit": [0.0, 0.6]})"},
      {"mamba2-groups", R"({"layer_norm_epsilon": 0.01})"},
      {"bamba-whole-row", R"({"rope_parameters": {"rope_theta": 20000.0}})"},
      {"bamba-whole-row", R"({"rope_parameters": {"partial_rotary_factor": 1.0}})"},
      {"llama-llama3", R"({"rope_parameters": {"rope_type": "default"}})"},
      {"llama-llama3", R"({"rope_parameters": {"original_max_position_embeddings": 128}})"},
      {"llama-llama3", R"({"rope_parameters": {"high_freq_factor": 8.0}})"},
      {"llama-biases-linear", R"({"rope_scaling": null})"},
      {"llama-biases-linear", R"({"rope_scaling": {"factor": 3.0}})"},
      {"llama-f16", R"({"hidden_act": "gelu"})"},
  };
  for (const auto& wrong : cases) {
    const TempFolder folder;
    CopyGolden(wrong.golden, wrong.patch, folder);
    const absl::StatusOr<GoldenReport> report =
        Compare(folder.path().string(), folder.File("golden.safetensors"));
    ASSERT_TRUE(report.ok()) << wrong.patch << report.status();
    EXPECT_FALSE(report->passed) << wrong.golden << " " << wrong.patch;
    EXPECT_GT(report->tree_max_abs_err, 2e-3) << wrong.golden << " " << wrong.patch;
  }
}

class GoldenFile : public ::testing::Test {
 protected:
  void SetUp() override {
    tensors_ = ReadTensors(GoldenFolder("llama-llama3") + "/golden.safetensors");
    backend_ = *CpuBackend::Create(1);
    model_ = *LoadModel(*backend_, GoldenFolder("llama-llama3"));
  }
  absl::StatusOr<GoldenReport> Run(double tolerance = kTolerance) {
    WriteFile(folder_.File("g.safetensors"), SafetensorsBytes(tensors_));
    return CompareWithGolden(*model_, folder_.File("g.safetensors"), tolerance);
  }
  std::string Error() {
    const absl::StatusOr<GoldenReport> report = Run();
    return report.ok() ? "passed" : std::string(report.status().message());
  }
  template <typename T>
  T& At(const char* tensor, size_t index) {
    return reinterpret_cast<T*>(tensors_.at(tensor).bytes.data())[index];
  }

  TempFolder folder_;
  StoredTensors tensors_;
  std::unique_ptr<CpuBackend> backend_;
  std::unique_ptr<LanguageModel> model_;
};

TEST_F(GoldenFile, ErrorsAreMeasured) {
  At<float>("context_logits", 5) += 0.25f;
  At<float>("tree_logits", 192 * 3 + 7) -= 0.5f;
  const absl::StatusOr<GoldenReport> report = Run();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_NEAR(report->context_max_abs_err, 0.25, 1e-4);
  EXPECT_NEAR(report->tree_max_abs_err, 0.5, 1e-4);
  EXPECT_FALSE(report->passed);
  EXPECT_TRUE(Run(0.6)->passed);
  EXPECT_FALSE(Run(0.4)->passed);
}

TEST_F(GoldenFile, ArgmaxIsCounted) {
  At<float>("tree_logits", 192 * 3 + 7) = 100.0f;
  const double nodes = 24;
  EXPECT_NEAR(Run()->tree_argmax_equal, (nodes - 1) / nodes, 1e-9);
}

TEST_F(GoldenFile, GreedyDifferenceIsJudgedByTheGapThere) {
  At<int32_t>("greedy_ids", 11) = (At<int32_t>("greedy_ids", 11) + 1) % 192;
  At<int32_t>("greedy_ids", 20) = (At<int32_t>("greedy_ids", 20) + 1) % 192;
  At<float>("greedy_top2_gap", 11) = 0.5f;
  absl::StatusOr<GoldenReport> report = Run();
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_FALSE(report->greedy->equal);
  EXPECT_EQ(report->greedy->first_difference, 11);
  EXPECT_EQ(report->greedy->gap_there, 0.5);
  EXPECT_FALSE(report->passed);
  At<float>("greedy_top2_gap", 11) = 0.0005f;
  EXPECT_TRUE(Run()->passed);
}

TEST_F(GoldenFile, GreedyDifferenceIsJudgedByToleranceAndErrorToo) {
  At<int32_t>("greedy_ids", 11) = (At<int32_t>("greedy_ids", 11) + 1) % 192;
  At<float>("greedy_top2_gap", 11) = 0.75f;
  EXPECT_FALSE(Run(2.0)->passed);  // the tolerance alone allows nothing
  At<float>("tree_logits", 5) += 0.4f;
  EXPECT_TRUE(Run(2.0)->passed);
  EXPECT_FALSE(Run(1.0)->passed);  // nor the error alone
  At<float>("greedy_top2_gap", 11) = 0.85f;
  EXPECT_FALSE(Run(2.0)->passed);
}

// The tolerance of f32 allows no more than ever.
TEST_F(GoldenFile, GreedyDifferenceInF32IsJudgedByTheGapAlone) {
  At<int32_t>("greedy_ids", 11) = (At<int32_t>("greedy_ids", 11) + 1) % 192;
  At<float>("tree_logits", 5) += 0.0018f;
  At<float>("greedy_top2_gap", 11) = 0.0011f;
  EXPECT_FALSE(Run(2e-3)->passed);
  At<float>("greedy_top2_gap", 11) = 0.0009f;
  EXPECT_TRUE(Run(2e-3)->passed);
}

TEST_F(GoldenFile, NotANumberFailsAndIsNullInJson) {
  At<float>("tree_logits", 0) = std::numeric_limits<float>::quiet_NaN();
  const absl::StatusOr<GoldenReport> report = Run(1e9);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_FALSE(report->passed);
  const nlohmann::json json = nlohmann::json::parse(report->ToJson());
  EXPECT_TRUE(json["tree_max_abs_err"].is_null());
  EXPECT_TRUE(json["context_max_abs_err"].is_number());
}

TEST_F(GoldenFile, JsonHasTheSpecifiedKeys) {
  const nlohmann::json with = nlohmann::json::parse(Run()->ToJson());
  for (const char* key : {"context_max_abs_err", "tree_max_abs_err", "tree_argmax_equal",
                          "greedy_equal", "greedy_first_difference", "greedy_gap_there"}) {
    EXPECT_TRUE(with.contains(key)) << key;
  }
  EXPECT_EQ(with["greedy_equal"], true);
  tensors_.erase("greedy_ids");
  const std::string without = Run()->ToJson();
  EXPECT_EQ(without.find("greedy"), std::string::npos);
  EXPECT_EQ(without.find('\n'), std::string::npos);
}

TEST_F(GoldenFile, DamagedFilesAreRefused) {
  const StoredTensors good = tensors_;
  for (const char* name : {"context_ids", "context_logits", "tree_parents", "tree_tokens",
                           "tree_logits", "greedy_top2_gap"}) {
    tensors_ = good;
    tensors_.erase(name);
    EXPECT_THAT(Error(), HasSubstr(absl::StrCat("tensor ", name, " is missing")));
    tensors_ = good;
    tensors_[name] = F32Tensor({1, 1, 1}, {0});
    EXPECT_THAT(Error(), HasSubstr(absl::StrCat("tensor ", name, " is F32 [1, 1, 1]")));
  }
  tensors_ = good;
  At<int32_t>("context_ids", 3) = 192;
  EXPECT_THAT(Error(), HasSubstr("context_ids has the token 192; the model's vocabulary has 192"));
  tensors_ = good;
  At<int32_t>("tree_tokens", 3) = -1;
  EXPECT_THAT(Error(), HasSubstr("tree_tokens has the token -1"));
  tensors_ = good;
  At<int32_t>("tree_parents", 3) = 7;
  EXPECT_NE(Error(), "passed");
  tensors_ = good;
  At<int32_t>("tree_parents", 3) = -5;
  EXPECT_NE(Error(), "passed");
}

}  // namespace
}  // namespace canopy
