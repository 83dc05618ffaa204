// The product of 1 to 64 rows with a weight matrix on the device: weights are streamed once, and a
// row's bits do not depend on the number of rows.
//
// Weights are cut into blocks of 16 outputs by 16 inputs, of which four are a tensor core's first
// operand (a unit). Blocks side by side make a tile, and the tiles' k-steps, one tile behind the
// other, are cut into as many runs of equal length as there are multiprocessors: so every
// multiprocessor streams the same number of bytes from one contiguous place. The sums of a run over
// a part of a tile's K (a "split") are left to the reader, who adds them in order.
//
// A product whose sums the same block goes on with (an "own" product, in_proj of a scan) has whole
// tiles as runs, and leaves them in registers. Outputs that all blocks need early are apart: tiles
// of one block, cut into parts over K with which the runs begin; their sums go to their readers.
//
// All this depends on the matrix and the device alone, and a column of a tensor core's result on
// that column alone: so row-invariant. Four groups of four warps take a unit of a tile each, where
// it has so many; in code for 90a with wgmma, which reads both operands from shared memory,
// elsewhere with mma.sync. f32 operands are split into three bf16 (core/cuda/ptx.cuh).
//
// Bytes: weights once; activations rows * K * sizeof(T) for each tile; sums.
//
// What did not pay (docs/performance.md): weights fetched into the cache beyond the ring, all at
// once, paced by the clock, or a little when the ring is full; the next product's weights held back
// until the barrier; blocks of outputs by eight warps with mma.sync, whose sums did not fit the
// registers at 64 rows; activations sent without a barrier for more than 16 rows; a pause between
// looks for those that are sent, or two of them under way; a tile's slots dealt to two groups of
// warps; a batch of wgmma under way while the next is begun; other amounts of weights under way, or
// more of them while the ring is empty; pieces of 8 KiB and less; longer slots where there are
// fewer of them, or for 64 rows; all of K of a few columns in a block by copies of 2 KiB (boxes of
// a tensor map do, see strip_cuda.cuh); smaller slots of activations for 32 and 64 rows, or more of
// them; the rows as wgmma's first operand for 16 and 32 rows; code for several k-steps of wgmma one
// behind the other; waiting for sent activations slot by slot; a part of a run that begins in the
// slot in which another one ends.

#ifndef CANOPY_CORE_OPS_MATMUL_CUDA_CUH_
#define CANOPY_CORE_OPS_MATMUL_CUDA_CUH_

#include <algorithm>

#include "core/cuda/pass.h"

namespace canopy::cuda {

// The ring of slots that weights are streamed into, the first thing in a block's shared memory. A
// slot is filled in pieces.
inline constexpr int kPieces = 2;
struct RingShape {
  int slots;
  int slot_bytes;
  int under_way;         // pieces at a time
  int longest_slot = 0;  // see Smaller

