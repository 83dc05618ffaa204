// The tree scan of Mamba-2 on the device, one operator from in_proj's sums to out_proj's input:
// convolution along ancestors, activation, dt, log decays, scores, state term, path sum, D skip,
// gate and the gated norm's weights. Formulas and exactness as in verify/tree_scan.h.
//
// A block takes a slice of a head: a few of its dimensions ("p") for all nodes of the pass. B, C and
// scores are made again by every slice, which is cheaper than a barrier of the grid. Products whose
// sum does not run over positions (C . B over the state, S C) are tensor core products of operands
// that hold every f32 bit; the sum over a path is one chain of fused multiply-adds in path order.
// The checkpoint is read once and nothing of it is written.
//
// Checkpoints S are stored as the tensor cores' first operand: blocks [p / 16][n / 16] of 256 f32,
// see StateElement.

#ifndef CANOPY_VERIFY_TREE_SCAN_CUDA_CUH_
#define CANOPY_VERIFY_TREE_SCAN_CUDA_CUH_

#include "core/cuda/pass.h"

namespace canopy::cuda {

struct ScanOp {
  int layer = 0;
  int heads = 0;
  int head_dim = 0;
  int groups = 0;
  int d_state = 0;
  int padded_d_state = 0;  // to a multiple of 16
  int slice = 0;           // dimensions of a slice: 16, 32 or 64
  int slices = 0;          // of a head
  int taps = 0;            // kernel - 1
  Partials partials;       // z | x | B | C | dt
  RowNorm norm;            // of in_proj's input
  const float* in_bias = nullptr;
  const float* conv_weight = nullptr;  // [taps + 1][conv_stride]
  int conv_stride = 0;
  const float* conv_bias = nullptr;    // [channels]
  const float* a = nullptr;            // [heads]
  const float* d = nullptr;
  const float* dt_bias = nullptr;
  float dt_min = 0.0f;
  float dt_max = 0.0f;
  const float* norm_weight = nullptr;  // [heads * head_dim]
  int norm_groups = 1;
  int group_columns = 0;     // of a norm group in act: padded to k-steps
  void* act = nullptr;       // out_proj's input, before the norm's factor
  float* squares = nullptr;  // [kMaxRows][heads * slices]
};

CANOPY_HOST_DEVICE constexpr int PadTo16(int n) { return (n + 15) / 16 * 16; }

// Where S[p, n] of a head lies among its PadTo16(head_dim) * padded_d_state floats.
CANOPY_HOST_DEVICE constexpr int StateElement(int p, int n, int padded_d_state) {
  const int block = p / 16 * (padded_d_state / 16) + n / 16;
  const int lane = p % 8 * 4 + n % 8 / 2;
  const int element = n % 16 / 8 * 4 + p % 16 / 8 * 2 + n % 2;
  return block * 256 + element / 4 * 128 + lane * 4 + element % 4;
}

// Floats between the weights of two nodes: odd, so that nodes lie in different banks.
inline constexpr int kWeightStride = 65;

// Shared memory of the scan, in bytes, for buckets of `rows` rows.
template <typename T>
struct ScanLayout {
  int c, b, u, x, weights, decay, dt, factor, end;

  CANOPY_HOST_DEVICE ScanLayout(int rows, int slice, int padded_d_state) {
    const int row_bytes = (padded_d_state + 8) * static_cast<int>(sizeof(T));
    c = 0;
    b = c + rows * row_bytes;
    // The u of all stored rows take the place of C and B once those are used up.
    u = 0;
    const int first = b + rows * row_bytes;
    const int second = (64 + kMaxRows) * slice * 4;
    x = first > second ? first : second;
    weights = x + rows * slice * static_cast<int>(sizeof(T));
    decay = weights + rows * kWeightStride * 4;  // and the convolution's raw inputs
    dt = decay + (64 + kMaxRows) * 4;
    factor = dt + kMaxRows * 4;
    end = factor + kMaxRows * 4;
  }
};

}  // namespace canopy::cuda

#ifdef __CUDACC__

#include "core/ops/rows_cuda.cuh"

