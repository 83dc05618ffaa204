// Tree attention on the device, in three operators: q, k and v of the new nodes (bias, norm, RoPE;
// k and v into the store), attention of nodes to a block of keys, and the blocks' combination into
// the output projection's input.
//
// Keys are taken in blocks at fixed absolute positions (KeyBlockOf), wherever their rows lie. A
// score's sum runs over dimensions alone, so scores are tensor core products of all stored rows of
// a block, put where they belong by position; probabilities are summed in one fixed tree, blocks in
// order. Values are summed by tensor cores too, sixteen positions at a time: those that all nodes
// share for all at once, others for each node by itself, with its path's rows in the places of
// their positions and zeros behind it. So a node's bits depend on its path alone.
//
// Bytes: the prefix's keys and values once for each group of nodes (MostQueryRows rows of q, or
// what fits).

#ifndef CANOPY_VERIFY_TREE_ATTENTION_CUDA_CUH_
#define CANOPY_VERIFY_TREE_ATTENTION_CUDA_CUH_

#include "core/cuda/pass.h"
#include "verify/row_products_cuda.cuh"

namespace canopy::cuda {

// Blocks of keys: short ones first, so that a short context is spread over many multiprocessors,
// then long ones, so that what blocks leave is little beside the keys. A long one is taken in parts
// of kKeysPerBlock.
inline constexpr int kKeysPerBlock = 64;
inline constexpr int kShortBlocks = 8;
inline constexpr int kLongBlock = 4 * kKeysPerBlock;
CANOPY_HOST_DEVICE constexpr int KeyBlockOf(int position) {
  const int beyond = position - kShortBlocks * kKeysPerBlock;
  return beyond < 0 ? position / kKeysPerBlock : kShortBlocks + beyond / kLongBlock;
}
CANOPY_HOST_DEVICE constexpr int KeyBlockStart(int block) {
  const int beyond = block - kShortBlocks;
  return beyond < 0 ? block * kKeysPerBlock : kShortBlocks * kKeysPerBlock + beyond * kLongBlock;
}
// What a block leaves of a row and head, for each kSumDims dimensions: the greatest score, the sum
// of probabilities, and the sums of values.
inline constexpr int kSumDims = 64;
CANOPY_HOST_DEVICE constexpr int SumParts(int padded_head) {
  return (padded_head + kSumDims - 1) / kSumDims;
}
CANOPY_HOST_DEVICE constexpr int BlockSums(int padded_head) {
  return padded_head + 2 * SumParts(padded_head);
}
// Floats between rows of scores: vectors, and rows in different banks.
inline constexpr int kScoreStride = kKeysPerBlock + 4;
inline constexpr int kMaxHeadDim = 256;
// Rows of q of a block, nodes times heads of a key's head: a warp sums values for sixteen rows and
// two sixteens of dimensions.
inline constexpr int kMostQueryRows = 64;
CANOPY_HOST_DEVICE constexpr int MostQueryRows(int padded_head) {
  return padded_head <= 128 ? kMostQueryRows : kMostQueryRows / 2;
}

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

// Elements between rows of values in shared memory: eight rows lie in different banks.
template <typename T>
CANOPY_HOST_DEVICE constexpr int ValueStride(int padded_head) {
  return padded_head + 16 / static_cast<int>(sizeof(T));
}

// Shared memory of Attend, in bytes, for `query_rows` rows of q. The last row of v is zeros.
template <typename T>
struct AttentionLayout {
  int q, scores, most, total, scale, v, end;

  CANOPY_HOST_DEVICE AttentionLayout(int query_rows, int padded_head) {
    q = 0;
    scores = q + query_rows * RowStride<T>(padded_head) * static_cast<int>(sizeof(T));
    most = scores + query_rows * kScoreStride * 4;
    total = most + kMostQueryRows * 4;
    scale = total + kMostQueryRows * 4;
    v = scale + kMostQueryRows * 4;
    end = v + (kKeysPerBlock + kMaxRows + 1) * ValueStride<T>(padded_head) *
                  static_cast<int>(sizeof(T));
  }
};

}  // namespace canopy::cuda

#ifdef __CUDACC__

#include "core/ops/rows_cuda.cuh"