  CANOPY_HOST_DEVICE constexpr int bytes() const { return slots * slot_bytes; }
};
inline constexpr int kFullShared = (227 << 10) - kRacecheckShared;
inline constexpr int kMostRingSlots = 5;
inline constexpr RingShape kLeastRing = {2, 16 << 10, 2};
static_assert(kLeastRing.under_way <= kLeastRing.slots * kPieces);

inline constexpr int kSlotBytes = 32 << 10, kLongSlotBytes = 40 << 10;
// The next smaller ring; of the smallest, the same. Slots are shortened from longest_slot, where it
// is not 0, to kSlotBytes before there is one fewer.
constexpr RingShape Smaller(RingShape ring) {
  if (ring.longest_slot > 0 && ring.slot_bytes > kSlotBytes) {
    ring.slot_bytes -= 1 << 10;
  } else if (ring.slots > 2) {
    --ring.slots;
    if (ring.longest_slot > 0) ring.slot_bytes = ring.longest_slot;
  } else {
    ring = kLeastRing;
  }
  return ring;
}

// 128 or 160 KiB of slots (f32 64): up to 22 MB on 132 multiprocessors, five microseconds of an
// H200's bandwidth, that come while other operators run. Those need the rest of the shared memory,
// for more rows and in f32 more of it. On devices whose blocks have less than an H200's, and for
// operators that need more (Smaller), the ring has as much less, down to kLeastRing: of 16 and 32
// rows, with which a layer is mostly waiting, by single KiB. `attends`: whether the model has
// attention, which of 32 rows needs more than a scan.
//
// As much is under way as memory's latency asks for (`latency_bytes`): more makes everybody else
// wait, which costs most where scans send their values from block to block all the time (`scans`).
// And it is under way in few large pieces, for a copy has a price of its own.
template <typename T>
constexpr RingShape RingFor(int row_tiles, int shared_bytes, bool scans, bool attends,
                            int latency_bytes) {
  RingShape ring = {row_tiles <= 2 ? kMostRingSlots : kMostRingSlots - 1, kSlotBytes, 2};
  if (scans && row_tiles == 1) ring = {4, kLongSlotBytes, 2};
  if (scans && (row_tiles == 2 || (row_tiles == 4 && !attends))) {
    ring = {4, kLongSlotBytes, 2, kLongSlotBytes};
  }
  if (sizeof(T) == 4) ring = {2, kSlotBytes, 2};
  const int piece_bytes = ring.slot_bytes / kPieces;
  if (!scans && latency_bytes >= 5 * piece_bytes / 2) ring.under_way = 3;  // to the nearest piece
  const int most = ring.bytes() - (kFullShared - shared_bytes);
  while (ring.bytes() > most && ring.bytes() > kLeastRing.bytes()) ring = Smaller(ring);
  return ring;
}

// Bytes that each of `multiprocessors` must have under way for a bandwidth in bytes a second. The
// latency is that of a memory at work.
inline constexpr double kMemorySeconds = 1.2e-6;
constexpr int LatencyBytes(double bandwidth, int multiprocessors) {
  return static_cast<int>(bandwidth * kMemorySeconds / multiprocessors);
}

// Whether the first activations of a block's run are sent, see kUnsent, and do not wait for a
// barrier. With more rows everybody who waits for so many of them is in the others' way.
CANOPY_HOST_DEVICE constexpr bool SendsActs(int bucket_rows) { return bucket_rows <= 16; }

// The ring of activations. Where they are sent each thread fills 16 bytes of a slot (BeginMatmul);
// copies come in fewer, larger slots, for each has a price of its own. For 16 rows there are three,
// so that four long slots of weights fit, which have as many k-steps, 16, of tiles of five blocks.
inline constexpr int kActRingBytes = 32 << 10;  // at most
inline constexpr int kMostActSlots = 4;
CANOPY_HOST_DEVICE constexpr int ActSlots(int row_tiles) {
  return !SendsActs(8 * row_tiles) ? 2 : row_tiles == 2 ? 3 : kMostActSlots;
}
CANOPY_HOST_DEVICE constexpr int ActSlotBytes(int row_tiles) {
  return kActRingBytes / (SendsActs(8 * row_tiles) ? kMostActSlots : 2);
}
CANOPY_HOST_DEVICE constexpr int ActBytes(int row_tiles) {
  return ActSlots(row_tiles) * ActSlotBytes(row_tiles);
}
// K-steps of activations in a slot.
template <typename T>
CANOPY_HOST_DEVICE constexpr int ActSteps(int row_tiles) {
  return ActSlotBytes(row_tiles) / (8 * row_tiles * 16 * static_cast<int>(sizeof(T)));
}

inline constexpr int kUnitBlocks = 4;  // of 16 outputs, in a unit
template <typename T>
inline constexpr int kBlockBytes = 16 * 16 * static_cast<int>(sizeof(T));
template <typename T>
inline constexpr int kUnitBytes = kUnitBlocks* kBlockBytes<T>;
inline constexpr int kMostTileUnits = kConsumerWarps / 4;
inline constexpr int kMostSplits = 16;
inline constexpr int kMostNormGroups = 16;

// What a product uses of the operators' shared memory: the ring of activations, factors of norms.
inline constexpr int kMatmulWorkBytes = kActRingBytes + 4 * kMaxRows * kMostNormGroups;

struct FirstActs;
struct MatmulOp {
  const void* weights = nullptr;
  const void* act = nullptr;
  float* out = nullptr;  // partials
  int blocks = 0;        // of 16 outputs, in all tiles but early ones
  int tile_blocks = kUnitBlocks;
  int k_steps = 0;
  int quantum = 1;        // runs begin and end at multiples of this, or at a tile's end
  int early_tiles = 0;    // of a block each
  int early_runs = 0;     // that begin with parts of those
  int columns = 0;        // of sums; those of padding behind them are not written
  int early_columns = 0;  // the same of early tiles
  int late_column = 0;    // the first one of the other tiles
  int split_stride = 0;   // columns of a split; ld is that of all
  int ld = 0;
  int index = 0;                          // of the operator in its pass
  const FirstActs* first_acts = nullptr;  // of every block
  // Of the operator before it, see Op; turn 0 where that ends with a barrier.
  int counter_before = 0;
  int turn_before = 0;
  // Norms of the input whose factor the product applies: of the head, and of groups of columns
  // (group_steps k-steps each). Elsewhere the reader does.
  RowNorm norm;
  int group_steps = 0;
  // Where pairs of blocks take strips of it (core/ops/strip_cuda.cuh): a tensor map of the weights,
  // groups of 8 outputs of a strip, k-steps of each part of K that are brought together.
  const void* strips = nullptr;
  int16_t strip_groups = 0;
  int16_t strip_steps = 0;

  // Groups of four warps that have a unit of a tile.
  CANOPY_HOST_DEVICE int TileUnits() const { return (tile_blocks + kUnitBlocks - 1) / kUnitBlocks; }
};

// How tiles are cut into runs: in quanta, one run a block, as long as there are quanta. Early tiles
// are cut by k-steps, apart from the others.
struct MatmulCut {
  int per_tile, total, runs;  // quanta
  int early_per_tile, early_total, early_runs;

