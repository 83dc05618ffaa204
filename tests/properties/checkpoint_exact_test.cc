// Bit-exactness on trained checkpoints: the bundled pair always, the larger ones where they are.

#include <cstring>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "core/cpu_backend.h"
#include "core/language_model.h"
#include "gtest/gtest.h"
#include "models/loader.h"
#include "tests/support/random_model.h"

namespace canopy {
namespace {

using testing::RandomTokens;
using testing::RandomTree;

class CheckpointExact : public ::testing::TestWithParam<std::string> {};

TEST_P(CheckpointExact, TreeEqualsPathsTokenByToken) {
  const std::string folder = std::string(CANOPY_SOURCE_DIR) + "/" + GetParam();
  if (!std::filesystem::exists(folder)) {
    GTEST_SKIP() << "skipped: " << GetParam() << " is not there; it is not part of the repository";
  }
  auto cpu = *CpuBackend::Create(0);
  auto loaded = LoadModel(*cpu, folder);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  const LanguageModel& model = **loaded;
  const int vocab = model.info().vocab_size;
  std::mt19937_64 rng(21);
  auto workspace = *model.NewWorkspace(64);
  auto state = *model.NewState({.max_positions = 256, .max_pending = 64});
  for (const int length : {5, 40, 90}) {
    const std::vector<TokenId> context = RandomTokens(rng, length, vocab);
    const TokenTree tree = RandomTree(rng, length == 40 ? 64 : 20, 32, vocab);
    state->Reset();
    const ForwardItem prompt{
        .state = state.get(), .tokens = context, .logits = LogitsOf::kNone, .commit_chain = true};
    ASSERT_TRUE(model.Forward({&prompt, 1}, *workspace).ok());
    auto plain = *state->Fork();
    const ForwardItem item{
        .state = state.get(), .tokens = tree.tokens(), .parents = tree.parents()};
    auto scored = model.Forward({&item, 1}, *workspace);
    ASSERT_TRUE(scored.ok()) << scored.status();
    std::vector<std::vector<float>> rows;
    for (int i = 0; i < tree.size(); ++i) {
      rows.emplace_back(scored->logits.row(i), scored->logits.row(i) + vocab);
    }
    for (int leaf = 0; leaf < tree.size(); ++leaf) {
      if (tree.first_child(NodeId(leaf)) != kPrefix) continue;
      auto path_state = *plain->Fork();
      for (NodeId node : tree.Path(NodeId(leaf))) {
        const TokenId token = tree.token(node);
        const ForwardItem step{.state = path_state.get(), .tokens = {&token, 1}};
        auto one = model.Forward({&step, 1}, *workspace);
        ASSERT_TRUE(one.ok()) << one.status();
        ASSERT_EQ(std::memcmp(one->logits.row(0), rows[node.value].data(), sizeof(float) * vocab),
                  0)
            << "context " << length << ", node " << node.value << " of " << tree.ToString();
        const NodeId first(0);
        ASSERT_TRUE(path_state->Commit({&first, 1}).ok());
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Checkpoints, CheckpointExact,
                         ::testing::Values("data/models/tiny-bamba-4m", "data/models/tiny-draft-m2",
                                           "../shared/models/m2-16m", "../shared/models/bamba-16m",
                                           "../shared/models/llama-16m"),
                         [](const auto& info) {
                           std::string name = std::filesystem::path(info.param).filename().string();
                           for (char& c : name) c = c == '-' ? '_' : c;
                           return name;
                         });

}  // namespace
}  // namespace canopy