namespace canopy::cuda {

// One warp a row and head. work: [kConsumerWarps][2 kMaxHeadDim].
template <typename T>
__device__ __forceinline__ void AttentionInputs(const AttentionOp& op, const PassNodes& nodes,
                                                const LayerStore<T>& store, const float* factors,
                                                float* work) {
  constexpr int kAhead = 4;  // of 32 dimensions
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* head_values = work + warp * (2 * kMaxHeadDim);
  float* sines = head_values + kMaxHeadDim;
  float* cosines = sines + kMaxHeadDim / 2;
  const int all_heads = op.heads + 2 * op.kv_heads;
#pragma unroll 1
  for (int task = warp * gridDim.x + blockIdx.x; task < nodes.rows * all_heads;
       task += kConsumerWarps * gridDim.x) {
    const int row = task / all_heads, head = task - row * all_heads;
    const int first = head * op.head_dim;
    const bool is_q = head < op.heads, is_k = !is_q && head < op.heads + op.kv_heads;
    const int half = is_q || is_k ? op.rotary / 2 : 0;
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
      // Rotations, while the sums come.
      if (base == 0) {
#pragma unroll 1
        for (int d = lane; d < half; d += 32) {
          sincosf(static_cast<float>(nodes.position[row]) * op.inv_freq[d], sines + d, cosines + d);
        }
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
        sums[k].Unsend(op.partials, row, first + d, splits[k]);
        head_values[d] = value;
        squares = fmaf(value, value, squares);
      }
    }
    const float* norm = is_q ? op.q_norm : is_k ? op.k_norm : nullptr;
    if (norm != nullptr) {
      const float norm_factor =
          rsqrtf(__fdividef(WarpSum(squares), static_cast<float>(op.head_dim)) + op.qk_norm_eps);
#pragma unroll 1
      for (int d = lane; d < op.head_dim; d += 32) head_values[d] *= norm_factor * norm[d];
    }
    __syncwarp();
#pragma unroll 1
    for (int d = lane; d < half; d += 32) {
      const float low = head_values[d], high = head_values[half + d];
      head_values[d] = low * cosines[d] - high * sines[d];
      head_values[half + d] = high * cosines[d] + low * sines[d];
    }
    __syncwarp();
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

// Values [16 positions][16 dimensions] as the second operand of two products. The lane names the
// row of position `lane` % 16, and with it the dimension from which on its half is.
__device__ __forceinline__ void LoadValues(FragmentB<__nv_bfloat16> (&b)[2],
                                           const __nv_bfloat16* row) {
  uint32_t m[4];
  LoadTransposed(m, row + threadIdx.x % 32 / 16 * 8);
#pragma unroll
  for (int i = 0; i < 4; ++i) b[i / 2].r[i % 2] = m[i];
}
__device__ __forceinline__ void LoadValues(FragmentB<float> (&b)[2], const float* row) {
  const int lane = threadIdx.x % 32, quad = lane % 4, octet = lane / 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float v[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int position = i % 2 * 8 + quad * 2 + k;
      const uint64_t at = __shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(row), position);
      v[k] = reinterpret_cast<const float*>(at)[i / 2 * 8 + octet];
    }
    SetPair(b[i / 2], i % 2, v[0], v[1]);
  }
}

// Brings the keys and values of the prefix that a task of Attend reads into the cache.
template <typename T>
__device__ inline void PrefetchKeys(const AttentionOp& op, const PassNodes& nodes,
                                    const LayerStore<T>& store, int task, int thread, int threads) {
  const int groups = (nodes.rows + op.node_group - 1) / op.node_group;
  const int block = task / op.kv_heads / groups, start = KeyBlockStart(block);
  const int keys = min(nodes.prefix, KeyBlockStart(block + 1)) - start;
  const int lines = (op.padded_head * static_cast<int>(sizeof(T)) + 127) / 128;
#pragma unroll 1
  for (int i = thread; i < 2 * keys * lines; i += threads) {
    const int row = i / lines % keys, line = i % lines;
    const T* from = i < keys * lines ? store.k : store.v;
    from += (static_cast<int64_t>(start + row) * op.kv_heads + task % op.kv_heads) * op.padded_head;
    Prefetch(reinterpret_cast<const char*>(from) + line * 128);
  }
}