  CANOPY_HOST_DEVICE MatmulCut(const MatmulOp& op, int grid)
      : per_tile((op.k_steps + op.quantum - 1) / op.quantum),
        total((op.blocks + op.tile_blocks - 1) / op.tile_blocks * per_tile),
        runs(grid < total ? grid : total),
        early_per_tile(op.k_steps),
        early_total(op.early_tiles * op.k_steps),
        early_runs(op.early_runs) {}
  // The first quantum of a run; of one that has none, behind the last.
  CANOPY_HOST_DEVICE int First(int run) const {
    return run >= runs ? total : Part(total, run, runs);
  }
  CANOPY_HOST_DEVICE int FirstEarly(int run) const {
    return run >= early_runs ? early_total : Part(early_total, run, early_runs);
  }
  CANOPY_HOST_DEVICE int RunOf(int quantum) const { return PartOf(quantum, total, runs); }
  CANOPY_HOST_DEVICE int RunOfEarly(int step) const {
    return PartOf(step, early_total, early_runs);
  }
  CANOPY_HOST_DEVICE int Splits(int tile) const {
    return RunOf((tile + 1) * per_tile - 1) - RunOf(tile * per_tile) + 1;
  }
  CANOPY_HOST_DEVICE int EarlySplits(int tile) const {
    return RunOfEarly((tile + 1) * early_per_tile - 1) - RunOfEarly(tile * early_per_tile) + 1;
  }

 private:
  static CANOPY_HOST_DEVICE int Part(int total, int i, int parts) {
    return static_cast<int>(uint32_t(total) * uint32_t(i) / uint32_t(parts));
  }
  static CANOPY_HOST_DEVICE int PartOf(int quantum, int total, int parts) {
    return static_cast<int>((uint32_t(quantum + 1) * uint32_t(parts) - 1) / uint32_t(total));
  }
};

// In how many runs early tiles are cut: all blocks take part, but their reader is not to add more
// than a few splits.
inline constexpr int kMostEarlySplits = 8;
inline int EarlyRuns(int tiles, int k_steps, int grid) {
  if (tiles == 0) return 0;
  const int splits = std::max(1, std::min({grid / tiles, k_steps, kMostEarlySplits}));
  return std::min(grid, tiles * splits);
}

// Element of weight (m, k) in the packed matrix: [tile][k-step][block of the tile][16 x 16]. A
// block of bf16 is 8 x 8 matrices [2][2][8][8]; of f32 a warp's operands.
template <typename T>
CANOPY_HOST_DEVICE inline int64_t PackedElement(const MatmulOp& op, int m, int k) {
  int first = m / 16, count = 1;  // of the tile
  if (first >= op.early_tiles) {
    const int in_late = (first - op.early_tiles) / op.tile_blocks * op.tile_blocks;
    first = op.early_tiles + in_late;
    count = op.blocks - in_late < op.tile_blocks ? op.blocks - in_late : op.tile_blocks;
  }
  const int64_t at = static_cast<int64_t>(first) * op.k_steps +
                     static_cast<int64_t>(k / 16) * count + (m / 16 - first);
  m %= 16;
  k %= 16;
  int element;
  if (sizeof(T) == 2) {
    element = (m / 8 * 2 + k / 8) * 64 + m % 8 * 8 + k % 8;
  } else {
    const int lane = m % 8 * 4 + k % 8 / 2;
    const int e = k / 8 * 4 + m / 8 * 2 + k % 2;
    element = e / 4 * 128 + lane * 4 + e % 4;
  }
  return at * 256 + element;
}

// A part of a block's run: k-steps of one tile and one norm group, told with its first slot.
struct alignas(16) PartInfo {
  int32_t column;  // first output
  int16_t steps;   // 0: nothing to do for this block
  int16_t split;
  int16_t group;
  int16_t blocks;       // of 16 outputs
  uint8_t first, last;  // of the run's parts of the tile
  uint8_t end;          // of the operator
};

// Calls task(part, first k-step, bytes of weights before it) for every part of run `run` of
// `grid`; kSplits: with the split, which takes a while.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <typename T, bool kSplits = false, typename F>
CANOPY_HOST_DEVICE inline void ForParts(const MatmulOp& op, int run, int grid, const F& task) {
  const MatmulCut cut(op, grid);
  const auto min = [](int a, int b) { return a < b ? a : b; };
  int early = cut.FirstEarly(run), quantum = cut.First(run);
  const int early_end = cut.FirstEarly(run + 1), end = cut.First(run + 1);
  PartInfo part = {};
  part.first = part.last = part.end = 1;
  part.blocks = 1;
  if (early >= early_end && quantum >= end) task(part, 0, int64_t{0});
  while (early < early_end || quantum < end) {
    const bool is_early = early < early_end;
    const int at = is_early ? early : quantum;
    const int per_tile = is_early ? cut.early_per_tile : cut.per_tile;
    const int steps_each = is_early ? 1 : op.quantum;
    const int tile = at / per_tile;
    const int tile_at = tile * per_tile;
    const int part_end = min(is_early ? early_end : end, tile_at + per_tile);
    const int first_block = is_early ? tile : tile * op.tile_blocks;
    const int blocks = is_early ? 1 : min(op.tile_blocks, op.blocks - first_block);
    const int k0 = (at - tile_at) * steps_each;
    const int k1 = min(op.k_steps, (part_end - tile_at) * steps_each);
    part.blocks = static_cast<int16_t>(blocks);
    part.column = first_block * 16 + (is_early ? 0 : op.late_column);
    if (kSplits) {
      const int first_run = is_early ? cut.RunOfEarly(tile_at) : cut.RunOf(tile_at);
      part.split = static_cast<int16_t>(run - first_run);
    }
    (is_early ? early : quantum) = part_end;
    const bool last_part = early >= early_end && quantum >= end;
    const int64_t blocks_before =
        static_cast<int64_t>(first_block + (is_early ? 0 : op.early_tiles)) * op.k_steps;
    for (int k = k0; k < k1; k += part.steps) {
      int steps = k1 - k;
      if (op.norm.groups > 1) {
        part.group = static_cast<int16_t>(k / op.group_steps);
        steps = min(steps, (part.group + 1) * op.group_steps - k);
      }
      part.steps = static_cast<int16_t>(steps);
      part.first = k == k0;
      part.last = k + steps == k1;
      part.end = part.last && last_part;
      task(part, k, (blocks_before + static_cast<int64_t>(k) * blocks) * kBlockBytes<T>);
    }
  }
}

// The first activations of a block's run, as many as their ring holds: first k-step and k-steps of
// each slot, -1 where there is none.
struct alignas(16) FirstActs {
  int16_t step[kMostActSlots], steps[kMostActSlots];
};
static_assert(sizeof(FirstActs) == 16);

template <typename T>
inline FirstActs ListActs(const MatmulOp& op, int row_tiles, int run, int grid) {
  const int most = ActSteps<T>(row_tiles);
  FirstActs list = {};
  int count = 0;
  ForParts<T>(op, run, grid, [&](const PartInfo& part, int k, int64_t) {
    int left = part.steps;
    do {
      if (count == ActSlots(row_tiles)) return;
      list.step[count] = static_cast<int16_t>(k + part.steps - left);
      list.steps[count++] = static_cast<int16_t>(std::min(left, most));
      left -= most;
    } while (left > 0);
  });
  for (; count < kMostActSlots; ++count) list.steps[count] = -1;
  return list;
}

}  // namespace canopy::cuda

