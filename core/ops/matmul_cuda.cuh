// The product of 1 to 64 rows with a weight matrix on the device: weights are streamed once, and a
// row's bits do not depend on the number of rows.
//
// Weights are cut into blocks of 16 outputs by 16 inputs, each stored as the 32 lanes' operands of
// one tensor core instruction. A block of threads has a rectangle of blocks, stored contiguously,
// inputs outermost, so that the copies into shared memory are large and in order. Its eight warps
// share it as warp_m groups of outputs by 8 / warp_m groups of inputs; the partial sums of those
// are added in one fixed tree, and the sums over rectangles (`k_groups` of them) are left to the
// reader, who adds them in order. All this depends on the matrix and the device alone, and a
// column of a tensor core's result on that column alone: so row-invariant.
//
// Bytes: weights once; activations rows * K * sizeof(T) for each of the m_groups rectangles.

#ifndef CANOPY_CORE_OPS_MATMUL_CUDA_CUH_
#define CANOPY_CORE_OPS_MATMUL_CUDA_CUH_

#include "core/cuda/pass.h"

namespace canopy::cuda {

// 126 KiB of slots: 17 MB in flight on 132 multiprocessors, four microseconds of an H200's
// bandwidth, while other operators run. The tree scan needs the rest of the shared memory.
inline constexpr int kSlotBytes = 32256;
template <typename T>
inline constexpr int kSlots = sizeof(T) == 2 ? 4 : 2;
template <typename T>
inline constexpr int kWeightBlockBytes = 256 * sizeof(T);
template <typename T>
inline constexpr int kActRowBytes = 16 * sizeof(T);

// What ConsumeMatmul works in: half of the warps' sums of one block for 64 rows.
inline constexpr int kMatmulWorkBytes = 16 << 10;

// Blocks of outputs that one warp holds sums of: with three, those of 64 rows did not fit the
// registers (the head costs 6 us less then, a 64-node pass of mamba2-2.7b 10 ms more).
inline constexpr int kWarpBlocks = 2;

struct MatmulOp {
  const void* weights = nullptr;
  const void* act = nullptr;
  float* out = nullptr;  // partials
  int m_blocks = 0;
  int k_steps = 0;
  int m_groups = 0;
  int k_groups = 0;
  int warp_m = 0;
  int ld = 0;
  int shift = 0;  // rectangle 0 belongs to this block, so that larger ones are spread evenly
  RowNorm norm;   // of the rows of the result (the head); elsewhere the reader scales
};

// The rectangle of one block.
struct MatmulTile {
  int m0, blocks, k0, steps;
  int split;  // which of the k_groups
  int64_t first_block;
};

// `total` cut into `parts` parts as even as can be, the larger ones first.
struct Cut {
  int first, count;
};
CANOPY_HOST_DEVICE inline Cut CutOf(int total, int parts, int index) {
  const int base = total / parts, more = total % parts;
  return {index * base + (index < more ? index : more), base + (index < more ? 1 : 0)};
}
// The part that holds `at`.
CANOPY_HOST_DEVICE inline int CutIndex(int total, int parts, int at) {
  const int base = total / parts, more = total % parts;
  return at < more * (base + 1) ? at / (base + 1) : more + (at - more * (base + 1)) / base;
}

CANOPY_HOST_DEVICE inline int64_t FirstBlock(const MatmulOp& op, const Cut& m, const Cut& k) {
  return static_cast<int64_t>(k.first) * op.m_blocks + static_cast<int64_t>(k.count) * m.first;
}

CANOPY_HOST_DEVICE inline bool TileOf(const MatmulOp& op, int block, int grid, MatmulTile* tile) {
  int index = block - op.shift;
  if (index < 0) index += grid;
  if (index >= op.m_groups * op.k_groups) return false;
  const int split = index / op.m_groups;
  const Cut m = CutOf(op.m_blocks, op.m_groups, index % op.m_groups);
  const Cut k = CutOf(op.k_steps, op.k_groups, split);
  *tile = {m.first, m.count, k.first, k.count, split, FirstBlock(op, m, k)};
  return true;
}

// K-steps that a slot holds, weights and activations, for buckets of 8 * row_tiles rows.
template <typename T>
CANOPY_HOST_DEVICE inline int StepsPerSlot(const MatmulOp& op, int row_tiles) {
  const int k_warps = kConsumerWarps / op.warp_m;
  const int most_blocks = (op.m_blocks + op.m_groups - 1) / op.m_groups;
  const int step = most_blocks * kWeightBlockBytes<T> + 8 * row_tiles * kActRowBytes<T>;
  return kSlotBytes / step / k_warps * k_warps;
}
template <typename T>
CANOPY_HOST_DEVICE inline int ActOffset(const MatmulOp& op, int steps_per_slot) {
  const int most_blocks = (op.m_blocks + op.m_groups - 1) / op.m_groups;
  return steps_per_slot * most_blocks * kWeightBlockBytes<T>;
}

// Element of weight (m, k) in the packed matrix.
template <typename T>
CANOPY_HOST_DEVICE inline int64_t PackedElement(const MatmulOp& op, int m, int k) {
  const int mb = m / 16, ks = k / 16;
  const Cut blocks = CutOf(op.m_blocks, op.m_groups, CutIndex(op.m_blocks, op.m_groups, mb));
  const Cut steps = CutOf(op.k_steps, op.k_groups, CutIndex(op.k_steps, op.k_groups, ks));
  const int64_t block = FirstBlock(op, blocks, steps) +
                        static_cast<int64_t>(ks - steps.first) * blocks.count + (mb - blocks.first);
  const int row = m % 16, column = k % 16;
  const int lane = row % 8 * 4 + column % 8 / 2;
  const int element = column / 8 * 4 + row / 8 * 2 + column % 2;
  // f32 operands of a lane are two vectors of four.
  const int per_vector = 16 / static_cast<int>(sizeof(T));
  return block * 256 + element / per_vector * 32 * per_vector + lane * per_vector +
         element % per_vector;
}

}  // namespace canopy::cuda