// Attention of a group of nodes and the heads that share a head of keys to one block of keys: sums
// of values, not yet divided, with the greatest score and the sum of probabilities. A function of
// its own, so that its registers are not the other operators'.
template <typename T>
__device__ __noinline__ void Attend(const AttentionOp& op, const PassNodes& nodes,
                                    const LayerStore<T>& store, char* work) {
  constexpr int kTiles = kMostQueryRows / 16;
  constexpr int kUnits = 2;  // sixteens of dimensions that a warp sums, see MostQueryRows
  static_assert(MostQueryRows(128) / 16 * 128 / 16 <= kUnits * kConsumerWarps);
  static_assert(MostQueryRows(kMaxHeadDim) / 16 * kMaxHeadDim / 16 <= kUnits * kConsumerWarps);
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, quad = lane % 4, octet = lane / 4;
  const int per_kv = op.heads / op.kv_heads, dim = op.padded_head;
  const int query_rows = op.node_group * per_kv;
  const AttentionLayout<T> layout(PadTo16(query_rows), dim);
  T* q = reinterpret_cast<T*>(work + layout.q);
  float* scores = reinterpret_cast<float*>(work + layout.scores);
  float* most_of = reinterpret_cast<float*>(work + layout.most);
  float* total_of = reinterpret_cast<float*>(work + layout.total);
  float* scale_of = reinterpret_cast<float*>(work + layout.scale);
  T* v = reinterpret_cast<T*>(work + layout.v);
  const int v_stride = ValueStride<T>(dim);
  T* zeros = v + (kKeysPerBlock + kMaxRows) * v_stride;
  for (int i = tid; i < dim; i += kConsumers) zeros[i] = FromFloat<T>(0.0f);
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
    const int rows = min(op.node_group, nodes.rows - first_node) * per_kv;
    const int block_start = KeyBlockStart(block);
    const T* keys = store.k + kv_head * dim;
    const T* values = store.v + kv_head * dim;
    if (task + gridDim.x < tasks) {
      PrefetchKeys<T>(op, nodes, store, task + gridDim.x, tid, kConsumers);
    }
#pragma unroll 1
    for (int i = tid; i < rows * vectors; i += kConsumers) {
      const int r = i / vectors, d = (i - r * vectors) * kPer16;
      const int node = r / per_kv, head = kv_head * per_kv + r - node * per_kv;
      CopyAsync16(q + r * q_stride + d,
                  static_cast<const T*>(op.q) + ((first_node + node) * op.heads + head) * dim + d);
    }
    // A warp sums values for sixteen rows of q and some sixteens of dimensions.
    const int tile_warps = kConsumerWarps / (rows <= 16 ? 1 : rows <= 32 ? 2 : 4);
    const int first_row = warp / tile_warps * 16, first_unit = warp % tile_warps, units = dim / 16;
    const int low_row = first_row + octet, high_row = low_row + 8;
    const bool sums_values = first_row < rows && first_unit < units;
    float sums[kUnits][2][4] = {};
    const int end = min(KeyBlockStart(block + 1), nodes.deepest + 1);
#pragma unroll 1
    for (int start = block_start; start < end; start += kKeysPerBlock) {
      const int stored_keys = min(max(nodes.prefix - start, 0), kKeysPerBlock);
      // Pending nodes belong to what reaches beyond the prefix.
      const int pending =
          start + kKeysPerBlock > nodes.prefix ? nodes.first_pending + nodes.rows : 0;
      const auto keys_of = [&](int r) {
        return min(kKeysPerBlock, nodes.position[first_node + r / per_kv] - start + 1);
      };
      if (start > block_start) SyncThreads<kConsumers>();  // the shared memory is free
#pragma unroll 1
      for (int i = tid; i < (stored_keys + pending) * vectors; i += kConsumers) {
        const int r = i / vectors, d = (i - r * vectors) * kPer16;
        const int64_t row = r < stored_keys ? start + r : nodes.kv_capacity + r - stored_keys;
        const int slot = r < stored_keys ? r : kKeysPerBlock + r - stored_keys;
        CopyAsync16(v + slot * v_stride + d, values + row * kv_width + d);
      }
      // Eight stored keys a warp: first the prefix's, then pending ones.
      const int slot = warp * 8 + octet;
      const bool is_pending = warp >= kKeysPerBlock / 8;
      const int key = is_pending ? slot - kKeysPerBlock : slot;
      const bool there = key < (is_pending ? pending : stored_keys);
      const T* key_row =
          keys +
          static_cast<int64_t>(is_pending ? nodes.kv_capacity + key : start + key) * kv_width +
          quad * 8;
      RowVector<T> ahead[kBlocksAhead];
#pragma unroll
      for (int i = 0; i < kBlocksAhead; ++i) {
        ahead[i].LoadGlobal(key_row + i * 32, there && i * 32 < dim);
      }
      CopiesWait();
      SyncThreads<kConsumers>();
      if (warp * 8 < (is_pending ? kKeysPerBlock + pending : stored_keys)) {
        float products[kTiles][4] = {};
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
              if (m * 16 >= rows) break;
              RowPair<T, false> q_rows;
              q_rows.Load(q + (m * 16 + octet) * q_stride + d + quad * 8,
                          q + (m * 16 + 8 + octet) * q_stride + d + quad * 8);
#pragma unroll
              for (int step = 0; step < 2; ++step) q_rows.AddProducts(products[m], second, step);
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
              if (r >= rows) continue;
              if (is_pending && !(nodes.below[k] >> (first_node + r / per_kv) & 1)) continue;
              scores[r * kScoreStride + place] = products[m][high * 2 + half];
            }
          }
        }
      }
      SyncThreads<kConsumers>();
      // Probabilities, a row of q a warp; what is summed so far is scaled to the new greatest
      // score.