#ifdef __CUDACC__

#include "core/cuda/ptx.cuh"

namespace canopy::cuda {

struct RingPlace {
  int slot, act_slot;
  uint32_t phase, act_phase;
};

// Arrivals at a slot's barriers: of who brings its activations, once they are there, and of warps
// that have used it up.
inline constexpr int kActsArrivals = kRacecheck ? kConsumers : 1;
inline constexpr int kEmptyArrivals = kConsumerWarps * kWarpArrivals;

// The slots and their barriers, as one of the three roles walks through them.
struct Ring {
  char* slots;
  char* act_slots;
  PartInfo* infos;
  uint64_t* weights_here;  // of pieces
  uint64_t* weights_empty;
  uint64_t* acts_here;
  uint64_t* acts_empty;
  RingShape shape;
  int row_tiles;
  int slot = 0, act_slot = 0;
  uint32_t phase = 0, act_phase = 0;

  __device__ char* weights() const { return slots + slot * shape.slot_bytes; }
  __device__ char* acts() const { return act_slots + act_slot * ActSlotBytes(row_tiles); }
  // Waits until no more pieces are under way than may be with this one of the slot, which is empty.
  // Returns the piece's number among all.
  __device__ int AwaitPiecesBefore(int piece) const {
    const int here = slot * kPieces + piece, before = here - shape.under_way;
    BarrierWait(&weights_here[before < 0 ? before + shape.slots * kPieces : before],
                before < 0 ? phase ^ 1 : phase);
    return here;
  }
  __device__ void NextWeights() {
    if (++slot == shape.slots) {
      slot = 0;
      phase ^= 1;
    }
  }
  __device__ void NextActs() {
    if (++act_slot == ActSlots(row_tiles)) {
      act_slot = 0;
      act_phase ^= 1;
    }
  }
};

// K-steps of weights in a slot. Where the last unit of a tile is not whole it is read as if it
// were. With wgmma that may be memory behind the slot, of which nothing is used; elsewhere it is
// not.
template <typename T>
__device__ inline int SlotSteps(const Ring& ring, int blocks) {
  const int step_bytes = blocks * kBlockBytes<T>;
#ifdef CANOPY_HAS_WGMMA
  if constexpr (sizeof(T) == 2) return ring.shape.slot_bytes / step_bytes;
#endif
  return 1 + (ring.shape.slot_bytes - PadTo(kUnitBlocks, blocks) * kBlockBytes<T>) / step_bytes;
}

// kStreamThreads threads: stream the weights of this block's run.
template <typename T>
__device__ inline void StreamWeights(const MatmulOp& op, Ring& ring, uint64_t policy) {
  const int piece_bytes = ring.shape.slot_bytes / kPieces;
  ForParts<T, true>(op, blockIdx.x, gridDim.x, [&](const PartInfo& part, int, int64_t offset) {
    const char* from = static_cast<const char*>(op.weights) + offset;
    const int most = SlotSteps<T>(ring, part.blocks);
    int steps_left = part.steps;
    do {
      const int steps = min(steps_left, most);
      int left = steps * part.blocks * kBlockBytes<T>;
      BarrierWait(&ring.weights_empty[ring.slot], ring.phase ^ 1);
      if (LeadsStream()) ring.infos[ring.slot] = part;
#pragma unroll 1
      for (int piece = 0; piece < kPieces; ++piece) {
        const int here = ring.AwaitPiecesBefore(piece);
        const int bytes = min(max(left, 0), piece_bytes);
        StreamCopy(ring.weights() + piece * piece_bytes, from, bytes, &ring.weights_here[here],
                   policy);
        from += bytes;
        left -= bytes;
      }
      steps_left -= steps;
      ring.NextWeights();
    } while (steps_left > 0);
  });
}

// kStreamThreads threads: bring the activations behind the first ones, once ready() has returned.
template <typename T, typename Ready>
__device__ inline void StreamActs(const MatmulOp& op, Ring& ring, uint64_t policy,
                                  const Ready& ready) {
  const int row_tiles = ring.row_tiles, slots = ActSlots(row_tiles);
  const int step_bytes = 8 * row_tiles * 16 * static_cast<int>(sizeof(T));
  int slot = SendsActs(8 * row_tiles) ? 0 : slots;
  bool waited = false;
  ForParts<T>(op, blockIdx.x, gridDim.x, [&](const PartInfo& part, int k, int64_t) {
    const char* from = static_cast<const char*>(op.act) + k * step_bytes;
    int left = part.steps;
    do {
      const int steps = min(left, ActSteps<T>(row_tiles));
      const uint32_t bytes = steps * step_bytes;
      if (slot++ >= slots) {
        // First, for then slots are as they were at the operator's beginning or later, and a phase
        // is known by its parity.
        if (!waited) ready();
        waited = true;
        BarrierWait(&ring.acts_empty[ring.act_slot], ring.act_phase ^ 1);
        if (kActsArrivals > 1 && LeadsStream()) {
          BarrierArrive(&ring.acts_here[ring.act_slot], kActsArrivals - 1);
        }
        StreamCopy(ring.acts(), from, bytes, &ring.acts_here[ring.act_slot], policy);
      }
      from += bytes;
      left -= steps;
      ring.NextActs();
    } while (left > 0);
  });
}

template <int kRowTiles>
__device__ inline void Clear(float (&sums)[kRowTiles][4]) {
#pragma unroll
  for (int i = 0; i < kRowTiles * 4; ++i) sums[i / 4][i % 4] = 0.0f;
}

#ifdef CANOPY_HAS_WGMMA
// sums += a b for `steps` k-steps, from zero where `fresh`; an operand's k-steps lie `a_bytes` or
// `b_bytes` apart.
template <int kTiles>
__device__ inline void WgmmaSteps(float (&sums)[kTiles][4], const void* a_from, int a_bytes,
                                  const void* b_from, int b_bytes, int steps, bool fresh) {
  WgmmaBegin(sums);
  uint64_t a = WgmmaOperand(a_from), b = WgmmaOperand(b_from);
  int add = fresh ? 0 : 1;
  for (int step = 0; step < steps; ++step) {
    Wgmma(sums, a, b, add);
    add = 1;
    a += a_bytes >> 4;
    b += b_bytes >> 4;
  }
  WgmmaEnd(sums);
}
#endif

// sums += unit x acts for `steps` k-steps, from zero where `fresh`. A warp of the group has 16 of
// the unit's outputs: lane l of warp w holds outputs 16 w + l / 4 and 8 more of rows 8 n + 2 (l %
// 4) and 1 more.
template <int kRowTiles>
__device__ inline void MultiplySteps(float (&sums)[kRowTiles][4], const __nv_bfloat16* weights,
                                     const __nv_bfloat16* acts, int steps, int blocks, bool fresh) {
#ifdef CANOPY_HAS_WGMMA
  WgmmaSteps(sums, weights, blocks * kBlockBytes<__nv_bfloat16>, acts, kRowTiles * 256, steps,
             fresh);
#else
  if (fresh) Clear(sums);
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const uint32_t a_lane = SharedAddress(weights + warp * 256 + lane * 8);
  const uint32_t b_lane = SharedAddress(acts + lane % 16 * 8);
  for (int step = 0; step < steps; ++step) {
    // Matrices in the order (rows, k): (0, 0), (0, 1), (1, 0), (1, 1).
    uint32_t m[4];
    LoadMatrices(m, a_lane + step * blocks * kBlockBytes<__nv_bfloat16>);
    const uint32_t a[4] = {m[0], m[2], m[1], m[3]};
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
      uint32_t b[2];
      LoadMatrices(b, b_lane + (step * kRowTiles + n) * 256);
      Mma(sums[n], a, b);
    }
  }
#endif
}
template <int kRowTiles>
__device__ inline void MultiplySteps(float (&sums)[kRowTiles][4], const float* weights,
                                     const float* acts, int steps, int blocks, bool fresh) {
  if (fresh) Clear(sums);
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  for (int step = 0; step < steps; ++step) {
    const float4* block =
        reinterpret_cast<const float4*>(weights + step * blocks * 256 + warp * 256);
    const float4 low = block[lane], high = block[32 + lane];
    FragmentA<float> a;
    SetPair(a, 0, low.x, low.y);
    SetPair(a, 1, low.z, low.w);
    SetPair(a, 2, high.x, high.y);
    SetPair(a, 3, high.z, high.w);
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
      const float4 v = reinterpret_cast<const float4*>(acts + (step * kRowTiles + n) * 128)[lane];
      FragmentB<float> b;
      SetPair(b, 0, v.x, v.y);
      SetPair(b, 1, v.z, v.w);
      Multiply(sums[n], a, b);
    }
  }
}

