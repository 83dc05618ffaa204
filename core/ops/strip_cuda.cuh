// The product of up to 8 rows whose sums go into the residual stream, by pairs of blocks, so that
// its sums need not go through the device's cache.
//
// A pair of neighbouring blocks, a cluster, has all of K of some columns (a strip), either block a
// half of K in four parts; so the eight parts are those of the product of more rows, whose runs end
// at the same places, and its sums are the same bit by bit. Each block puts half of the columns
// into the residual stream, for which the other's sums come into its shared memory.
//
// Weights lie as in matmul_cuda.cuh; a strip of a tile is a box of that matrix, which a tensor map
// describes. A piece of the ring has the same number of k-steps of each part, so that all parts
// progress together.
//
// Bytes: weights once; activations rows * K / 2 * sizeof(T) for each block.
//
// What did not pay (docs/performance.md): half of the warps looking for activations while the scan
// still ends, with k-steps read ahead of those that are multiplied; strips of 16 rows, with
// a smaller ring and with factors of the next norm that came late.

#ifndef CANOPY_CORE_OPS_STRIP_CUDA_CUH_
#define CANOPY_CORE_OPS_STRIP_CUDA_CUH_

#include "core/ops/matmul_cuda.cuh"
#include "core/ops/rows_cuda.cuh"

namespace canopy::cuda {

inline constexpr int kStripBlocks = 2;  // of a cluster
inline constexpr int kStripParts = 4;   // of a block's half of K, for four warps each
inline constexpr int kStripRows = 8;
inline constexpr int kMostStripGroups = 8;      // four warps of 16 columns
inline constexpr int kStripStep = 4;            // k-steps that a warp takes at a time
inline constexpr int kMostStripSteps = 320;     // of K, see StripResidual
inline constexpr int kMostStripColumns = 2560;  // of the product, see QuadFactor
// Of shared memory: activations first of all, sums at its end.
inline constexpr int kStepActBytes = kStripRows * 16 * 2;
CANOPY_HOST_DEVICE constexpr int StripActBytes(int k_steps) {
  return k_steps / kStripBlocks * kStepActBytes;
}
CANOPY_HOST_DEVICE constexpr int StripSumBytes(int groups) {
  return kStripBlocks * kStripParts * kStripRows * groups * 8 / kStripBlocks * 4;
}

// Of weights, in a piece of the ring.
CANOPY_HOST_DEVICE constexpr int StripPieceBytes(const MatmulOp& op) {
  return kStripParts * op.strip_steps * op.strip_groups * 256;
}

// A product of `outputs` and `k_steps` in strips, for `grid` blocks and pieces of `piece_bytes`;
// blocks is 0 where its shape does not suit.
inline MatmulOp PlanStrips(int outputs, int k_steps, int grid, int piece_bytes) {
  // With eight parts of K each, 16 tiles are 128 runs: most devices have a few blocks more.
  constexpr int kParts = kStripBlocks * kStripParts, kTiles = 16;
  MatmulOp op;
  const int pairs = grid / kStripBlocks;
  op.strip_groups = static_cast<int16_t>((outputs / 8 + pairs - 1) / pairs);
  op.tile_blocks = outputs / 16 / kTiles;
  op.quantum = k_steps / kParts;
  if (outputs > kMostStripColumns || k_steps > kMostStripSteps || outputs % (16 * kTiles) != 0 ||
      k_steps % (kParts * kStripStep) != 0 || op.tile_blocks > kUnitBlocks * kMostTileUnits ||
      kTiles * kParts > grid || op.strip_groups > kMostStripGroups ||
      op.tile_blocks * 2 % op.strip_groups != 0) {
    return {};
  }
  const int most = piece_bytes / (kStripParts * op.strip_groups * 256);
  for (int steps = kStripStep; steps <= most; steps += kStripStep) {
    if (op.quantum % steps == 0) op.strip_steps = static_cast<int16_t>(steps);
  }
  if (op.strip_steps == 0) return {};
  op.blocks = outputs / 16;
  op.columns = op.split_stride = outputs;
  op.k_steps = k_steps;
  op.ld = kParts * outputs;
  return op;
}

}  // namespace canopy::cuda

#ifdef __CUDACC__

namespace canopy::cuda {

struct Strip {
  int pair, rank;
  bool there;

