// Tree attention on the device, in three operators with a barrier of the grid between them: q, k
// and v of the new nodes (bias, norm, RoPE; k and v into the store), attention of each node and
// head to a block of keys, and the blocks' combination into the output projection's input.
//
// Keys are taken in chunks of 32 and blocks of kKeysPerBlock at fixed absolute positions, wherever
// their rows lie: so a node's bits depend on its path alone. Within a chunk probabilities are
// summed in one fixed tree and values in position order.

#ifndef CANOPY_VERIFY_TREE_ATTENTION_CUDA_CUH_
#define CANOPY_VERIFY_TREE_ATTENTION_CUDA_CUH_

#include "core/cuda/pass.h"

namespace canopy::cuda {

inline constexpr int kKeysPerBlock = 128;
inline constexpr int kMaxHeadDim = 256;

struct AttentionOp {
  int layer = 0;
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  float scale = 0.0f;
  Partials partials;  // q | k | v
  RowNorm norm;       // of the product's input
  const float* bias = nullptr;
  const float* q_norm = nullptr;  // [head_dim]
  const float* k_norm = nullptr;
  float qk_norm_eps = 0.0f;
  const float* inv_freq = nullptr;  // [rotary / 2]
  int rotary = 0;
  float* q = nullptr;   // [kMaxRows][heads * head_dim]
  void* act = nullptr;  // the output projection's input
};

}  // namespace canopy::cuda

#ifdef __CUDACC__

#include "core/ops/rows_cuda.cuh"

namespace canopy::cuda {

// One warp a row and head. `work`: [kMaxRows] factors, then [kConsumerWarps][kMaxHeadDim].
template <typename T>
__device__ __noinline__ void AttentionInputs(const AttentionOp& op, const PassNodes& nodes,
                                             float* work) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  RowFactors(op.norm, nodes.rows, work);
  SyncThreads<kConsumers>();
  float* head_values = work + kMaxRows + warp * kMaxHeadDim;
  const LayerStore<T>& store = static_cast<const LayerStore<T>*>(nodes.layers)[op.layer];
  const int all_heads = op.heads + 2 * op.kv_heads;
#pragma unroll 1
  for (int task = warp * gridDim.x + blockIdx.x; task < nodes.rows * all_heads;
       task += kConsumerWarps * gridDim.x) {
    const int row = task / all_heads, head = task % all_heads;
    const int first = head * op.head_dim;
    __syncwarp();
    float squares = 0.0f;
#pragma unroll 1
    for (int d = lane; d < op.head_dim; d += 32) {
      float value = work[row] * Sum(op.partials, row, first + d);
      if (op.bias != nullptr) value += op.bias[first + d];
      head_values[d] = value;
      squares = fmaf(value, value, squares);
    }
    const bool is_q = head < op.heads, is_k = !is_q && head < op.heads + op.kv_heads;
    const float* norm = is_q ? op.q_norm : is_k ? op.k_norm : nullptr;
    if (norm != nullptr) {
      const float factor =
          rsqrtf(WarpSum(squares) / static_cast<float>(op.head_dim) + op.qk_norm_eps);
#pragma unroll 1
      for (int d = lane; d < op.head_dim; d += 32) head_values[d] *= factor * norm[d];
    }
    __syncwarp();
    if (is_q || is_k) {
      const int half = op.rotary / 2;
      const float position = static_cast<float>(nodes.position[row]);
#pragma unroll 1
      for (int d = lane; d < half; d += 32) {
        float sine, cosine;
        sincosf(position * op.inv_freq[d], &sine, &cosine);
        const float low = head_values[d], high = head_values[half + d];
        head_values[d] = low * cosine - high * sine;
        head_values[half + d] = high * cosine + low * sine;
      }
      __syncwarp();
    }
    if (is_q) {
      float* to = op.q + (static_cast<int64_t>(row) * op.heads + head) * op.head_dim;
#pragma unroll 1
      for (int d = lane; d < op.head_dim; d += 32) __stcg(to + d, head_values[d]);
    } else {
      const int kv_head = (head - op.heads) % op.kv_heads;
      const int64_t stored = nodes.kv_capacity + nodes.first_pending + row;
      T* to = (is_k ? store.k : store.v) + (stored * op.kv_heads + kv_head) * op.head_dim;
#pragma unroll 1
      for (int d = lane; d < op.head_dim; d += 32) to[d] = FromFloat<T>(head_values[d]);
    }
  }
}

template <typename T>
__device__ inline float DotKey(const float* q, const T* key, int head_dim) {
  float sum = 0.0f;
  if (head_dim % 8 == 0) {
    // Loads go out four at a time.
    constexpr int kVector = 16 / sizeof(T);
#pragma unroll 1
    for (int d = 0; d < head_dim; d += 4 * kVector) {
      uint4 bits[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (d + k * kVector < head_dim) {
          bits[k] = __ldcg(reinterpret_cast<const uint4*>(key + d + k * kVector));
        }
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (d + k * kVector >= head_dim) break;
        T values[kVector];
        memcpy(values, &bits[k], sizeof(bits[k]));
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          sum = fmaf(q[d + k * kVector + i], ToFloat(values[i]), sum);
        }
      }
    }
  } else {
#pragma unroll 1
    for (int d = 0; d < head_dim; ++d) sum = fmaf(q[d], ToFloat(key[d]), sum);
  }
  return sum;
}

// One warp a row, head and block of keys. kDimsPerLane: of heads of up to 32 times as many.
// A function of its own, so that its many registers are not the whole kernel's.
template <typename T, int kDimsPerLane>
__device__ __noinline__ void AttendBlocks(const AttentionOp& op, const PassNodes& nodes,
                                          float* work) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* q = work + warp * kMaxHeadDim;
  const LayerStore<T>& store = static_cast<const LayerStore<T>*>(nodes.layers)[op.layer];
  const int tasks = nodes.rows * op.heads * nodes.key_blocks;