// Whether an own product takes its 64 rows as the first operand and a tile's outputs as the second.
// Then four warps are enough for a tile, and tensor cores have less to do where a tile has no whole
// units. A row's sums are the same bits, which tests compare with those of fewer rows.
template <typename T>
constexpr bool RowsFirst(int row_tiles) {
#ifdef CANOPY_HAS_WGMMA
  return sizeof(T) == 2 && row_tiles == 8;
#else
  return false;
#endif
}

// MultiplySteps with the rows as the first operand, of kTiles / 2 blocks side by side, of which
// those behind `blocks` are of no use (what they read is of the ring or just behind it): lane l of
// warp w holds rows 16 w + l / 4 and 8 more of outputs 8 n + 2 (l % 4) and 1 more.
template <int kRowTiles, int kTiles>
__device__ inline void MultiplyRows(float (&sums)[kTiles][4], const __nv_bfloat16* weights,
                                    const __nv_bfloat16* acts, int steps, int blocks, bool fresh) {
#ifdef CANOPY_HAS_WGMMA
  WgmmaSteps(sums, acts, kRowTiles * 256, weights, blocks * kBlockBytes<__nv_bfloat16>, steps,
             fresh);
#endif
}

// The factor of a row and group of columns, by one warp; the same in all lanes. Loads first, so
// that several factors' loads are under way together.
struct RowFactor {
  static constexpr int kAhead = 6;
  float v[kAhead];