namespace canopy::cuda {

// Convolution and activation of up to 64 channels, for all rows: raw inputs go to `raw` [rows][64]
// and, if `keep`, to the store; results to out[row * stride + channel].
template <typename T>
__device__ inline void ConvChannels(const ScanOp& op, const PassNodes& nodes,
                                    const LayerStore<T>& store, int first, int count, bool keep,
                                    const float* factor, float* raw, T* out, int stride) {
  const int inner = op.heads * op.head_dim;
  const int channels = inner + 2 * op.groups * op.d_state;
  const int channel = threadIdx.x % 64;
  const bool mine = channel < count;
  const int at = first + channel;
  NamedBarrier(1, kConsumers);  // raw is free
  if (mine) {
    const float bias = op.in_bias != nullptr ? op.in_bias[inner + at] : 0.0f;
    for (int row = threadIdx.x / 64; row < nodes.rows; row += kConsumers / 64) {
      const float value = factor[row] * Sum(op.partials, row, inner + at) + bias;
      raw[row * 64 + channel] = value;
      if (keep) {
        const int64_t to = op.taps + nodes.first_pending + row;
        store.conv[to * channels + at] = value;
      }
    }
  }
  NamedBarrier(1, kConsumers);
  if (!mine) return;
  const float bias = op.conv_bias[at];
  for (int row = threadIdx.x / 64; row < nodes.rows; row += kConsumers / 64) {
    float sum = bias;
    for (int back = op.taps; back > 0; --back) {
      const int tap = nodes.taps[row][back - 1];
      if (tap == -1) continue;
      const float input = tap >= 0 ? raw[tap * 64 + channel]
                                   : store.conv[static_cast<int64_t>(-2 - tap) * channels + at];
      sum = fmaf(op.conv_weight[(op.taps - back) * op.conv_stride + at], input, sum);
    }
    sum = fmaf(op.conv_weight[op.taps * op.conv_stride + at], raw[row * 64 + channel], sum);
    out[row * stride + channel] = FromFloat<T>(Silu(sum));
  }
}

template <typename T, int kRowTiles>
__device__ inline void ScanSlice(const ScanOp& op, const PassNodes& nodes, int head, int slice,
                                 char* work) {
  constexpr int kRows = 8 * kRowTiles;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const LayerStore<T>& store = static_cast<const LayerStore<T>*>(nodes.layers)[op.layer];
  const ScanLayout<T> layout(kRows, op.slice, op.padded_d_state);
  T* c = reinterpret_cast<T*>(work + layout.c);
  T* b = reinterpret_cast<T*>(work + layout.b);
  float* u = reinterpret_cast<float*>(work + layout.u);
  T* x = reinterpret_cast<T*>(work + layout.x);
  float* weights = reinterpret_cast<float*>(work + layout.weights);
  float* decay = reinterpret_cast<float*>(work + layout.decay);
  float* dt = reinterpret_cast<float*>(work + layout.dt);
  const float* factor = reinterpret_cast<float*>(work + layout.factor);

  const int inner = op.heads * op.head_dim;
  const int channels = inner + 2 * op.groups * op.d_state;
  const int group = head / (op.heads / op.groups);
  const int first_dim = slice * op.slice;
  const int dims = min(op.slice, op.head_dim - first_dim);
  const int first_x = head * op.head_dim + first_dim;
  const int ds = op.padded_d_state;
  const int c_stride = ds + 8;
  const int rows = nodes.rows;
  const int pending_end = nodes.first_pending + rows;
  const bool first_of_group = head % (op.heads / op.groups) == 0 && slice == 0;

  // Padding takes part in products.
  for (int i = tid; i < kRows * c_stride; i += kConsumers) {
    c[i] = FromFloat<T>(0.0f);
    b[i] = FromFloat<T>(0.0f);
  }
  // dt, and the log decays of what is stored already.
  for (int row = tid; row < rows; row += kConsumers) {
    const int column = inner + channels + head;
    float raw = factor[row] * Sum(op.partials, row, column);
    if (op.in_bias != nullptr) raw += op.in_bias[column];
    const float v = raw + op.dt_bias[head];
    const float soft = fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v)));
    dt[row] = fminf(fmaxf(soft, op.dt_min), op.dt_max);
  }
  for (int r = tid; r < 64 + nodes.first_pending; r += kConsumers) {
    decay[r] = store.l[static_cast<int64_t>(r) * op.heads + head];
  }
  ConvChannels<T>(op, nodes, store, first_x, dims, true, factor, weights, x, op.slice);
  const int first_b = inner + group * op.d_state;
  for (int n = 0; n < op.d_state; n += 64) {
    ConvChannels<T>(op, nodes, store, first_b + n, min(64, op.d_state - n), first_of_group, factor,
                    weights, b + n, c_stride);
  }
  const int first_c = inner + (op.groups + group) * op.d_state;
  for (int n = 0; n < op.d_state; n += 64) {
    ConvChannels<T>(op, nodes, store, first_c + n, min(64, op.d_state - n), first_of_group, factor,
                    weights, c + n, c_stride);
  }
  // l of the new nodes: along the path, from the start of the node's aligned segment.
  const float a = op.a[head];
  for (int row = tid; row < rows; row += kConsumers) {
    const int t = nodes.position[row];
    const int segment = t / 32 * 32;
    float l = 0.0f;
    int next = segment;  // position
    const int first_new = nodes.prefix;
    if (segment < first_new) {
      l = decay[(first_new - 1) % 64];
      next = first_new;
    }
    for (int p = next; p <= t; ++p) {
      const int node = nodes.path[row][p - first_new];
      // Of the earlier pending nodes the stored value is the sum so far.
      if (node < nodes.first_pending) {
        l = decay[64 + node];
      } else {
        const float step = dt[node - nodes.first_pending] * a;
        l = p % 32 == 0 ? step : l + step;
      }
    }
    // The row's own place only: others read the stored ones.
    store.l[static_cast<int64_t>(64 + nodes.first_pending + row) * op.heads + head] = l;
    decay[64 + nodes.first_pending + row] = l;
  }
  NamedBarrier(1, kConsumers);
  if (first_of_group) {
    for (int i = tid; i < rows * ds; i += kConsumers) {
      const int row = i / ds, n = i % ds;
      store.b[(static_cast<int64_t>(64 + nodes.first_pending + row) * op.groups + group) * ds + n] =
          b[row * c_stride + n];
    }
  }

  // Scores C_i . B_j into weights[i][position of j - checkpoint of i]; eight stored rows a turn.
  constexpr int kRowBlocks = (kRows + 15) / 16;
  for (int tile = warp; tile < (64 + pending_end + 7) / 8; tile += kConsumerWarps) {
    const int j = tile * 8 + lane / 4;  // the stored row whose B this lane loads
    const T* from = nullptr;
    if (j >= 64 + nodes.first_pending && j < 64 + pending_end) {
      from = b + (j - 64 - nodes.first_pending) * c_stride;
    } else if (j < 64 + nodes.first_pending) {
      from = store.b + (static_cast<int64_t>(j) * op.groups + group) * ds;
    }
    float scores[kRowBlocks][4] = {};
    for (int n = 0; n < ds; n += 16) {
      FragmentB<T> fb = {};
      if (from != nullptr) {
        LoadPair(fb, 0, from + n + lane % 4 * 2);
        LoadPair(fb, 1, from + n + lane % 4 * 2 + 8);
      }
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
        FragmentA<T> fa = {};
        const int low = m * 16 + lane / 4, high = low + 8;
        const T* at = c + low * c_stride + n + lane % 4 * 2;
        LoadPair(fa, 0, at);
        LoadPair(fa, 2, at + 8);
        if (high < kRows) {
          LoadPair(fa, 1, at + 8 * c_stride);
          LoadPair(fa, 3, at + 8 * c_stride + 8);
        }
        Multiply(scores[m], fa, fb);
      }
    }
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = m * 16 + lane / 4 + e / 2 * 8;
        const int stored = tile * 8 + lane % 4 * 2 + e % 2;
        if (row >= rows || stored >= 64 + pending_end) continue;
        int position;
        if (stored < 64) {
          // The position at ring row `stored` that is the latest of the prefix.
          position = (nodes.prefix - 1) / 64 * 64 + stored;
          if (position >= nodes.prefix) position -= 64;
          if (nodes.prefix == 0 || position < nodes.checkpoint[row]) continue;
        } else {
          const int node = stored - 64;
          if (!(nodes.path_mask[row] >> node & 1)) continue;
          position = nodes.prefix + nodes.depth[node];
          if (position < nodes.checkpoint[row]) continue;
        }
        weights[row * kWeightStride + position - nodes.checkpoint[row]] = scores[m][e];
      }
    }
  }
  NamedBarrier(1, kConsumers);

  // weights = exp(difference of log decays) * score. Across the segment boundary the first
  // segment's rest and the node's own part are added.
  const auto stored_row = [&](int row, int position) {
    return position < nodes.prefix ? position % 64
                                   : 64 + nodes.path[row][position - nodes.prefix];
  };
  for (int i = tid; i < rows * 64; i += kConsumers) {
    const int row = i / 64, j = i % 64;
    const int t = nodes.position[row], start = nodes.checkpoint[row];
    if (start + j > t) continue;
    const int segment = t / 32 * 32;
    const float own = decay[64 + nodes.first_pending + row];
    const float lj = decay[stored_row(row, start + j)];
    float exponent;
    if (start + j < segment) {
      exponent = (decay[stored_row(row, segment - 1)] - lj) + own;
    } else {
      exponent = own - lj;
    }
    weights[row * kWeightStride + j] *= expf(exponent);
  }

  // The state term S C_i, for each of the two checkpoints that a node of the pass reads.
  const int p_tiles = op.slice / 16;
  const int p_tile = warp % p_tiles;
  const int node_step = kConsumerWarps / p_tiles;
  constexpr int kMost = kRowTiles < 4 ? kRowTiles : 4;  // node tiles of a warp, slice <= 64
  float y[kMost][4] = {};
  const bool has_tile = first_dim + p_tile * 16 < op.head_dim;
  for (int position = nodes.first_checkpoint; position <= nodes.last_checkpoint; position += 32) {
    if (position == 0 || !has_tile) continue;
    const int64_t head_floats = static_cast<int64_t>(PadTo16(op.head_dim)) * ds;
    const float* state = store.checkpoints[position / 32 % 2] + head * head_floats +
                         static_cast<int64_t>(first_dim / 16 + p_tile) * ds * 16;
    float term[kMost][4] = {};
#pragma unroll 4
    for (int n = 0; n < ds; n += 16) {
      const float4* at = reinterpret_cast<const float4*>(state + n * 16) + lane;
      const float4 v0 = __ldg(at), v1 = __ldg(at + 32);
      FragmentA<float> fa;
      SetPair(fa, 0, v0.x, v0.y);
      SetPair(fa, 1, v0.z, v0.w);
      SetPair(fa, 2, v1.x, v1.y);
      SetPair(fa, 3, v1.z, v1.w);
#pragma unroll
      for (int k = 0; k < kMost; ++k) {
        const int tile = warp / p_tiles + k * node_step;
        if (tile >= kRowTiles) break;
        FragmentB<T> fb;
        const T* from = c + (tile * 8 + lane / 4) * c_stride + n + lane % 4 * 2;
        LoadPair(fb, 0, from);
        LoadPair(fb, 1, from + 8);
        Multiply(term[k], fa, fb);
      }
    }
#pragma unroll
    for (int k = 0; k < kMost; ++k) {
      const int tile = warp / p_tiles + k * node_step;
      if (tile >= kRowTiles) break;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = tile * 8 + lane % 4 * 2 + e % 2;
        if (row < rows && nodes.checkpoint[row] == position) y[k][e] = term[k][e];
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kMost; ++k) {
    const int tile = warp / p_tiles + k * node_step;
    if (tile >= kRowTiles) break;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = tile * 8 + lane % 4 * 2 + e % 2;
      if (row >= rows) continue;
      const int t = nodes.position[row], segment = t / 32 * 32;
      float exponent = decay[64 + nodes.first_pending + row];
      if (segment > nodes.checkpoint[row]) exponent += decay[stored_row(row, segment - 1)];
      y[k][e] *= expf(exponent);
    }
  }
  NamedBarrier(1, kConsumers);  // C and B are used up, the weights are there

  // u of all rows that a path may have, and of the new ones into the store.
  for (int i = tid; i < (64 + pending_end) * op.slice; i += kConsumers) {
    const int r = i / op.slice, p = i % op.slice;
    float value = 0.0f;
    const int64_t at = static_cast<int64_t>(r) * inner + first_x + p;
    if (p < dims) {
      if (r >= 64 + nodes.first_pending) {
        const int row = r - 64 - nodes.first_pending;
        value = dt[row] * ToFloat(x[row * op.slice + p]);
        store.u[at] = value;
      } else {
        value = store.u[at];
      }
    }
    u[i] = value;
  }
  NamedBarrier(1, kConsumers);

  const float skip = op.d[head];
  const int group_width = inner / op.norm_groups;
