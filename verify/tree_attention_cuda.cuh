// Tree attention on the device, in three operators: q, k and v of the new nodes (bias, norm, RoPE;
// k and v into the store), attention of nodes to a block of keys, and the blocks' combination into
// the output projection's input.
//
// Keys are taken in blocks of kKeysPerBlock at fixed absolute positions, wherever their rows lie. A
// score's sum runs over dimensions alone, so scores are tensor core products of all stored rows of
// a block, put where they belong by position; probabilities are summed in one fixed tree, values in
// position order, blocks in order. So a node's bits depend on its path alone.
//
// Bytes: the prefix's keys and values once for each group of nodes (64 rows of q).

#ifndef CANOPY_VERIFY_TREE_ATTENTION_CUDA_CUH_
#define CANOPY_VERIFY_TREE_ATTENTION_CUDA_CUH_

#include "core/cuda/pass.h"
#include "verify/row_products_cuda.cuh"

namespace canopy::cuda {

inline constexpr int kKeysPerBlock = 64;
// Floats between rows of scores: vectors, and rows in different banks.
inline constexpr int kScoreStride = kKeysPerBlock + 4;
inline constexpr int kMaxHeadDim = 256;
inline constexpr int kMostQueryRows = 64;  // of a block: nodes times heads of a key's head

struct AttentionOp {
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int padded_head = 0;  // to a multiple of 32, of q, k and v
  int node_group = 0;   // nodes that a block takes at a time
  float scale = 0.0f;
  Partials partials;  // q | k | v
  const float* bias = nullptr;
  const float* q_norm = nullptr;  // [head_dim]
  const float* k_norm = nullptr;
  float qk_norm_eps = 0.0f;
  const float* inv_freq = nullptr;  // [rotary / 2]
  int rotary = 0;
  void* q = nullptr;    // T [kMaxRows][heads * padded_head]
  void* act = nullptr;  // the output projection's input
};

// Shared memory of Attend, in bytes, for `query_rows` rows of q.
template <typename T>
struct AttentionLayout {
  int q, scores, v, end;

  CANOPY_HOST_DEVICE AttentionLayout(int query_rows, int padded_head) {
    q = 0;
    scores = q + query_rows * RowStride<T>(padded_head) * static_cast<int>(sizeof(T));
    v = scores + query_rows * kScoreStride * 4;
    end = v + (kKeysPerBlock + kMaxRows) * padded_head * static_cast<int>(sizeof(T));
  }
};

}  // namespace canopy::cuda

#ifdef __CUDACC__

#include "core/ops/rows_cuda.cuh"