#pragma unroll 1
      for (int r = warp; r < rows; r += kConsumerWarps) {
        const int here = keys_of(r);
        if (here <= 0) {
          if (lane == 0) scale_of[r] = 1.0f;
          continue;
        }
        float* row_scores = scores + r * kScoreStride;
        const bool first = start == block_start;
        const float before = first ? -INFINITY : most_of[r];
        const float low = lane < here ? op.scale * row_scores[lane] : -INFINITY;
        const float high = lane + 32 < here ? op.scale * row_scores[lane + 32] : -INFINITY;
        const float most = fmaxf(before, WarpMax(fmaxf(low, high)));
        const float p_low = expf(low - most), p_high = expf(high - most);
        const float total = WarpSum(p_low + p_high);
        row_scores[lane] = p_low;
        row_scores[lane + 32] = p_high;
        if (lane == 0) {
          const float scale = expf(before - most);
          total_of[r] = first ? total : fmaf(scale, total_of[r], total);
          most_of[r] = most;
          scale_of[r] = scale;
        }
      }
      SyncThreads<kConsumers>();
      if (!sums_values) continue;
      const float low_scale = scale_of[low_row], high_scale = scale_of[high_row];
#pragma unroll
      for (int i = 0; i < kUnits * 8; ++i) {
        sums[i / 8][i / 4 % 2][i % 4] *= i % 4 < 2 ? low_scale : high_scale;
      }
      // Adds sixteen positions' values to the lane's rows; lane_row: of position `lane` % 16.
      const auto add = [&](int step, const T* lane_row, bool low, bool high) {
        const float* at = scores + low_row * kScoreStride + step * 16 + quad * 2;
        FragmentA<float> p;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 pair =
              *reinterpret_cast<const float2*>(at + i % 2 * 8 * kScoreStride + i / 2 * 8);
          SetPair(p, i, pair.x, pair.y);
        }
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          const int unit = first_unit + u * tile_warps;
          if (unit >= units) break;
          FragmentB<T> values_of[2];
          LoadValues(values_of, lane_row + unit * 16);
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            float(&to)[4] = sums[u][n];
            float next[4] = {to[0], to[1], to[2], to[3]};
            Multiply(next, p, values_of[n]);
#pragma unroll
            for (int e = 0; e < 4; ++e) to[e] = (e < 2 ? low : high) ? next[e] : to[e];
          }
        }
      };
      const int shared_steps = stored_keys / 16;
#pragma unroll 2
      for (int step = 0; step < shared_steps; ++step) {
        add(step, v + (step * 16 + lane % 16) * v_stride, true, true);
      }
      if (shared_steps == kKeysPerBlock / 16) continue;
      const int last_node = (min(first_row + 16, rows) - 1) / per_kv;
#pragma unroll 1
      for (int node = first_row / per_kv; node <= last_node; ++node) {
        const int here = keys_of(node * per_kv);
        const bool low = low_row / per_kv == node, high = high_row / per_kv == node;
#pragma unroll 1
        for (int step = shared_steps; step * 16 < here; ++step) {
          const int k = step * 16 + lane % 16;
          const T* lane_row = k < stored_keys ? v + k * v_stride : zeros;
          if (k >= stored_keys && k < here) {
            const int pending_node = nodes.path[first_node + node][start + k - nodes.prefix];
            lane_row = v + (kKeysPerBlock + pending_node) * v_stride;
          }
          add(step, lane_row, low, high);
        }
      }
    }
    // Of rows whose nodes stand in the block or behind it.
    if (sums_values) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = half == 0 ? low_row : high_row, node = r / per_kv;
        if (r >= rows || nodes.position[first_node + node] < block_start) continue;
        const int head = kv_head * per_kv + r - node * per_kv;
        const int64_t of_row = static_cast<int64_t>(first_node + node) * op.heads + head;
        float* to = nodes.attention + (of_row * nodes.key_blocks + block) * BlockSums(dim);
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          const int unit = first_unit + u * tile_warps;
          if (unit >= units) break;
          const int first = unit * 16;
          float* part = to + first / kSumDims * (kSumDims + 2);
          if (first % kSumDims == 0 && quad == 0) Send2(part, most_of[r], total_of[r]);
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            Send2(part + 2 + first % kSumDims + n * 8 + quad * 2, sums[u][n][half * 2],
                  sums[u][n][half * 2 + 1]);
          }
        }
      }
    }
    if (task + gridDim.x < tasks) SyncThreads<kConsumers>();  // the shared memory is free
  }
}