#pragma unroll
  for (int k = 0; k < kMost; ++k) {
    const int tile = warp / p_tiles + k * node_step;
    if (tile >= kRowTiles || !has_tile) break;
    float squares[2] = {0.0f, 0.0f};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile * 8 + lane % 4 * 2 + half;
      if (row >= rows) continue;
      const int p0 = p_tile * 16 + lane / 4, p1 = p0 + 8;
      float y0 = y[k][half], y1 = y[k][2 + half];
      const int start = nodes.checkpoint[row];
      const float* w = weights + row * kWeightStride;
      int position = start;
      for (; position < min(nodes.prefix, nodes.position[row] + 1); ++position) {
        const float* from = u + position % 64 * op.slice;
        y0 = fmaf(w[position - start], from[p0], y0);
        y1 = fmaf(w[position - start], from[p1], y1);
      }
      for (; position <= nodes.position[row]; ++position) {
        const float* from = u + (64 + nodes.path[row][position - nodes.prefix]) * op.slice;
        y0 = fmaf(w[position - start], from[p0], y0);
        y1 = fmaf(w[position - start], from[p1], y1);
      }
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int p = part == 0 ? p0 : p1;
        if (p >= dims) continue;
        float value = fmaf(skip, ToFloat(x[row * op.slice + p]), part == 0 ? y0 : y1);
        const int column = first_x + p;
        float z = factor[row] * Sum(op.partials, row, column);
        if (op.in_bias != nullptr) z += op.in_bias[column];
        value *= Silu(z);
        squares[half] = fmaf(value, value, squares[half]);
        const int placed = column / group_width * op.group_columns + column % group_width;
        T* to = static_cast<T*>(op.act) + (static_cast<int64_t>(placed / 16) * kRows + row) * 16 +
                ActivationSlot(placed % 16);
        *to = FromFloat<T>(value * op.norm_weight[column]);
      }
    }
    // Over the 8 lanes that hold a row's dimensions, then over the slice's tiles of 16.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = squares[half];
      for (int other = 4; other < 32; other *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
      const int row = tile * 8 + lane % 4 * 2 + half;
      // decay is used up but for the rows' own, which were read above.
      if (lane / 4 == 0 && row < rows) {
        op.squares[(static_cast<int64_t>(row) * op.heads + head) * (op.slices * p_tiles) +
                   slice * p_tiles + p_tile] = sum;
      }
    }
  }
}