  __device__ void Load(const RowNorm& norm, int at) {  // row * groups + group
    const int count = norm.squares == nullptr ? 0 : norm.count, lane = threadIdx.x % 32;
    const float* from = norm.squares + at * count + lane;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) v[k] = LoadSent(from + 32 * k, lane + 32 * k < count);
  }
  template <bool kSent = false>
  __device__ float Finish(const RowNorm& norm, int at) const {
    float sum = ((v[0] + v[1]) + (v[2] + v[3])) + (v[4] + v[5]);
    if (norm.count > 32 * kAhead) {
      const float* from = norm.squares + at * norm.count;
#pragma unroll 1
      for (int j = threadIdx.x % 32 + 32 * kAhead; j < norm.count; j += 32) {
        float next;
        do {
          next = LoadSent(from + j);
        } while (kSent && IsUnsent(next));
        sum += next;
      }
      __syncwarp();
    }
    const float factor = rsqrtf(fmaf(WarpSum(sum), norm.inverse_width, norm.eps));
    return norm.squares == nullptr ? 1.0f : factor;
  }
  // With kSent once the squares come.
  template <bool kSent>
  __device__ static float Of(const RowNorm& norm, int at) {
    RowFactor factor;
    bool unsent;
    do {
      factor.Load(norm, at);
      unsent = false;
#pragma unroll
      for (int k = 0; k < kAhead; ++k) unsent |= kSent && IsUnsent(factor.v[k]);
    } while (unsent);
    __syncwarp();
    return factor.Finish<kSent>(norm, at);
  }
};

// Factors of rows `warp`, `warp` + `warps` and so on of a norm of one group, into [kMaxRows] in
// shared memory, by the whole warp. All blocks read the same squares at once, so a row is one read
// of neighbours: a row a thread took 2 us longer, and held up everybody else's reads.
template <int kBatch, typename Load>
__device__ inline void HelpRows(const RowNorm& norm, int rows, int warp, int warps, float* factors,
                                const Load& load) {
#pragma unroll 1
  for (int first = warp; first < rows; first += kBatch * warps) {
    float sums[kBatch];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) sums[n] = load(min(first + n * warps, rows - 1));
#pragma unroll
    for (int n = 0; n < kBatch; ++n) sums[n] = WarpSum(sums[n]);
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      if (threadIdx.x % 32 == 0) {
        factors[min(first + n * warps, rows - 1)] =
            rsqrtf(fmaf(sums[n], norm.inverse_width, norm.eps));
      }
    }
  }
}
__device__ inline void HelpRowFactors(const RowNorm& norm, int rows, int warp, int warps,
                                      float* factors) {
  const int lane = threadIdx.x % 32;
  if (norm.count <= 32) {
    HelpRows<16>(norm, rows, warp, warps, factors, [&](int row) {
      return LoadNew(norm.squares + row * norm.count + lane, lane < norm.count);
    });
  } else {
    HelpRows<1>(norm, rows, warp, warps, factors, [&](int row) {
      float sum = 0.0f;
#pragma unroll 4
      for (int k = lane; k < norm.count; k += 32)
        sum += LoadNew(norm.squares + row * norm.count + k);
      return sum;
    });
  }
}

// All factors, into [groups][kMaxRows] in shared memory. The caller synchronises.
__device__ inline void RowFactors(const RowNorm& norm, int rows, float* factors) {
  const int warp = threadIdx.x / 32;
  const int count = rows * norm.groups;
#pragma unroll 1
  for (int first = warp; first < count; first += 2 * kConsumerWarps) {
    RowFactor factor[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int i = min(first + n * kConsumerWarps, count - 1);
      factor[n].Load(norm, i);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int i = min(first + n * kConsumerWarps, count - 1);
      const float f = factor[n].Finish(norm, i);
      const int row = i / norm.groups;
      if (threadIdx.x % 32 == 0) factors[(i - row * norm.groups) * kMaxRows + row] = f;
    }
  }
}

