// How products are cut into runs: every quantum is in one run, runs are equally long, and what is
// wanted early comes first. Needs no device.

#include <algorithm>
#include <random>

#include "core/ops/matmul_cuda.cuh"
#include "gtest/gtest.h"

namespace canopy::cuda {
namespace {

MatmulOp RandomOp(std::mt19937& random) {
  const auto below = [&](int n) { return static_cast<int>(random() % n); };
  MatmulOp op;
  op.tile_subs = 1 << below(3);
  op.units = 1 + below(300);
  op.k_steps = 1 + below(400);
  op.quantum = 1 << below(4);
  op.first_tiles = below(1 + std::min(40, op.units / op.tile_subs / 2));
  return op;
}

TEST(MatmulCut, EveryQuantumIsInOneRun) {
  std::mt19937 random(7);
  int with_first = 0;
  for (int i = 0; i < 2000; ++i) {
    MatmulOp op = RandomOp(random);
    const int grid = 1 + static_cast<int>(random() % 150);
    op.first_runs = FirstRuns(op, grid);
    with_first += op.first_runs > 0;
    const MatmulCut cut(op, grid);
    int first = 0, other = cut.first_total;  // what no run had so far
    for (int run = 0; run < grid; ++run) {
      ASSERT_EQ(cut.FirstOfFirst(run), first);
      const int first_end = cut.FirstOfFirst(run + 1);
      for (int quantum = first; quantum < first_end; ++quantum) {
        ASSERT_EQ(cut.RunOf(quantum), run);
      }
      ASSERT_EQ(cut.First(run), other);
      const int end = cut.First(run + 1);
      ASSERT_GE(end, other);
      for (int quantum = other; quantum < end; ++quantum) ASSERT_EQ(cut.RunOf(quantum), run);
      if (run < cut.runs) {
        EXPECT_NEAR((first_end - first) + (end - other), cut.total / cut.runs, 1);
      }
      first = first_end;
      other = end;
    }
    EXPECT_EQ(first, cut.first_total);
    EXPECT_EQ(other, cut.total);
  }
  EXPECT_GT(with_first, 200);
}

TEST(MatmulCut, SplitsAreRunsOfATile) {
  std::mt19937 random(8);
  for (int i = 0; i < 300; ++i) {
    MatmulOp op = RandomOp(random);
    const int grid = 1 + static_cast<int>(random() % 150);
    op.first_runs = FirstRuns(op, grid);
    const MatmulCut cut(op, grid);
    for (int tile = 0; tile * cut.per_tile < cut.total; ++tile) {
      int splits = 0;
      for (int run = 0; run < grid; ++run) {
        const auto overlaps = [&](int begin, int end) {
          return std::max(begin, tile * cut.per_tile) < std::min(end, (tile + 1) * cut.per_tile);
        };
        splits += overlaps(cut.FirstOfFirst(run), cut.FirstOfFirst(run + 1)) ||
                  overlaps(cut.First(run), cut.First(run + 1));
      }
      ASSERT_EQ(cut.Splits(tile), splits) << tile;
    }
  }
}

}  // namespace
}  // namespace canopy::cuda