template <typename T, int kRowTiles>
__device__ inline void Scan(const ScanOp& op, const PassNodes& nodes, char* work) {
  const ScanLayout<T> layout(8 * kRowTiles, op.slice, op.padded_d_state);
  const int tasks = op.heads * op.slices;
  if (static_cast<int>(blockIdx.x) < tasks) {
    RowFactors(op.norm, nodes.rows, reinterpret_cast<float*>(work + layout.factor));
  }
  for (int task = blockIdx.x; task < tasks; task += gridDim.x) {
    NamedBarrier(1, kConsumers);
    ScanSlice<T, kRowTiles>(op, nodes, task / op.slices, task % op.slices, work);
  }
}

// Rows of a committed path behind the prefix. One block for each layer and path position.
template <typename T>
struct CommitLayer {
  LayerStore<T> store;
  int u_columns, b_columns, heads;  // 0: not an SSD layer
  int channels, taps;
  int kv_columns;  // 0: not attention
};

struct CommitPath {
  int32_t length;
  int32_t position;  // of the first node
  int32_t kv_capacity;
  uint8_t node[kMaxRows];
};

template <typename Element>
__device__ inline void CopyRow(Element* rows, int64_t columns, int from, int to) {
  for (int64_t i = threadIdx.x; i < columns; i += blockDim.x) {
    rows[to * columns + i] = rows[from * columns + i];
  }
}