namespace canopy::cuda {

// One warp a row and head. work: [kConsumerWarps][kMaxHeadDim].
template <typename T>
__device__ __forceinline__ void AttentionInputs(const AttentionOp& op, const PassNodes& nodes,
                                                const LayerStore<T>& store, const float* factors,
                                                float* work) {
  constexpr int kAhead = 4;  // of 32 dimensions
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* head_values = work + warp * kMaxHeadDim;
  const int all_heads = op.heads + 2 * op.kv_heads;
#pragma unroll 1
  for (int task = warp * gridDim.x + blockIdx.x; task < nodes.rows * all_heads;
       task += kConsumerWarps * gridDim.x) {
    const int row = task / all_heads, head = task - row * all_heads;
    const int first = head * op.head_dim;
    const float factor = factors[row];
    float squares = 0.0f;
#pragma unroll 1
    for (int base = 0; base < op.head_dim; base += 32 * kAhead) {
      Sum1 sums[kAhead];
      int splits[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int d = base + k * 32 + lane;
        splits[k] = d < op.head_dim ? Splits(op.partials, first + d) : 0;
        sums[k].Load(op.partials, row, first + d, d < op.head_dim);
      }
      bool unsent;
      do {
        unsent = false;
#pragma unroll
        for (int k = 0; k < kAhead; ++k) unsent |= sums[k].Unsent(splits[k]);
        if (!unsent) break;
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          const int d = base + k * 32 + lane;
          sums[k].Load(op.partials, row, first + d, d < op.head_dim);
        }
      } while (unsent);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int d = base + k * 32 + lane;
        if (d >= op.head_dim) continue;
        const float bias = LoadWeight(op.bias + first + d, op.bias != nullptr);
        const float value =
            fmaf(factor, FinishOne(sums[k], op.partials, row, first + d, splits[k]), bias);
        head_values[d] = value;
        squares = fmaf(value, value, squares);
      }
    }
    const bool is_q = head < op.heads, is_k = !is_q && head < op.heads + op.kv_heads;
    const float* norm = is_q ? op.q_norm : is_k ? op.k_norm : nullptr;
    if (norm != nullptr) {
      const float norm_factor =
          rsqrtf(__fdividef(WarpSum(squares), static_cast<float>(op.head_dim)) + op.qk_norm_eps);
#pragma unroll 1
      for (int d = lane; d < op.head_dim; d += 32) head_values[d] *= norm_factor * norm[d];
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
    T* to;
    if (is_q) {
      to = static_cast<T*>(op.q) + (row * op.heads + head) * op.padded_head;
    } else {
      const int kv_head = (head - op.heads) % op.kv_heads;
      const int64_t stored = nodes.kv_capacity + nodes.first_pending + row;
      to = (is_k ? store.k : store.v) + (stored * op.kv_heads + kv_head) * op.padded_head;
    }
#pragma unroll 1
    for (int d = lane; d < op.head_dim; d += 32) to[d] = FromFloat<T>(head_values[d]);
    __syncwarp();
  }
}