// One warp a row, head and kSumDims dimensions: its blocks, in order.
template <typename T>
__device__ __forceinline__ void CombineBlocks(const AttentionOp& op, const PassNodes& nodes,
                                              int bucket_rows) {
  constexpr int kAhead = 8;  // blocks
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int parts = SumParts(op.padded_head), stride = BlockSums(op.padded_head);
#pragma unroll 1
  for (int task = warp * gridDim.x + blockIdx.x; task < nodes.rows * op.heads * parts;
       task += kConsumerWarps * gridDim.x) {
    const int of_row = task / parts, part = task - of_row * parts;
    const int row = of_row / op.heads, head = of_row - row * op.heads;
    const int blocks = KeyBlockOf(nodes.position[row]) + 1;
    const int dims = min(kSumDims, op.padded_head - part * kSumDims), d = lane * 2;
    float* from = nodes.attention + static_cast<int64_t>(of_row) * nodes.key_blocks * stride +
                  part * (kSumDims + 2);
    const auto stats_of = [&](int b) {
      float2 stats;
      do {
        stats = LoadSent2(from + b * stride);
      } while (IsUnsent(stats.x) || IsUnsent(stats.y));
      return stats;
    };
    float most = -INFINITY;
#pragma unroll 1
    for (int b = lane; b < blocks; b += 32) most = fmaxf(most, stats_of(b).x);
    most = WarpMax(most);
    float total = 0.0f;
    float2 sum = {0.0f, 0.0f};
#pragma unroll 1
    for (int group = 0; group < blocks; group += 32) {
      // A lane has a block's factor and sum of probabilities.
      float2 stats = {-INFINITY, 0.0f};
      if (group + lane < blocks) stats = stats_of(group + lane);
      const float factor = expf(stats.x - most);
      const int count = min(32, blocks - group);
#pragma unroll 1
      for (int first = 0; first < count; first += kAhead) {
        float2 values[kAhead];
        bool unsent;
        do {
          unsent = false;
#pragma unroll
          for (int b = 0; b < kAhead; ++b) {
            values[b] = {0.0f, 0.0f};
            if (first + b >= count || d >= dims) continue;
            values[b] = LoadSent2(from + (group + first + b) * stride + 2 + d);
          }
#pragma unroll
          for (int b = 0; b < kAhead; ++b) unsent |= IsUnsent(values[b].x) || IsUnsent(values[b].y);
        } while (unsent);
#pragma unroll
        for (int b = 0; b < kAhead; ++b) {
          const float f = __shfl_sync(0xffffffffu, factor, (first + b) % 32);
          const float of_block = __shfl_sync(0xffffffffu, stats.y, (first + b) % 32);
          if (first + b >= count) continue;
          total = fmaf(f, of_block, total);
          sum.x = fmaf(f, values[b].x, sum.x);
          sum.y = fmaf(f, values[b].y, sum.y);
        }
      }
    }
    T* act = static_cast<T*>(op.act);
    const int dim = part * kSumDims + d, column = head * op.head_dim + dim;
    if (d < dims && dim < op.head_dim) {
      SendElement(act + ActIndex<T>(bucket_rows, row, column),
                  FromFloat<T>(__fdividef(sum.x, total)));
    }
    if (d < dims && dim + 1 < op.head_dim) {
      SendElement(act + ActIndex<T>(bucket_rows, row, column + 1),
                  FromFloat<T>(__fdividef(sum.y, total)));
    }
    // The last head sends the zeros behind it.
    const int behind = op.heads * op.head_dim + lane;
    if (head + 1 == op.heads && part == 0 && behind < PadTo16(op.heads * op.head_dim)) {
      SendElement(static_cast<T*>(op.act) + ActIndex<T>(bucket_rows, row, behind),
                  FromFloat<T>(0.0f));
    }
    __syncwarp();
    const int pairs = (dims + 2) / 2;
#pragma unroll 1
    for (int i = lane; i < blocks * pairs; i += 32) {
      const int b = i / pairs;
      Unsend2(from + b * stride + (i - b * pairs) * 2);
    }
  }
}

}  // namespace canopy::cuda

#endif  // __CUDACC__
#endif  // CANOPY_VERIFY_TREE_ATTENTION_CUDA_CUH_