// All computing threads: makes the factors of a norm that the product applies, and waits for the
// first activations, which come from other blocks without a barrier (kUnsent), and fills their
// ring, of which nothing is in use. A function of its own, and one only: divergent loops before
// wgmma, and a second call, make the compiler serialise that.
template <typename T, int kRowTiles>
__device__ __noinline__ inline void BeginMatmul(const MatmulOp& op, const FirstActs& list, int rows,
                                                int slot, char* slots, float* factors) {
  if (op.norm.squares != nullptr) RowFactors(op.norm, rows, factors);
  if constexpr (SendsActs(8 * kRowTiles)) {
    constexpr int kActSlots = ActSlots(kRowTiles), kActSlotBytes = ActSlotBytes(kRowTiles);
    // A slot has room for a vector of 16 bytes for each thread. The vectors of the rows that there
    // are lie on neighbouring threads, for each slot behind those of the one before.
    static_assert(kActSlotBytes == kConsumers * 16);
    constexpr int kStepBytes = 8 * kRowTiles * 16 * static_cast<int>(sizeof(T));
    constexpr int kStepVectors = sizeof(T);  // of a row and k-step
    constexpr int kRowVectors = kConsumers / (8 * kRowTiles);
    const int shift = 32 - __clz(rows - 1);
    uint4 v[kActSlots];
    int to[kActSlots];  // place in the slot, -1: nothing
    const char* from[kActSlots];
#pragma unroll
    for (int s = 0; s < kActSlots; ++s) {
      const int at = (threadIdx.x - (s * kRowVectors << shift)) & (kConsumers - 1);
      const int row = at & ((1 << shift) - 1), vector = at >> shift;
      const int step = vector / kStepVectors, part = vector % kStepVectors;
      // See ActIndex.
      const int in_step =
          sizeof(T) == 2 ? row / 8 * 256 + part * 128 + row % 8 * 16 : row * 64 + part * 16;
      // Of rows that the pass does not have nothing comes, and nothing is used.
      const bool there = row < rows && vector < kRowVectors && step < list.steps[s];
      to[s] = there ? step * kStepBytes + in_step : -1;
      from[s] = static_cast<const char*>(op.act) + (list.step[s] * kStepBytes + to[s]);
      v[s] = LoadSentBits(from[s], there);
    }
    bool unsent;
    do {
      unsent = false;
#pragma unroll
      for (int s = 0; s < kActSlots; ++s) {
        if (!IsUnsent<T>(v[s])) continue;
        v[s] = LoadSentBits(from[s]);
        unsent = true;
      }
    } while (unsent);
#pragma unroll
    for (int s = 0; s < kActSlots; ++s) {
      if (to[s] >= 0) {
        *reinterpret_cast<uint4*>(slots + (slot + s) % kActSlots * kActSlotBytes + to[s]) = v[s];
      }
    }
    FenceProxyAsyncShared();
  }
}

// All computing threads, before ConsumeMatmul. factors: [norm groups][kMaxRows] in shared memory.
template <typename T, int kRowTiles>
__device__ __forceinline__ void AwaitActs(const MatmulOp& op, const FirstActs& first_acts, int rows,
                                          const Ring& ring, const RingPlace& at, float* factors) {
  constexpr bool kSends = SendsActs(8 * kRowTiles);
  constexpr int kActSlots = ActSlots(kRowTiles);
  if (kSends || op.norm.squares != nullptr) {
    BeginMatmul<T, kRowTiles>(op, first_acts, rows, at.act_slot, ring.act_slots, factors);
    SyncThreads<kConsumers>();
  }
  if constexpr (kSends && kRacecheck) {
    for (int s = 0; s < kActSlots; ++s) {
      if (first_acts.steps[s] < 0) continue;
      BarrierArrive(&ring.acts_here[(at.act_slot + s) % kActSlots], 1);
    }
  } else if (kSends && threadIdx.x < kActSlots && first_acts.steps[threadIdx.x] >= 0) {
    BarrierArrive(&ring.acts_here[(at.act_slot + threadIdx.x) % kActSlots], 1);
  }
}

