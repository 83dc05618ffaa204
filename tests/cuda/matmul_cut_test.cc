// How products are cut into runs: every quantum is in one run, runs are equally long, and what is
// wanted early comes first. And what of shared memory their weights' ring has. Needs no device.

#include <cuda_bf16.h>

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

template <typename T>
void ExpectRing(int row_tiles, int shared_bytes, int slots, int slot_bytes) {
  const RingShape ring = RingFor<T>(row_tiles, shared_bytes);
  EXPECT_EQ(ring.slots, slots) << row_tiles << " " << shared_bytes;
  EXPECT_EQ(ring.slot_bytes, slot_bytes) << row_tiles << " " << shared_bytes;
  // A k-step of the widest tile, and room for what products work with.
  EXPECT_GE(ring.slot_bytes, kMostTileSubs * kUnitBytes<T>);
  const int rest = shared_bytes - ring.bytes() - static_cast<int>(sizeof(PassNodes));
  EXPECT_GE(rest, kMatmulWorkBytes);
}

// By what a block has on compute capability 9.0 and 10.0, on 8.0, and on 8.6, 8.9 and 12.0.
TEST(WeightRing, FollowsTheSharedMemory) {
  constexpr int kLarge = 227 << 10, kMiddle = 163 << 10, kSmall = 99 << 10;
  constexpr int kWhole = 32 << 10, kHalf = 16 << 10;
  ExpectRing<__nv_bfloat16>(1, kLarge, 5, kWhole);
  ExpectRing<__nv_bfloat16>(2, kLarge, 5, kWhole);
  ExpectRing<__nv_bfloat16>(4, kLarge, 4, kWhole);
  ExpectRing<__nv_bfloat16>(8, kLarge, 4, kWhole);
  ExpectRing<__nv_bfloat16>(8, 2 * kLarge, 4, kWhole);
  ExpectRing<__nv_bfloat16>(1, kMiddle, 3, kWhole);
  ExpectRing<__nv_bfloat16>(8, kMiddle, 2, kWhole);
  ExpectRing<__nv_bfloat16>(1, kSmall, 2, kHalf);
  ExpectRing<__nv_bfloat16>(8, kSmall, 2, kHalf);
  for (const int row_tiles : {1, 2, 4, 8}) {
    ExpectRing<float>(row_tiles, kLarge, 2, kWhole);
    ExpectRing<float>(row_tiles, kMiddle, 2, kHalf);
    ExpectRing<float>(row_tiles, kSmall, 2, kHalf);
  }
}

}  // namespace
}  // namespace canopy::cuda