template <typename T>
__global__ void CommitRowsKernel(const CommitLayer<T>* layers, CommitPath path) {
  const CommitLayer<T>& layer = layers[blockIdx.y];
  const int i = blockIdx.x;
  const int position = path.position + i, node = path.node[i];
  if (layer.heads > 0) {
    CopyRow(layer.store.u, layer.u_columns, 64 + node, position % 64);
    CopyRow(layer.store.b, layer.b_columns, 64 + node, position % 64);
    CopyRow(layer.store.l, layer.heads, 64 + node, position % 64);
    if (i >= path.length - layer.taps) {
      CopyRow(layer.store.conv, layer.channels, layer.taps + node, position % layer.taps);
    }
  }
  if (layer.kv_columns > 0) {
    CopyRow(layer.store.k, layer.kv_columns, path.kv_capacity + node, position);
    CopyRow(layer.store.v, layer.kv_columns, path.kv_capacity + node, position);
  }
}

struct FoldShape {
  int heads, head_dim, groups, d_state, padded_d_state;
};

// Folds the segment of 32 positions that begins at `segment` into the next checkpoint:
// S <- exp(l_last) S + sum over k of exp(l_last - l_k) u_k B_k^T, k in order. A block for each head
// (x) of each SSD layer (y).
template <typename T>
__global__ void FoldKernel(const CommitLayer<T>* layers, const FoldShape* shapes, int segment) {
  const CommitLayer<T>& layer = layers[blockIdx.y];
  const FoldShape shape = shapes[blockIdx.y];
  const int head = blockIdx.x;
  if (head >= shape.heads) return;
  extern __shared__ float fold_shared[];
  const int padded = PadTo16(shape.head_dim);
  const int ds = shape.padded_d_state;
  float* u = fold_shared;      // [32][padded head_dim], times the weight of its position
  float* b = u + 32 * padded;  // [32][ds]
  const int first = segment % 64;
  const LayerStore<T>& store = layer.store;
  const int group = head / (shape.heads / shape.groups);
  const auto decay = [&](int k) {
    return store.l[static_cast<int64_t>(first + k) * shape.heads + head];
  };
  const float last = decay(31);
  for (int i = threadIdx.x; i < 32 * padded; i += blockDim.x) {
    const int k = i / padded, p = i % padded;
    float value = 0.0f;
    if (p < shape.head_dim) {
      value = store.u[static_cast<int64_t>(first + k) * layer.u_columns + head * shape.head_dim + p];
    }
    u[i] = expf(last - decay(k)) * value;
  }
  for (int i = threadIdx.x; i < 32 * ds; i += blockDim.x) {
    const int k = i / ds, n = i % ds;
    b[i] = ToFloat(store.b[(static_cast<int64_t>(first + k) * shape.groups + group) * ds + n]);
  }
  __syncthreads();
  const float* from = store.checkpoints[segment / 32 % 2] + static_cast<int64_t>(head) * padded * ds;
  float* to = store.checkpoints[(segment / 32 + 1) % 2] + static_cast<int64_t>(head) * padded * ds;
  const float state_decay = expf(last);
  for (int quad = threadIdx.x; quad < padded * ds / 4; quad += blockDim.x) {
    const int block = quad / 64, half = quad / 32 % 2, lane = quad % 32;
    const int p = block / (ds / 16) * 16 + lane / 4;
    const int n = block % (ds / 16) * 16 + half * 8 + lane % 4 * 2;
    float4 s = reinterpret_cast<const float4*>(from)[quad];
    s = make_float4(state_decay * s.x, state_decay * s.y, state_decay * s.z, state_decay * s.w);
    for (int k = 0; k < 32; ++k) {
      const float u0 = u[k * padded + p], u1 = u[k * padded + p + 8];
      const float b0 = b[k * ds + n], b1 = b[k * ds + n + 1];
      s.x = fmaf(u0, b0, s.x);
      s.y = fmaf(u0, b1, s.y);
      s.z = fmaf(u1, b0, s.z);
      s.w = fmaf(u1, b1, s.w);
    }
    reinterpret_cast<float4*>(to)[quad] = s;
  }
}

}  // namespace canopy::cuda

#endif  // __CUDACC__
#endif  // CANOPY_VERIFY_TREE_SCAN_CUDA_CUH_