// The groups of warps that have a unit in a tile; the others leave the rings to them, who tell by
// `next` where they are at the end. That must not be `at`, which slower warps may not have read.
// With kOwn the sums of the last tile, if the block has one, stay in `sums`, and those of early
// tiles alone are sent: see MultiplySteps.
template <typename T, int kRowTiles, bool kOwn, int kTiles>
__device__ __forceinline__ void ConsumeMatmul(const MatmulOp& op, int rows, const Ring& first,
                                              const RingPlace& at, RingPlace* next,
                                              const float* factors, float (&sums)[kTiles][4]) {
  constexpr bool kRowsFirst = kOwn && RowsFirst<T>(kRowTiles);
  // What decides on the way to wgmma must be seen to be the same in a whole warp: hence shuffles.
  const auto uniform = [](auto value) { return __shfl_sync(0xffffffffu, value, 0); };
  const int warp = uniform(threadIdx.x / 32), group = warp / 4;
  const int lane = threadIdx.x % 32;
  const bool with_norm = !kOwn && op.norm.squares != nullptr;
  // Of the warp for itself, or for those of the groups that have no unit as well.
  const int units = kRowsFirst ? 1 : uniform(op.TileUnits());
  const uint32_t arrivals = group == 0 ? kMostTileUnits + 1 - units : 1;
  Ring ring = first;
  ring.slot = uniform(at.slot), ring.phase = uniform(at.phase);
  ring.act_slot = uniform(at.act_slot), ring.act_phase = uniform(at.act_phase);
  const bool grouped = !kOwn && op.norm.groups > 1;
  float totals[kRowTiles][4] = {};  // of norm groups that are complete
  PartInfo part = {};
  // Where the lane's sums go, and how many outputs there are from that one on. Worked out before
  // the multiplying, if there are registers for it, for afterwards others wait for the sums.
  float* out = nullptr;
  int outputs = 0;
  const int ld = op.ld;
  constexpr bool kPlacesFirst = kRowTiles < 8;
  const auto place_sums = [&] {
    const int column = part.column + warp * 16 + lane / 4;
    outputs = (part.column < op.late_column ? op.early_columns : op.columns) - column;
    out = op.out + (part.split * op.split_stride + column) + lane % 4 * 2 * ld;
  };
  int left = 0, acts_left = 0, most = 0, blocks = 0, unit = 0;
  bool end = false;
  while (!end) {
#pragma unroll 1
    for (int piece = 0; piece < kPieces; ++piece) {
      BarrierWait(&ring.weights_here[ring.slot * kPieces + piece], ring.phase);
    }
    bool fresh = left == 0;
    if (fresh) {
      part = ring.infos[ring.slot];
      left = uniform(int{part.steps});
      blocks = uniform(int{part.blocks});
      most = SlotSteps<T>(ring, blocks);
      // A group of warps whose unit the tile does not have computes nothing of use.
      unit = kRowsFirst ? 0 : min(group, (blocks - 1) / kUnitBlocks);
      acts_left = 0;
      if (kPlacesFirst) place_sums();
    }
    const T* weights = reinterpret_cast<const T*>(ring.weights() + unit * kUnitBytes<T>);
    int in_slot = min(left, most);
    left -= in_slot;
    do {
      if (acts_left == 0) {
        BarrierWait(&ring.acts_here[ring.act_slot], ring.act_phase);
        acts_left = ActSteps<T>(kRowTiles);
      }
      const int steps = min(in_slot, acts_left);
      const T* acts = reinterpret_cast<const T*>(ring.acts()) +
                      (ActSteps<T>(kRowTiles) - acts_left) * (kRowTiles * 128);
      if constexpr (kRowsFirst) {
        MultiplyRows<kRowTiles>(sums, weights, acts, steps, blocks, fresh);
      } else {
        MultiplySteps<kRowTiles>(sums, weights, acts, steps, blocks, fresh);
      }
      fresh = false;
      weights += steps * blocks * 256;
      in_slot -= steps;
      acts_left -= steps;
      if (acts_left == 0 || left + in_slot == 0) {
        BarrierArriveWarp(&ring.acts_empty[ring.act_slot], arrivals);
        ring.NextActs();
      }
    } while (in_slot > 0);
    BarrierArriveWarp(&ring.weights_empty[ring.slot], arrivals);
    ring.NextWeights();
    if (left > 0) continue;
    end = uniform(int{part.end}) != 0;
    if ((!kRowsFirst && warp >= blocks) || part.steps == 0) continue;
    if (kOwn && part.column >= op.late_column) continue;
    if constexpr (kRowsFirst) {
      if (!part.last) continue;
      const int row = warp * 16 + lane / 4, column = part.column + lane % 4 * 2;
      float* to = op.out + (part.split * op.split_stride + column + row * ld);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int n = i / 4, half = i / 2 % 2, c = i % 2;
        Send(to + (half * 8 * ld + n * 8 + c), sums[n][half * 2 + c],
             row + half * 8 < rows && column + n * 8 + c < op.early_columns);
      }
      continue;
    } else {
      const float* group_factors = factors + part.group * kMaxRows + lane % 4 * 2;
      if (grouped) {
        if (part.first) Clear(totals);
#pragma unroll
        for (int i = 0; i < kRowTiles * 4; ++i) {
          const int n = i / 4, e = i % 4;
          totals[n][e] = fmaf(group_factors[n * 8 + e % 2], sums[n][e], totals[n][e]);
        }
      }
      if (!part.last) continue;
      if (!kPlacesFirst) place_sums();
#pragma unroll
      for (int n = 0; n < kRowTiles; ++n) {
        if (n * 8 >= rows) break;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const bool there = n * 8 + lane % 4 * 2 + c < rows;
          const float factor = with_norm && !grouped ? group_factors[n * 8 + c] : 1.0f;
          float* to = out + (n * 8 + c) * ld;
          Send(to, grouped ? totals[n][c] : factor * sums[n][c], there && outputs > 0);
          Send(to + 8, grouped ? totals[n][2 + c] : factor * sums[n][2 + c], there && outputs > 8);
        }
      }
    }
  }
  if (threadIdx.x == 0) *next = {ring.slot, ring.act_slot, ring.phase, ring.act_phase};
}

// The operator.
template <typename T, int kRowTiles>
__device__ __forceinline__ void ConsumeMatmul(const MatmulOp& op, const FirstActs& first_acts,
                                              int rows, const Ring& ring, const RingPlace& at,
                                              RingPlace* next, float* factors) {
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  float sums[kRowTiles][4] = {};
  AwaitActs<T, kRowTiles>(op, first_acts, rows, ring, at, factors);
  if (group < __shfl_sync(0xffffffffu, op.TileUnits(), 0)) {
    ConsumeMatmul<T, kRowTiles, /*kOwn=*/false>(op, rows, ring, at, next, factors, sums);
  }
}

}  // namespace canopy::cuda

#endif  // __CUDACC__
#endif  // CANOPY_CORE_OPS_MATMUL_CUDA_CUH_