#ifdef __CUDACC__

#include "core/cuda/ptx.cuh"

namespace canopy::cuda {

// The slots and their barriers, as one of the three roles walks through them.
struct Ring {
  char* slots;
  uint64_t* weights_here;
  uint64_t* acts_here;
  uint64_t* empty;
  int slot = 0;
  uint32_t phase = 0;

  __device__ char* data() const { return slots + slot * kSlotBytes; }
  template <typename T>
  __device__ void Next() {
    if (++slot == kSlots<T>) {
      slot = 0;
      phase ^= 1;
    }
  }
};

// One thread: streams the weights of this block's rectangle.
template <typename T>
__device__ inline void StreamWeights(const MatmulOp& op, int row_tiles, Ring& ring,
                                     uint64_t policy) {
  MatmulTile tile;
  if (!TileOf(op, blockIdx.x, gridDim.x, &tile)) return;
  const int per_slot = StepsPerSlot<T>(op, row_tiles);
  const char* from = static_cast<const char*>(op.weights) + tile.first_block * kWeightBlockBytes<T>;
  for (int k = 0; k < tile.steps; k += per_slot) {
    const int steps = min(per_slot, tile.steps - k);
    const uint32_t bytes = steps * tile.blocks * kWeightBlockBytes<T>;
    BarrierWait(&ring.empty[ring.slot], ring.phase ^ 1);
    BarrierExpect(&ring.weights_here[ring.slot], bytes);
    BulkCopy(ring.data(), from, bytes, &ring.weights_here[ring.slot], policy);
    from += bytes;
    ring.Next<T>();
  }
}

// One thread: brings the activations of the rectangle's inputs.
template <typename T>
__device__ inline void StreamActs(const MatmulOp& op, int row_tiles, Ring& ring, uint64_t policy) {
  MatmulTile tile;
  if (!TileOf(op, blockIdx.x, gridDim.x, &tile)) return;
  const int per_slot = StepsPerSlot<T>(op, row_tiles);
  const int step_bytes = 8 * row_tiles * kActRowBytes<T>;
  const int offset = ActOffset<T>(op, per_slot);
  const char* from = static_cast<const char*>(op.act) + static_cast<int64_t>(tile.k0) * step_bytes;
  for (int k = 0; k < tile.steps; k += per_slot) {
    const uint32_t bytes = min(per_slot, tile.steps - k) * step_bytes;
    BarrierWait(&ring.empty[ring.slot], ring.phase ^ 1);
    BarrierExpect(&ring.acts_here[ring.slot], bytes);
    BulkCopy(ring.data() + offset, from, bytes, &ring.acts_here[ring.slot], policy);
    from += bytes;
    ring.Next<T>();
  }
}

__device__ inline FragmentA<__nv_bfloat16> LoadWeights(const __nv_bfloat16* block, int lane) {
  const uint4 v = reinterpret_cast<const uint4*>(block)[lane];
  return {{v.x, v.y, v.z, v.w}};
}
__device__ inline FragmentA<float> LoadWeights(const float* block, int lane) {
  const float4 a = reinterpret_cast<const float4*>(block)[lane];
  const float4 b = reinterpret_cast<const float4*>(block)[32 + lane];
  FragmentA<float> f;
  SetPair(f, 0, a.x, a.y);
  SetPair(f, 1, a.z, a.w);
  SetPair(f, 2, b.x, b.y);
  SetPair(f, 3, b.z, b.w);
  return f;
}
__device__ inline FragmentB<__nv_bfloat16> LoadActs(const __nv_bfloat16* rows, int lane) {
  const uint2 v = reinterpret_cast<const uint2*>(rows)[lane];
  return {{v.x, v.y}};
}
__device__ inline FragmentB<float> LoadActs(const float* rows, int lane) {
  const float4 v = reinterpret_cast<const float4*>(rows)[lane];
  FragmentB<float> f;
  SetPair(f, 0, v.x, v.y);
  SetPair(f, 1, v.z, v.w);
  return f;
}

// One factor a row and group into factors [groups][kMaxRows] in shared memory. The caller
// synchronises.
__device__ inline void RowFactors(const RowNorm& norm, int rows, float* factors) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = warp; i < rows * norm.groups; i += kConsumerWarps) {
    const int row = i % rows, group = i / rows;
    float factor = 1.0f;
    if (norm.squares != nullptr) {
      const float* squares = norm.squares + (row * norm.groups + group) * norm.count;
      float sum = 0.0f;
      for (int j = lane; j < norm.count; j += 256) {
        float v[8];
#pragma unroll
        for (int k = 0; k < 8; ++k)
          v[k] = j + 32 * k < norm.count ? __ldcg(squares + j + 32 * k) : 0.0f;
#pragma unroll
        for (int k = 0; k < 8; ++k) sum += v[k];
      }
      factor = rsqrtf(WarpSum(sum) * norm.inverse_width + norm.eps);
    }
    if (lane == 0) factors[group * kMaxRows + row] = factor;
  }
}

