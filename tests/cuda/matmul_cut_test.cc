// How products are cut into runs: every quantum is in one run, runs are equally long, and every
// weight has a place of its own. And what of shared memory their weights' ring has. Needs no
// device.

#include <cuda_bf16.h>

#include <algorithm>
#include <random>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "core/ops/matmul_cuda.cuh"
#include "core/ops/strip_cuda.cuh"
#include "gtest/gtest.h"

namespace canopy::cuda {
namespace {

MatmulOp RandomOp(std::mt19937& random, int grid) {
  const auto below = [&](int n) { return static_cast<int>(random() % n); };
  MatmulOp op;
  op.tile_blocks = 1 + below(16);
  op.k_steps = 1 + below(400);
  op.quantum = 1 << below(4);
  op.blocks = 1 + below(600);
  op.early_tiles = below(3) * below(40);
  op.early_runs = EarlyRuns(op.early_tiles, op.k_steps, grid);
  return op;
}

TEST(MatmulCut, EveryQuantumIsInOneRun) {
  std::mt19937 random(7);
  for (int i = 0; i < 2000; ++i) {
    const int grid = 1 + static_cast<int>(random() % 150);
    const MatmulOp op = RandomOp(random, grid);
    const MatmulCut cut(op, grid);
    int early = 0, other = 0;  // what no run had so far
    for (int run = 0; run < grid; ++run) {
      ASSERT_EQ(cut.FirstEarly(run), early);
      const int early_end = cut.FirstEarly(run + 1);
      for (; early < early_end; ++early) ASSERT_EQ(cut.RunOfEarly(early), run);
      if (run < cut.early_runs) {
        EXPECT_NEAR(early_end - cut.FirstEarly(run), cut.early_total / cut.early_runs, 1);
      }
      ASSERT_EQ(cut.First(run), other);
      const int end = cut.First(run + 1);
      if (run < cut.runs) {
        EXPECT_NEAR(end - other, cut.total / cut.runs, 1);
      }
      for (; other < end; ++other) ASSERT_EQ(cut.RunOf(other), run);
    }
    EXPECT_EQ(early, cut.early_total);
    EXPECT_EQ(other, cut.total);
  }
}

TEST(MatmulCut, WholeTilesAreRunsOfTheirOwn) {
  MatmulOp op;
  op.tile_blocks = 5;
  op.blocks = 5 * 128;
  op.k_steps = op.quantum = 160;
  const MatmulCut cut(op, 132);
  for (int run = 0; run < 132; ++run) EXPECT_EQ(cut.First(run), std::min(run, 128));
}

TEST(MatmulCut, SplitsAreRunsOfATile) {
  std::mt19937 random(8);
  for (int i = 0; i < 300; ++i) {
    const int grid = 1 + static_cast<int>(random() % 150);
    const MatmulOp op = RandomOp(random, grid);
    const MatmulCut cut(op, grid);
    const auto overlaps = [](int tile, int per_tile, int begin, int end) {
      return std::max(begin, tile * per_tile) < std::min(end, (tile + 1) * per_tile);
    };
    for (int tile = 0; tile * cut.per_tile < cut.total; ++tile) {
      int splits = 0;
      for (int run = 0; run < grid; ++run) {
        splits += overlaps(tile, cut.per_tile, cut.First(run), cut.First(run + 1));
      }
      ASSERT_EQ(cut.Splits(tile), splits) << tile;
    }
    for (int tile = 0; tile < op.early_tiles; ++tile) {
      int splits = 0;
      for (int run = 0; run < grid; ++run) {
        splits += overlaps(tile, cut.early_per_tile, cut.FirstEarly(run), cut.FirstEarly(run + 1));
      }
      ASSERT_EQ(cut.EarlySplits(tile), splits) << tile;
      EXPECT_LE(splits, kMostEarlySplits + 1);
    }
  }
}

TEST(MatmulCut, EveryWeightHasItsPlace) {
  std::mt19937 random(9);
  for (int i = 0; i < 50; ++i) {
    MatmulOp op = RandomOp(random, 20);
    op.blocks = 1 + op.blocks % 20;
    op.early_tiles %= 4;
    op.k_steps = 1 + op.k_steps % 5;
    const int outputs = (op.early_tiles + op.blocks) * 16, inputs = op.k_steps * 16;
    std::vector<bool> taken(size_t{1} * outputs * inputs);
    for (int m = 0; m < outputs; ++m) {
      for (int k = 0; k < inputs; ++k) {
        const int64_t at =
            i % 2 == 0 ? PackedElement<uint16_t>(op, m, k) : PackedElement<float>(op, m, k);
        ASSERT_GE(at, 0);
        ASSERT_LT(at, static_cast<int64_t>(taken.size()));
        ASSERT_FALSE(taken[at]);
        taken[at] = true;
      }
    }
  }
}

template <typename T>
void ExpectRing(int row_tiles, int shared_bytes, bool scans, bool attends, int slots,
                int slot_bytes) {
  const RingShape ring = RingFor<T>(row_tiles, shared_bytes, scans, attends, 0);
  const auto which = [&] {
    return absl::StrCat(row_tiles, " ", shared_bytes, " ", scans, " ", attends);
  };
  EXPECT_EQ(ring.slots, slots) << which();
  EXPECT_EQ(ring.slot_bytes, slot_bytes) << which();
  // A k-step of the widest tile, and room for what products work with.
  EXPECT_GE(ring.slot_bytes, kMostTileUnits * kUnitBytes<T>);
  const int rest = shared_bytes - ring.bytes() - static_cast<int>(sizeof(PassNodes));
  EXPECT_GE(rest, kMatmulWorkBytes);
  // A piece waits for one that was begun before it and is still in the ring, also in smaller ones
  // and with as many under way as there ever are.
  RingShape smaller = RingFor<T>(row_tiles, shared_bytes, scans, attends, 1 << 20);
  while (true) {
    EXPECT_LE(smaller.under_way, smaller.slots * kPieces);
    EXPECT_EQ(smaller.slot_bytes % (kPieces * 16), 0);
    EXPECT_LE(smaller.slots, kMostRingSlots);
    if (smaller.bytes() == kLeastRing.bytes()) break;
    ASSERT_LT(Smaller(smaller).bytes(), smaller.bytes());
    smaller = Smaller(smaller);
  }
}

// The published sizes of Mamba-2: pairs of blocks have all columns, each once, and the runs of more
// rows are the parts of strips.
TEST(Strips, HaveAllColumnsAndThePartsOfRuns) {
  constexpr int kGrid = 132, kPieceBytes = 20 << 10;
  for (const auto& [outputs, inputs] :
       {std::pair{768, 1536}, std::pair{1024, 2048}, std::pair{1536, 3072}, std::pair{2048, 4096},
        std::pair{2560, 5120}}) {
    const MatmulOp op = PlanStrips(outputs, inputs / 16, kGrid, kPieceBytes);
    SCOPED_TRACE(outputs);
    ASSERT_EQ(op.blocks * 16, outputs);
    EXPECT_EQ(op.blocks % op.tile_blocks, 0);
    EXPECT_EQ(op.tile_blocks * 2 % op.strip_groups, 0);  // a strip is in one tile
    EXPECT_LE(outputs, kGrid / kStripBlocks * op.strip_groups * 8);
    EXPECT_LE(StripPieceBytes(op), kPieceBytes);
    EXPECT_EQ(op.quantum % op.strip_steps, 0);
    EXPECT_EQ(op.quantum * kStripBlocks * kStripParts, op.k_steps);
    const MatmulCut cut(op, kGrid);
    for (int tile = 0; tile < op.blocks / op.tile_blocks; ++tile) {
      EXPECT_EQ(cut.Splits(tile), kStripBlocks * kStripParts);
    }
    for (int run = 0; run < cut.runs; ++run) EXPECT_EQ(cut.First(run + 1) - cut.First(run), 1);
  }
  for (const auto& [outputs, inputs] :
       {std::pair{2560, 5136}, std::pair{2576, 5120}, std::pair{4096, 8192}, std::pair{52, 160}}) {
    EXPECT_EQ(PlanStrips(outputs, inputs / 16, kGrid, kPieceBytes).blocks, 0) << outputs;
  }
  EXPECT_EQ(PlanStrips(2560, 320, 64, kPieceBytes).blocks, 0);
  EXPECT_EQ(PlanStrips(2560, 320, kGrid, 8 << 10).blocks, 0);
}

// By what a block has on compute capability 9.0 and 10.0, on 8.0, and on 8.6, 8.9 and 12.0.
TEST(WeightRing, FollowsTheSharedMemory) {
  constexpr int kLarge = 227 << 10, kMiddle = 163 << 10, kSmall = 99 << 10;
  constexpr int kWhole = 32 << 10, kHalf = 16 << 10, kLong = 40 << 10;
  for (const bool attends : {true, false}) {
    ExpectRing<__nv_bfloat16>(1, kLarge, true, attends, 4, kLong);
    ExpectRing<__nv_bfloat16>(1, kMiddle, true, attends, 2, kLong);
    ExpectRing<__nv_bfloat16>(2, kLarge, true, attends, 4, kLong);
    ExpectRing<__nv_bfloat16>(2, kMiddle, true, attends, 3, kWhole);
    ExpectRing<__nv_bfloat16>(4, kLarge, true, attends, 4, attends ? kWhole : kLong);
    ExpectRing<__nv_bfloat16>(1, kLarge, false, attends, 5, kWhole);
    ExpectRing<__nv_bfloat16>(1, kMiddle, false, attends, 3, kWhole);
    ExpectRing<__nv_bfloat16>(2, kLarge, false, attends, 5, kWhole);
    ExpectRing<__nv_bfloat16>(4, kLarge, false, attends, 4, kWhole);
    for (const bool scans : {true, false}) {
      ExpectRing<__nv_bfloat16>(8, kLarge, scans, attends, 4, kWhole);
      ExpectRing<__nv_bfloat16>(8, 2 * kLarge, scans, attends, 4, kWhole);
      ExpectRing<__nv_bfloat16>(8, kMiddle, scans, attends, 2, kWhole);
      ExpectRing<__nv_bfloat16>(1, kSmall, scans, attends, 2, kHalf);
      ExpectRing<__nv_bfloat16>(8, kSmall, scans, attends, 2, kHalf);
      for (const int row_tiles : {1, 2, 4, 8}) {
        ExpectRing<float>(row_tiles, kLarge, scans, attends, 2, kWhole);
        ExpectRing<float>(row_tiles, kMiddle, scans, attends, 2, kHalf);
        ExpectRing<float>(row_tiles, kSmall, scans, attends, 2, kHalf);
      }
    }
  }
}

// Slots of scans of 16 and 32 rows become shorter before there is one fewer.
TEST(WeightRing, ShortensSlotsFirst) {
  RingShape ring = RingFor<__nv_bfloat16>(4, 227 << 10, true, false, 0);
  for (int slots = 4; slots >= 2; --slots) {
    for (int bytes = 40 << 10; bytes >= 32 << 10; bytes -= 1 << 10, ring = Smaller(ring)) {
      EXPECT_EQ(ring.slots, slots);
      EXPECT_EQ(ring.slot_bytes, bytes);
    }
  }
  EXPECT_EQ(ring.bytes(), kLeastRing.bytes());
}

// By the nominal bandwidth of an H200 and of an H100, with 132 multiprocessors.
TEST(WeightRing, HasMorePiecesUnderWayWhereMemoryIsFaster) {
  constexpr int kLarge = 227 << 10;
  const int h200 = LatencyBytes(4.92e12, 132), h100 = LatencyBytes(3.35e12, 132);
  for (const int row_tiles : {1, 2, 4, 8}) {
    EXPECT_EQ(RingFor<__nv_bfloat16>(row_tiles, kLarge, false, false, h200).under_way, 3);
    EXPECT_EQ(RingFor<__nv_bfloat16>(row_tiles, kLarge, false, false, h100).under_way, 2);
    EXPECT_EQ(RingFor<__nv_bfloat16>(row_tiles, kLarge, true, false, h200).under_way, 2);
    EXPECT_EQ(RingFor<__nv_bfloat16>(row_tiles, kLarge, false, false, 0).under_way, 2);
  }
}

}  // namespace
}  // namespace canopy::cuda