#pragma unroll 1
  for (int task = warp * gridDim.x + blockIdx.x; task < tasks; task += kConsumerWarps * gridDim.x) {
    const int head = task % op.heads;
    const int row = task / op.heads % nodes.rows;
    const int block = task / op.heads / nodes.rows;
    const int t = nodes.position[row];
    const int first = block * kKeysPerBlock;
    if (first > t) continue;
    const int end = min(first + kKeysPerBlock, t + 1);
    const int kv_head = head / (op.heads / op.kv_heads);
    __syncwarp();
#pragma unroll 1
    for (int d = lane; d < op.head_dim; d += 32) {
      q[d] =
          op.scale * __ldcg(op.q + (static_cast<int64_t>(row) * op.heads + head) * op.head_dim + d);
    }
    __syncwarp();
    float most = -INFINITY, total = 0.0f;
    float sums[kDimsPerLane] = {};
#pragma unroll 1
    for (int chunk = first; chunk < end; chunk += 32) {
      const int position = chunk + lane;
      const bool valid = position < end;
      int stored = 0;
      float score = -INFINITY;
      if (valid) {
        stored = position < nodes.prefix
                     ? position
                     : nodes.kv_capacity + nodes.path[row][position - nodes.prefix];
        score = DotKey<T>(
            q, store.k + (static_cast<int64_t>(stored) * op.kv_heads + kv_head) * op.head_dim,
            op.head_dim);
      }
      const float new_most = fmaxf(most, WarpMax(score));
      const float correction = expf(most - new_most);  // 0 for the first chunk
      const float p = valid ? expf(score - new_most) : 0.0f;
      total = total * correction + WarpSum(p);
#pragma unroll
      for (int i = 0; i < kDimsPerLane; ++i) sums[i] *= correction;
      most = new_most;
      const int count = min(32, end - chunk);
      // Several rows of values are on their way at a time.
      constexpr int kAheadRows = kDimsPerLane <= 4 ? 8 : 4;
#pragma unroll 1
      for (int j = 0; j < count; j += kAheadRows) {
        T values[kAheadRows][kDimsPerLane];
#pragma unroll
        for (int k = 0; k < kAheadRows; ++k) {
          const int row_j = __shfl_sync(0xffffffffu, stored, j + k);
          const T* from =
              store.v + (static_cast<int64_t>(row_j) * op.kv_heads + kv_head) * op.head_dim;
#pragma unroll
          for (int i = 0; i < kDimsPerLane; ++i) {
            const int d = i * 32 + lane;
            if (d < op.head_dim) values[k][i] = from[d];
          }
        }
#pragma unroll
        for (int k = 0; k < kAheadRows; ++k) {
          const float pj = __shfl_sync(0xffffffffu, p, j + k);
          if (j + k >= count) break;
#pragma unroll
          for (int i = 0; i < kDimsPerLane; ++i) {
            const int d = i * 32 + lane;
            if (d < op.head_dim) sums[i] = fmaf(pj, ToFloat(values[k][i]), sums[i]);
          }
        }
      }
    }
    float* to = nodes.attention +
                ((static_cast<int64_t>(row) * op.heads + head) * nodes.key_blocks + block) *
                    (op.head_dim + 2);
    if (lane == 0) {
      __stcg(to, most);
      __stcg(to + 1, total);
    }
#pragma unroll
    for (int i = 0; i < kDimsPerLane; ++i) {
      const int d = i * 32 + lane;
      if (d < op.head_dim) __stcg(to + 2 + d, sums[i]);
    }
  }
}

// One warp a row and head: its blocks, in order.
template <typename T>
__device__ __noinline__ void CombineBlocks(const AttentionOp& op, const PassNodes& nodes,
                                           int bucket_rows) {
  constexpr int kDimsPerLane = kMaxHeadDim / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
  for (int task = warp * gridDim.x + blockIdx.x; task < nodes.rows * op.heads;
       task += kConsumerWarps * gridDim.x) {
    const int row = task / op.heads, head = task % op.heads;
    const int blocks = nodes.position[row] / kKeysPerBlock + 1;
    const float* from = nodes.attention + (static_cast<int64_t>(row) * op.heads + head) *
                                              nodes.key_blocks * (op.head_dim + 2);
    float most = -INFINITY, total = 0.0f;
    float sums[kDimsPerLane] = {};
#pragma unroll 1
    for (int block = 0; block < blocks; ++block, from += op.head_dim + 2) {
      const float block_most = __ldcg(from);
      const float new_most = fmaxf(most, block_most);
      const float before = expf(most - new_most), here = expf(block_most - new_most);
      total = fmaf(total, before, here * __ldcg(from + 1));
#pragma unroll
      for (int i = 0; i < kDimsPerLane; ++i) {
        const int d = i * 32 + lane;
        if (d < op.head_dim) sums[i] = fmaf(sums[i], before, here * __ldcg(from + 2 + d));
      }
      most = new_most;
    }
#pragma unroll
    for (int i = 0; i < kDimsPerLane; ++i) {
      const int d = i * 32 + lane;
      if (d >= op.head_dim) continue;
      const int column = head * op.head_dim + d;
      T* to = static_cast<T*>(op.act) +
              (static_cast<int64_t>(column / 16) * bucket_rows + row) * 16 +
              ActivationSlot(column % 16);
      *to = FromFloat<T>(sums[i] / total);
    }
  }
}

}  // namespace canopy::cuda

#endif  // __CUDACC__
#endif  // CANOPY_VERIFY_TREE_ATTENTION_CUDA_CUH_
