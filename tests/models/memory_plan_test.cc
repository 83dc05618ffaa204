#include "models/memory_plan.h"

#include <memory>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "models/loader.h"
#include "tests/support/checkpoint_files.h"

namespace canopy {
namespace {

using testing::GoldenFolder;
using ::testing::HasSubstr;

struct Planned {
  MemoryPlan plan;
  std::unique_ptr<LanguageModel> model;
};

Planned Load(CpuBackend& backend, const std::string& name) {
  absl::StatusOr<Checkpoint> checkpoint = Checkpoint::Open(backend, GoldenFolder(name));
  CHECK(checkpoint.ok());
  absl::StatusOr<DecoderSpec> spec = ReadSpec(*checkpoint);
  CHECK(spec.ok());
  Planned planned;
  planned.plan = PlanMemory(*spec);
  planned.model = *MakeDecoder(backend, *std::move(spec));
  return planned;
}

class MemoryPlanOf : public ::testing::TestWithParam<const char*> {};

TEST_P(MemoryPlanOf, IsWhatTheAllocatorGave) {
  const std::unique_ptr<CpuBackend> backend = *CpuBackend::Create(1);
  const Planned planned = Load(*backend, GetParam());
  EXPECT_EQ(backend->memory().bytes_in_use, planned.plan.matrices);
  const absl::Status status = CheckMemory(*backend, *planned.model, planned.plan);
  EXPECT_TRUE(status.ok()) << status;
}

// Among them sizes that are no multiple of a row: head_dim 24, 4 and 8 heads, state 48.
INSTANTIATE_TEST_SUITE_P(All, MemoryPlanOf,
                         ::testing::Values("bamba-groups", "bamba-whole-row", "llama-biases-linear",
                                           "mamba2-bf16", "mamba2-groups", "qwen3-head-32"));

// By hand from the table of the design: mamba2-groups has 2 layers of 4 heads of 24, 2 groups,
// state 48.
TEST(MemoryPlan, CountsTheNumbersOfAPendingNode) {
  const std::unique_ptr<CpuBackend> backend = *CpuBackend::Create(1);
  const MemoryPlan ssd = Load(*backend, "mamba2-groups").plan;
  const size_t u = 96, b = 96, l = 4, conv = 96 + 2 * 96;
  EXPECT_EQ(ssd.total.per_node_unpadded, 2 * 4 * (u + b + l + conv));
  // Heads of 24 take 32 floats; 4 log decays take 16; 48 and 288 are whole rows.
  EXPECT_EQ(ssd.total.per_node, 2 * 4 * (4 * 32 + 2 * 48 + 16 + 288));
  EXPECT_EQ(ssd.total.per_position, 0u);
  EXPECT_EQ(ssd.total.checkpoint, 2 * 4 * (2 * 4 * 48 * 32 + 3 * 288));
  // llama-biases-linear: 2 layers of 2 KV heads of 24.
  const MemoryPlan attention = Load(*backend, "llama-biases-linear").plan;
  EXPECT_EQ(attention.total.per_node_unpadded, 2u * 4 * (2 * 2 * 24));
  EXPECT_EQ(attention.total.per_node, 2u * 4 * (2 * 2 * 32));
  EXPECT_EQ(attention.total.per_position, 2u * 4 * 2 * (24 + 32));
}

TEST(MemoryPlan, CheckSeesADifference) {
  const std::unique_ptr<CpuBackend> backend = *CpuBackend::Create(1);
  Planned planned = Load(*backend, "bamba-groups");
  for (size_t StatePlan::*field :
       {&StatePlan::checkpoint, &StatePlan::ring, &StatePlan::per_position, &StatePlan::per_node}) {
    MemoryPlan wrong = planned.plan;
    wrong.total.*field += 64;
    const absl::Status status = CheckMemory(*backend, *planned.model, wrong);
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
    EXPECT_THAT(std::string(status.message()), HasSubstr("the allocator gave"));
  }
}

}  // namespace
}  // namespace canopy