// Attention of a group of nodes and the heads that share a head of keys to one block of keys:
// sums of values, not yet divided, with the greatest score and the sum of probabilities.
template <typename T>
__device__ __forceinline__ void Attend(const AttentionOp& op, const PassNodes& nodes,
                                       const LayerStore<T>& store, char* work) {
  constexpr int kTiles = kMostQueryRows / 16;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, quad = lane % 4, octet = lane / 4;
  const int per_kv = op.heads / op.kv_heads, dim = op.padded_head;
  const int query_rows = op.node_group * per_kv;
  const AttentionLayout<T> layout(PadTo16(query_rows), dim);
  T* q = reinterpret_cast<T*>(work + layout.q);
  float* scores = reinterpret_cast<float*>(work + layout.scores);
  T* v = reinterpret_cast<T*>(work + layout.v);
  const int q_stride = RowStride<T>(dim);
  const int groups = (nodes.rows + op.node_group - 1) / op.node_group;
  const int tasks = op.kv_heads * nodes.key_blocks * groups;
  constexpr int kPer16 = 16 / sizeof(T);
  const int vectors = dim / kPer16;
  const int kv_width = op.kv_heads * dim;
#pragma unroll 1
  for (int task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int kv_head = task % op.kv_heads;
    const int rest = task / op.kv_heads;
    const int block = rest / groups, first_node = (rest - block * groups) * op.node_group;
    const int count = min(op.node_group, nodes.rows - first_node);
    const int start = block * kKeysPerBlock;
    const int stored_keys = min(max(nodes.prefix - start, 0), kKeysPerBlock);
    // Pending nodes belong to the blocks that reach beyond the prefix.
    const int pending = start + kKeysPerBlock > nodes.prefix ? nodes.first_pending + nodes.rows : 0;
    const T* keys = store.k + kv_head * dim;
    const T* values = store.v + kv_head * dim;
#pragma unroll 1
    for (int i = tid; i < count * per_kv * vectors; i += kConsumers) {
      const int r = i / vectors, d = (i - r * vectors) * kPer16;
      const int node = r / per_kv, head = kv_head * per_kv + r - node * per_kv;
      CopyAsync16(q + r * q_stride + d,
                  static_cast<const T*>(op.q) + ((first_node + node) * op.heads + head) * dim + d);
    }
#pragma unroll 1
    for (int i = tid; i < (stored_keys + pending) * vectors; i += kConsumers) {
      const int r = i / vectors, d = (i - r * vectors) * kPer16;
      const int64_t row = r < stored_keys ? start + r : nodes.kv_capacity + r - stored_keys;
      const int slot = r < stored_keys ? r : kKeysPerBlock + r - stored_keys;
      CopyAsync16(v + slot * dim + d, values + row * kv_width + d);
    }
    // Eight stored keys a warp: first the prefix's, then pending ones.
    const int slot = warp * 8 + octet;
    const bool is_pending = warp >= kKeysPerBlock / 8;
    const int key = is_pending ? slot - kKeysPerBlock : slot;
    const bool there = key < (is_pending ? pending : stored_keys);
    const T* key_row =
        keys + static_cast<int64_t>(is_pending ? nodes.kv_capacity + key : start + key) * kv_width +
        quad * 8;
    RowVector<T> ahead[kBlocksAhead];
#pragma unroll
    for (int i = 0; i < kBlocksAhead; ++i) {
      ahead[i].LoadGlobal(key_row + i * 32, there && i * 32 < dim);
    }
    CopiesWait();
    SyncThreads<kConsumers>();
    if (warp * 8 < (is_pending ? kKeysPerBlock + pending : stored_keys)) {
      float sums[kTiles][4] = {};
#pragma unroll 1
      for (int first = 0; first < dim; first += 32 * kBlocksAhead) {
#pragma unroll
        for (int i = 0; i < kBlocksAhead; ++i) {
          const int d = first + i * 32;
          if (d >= dim) break;
          if (first > 0) ahead[i].LoadGlobal(key_row + d, there);
          FragmentB<T> second[2];
          SetSecond(second, ahead[i]);
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
            if (m * 16 >= count * per_kv) break;
            AddRowProducts<false>(sums[m], second, q + (m * 16 + octet) * q_stride + d + quad * 8,
                                  q + (m * 16 + 8 + octet) * q_stride + d + quad * 8);
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int k = (is_pending ? warp * 8 - kKeysPerBlock : warp * 8) + quad * 2 + half;
        if (k >= (is_pending ? pending : stored_keys)) continue;
        const int place = is_pending ? nodes.prefix + nodes.depth[k] - start : k;
        if (place < 0 || place >= kKeysPerBlock) continue;
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
          for (int high = 0; high < 2; ++high) {
            const int r = m * 16 + octet + high * 8;
            if (r >= count * per_kv) continue;
            if (is_pending && !(nodes.path_mask[first_node + r / per_kv] >> k & 1)) continue;
            scores[r * kScoreStride + place] = sums[m][high * 2 + half];
          }
        }
      }
    }
    SyncThreads<kConsumers>();
    // A row of q a warp: probabilities, then values; a lane has every 32nd dimension's pair.
#pragma unroll 1
    for (int r = warp; r < count * per_kv; r += kConsumerWarps) {
      const int node = r / per_kv, row = first_node + node;
      const int here = min(kKeysPerBlock, nodes.position[row] - start + 1);
      if (here <= 0) continue;
      float* row_scores = scores + r * kScoreStride;
      const float low = lane < here ? op.scale * row_scores[lane] : -INFINITY;
      const float high = lane + 32 < here ? op.scale * row_scores[lane + 32] : -INFINITY;
      const float most = WarpMax(fmaxf(low, high));
      const float p_low = expf(low - most), p_high = expf(high - most);
      const float total = WarpSum(p_low + p_high);
      row_scores[lane] = p_low;
      row_scores[lane + 32] = p_high;
      __syncwarp();
      float* to = nodes.attention +
                  ((static_cast<int64_t>(row) * op.heads + kv_head * per_kv + r - node * per_kv) *
                       nodes.key_blocks +
                   block) *
                      (dim + 2);
      if (lane == 0) {
        Send(to, most);
        Send(to + 1, total);
      }
#pragma unroll 1
      for (int d = lane * 2; d < dim; d += 64) {
        float2 sum = {0.0f, 0.0f};
        const auto add = [&](int slot_of, float p) {
          float2 value;
          if constexpr (sizeof(T) == 2) {
            const uint32_t bits = *reinterpret_cast<const uint32_t*>(v + slot_of * dim + d);
            value = {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
          } else {
            value = *reinterpret_cast<const float2*>(v + slot_of * dim + d);
          }
          sum.x = fmaf(p, value.x, sum.x);
          sum.y = fmaf(p, value.y, sum.y);
        };
        const int shared_keys = min(stored_keys, here);
        int k = 0;
#pragma unroll 2
        for (; k + 4 <= shared_keys; k += 4) {
          const float4 p = *reinterpret_cast<const float4*>(row_scores + k);
          add(k, p.x);
          add(k + 1, p.y);
          add(k + 2, p.z);
          add(k + 3, p.w);
        }
#pragma unroll 2
        for (; k < here; ++k) {
          const int at =
              k < stored_keys ? k : kKeysPerBlock + nodes.path[row][start + k - nodes.prefix];
          add(at, row_scores[k]);
        }
        Send(to + 2 + d, sum.x);
        Send(to + 3 + d, sum.y);
      }
    }
    if (task + gridDim.x < tasks) SyncThreads<kConsumers>();  // the shared memory is free
  }
}

// One warp a row and head: its blocks, in order.
template <typename T>
__device__ __forceinline__ void CombineBlocks(const AttentionOp& op, const PassNodes& nodes,
                                              int bucket_rows) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
  for (int task = warp * gridDim.x + blockIdx.x; task < nodes.rows * op.heads;
       task += kConsumerWarps * gridDim.x) {
    const int row = task / op.heads, head = task - row * op.heads;
    const int blocks = nodes.position[row] / kKeysPerBlock + 1;
    const int stride = op.padded_head + 2;
    float* from = nodes.attention + static_cast<int64_t>(task) * nodes.key_blocks * stride;
    float most = -INFINITY;
#pragma unroll 1
    for (int b = lane; b < blocks; b += 32) {
      float of_block;
      do {
        of_block = LoadSent(from + b * stride);
      } while (IsUnsent(of_block));
      most = fmaxf(most, of_block);
    }
    most = WarpMax(most);
#pragma unroll 1
    for (int d = lane * 2; d < op.padded_head; d += 64) {
      float total = 0.0f;
      float2 sum = {0.0f, 0.0f};
      constexpr int kAhead = 4;  // blocks
#pragma unroll 1
      for (int first = 0; first < blocks; first += kAhead) {
        float at[kAhead][4];
        bool unsent;
        do {
          unsent = false;
#pragma unroll
          for (int b = 0; b < kAhead; ++b) {
            const float* block = from + (first + b) * stride;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              at[b][i] = LoadSent(i < 2 ? block + i : block + i + d, first + b < blocks);
              unsent |= IsUnsent(at[b][i]);
            }
          }
        } while (unsent);
#pragma unroll
        for (int b = 0; b < kAhead; ++b) {
          if (first + b >= blocks) break;
          const float factor = expf(at[b][0] - most);
          total = fmaf(factor, at[b][1], total);
          sum.x = fmaf(factor, at[b][2], sum.x);
          sum.y = fmaf(factor, at[b][3], sum.y);
        }
      }
      T* act = static_cast<T*>(op.act);
      const int column = head * op.head_dim + d;
      if (d < op.head_dim) {
        SendElement(act + ActIndex<T>(bucket_rows, row, column),
                    FromFloat<T>(__fdividef(sum.x, total)));
      }
      if (d + 1 < op.head_dim) {
        SendElement(act + ActIndex<T>(bucket_rows, row, column + 1),
                    FromFloat<T>(__fdividef(sum.y, total)));
      }
    }
    // The last head sends the zeros behind it.
    const int column = op.heads * op.head_dim + lane;
    if (head + 1 == op.heads && column < PadTo16(op.heads * op.head_dim)) {
      SendElement(static_cast<T*>(op.act) + ActIndex<T>(bucket_rows, row, column),
                  FromFloat<T>(0.0f));
    }
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < blocks * stride; i += 32) Unsend(from + i);
  }
}

}  // namespace canopy::cuda

#endif  // __CUDACC__
#endif  // CANOPY_VERIFY_TREE_ATTENTION_CUDA_CUH_