  __device__ explicit Strip(const MatmulOp& op)
      : pair(blockIdx.x / kStripBlocks),
        rank(blockIdx.x % kStripBlocks),
        there(pair * op.strip_groups < op.blocks * 2) {}
};

// Brings a tensor map near before it is used.
__device__ inline void FetchStripMap(const MatmulOp& op) {
#ifdef CANOPY_HAS_CLUSTERS
  if (op.strips != nullptr) PrefetchMap(op.strips);
#endif
}

// As StreamWeights, of this block's half of a strip.
__device__ inline void StreamStrip(const MatmulOp& op, Ring& ring, uint64_t policy) {
#ifdef CANOPY_HAS_CLUSTERS
  const Strip strip(op);
  if (!strip.there) return;
  const int piece_bytes = ring.shape.slot_bytes / kPieces;
  const int box_bytes = op.strip_steps * op.strip_groups * 256;
  const int per_tile = op.tile_blocks * 2 / op.strip_groups;
  const int tile = strip.pair / per_tile;
  const int x = (strip.pair - tile * per_tile) * op.strip_groups * 32;  // of 8 bytes
  const int y = tile * op.k_steps + strip.rank * kStripParts * op.quantum;
  for (int k = 0; k < op.quantum;) {
    BarrierWait(&ring.weights_empty[ring.slot], ring.phase ^ 1);
#pragma unroll 1
    for (int piece = 0; piece < kPieces; ++piece, k += op.strip_steps) {
      const int here = ring.AwaitPiecesBefore(piece);
      const bool there = k < op.quantum;
      BarrierExpect(&ring.weights_here[here], there ? kStripParts * box_bytes : 0);
      char* to = ring.weights() + piece * piece_bytes;
      for (int part = 0; there && part < kStripParts; ++part, to += box_bytes) {
        StreamBox(to, op.strips, x, y + part * op.quantum + k, &ring.weights_here[here], policy);
      }
    }
    ring.NextWeights();
  }
#endif
}

// The operator, by all computing threads. at: in the ring of weights; place: where it is said for
// the next product; sums_here: a barrier of one arrival, used once by each such operator, `number`
// of them before; sums: StripSumBytes of shared memory, at the same place in all blocks.
// multiplied() is called by the first warp when it has nothing to do any more. What is passed by
// reference lies in shared memory.
template <typename Multiplied>
__device__ __noinline__ void StripResidual(const MatmulOp& product, const ResidualOp& op,
                                           const PassNodes& nodes, const Ring ring,
                                           const RingPlace at, RingPlace* place,
                                           uint64_t* sums_here, uint32_t number, char* work,
                                           float* sums, const Multiplied multiplied) {
#ifdef CANOPY_HAS_CLUSTERS
  using T = __nv_bfloat16;
  __builtin_assume(__isShared(&product) && __isShared(&op) && __isShared(&nodes) &&
                   __isShared(place) && __isShared(sums_here) && __isShared(work) &&
                   __isShared(sums));
  const Strip strip(product);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (!strip.there) {
    if (threadIdx.x == 0) *place = at;
    if (warp == 0) multiplied();
    return;
  }
  const int part = warp / 4, sub = warp % 4;
  const int rows = nodes.rows, groups = product.strip_groups;
  if (threadIdx.x == 0) BarrierExpect(sums_here, StripSumBytes(groups) / kStripRows * rows);

  // What the block's own columns need, by warps that most strips leave idle.
  constexpr int kEach = kStripRows / kStripParts;
  const bool finishes = sub == 3, active = lane < groups;
  const int column = (strip.pair * kStripBlocks + strip.rank) * groups * 4 + lane * 4;
  float* const x_at = op.x + part * op.k_steps * 16 + column;
  const int x_stride = kStripParts * op.k_steps * 16;
  float4 x[kEach], w, bias;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    x[i] = LoadNew4(x_at + i * x_stride, finishes && active && part + i * kStripParts < rows);
  }
  w = LoadWeight4(op.next.weight + column, finishes && active);
  bias = LoadWeight4(op.bias + column, finishes && active && op.bias != nullptr);

