// canopy golden and canopy inspect as a user meets them: exit code, stdout, one line on stderr.

#include <sys/wait.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "core/cpu_backend.h"
#include "drafting/registry.h"
#include "experiments/decode_loop.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "models/loader.h"
#include "nlohmann/json.hpp"
#include "tests/support/checkpoint_files.h"
#include "tests/support/command_output.h"
#include "verify/acceptance.h"

namespace canopy {
namespace {

using testing::CopyGolden;
using testing::GoldenFolder;
using ::testing::HasSubstr;
using testing::ReadTensors;
using testing::SafetensorsBytes;
using ::testing::StartsWith;
using testing::StoredTensors;
using testing::TempFolder;
using testing::WriteFile;

using Output = testing::CommandOutput;

Output Canopy(const std::vector<std::string>& args) { return testing::RunCommand(args); }

void ExpectError(const Output& output, int code, const std::string& command,
                 const std::string& message) {
  EXPECT_EQ(output.code, code);
  EXPECT_THAT(output.err, StartsWith("canopy " + command + ": "));
  EXPECT_THAT(output.err, HasSubstr(message));
  EXPECT_EQ(std::count(output.err.begin(), output.err.end(), '\n'), 1) << output.err;
}

// Sets element `index` of an f32 tensor of model.safetensors in `folder`.
void SetWeight(const TempFolder& folder, const std::string& tensor, size_t index, float value) {
  StoredTensors tensors = ReadTensors(folder.File("model.safetensors"));
  reinterpret_cast<float*>(tensors.at(tensor).bytes.data())[index] = value;
  WriteFile(folder.File("model.safetensors"), SafetensorsBytes(tensors));
}

TEST(GoldenCommand, PrintsOneLineOfJson) {
  const std::string folder = GoldenFolder("mamba2-whole-row");
  const Output output = Canopy(
      {"golden", "--model", folder, "--golden", folder + "/golden.safetensors", "--threads=1"});
  EXPECT_EQ(output.code, 0) << output.err;
  EXPECT_EQ(output.err, "");
  EXPECT_EQ(std::count(output.out.begin(), output.out.end(), '\n'), 1);
  const nlohmann::json json = nlohmann::json::parse(output.out);
  EXPECT_LT(json["context_max_abs_err"], 2e-4);
  EXPECT_LT(json["tree_max_abs_err"], 2e-4);
  EXPECT_EQ(json["tree_argmax_equal"], 1.0);
  EXPECT_EQ(json["greedy_equal"], true);
  EXPECT_TRUE(json["greedy_first_difference"].is_null());
}

TEST(GoldenCommand, FailsOutsideTheTolerance) {
  const std::string folder = GoldenFolder("llama-llama3");
  const std::vector<std::string> args = {"golden", "--model", folder, "--golden",
                                         folder + "/golden.safetensors"};
  std::vector<std::string> strict = args;
  strict.push_back("--tolerance=0");
  const Output output = Canopy(strict);
  ExpectError(output, 1, "golden", "tolerance 0");
  EXPECT_TRUE(nlohmann::json::parse(output.out).is_object());
}

TEST(GoldenCommand, SeesWeightsThatAreNotNumbers) {
  const TempFolder folder;
  CopyGolden("llama-llama3", "{}", folder);
  SetWeight(folder, "model.norm.weight", 3, std::numeric_limits<float>::quiet_NaN());
  const Output output = Canopy({"golden", "--model", folder.path().string(), "--golden",
                                folder.File("golden.safetensors"), "--tolerance=1e30"});
  ExpectError(output, 1, "golden", "differs from");
  EXPECT_TRUE(nlohmann::json::parse(output.out)["tree_max_abs_err"].is_null());
}

TEST(DecodeLoop, StopsAtLogitsThatAreNotNumbers) {
  const TempFolder folder;
  CopyGolden("llama-llama3", "{}", folder);
  SetWeight(folder, "model.norm.weight", 3, std::numeric_limits<float>::quiet_NaN());
  const auto cpu = *CpuBackend::Create(1);
  const auto model = LoadModel(*cpu, folder.path().string());
  ASSERT_TRUE(model.ok()) << model.status();
  const auto loop = *DecodeLoop::Create(**model, 64);
  const auto rule = *MakeAcceptanceRule("greedy");
  const auto drafter = *MakeDrafter("none", {});
  const std::vector<TokenId> prompt = {TokenId(1), TokenId(9), TokenId(10)};
  DecodeRequest request;
  request.prompt = prompt;
  request.drafter = drafter.get();
  request.rule = rule.get();
  Generation out;
  const absl::Status status = loop->Decode({&request, 1}, {&out, 1});
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("at position 2 are not numbers"));
}

TEST(ListCommand, SaysWhenItsOutputIsLost) {
  EXPECT_EQ(WEXITSTATUS(std::system(CANOPY_BINARY " list >/dev/full 2>/dev/null")), 1);
}

TEST(GoldenCommand, RefusesWrongUsage) {
  ExpectError(Canopy({"golden"}), 2, "golden", "--golden");
  ExpectError(Canopy({"golden", "--model=x"}), 2, "golden", "--golden");
  ExpectError(Canopy({"golden", "--modle=x"}), 2, "golden", "modle");
  ExpectError(Canopy({"golden", "--model=x", "--golden=y", "z"}), 2, "golden", "positional");
  ExpectError(Canopy({"golden", "--model=x", "--golden=y", "--tolerance=abc"}), 2, "golden", "abc");
  ExpectError(Canopy({"golden", "--model=x", "--golden=y", "--tolerance=nan"}), 2, "golden",
              "--tolerance");
  ExpectError(Canopy({"golden", "--model=x", "--golden=y", "--threads=-1"}), 2, "golden",
              "--threads");
}

TEST(GoldenCommand, NamesFilesThatAreMissing) {
  ExpectError(Canopy({"golden", "--model=/no/model", "--golden=/no/file"}), 1, "golden",
              "/no/model");
  ExpectError(Canopy({"golden", "--model", GoldenFolder("llama-f16"), "--golden=/no/file"}), 1,
              "golden", "/no/file");
}

TEST(InspectCommand, DescribesAModel) {
  const Output output = Canopy({"inspect", GoldenFolder("bamba-groups"), "--check"});
  EXPECT_EQ(output.code, 0) << output.err;
  EXPECT_EQ(output.err, "");
  for (const char* part :
       {"bamba, 3 layers, hidden size 64", "114704", "bf16", "all weights are finite",
        "attention  4 heads of 16, 2 KV heads, RoPE over 8", "ssd        8 heads of 16, state 32",
        "weights", "pending node", "the allocator gave the same"}) {
    EXPECT_THAT(output.out, HasSubstr(part));
  }
  // 2 attention layers of 2 * 2 * 16 numbers; an SSD layer of 128 + 2 * 32 + 8 + 128 + 4 * 32.
  EXPECT_THAT(output.out,
              HasSubstr(absl::StrCat(4 * (2 * 64 + 128 + 64 + 8 + 256), " B of numbers")));
}

TEST(InspectCommand, CheckNamesTensorsThatAreNotFinite) {
  const TempFolder folder;
  CopyGolden("llama-llama3", "{}", folder);
  const std::string path = folder.path().string();
  SetWeight(folder, "model.layers.1.mlp.up_proj.weight", 70,
            std::numeric_limits<float>::quiet_NaN());
  SetWeight(folder, "model.layers.1.mlp.up_proj.weight", 71,
            std::numeric_limits<float>::quiet_NaN());
  SetWeight(folder, "model.norm.weight", 5, -std::numeric_limits<float>::infinity());
  const Output output = Canopy({"inspect", path, "--check"});
  ExpectError(output, 1, "inspect",
              "2 tensors have values that are not finite; the first: "
              "model.layers.1.mlp.up_proj.weight [88, 64]");
  EXPECT_THAT(output.out, HasSubstr("2 NaN and 0 infinite values, the first at index 70"));
  EXPECT_THAT(output.out, HasSubstr("model.norm.weight [64]"));
  EXPECT_THAT(output.out, HasSubstr("0 NaN and 1 infinite values, the first at index 5"));
  // Without --check the weights are not scanned.
  EXPECT_EQ(Canopy({"inspect", path}).code, 0);
}

TEST(InspectCommand, RefusesWrongUsageAndFolders) {
  ExpectError(Canopy({"inspect"}), 2, "inspect", "expected a checkpoint folder");
  ExpectError(Canopy({"inspect", "a", "b"}), 2, "inspect", "positional");
  ExpectError(Canopy({"inspect", "a", "--nodes=0"}), 2, "inspect", "--nodes");
  ExpectError(Canopy({"inspect", "a", "--positions=0"}), 2, "inspect", "--positions");
  ExpectError(Canopy({"inspect", "a", "--chekc"}), 2, "inspect", "chekc");
  ExpectError(Canopy({"inspect", "/no/model"}), 1, "inspect", "/no/model");
  const TempFolder folder;
  ExpectError(Canopy({"inspect", folder.path().string()}), 1, "inspect", "config.json");
}

}  // namespace
}  // namespace canopy