// All consumer threads. `work` holds kMatmulWorkBytes.
template <typename T, int kRowTiles>
__device__ __noinline__ void ConsumeMatmul(const MatmulOp& op, int rows, Ring& state, float* work) {
  Ring ring = state;
  MatmulTile tile;
  const bool mine = TileOf(op, blockIdx.x, gridDim.x, &tile);
  if (!mine) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int k_warps = kConsumerWarps / op.warp_m;
  const int wm = warp % op.warp_m, wk = warp / op.warp_m;
  const int per_slot = StepsPerSlot<T>(op, kRowTiles);
  const int act_offset = ActOffset<T>(op, per_slot);
  float sums[kWarpBlocks][kRowTiles][4] = {};
  for (int k = 0; k < tile.steps; k += per_slot) {
    const int steps = min(per_slot, tile.steps - k);
    BarrierWait(&ring.weights_here[ring.slot], ring.phase);
    BarrierWait(&ring.acts_here[ring.slot], ring.phase);
    const T* weights = reinterpret_cast<const T*>(ring.data());
    const T* acts = reinterpret_cast<const T*>(ring.data() + act_offset);
    for (int step = wk; step < steps; step += k_warps) {
      FragmentB<T> b[kRowTiles];
#pragma unroll
      for (int n = 0; n < kRowTiles; ++n) {
        b[n] = LoadActs(acts + (step * kRowTiles + n) * 128, lane);
      }
#pragma unroll
      for (int i = 0; i < kWarpBlocks; ++i) {
        const int block = wm + i * op.warp_m;
        if (block >= tile.blocks) break;
        const FragmentA<T> a = LoadWeights(weights + (step * tile.blocks + block) * 256, lane);
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) Multiply(sums[i][n], a, b[n]);
      }
    }
    __syncwarp();
    if (lane == 0) BarrierArrive(&ring.empty[ring.slot]);
    ring.Next<T>();
  }
  state = ring;
  // The warps' parts of K, in one fixed tree, one of a warp's blocks at a time.
  if (k_warps > 1) {
#pragma unroll
    for (int i = 0; i < kWarpBlocks; ++i) {
      if (i * op.warp_m >= tile.blocks) break;
      for (int half = k_warps / 2; half > 0; half /= 2) {
        SyncThreads<kConsumers>();
        if (wk >= half && wk < 2 * half) {
          float* to = work + ((wk - half) * op.warp_m + wm) * kRowTiles * 128 + lane;
#pragma unroll
          for (int e = 0; e < kRowTiles * 4; ++e) to[e * 32] = sums[i][e / 4][e % 4];
        }
        SyncThreads<kConsumers>();
        if (wk < half) {
          const float* from = work + (wk * op.warp_m + wm) * kRowTiles * 128 + lane;
#pragma unroll
          for (int e = 0; e < kRowTiles * 4; ++e) sums[i][e / 4][e % 4] += from[e * 32];
        }
      }
    }
    SyncThreads<kConsumers>();
  }
  if (op.norm.squares != nullptr) {
    RowFactors(op.norm, rows, work);
    SyncThreads<kConsumers>();
  }
  if (wk == 0) {
    float* out = op.out + static_cast<int64_t>(tile.split) * kMaxRows * op.ld;
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int row = n * 8 + lane % 4 * 2 + c;
        if (row >= rows) continue;
        const float factor = op.norm.squares != nullptr ? work[row] : 1.0f;
#pragma unroll
        for (int i = 0; i < kWarpBlocks; ++i) {
          const int block = wm + i * op.warp_m;
          if (block >= tile.blocks) break;
          float* to = out + static_cast<int64_t>(row) * op.ld + (tile.m0 + block) * 16 + lane / 4;
          __stcg(to, factor * sums[i][n][c]);
          __stcg(to + 8, factor * sums[i][n][2 + c]);
        }
      }
    }
  }
}

}  // namespace canopy::cuda

#endif  // __CUDACC__
#endif  // CANOPY_CORE_OPS_MATMUL_CUDA_CUH_