  // Activations of this half of K, a vector of 16 bytes at a time.
  const int quantum = product.quantum, half_steps = kStripParts * quantum;
  {
    constexpr int kVectors = kMostStripSteps / kStripBlocks * 2 * kStripRows / kConsumers;
    const int shift = 32 - __clz(rows - 1);
    const char* act =
        static_cast<const char*>(product.act) + strip.rank * half_steps * kStepActBytes;
    uint4 v[kVectors];
    int to[kVectors];  // -1: nothing
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int item = threadIdx.x + i * kConsumers;
      const int row = item & ((1 << shift) - 1), vector = item >> shift;
      const bool there = row < rows && vector < half_steps * 2;
      to[i] = there ? vector * (kStepActBytes / 2) + row * 16 : -1;
      v[i] = LoadSentBits(act + to[i], there);
    }
    bool unsent;
    do {
      unsent = false;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (!IsUnsent<T>(v[i])) continue;
        v[i] = LoadSentBits(act + to[i]);
        unsent = true;
      }
    } while (unsent);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (to[i] >= 0) *reinterpret_cast<uint4*>(work + to[i]) = v[i];
    }
  }
  SyncThreads<kConsumers>();

  const int subs = (groups + 1) / 2;  // that multiply, 16 columns each
  if (sub < subs) {
    // All addresses in registers: a step lasts as long as its instructions, not its multiplying.
    const uint32_t step_bytes = groups * 256, slot_bytes = ring.shape.slot_bytes;
    const int steps = product.strip_steps, slots = ring.shape.slots;
    // Lanes name rows of matrices in the order of Mma's operand: rows, then K. Of an odd last group
    // the second half is the first.
    const bool whole = sub * 2 + 1 < groups;
    const uint32_t a_first = SharedAddress(ring.slots) + part * steps * step_bytes + sub * 512 +
                             (whole ? lane / 8 % 2 * 256 : 0) + lane / 16 * 128 + lane % 8 * 16;
    uint32_t b_at = SharedAddress(work) + part * quantum * kStepActBytes + lane % 16 * 16;
    int slot = at.slot, left = quantum;
    uint32_t phase = at.phase;
    float d[4] = {};
    do {
      uint64_t* const here = ring.weights_here + slot * kPieces;
      uint32_t a_piece = a_first + slot * slot_bytes;
#pragma unroll 1
      for (int piece = 0; piece < kPieces; ++piece) {
        BarrierWait(here + piece, phase);
        if (left == 0) break;  // the last piece, in which nothing came
        uint32_t a_at = a_piece;
#pragma unroll 1
        for (int step = 0; step < steps; step += kStripStep) {
          uint32_t a[kStripStep][4], b[kStripStep][2];
#pragma unroll
          for (int i = 0; i < kStripStep; ++i) {
            LoadMatrices(a[i], a_at + i * step_bytes);
            LoadMatrices(b[i], b_at + i * kStepActBytes);
          }
#pragma unroll
          for (int i = 0; i < kStripStep; ++i) Mma(d, a[i], b[i]);
          a_at += kStripStep * step_bytes;
          b_at += kStripStep * kStepActBytes;
        }
        left -= steps;
        a_piece += slot_bytes / kPieces;
      }
      BarrierArriveWarp(ring.weights_empty + slot, sub == 0 ? 1 + 4 - subs : 1);
      if (++slot == slots) slot = 0, phase ^= 1;
    } while (left > 0);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int to_column = sub * 16 + lane / 4 + e / 2 * 8, row = lane % 4 * 2 + e % 2;
      const int owner = to_column >= groups * 4 ? 1 : 0;
      const float* to =
          sums + (((strip.rank * kStripParts + part) * kStripRows + row) * groups * 4 + to_column -
                  owner * groups * 4);
      if (row < rows && to_column < groups * 8) {
        StoreIn(AddressIn(to, owner), d[e], AddressIn(sums_here, owner));
      }
    }
    if (threadIdx.x == 0) *place = {slot, at.act_slot, phase, at.act_phase};
    if (warp == 0) multiplied();
  }
  if (!finishes) return;
  float f[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int row = part + i * kStripParts;
    f[i] = row < rows ? RowFactor::Of<true>(op.norm, row) : 0.0f;
  }
  BarrierWait(sums_here, number & 1);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int row = part + i * kStripParts;
    if (row >= rows || !active) continue;
    const float* from = sums + row * groups * 4 + lane * 4;
    float4 sum = *reinterpret_cast<const float4*>(from);
#pragma unroll
    for (int k = 1; k < kStripBlocks * kStripParts; ++k) {
      const float4 s = *reinterpret_cast<const float4*>(from + k * kStripRows * groups * 4);
      sum = make_float4(sum.x + s.x, sum.y + s.y, sum.z + s.z, sum.w + s.w);
    }
    const float4 y = AddScaled(x[i], f[i], sum, bias);
    SendAct4<T>(op.next.act, kStripRows, row, column,
                make_float4(y.x * w.x, y.y * w.y, y.z * w.z, y.w * w.w));
    Send(op.next.squares + row * Granules(op.k_steps) * 32 + column / 4, Squares4(y));
    StoreNew4(x_at + i * x_stride, y);
  }
#endif
}

// The factor of a row whose sums of squares come as those of four columns (RowNorm::of_quads), by
// one warp: the same tree as where a whole part comes.
__device__ inline float QuadFactor(const RowNorm& norm, int row) {
  constexpr int kVectors = kMostStripColumns / 4 / 4 / 32;
  const int lane = threadIdx.x % 32, vectors = norm.count * 8;
  const float* from = norm.squares + row * norm.count * 32 + lane * 4;
  float4 v[kVectors];
  bool unsent;
  do {
    unsent = false;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      v[i] = LoadSent4(from + i * 128, lane + i * 32 < vectors);
      unsent |= IsUnsent(v[i]);
    }
  } while (unsent);
  __syncwarp();
  float part = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int other = 4; other > 0; other /= 2) {
      v[i].x += __shfl_xor_sync(0xffffffffu, v[i].x, other);
      v[i].y += __shfl_xor_sync(0xffffffffu, v[i].y, other);
      v[i].z += __shfl_xor_sync(0xffffffffu, v[i].z, other);
      v[i].w += __shfl_xor_sync(0xffffffffu, v[i].w, other);
    }
    const float sum = (v[i].x + v[i].z) + (v[i].y + v[i].w);
    const float mine = __shfl_sync(0xffffffffu, sum, lane % 4 * 8);
    if (lane / 4 == i) part = mine;
  }
  return rsqrtf(fmaf(WarpSum(part), norm.inverse_width, norm.eps));
}

}  // namespace canopy::cuda

#endif  // __CUDACC__
#endif  // CANOPY_CORE_OPS_STRIP_CUDA_CUH_
