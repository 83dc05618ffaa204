// The tree scan of Mamba-2 on the device, two operators from in_proj's sums to out_proj's input.
// Formulas and exactness as in verify/tree_scan.h.
//
// 1. Inputs, a block a few columns for all nodes: convolution along ancestors and activation (x, B,
//    C), dt, log decays.
// 2. Heads, a block a slice of 64 dimensions of a head: scores C . B, the state term S C, the sum
//    over the path, D skip, gate and the gated norm's weights.
//
// Products whose sum does not run over positions (C . B over the state, S C) are tensor core
// products of operands that hold every f32 bit; the sum over a path is one chain of fused
// multiply-adds in path order. The checkpoint is read once and nothing of it is written.
//
// Both products run over the state in blocks of 32, of which a lane l holds the eight from
// 8 (l % 4) on, so that operands are vectors in memory. Checkpoints S are stored as first operands:
// blocks [p / 16][n / 32] of 512 f32, in which S[p, n] is element n % 4 of vector
// (n % 8 / 4 * 2 + p % 16 / 8) * 32 + lane, with lane = p % 8 * 4 + n % 32 / 8.

#ifndef CANOPY_VERIFY_TREE_SCAN_CUDA_CUH_
#define CANOPY_VERIFY_TREE_SCAN_CUDA_CUH_

#include "core/cuda/pass.h"
#include "verify/row_products_cuda.cuh"

namespace canopy::cuda {

struct ScanOp {
  int heads = 0;
  int head_dim = 0;
  int padded_head = 0;  // to a multiple of 4
  int groups = 0;
  int d_state = 0;
  int padded_d_state = 0;  // to a multiple of 32
  int slices = 0;          // of kSliceDims dimensions, of a head
  int taps = 0;            // kernel - 1
  int columns = 0;         // channels that a block of the first operator takes at a time
  Partials partials;       // z | x | B | C | dt
  RowNorm norm;            // of in_proj's input
  const float* in_bias = nullptr;
  const float* conv_weight = nullptr;  // [taps + 1][conv_stride]
  int conv_stride = 0;
  const float* conv_bias = nullptr;  // [channels]
  const float* a = nullptr;          // [heads]
  const float* d = nullptr;
  const float* dt_bias = nullptr;
  float dt_min = 0.0f;
  float dt_max = 0.0f;
  const float* norm_weight = nullptr;  // [heads * head_dim]
  int norm_groups = 1;
  int group_columns = 0;  // of a norm group in act: padded to k-steps
  // From the first operator to the second.
  void* x = nullptr;         // T [kMaxRows][heads * padded_head]
  void* c = nullptr;         // T [kMaxRows][groups * padded_d_state]
  float* dt = nullptr;       // [kMaxRows][heads]
  float* factors = nullptr;  // [kMaxRows], of in_proj's norm
  void* act = nullptr;       // out_proj's input, before the norm's factor
  // [kMaxRows][heads * slices * kSliceDims / kSquareDims]
  float* squares = nullptr;
};

inline constexpr int kSliceDims = 64;
inline constexpr int kSquareDims = 32;
inline constexpr int kMostScanColumns = 120;
// Parts of the state whose terms are made by different warps.
inline constexpr int kStateParts = kConsumerWarps / (kSliceDims / 16);
// Floats between rows of weights and of state terms: vectors, and rows in different banks.
inline constexpr int kWeightStride = kRing + 4;
inline constexpr int kTermStride = kSliceDims + 4;

// Shared memory of the second operator, in bytes, for buckets of `rows` rows. pending_u takes the
// place of c once that is used up.
template <typename T>
struct ScanLayout {
  int c, pending_u, ring_u, weights, terms, decay, end;

  CANOPY_HOST_DEVICE ScanLayout(int rows, int padded_d_state) {
    c = 0;
    pending_u = 0;
    const int c_bytes = rows * RowStride<T>(padded_d_state) * static_cast<int>(sizeof(T));
    const int u_bytes = kMaxRows * kSliceDims * 4;
    ring_u = c_bytes > u_bytes ? c_bytes : u_bytes;
    weights = ring_u + kRing * kSliceDims * 4;
    terms = weights + rows * kWeightStride * 4;
    decay = terms + kStateParts * (rows < 32 ? rows : 32) * kTermStride * 4;
    end = decay + (kRing + kMaxRows) * 4;
  }
};

}  // namespace canopy::cuda

#ifdef __CUDACC__

#include "core/ops/rows_cuda.cuh"

namespace canopy::cuda {

// The first operator. The last warp takes dt and the decays, a head at a time, the others a few
// channels of the convolution for all nodes.
template <typename T, int kRowTiles>
__device__ __forceinline__ void ScanInputs(const ScanOp& op, const PassNodes& nodes,
                                           const LayerStore<T>& store, char* work) {
  constexpr int kThreads = kConsumers - 32;              // of the convolution
  constexpr int kBatch = kRowTiles < 4 ? kRowTiles : 3;  // rows a thread loads at a time
  float* factor = reinterpret_cast<float*>(work);        // [kMaxRows]
  float* dts = factor + kMaxRows;                        // [kMaxRows], of a head
  float* raw = dts + kMaxRows;                           // [rows][op.columns]
  const int inner = op.heads * op.head_dim;
  const int channels = inner + 2 * op.groups * op.d_state;
  const int rows = nodes.rows;
  const int new_rows = kRing + nodes.first_pending;  // stored rows before those of this pass
  const int tid = threadIdx.x;
  const bool is_conv = tid < kThreads;
  // A thread has one channel and every `step`-th row.
  const int step = kThreads / op.columns;
  const int first_row = tid / op.columns, column = tid - first_row * op.columns;
  int begin = blockIdx.x * op.columns;  // channels
  int head = blockIdx.x;
#pragma unroll 1
  for (bool first = true; begin < channels || head < op.heads || first; first = false) {
    const int channel = begin + column;
    const bool active = is_conv && first_row < step && channel < channels;
    // What comes from memory is asked for before the norm's factors are made.
    float weights[kMaxTaps + 1], first_inputs[kMaxTaps];
    const float conv_bias = LoadWeight(op.conv_bias + channel, active);
    const float in_bias = LoadWeight(op.in_bias + inner + channel, active && op.in_bias != nullptr);
    const float* conv = store.conv + channel;
#pragma unroll
    for (int m = 0; m <= kMaxTaps; ++m) {  // m positions before the node
      weights[m] = LoadWeight(op.conv_weight + (op.taps - m) * op.conv_stride + channel,
                              active && m <= op.taps);
    }
#pragma unroll
    for (int m = 0; m < kMaxTaps; ++m) {
      const int tap = first_row < rows ? nodes.taps[first_row][m] : -1;
      first_inputs[m] = LoadNew(conv + (-2 - tap) * channels, active && tap <= -2);
    }
    const int splits = active ? Splits(op.partials, inner + channel) : 0;
#pragma unroll 1
    for (int base = 0; base < rows; base += kBatch * step) {
      Sum1<> sums[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int row = base + first_row + k * step;
        sums[k].Load(op.partials, row, inner + channel, active && row < rows);
      }
      if (base == 0) {
        if (first) {
          RowFactors(op.norm, rows, factor);
          SyncThreads<kConsumers>();
        }
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int row = base + first_row + k * step;
        if (active && row < rows) {
          const float value =
              fmaf(factor[row], sums[k].Finish(op.partials, row, inner + channel, splits), in_bias);
          raw[row * op.columns + column] = value;
          store.conv[(op.taps + nodes.first_pending + row) * channels + channel] = value;
        }
      }
    }
    if (!is_conv && head < op.heads) {
      const int lane = tid % 32, dt_column = inner + channels + head;
      const float a = op.a[head];
      const float dt_bias = op.dt_bias[head];
      const float bias = LoadWeight(op.in_bias + dt_column, op.in_bias != nullptr);
      const float last_decay =
          LoadNew(store.l + (nodes.prefix - 1) % kRing * op.heads + head, nodes.prefix > 0);
#pragma unroll 1
      for (int row = lane; row < rows; row += 32) {
        const float v = fmaf(factor[row], Sum(op.partials, row, dt_column), bias) + dt_bias;
        const float soft = fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v)));
        const float dt = fminf(fmaxf(soft, op.dt_min), op.dt_max);
        dts[row] = dt;
        op.dt[row * op.heads + head] = dt;
      }
      __syncwarp();
      // l along the path, from the start of the node's aligned segment.
#pragma unroll 1
      for (int row = lane; row < rows; row += 32) {
        const int t = nodes.position[row];
        const int segment = t / kSegment * kSegment;
        float l = 0.0f;
        int next = segment;  // position
        if (segment < nodes.prefix) {
          l = last_decay;
          next = nodes.prefix;
        }
#pragma unroll 1
        for (int p = next; p <= t; ++p) {
          const int node = nodes.path[row][p - nodes.prefix];
          // Of the earlier pending nodes the stored value is the sum so far.
          if (node < nodes.first_pending) {
            l = store.l[(kRing + node) * op.heads + head];
          } else {
            l = fmaf(dts[node - nodes.first_pending], a, p % kSegment == 0 ? 0.0f : l);
          }
        }
        store.l[(new_rows + row) * op.heads + head] = l;
      }
      __syncwarp();
      head += gridDim.x;
    }
    if (first && blockIdx.x == 0 && tid < rows) op.factors[tid] = factor[tid];
    SyncThreads<kConsumers>();
    if (active) {
      const int states = op.groups * op.d_state;
      // Where the result goes in a row, and how long such a row is.
      T* to = static_cast<T*>(op.x);
      int width = op.heads * op.padded_head, part = op.head_dim, padded = op.padded_head;
      int at = channel;
      if (channel >= inner) {
        at -= inner;
        width = op.groups * op.padded_d_state, part = op.d_state, padded = op.padded_d_state;
        to = store.b + new_rows * width;
        if (at >= states) {
          at -= states;
          to = static_cast<T*>(op.c);
        }
      }
      to += padded == part ? at : at / part * padded + at % part;
#pragma unroll 1
      for (int row = first_row; row < rows; row += step) {
        float sum = conv_bias;
#pragma unroll
        for (int m = kMaxTaps; m > 0; --m) {
          const int tap = nodes.taps[row][m - 1];
          float input = first_inputs[m - 1];
          if (row != first_row && tap < 0) input = LoadNew(conv + (-2 - tap) * channels, tap <= -2);
          if (tap >= 0) input = raw[tap * op.columns + column];
          if (m <= op.taps) sum = fmaf(weights[m], input, sum);
        }
        sum = fmaf(weights[0], raw[row * op.columns + column], sum);
        to[row * width] = FromFloat<T>(Silu(sum));
      }
    }
    begin += gridDim.x * op.columns;
    if (is_conv) head += gridDim.x;  // so that all threads leave together
    if (begin < channels || head < op.heads) SyncThreads<kConsumers>();  // raw is free
  }
}

template <int kCount>
struct Vector {
  float v[kCount];

  __device__ static Vector Load(const float* from) {
    Vector r;
    if constexpr (kCount == 4) {
      const float4 q = *reinterpret_cast<const float4*>(from);
      r.v[0] = q.x, r.v[1] = q.y, r.v[2] = q.z, r.v[3] = q.w;
    } else if constexpr (kCount == 2) {
      const float2 q = *reinterpret_cast<const float2*>(from);
      r.v[0] = q.x, r.v[1] = q.y;
    } else {
      r.v[0] = *from;
    }
    return r;
  }
  // Of what another block wrote in this pass.
  __device__ static Vector LoadNew(const float* from) {
    Vector r;
    if constexpr (kCount == 4) {
      const float4 q = __ldcg(reinterpret_cast<const float4*>(from));
      r.v[0] = q.x, r.v[1] = q.y, r.v[2] = q.z, r.v[3] = q.w;
    } else if constexpr (kCount == 2) {
      const float2 q = __ldcg(reinterpret_cast<const float2*>(from));
      r.v[0] = q.x, r.v[1] = q.y;
    } else {
      r.v[0] = __ldcg(from);
    }
    return r;
  }
  __device__ static Vector LoadNew(const __nv_bfloat16* from) {
    Vector r;
    if constexpr (kCount == 1) {
      const unsigned short bits = __ldcg(reinterpret_cast<const unsigned short*>(from));
      r.v[0] = __uint_as_float(static_cast<uint32_t>(bits) << 16);
    } else {
      uint32_t pairs[kCount / 2];
      if constexpr (kCount == 4) {
        const uint2 q = __ldcg(reinterpret_cast<const uint2*>(from));
        pairs[0] = q.x, pairs[1] = q.y;
      } else {
        pairs[0] = __ldcg(reinterpret_cast<const uint32_t*>(from));
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        r.v[i] = __uint_as_float(i % 2 == 0 ? pairs[i / 2] << 16 : pairs[i / 2] & 0xffff0000u);
      }
    }
    return r;
  }
  __device__ void Store(float* to) const {
    if constexpr (kCount == 4) {
      *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
    } else if constexpr (kCount == 2) {
      *reinterpret_cast<float2*>(to) = make_float2(v[0], v[1]);
    } else {
      *to = v[0];
    }
  }
};

// The second operator.
template <typename T, int kRowTiles>
__device__ __forceinline__ void ScanHeads(const ScanOp& op, const PassNodes& nodes,
                                          const LayerStore<T>& store, char* work) {
  constexpr int kRows = 8 * kRowTiles;
  constexpr int kVec = kRows < 32 ? kRows / 8 : 4;    // dimensions of a thread
  constexpr int kRowThreads = kSliceDims / kVec;      // threads of a row
  constexpr int kOwn = kRows <= 32 ? 1 : kRows / 32;  // rows of a thread
  constexpr int kTermTiles = kRowTiles < 4 ? kRowTiles : 4;
  constexpr int kTermRows = 8 * kTermTiles;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, quad = lane % 4, octet = lane / 4;
  const ScanLayout<T> layout(kRows, op.padded_d_state);
  T* c = reinterpret_cast<T*>(work + layout.c);
  float* pending_u = reinterpret_cast<float*>(work + layout.pending_u);
  float* ring_u = reinterpret_cast<float*>(work + layout.ring_u);
  float* weights = reinterpret_cast<float*>(work + layout.weights);
  float* terms = reinterpret_cast<float*>(work + layout.terms);
  float* decay = reinterpret_cast<float*>(work + layout.decay);
  const int ds = op.padded_d_state, c_stride = RowStride<T>(ds);
  const int rows = nodes.rows, prefix = nodes.prefix;
  const int new_rows = kRing + nodes.first_pending;  // stored rows before those of this pass
  const int end_rows = new_rows + rows;
  const int width = op.heads * op.padded_head;
  const int b_width = op.groups * ds;
  const auto stored_row = [&](int row, int position) {
    return position < prefix ? position % kRing : kRing + nodes.path[row][position - prefix];
  };
#pragma unroll 1
  for (int task = blockIdx.x; task < op.heads * op.slices; task += gridDim.x) {
    const int head = op.slices == 1 ? task : task / op.slices;
    const int first_dim = (task - head * op.slices) * kSliceDims;
    const int group = op.groups == 1 ? 0 : head / (op.heads / op.groups);
    const int dims = min(kSliceDims, op.head_dim - first_dim);
    const int first_column = head * op.padded_head + first_dim;

    // Everything comes at once: C and u of the prefix into shared memory, B and S as operands, the
    // thread's own dimensions into registers.
    {
      const T* from = static_cast<const T*>(op.c) + group * ds;
      constexpr int kPer16 = 16 / sizeof(T);
      const int vectors = ds / kPer16;
#pragma unroll 1
      for (int i = tid; i < rows * vectors; i += kConsumers) {
        const int r = i / vectors, n = (i - r * vectors) * kPer16;
        CopyAsync16(c + r * c_stride + n, from + r * b_width + n);
      }
      const float* u_from = store.u + first_column;
#pragma unroll 1
      for (int i = tid; i < kRing * (kSliceDims / 4); i += kConsumers) {
        const int r = i / (kSliceDims / 4), p = i % (kSliceDims / 4) * 4;
        if (p < dims) CopyAsync16(ring_u + r * kSliceDims + p, u_from + r * width + p);
      }
    }
    // Eight stored rows a warp.
    const int stored = warp * 8 + octet;
    const T* b_from = store.b + (stored * b_width + group * ds + quad * 8);
    RowVector<T> b[kBlocksAhead];
#pragma unroll
    for (int i = 0; i < kBlocksAhead; ++i) {
      b[i].LoadGlobal(b_from + i * 32, stored < end_rows && i * 32 < ds);
    }
    // 16 dimensions a warp, and a part of the states.
    const int p_tile = warp % (kSliceDims / 16), part = warp / (kSliceDims / 16);
    const bool has_tile = p_tile * 16 < dims;
    const int tile_floats = (head * PadTo16(op.head_dim) + first_dim + p_tile * 16) * ds + lane * 4;
    float4 s[2][2];
    const auto load_state = [&](int position, int block) {
      const float* at = store.checkpoints[position / kSegment % 2] + (tile_floats + block * 512);
      const bool there = position > 0 && has_tile && block * 32 < ds;
#pragma unroll
      for (int i = 0; i < 4; ++i) s[i / 2][i % 2] = LoadWeight4(at + i * 128, there);
    };
    load_state(nodes.first_checkpoint, part);
    const float decay_here =
        LoadNew(store.l + (tid * op.heads + head), tid < end_rows);  // of stored row tid
    // A thread's rows and its dimensions of them.
    const int dim = tid % kRowThreads * kVec;
    int row_of[kOwn];
    float dt[kOwn];
    Vector<kVec> x[kOwn], gate[kOwn];
    const int z_column = head * op.head_dim + first_dim + dim;
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      const int row = tid / kRowThreads + k * 32;
      row_of[k] = row < rows && dim < dims ? row : -1;
      if (row_of[k] < 0) continue;
      dt[k] = LoadNew(op.dt + row * op.heads + head);
      x[k] = Vector<kVec>::LoadNew(static_cast<const T*>(op.x) + row * width + first_column + dim);
      const float factor = LoadNew(op.factors + row);
      Sum1<> z[kVec];
#pragma unroll
      for (int v = 0; v < kVec; ++v) z[v].Load(op.partials, row, z_column + v, dim + v < dims);
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        const bool there = dim + v < dims;
        const float bias = LoadWeight(op.in_bias + z_column + v, there && op.in_bias != nullptr);
        const int splits = there ? Splits(op.partials, z_column + v) : 0;
        gate[k].v[v] =
            Silu(fmaf(factor, z[v].Finish(op.partials, row, z_column + v, splits), bias));
      }
    }
    if (tid < end_rows) decay[tid] = decay_here;
    CopiesWait();
    SyncThreads<kConsumers>();

    // Scores C_i . B_j into weights[i][position of j - checkpoint of i].
    constexpr int kRowBlocks = (kRows + 15) / 16;
    if (warp * 8 < end_rows) {
      float scores[kRowBlocks][4] = {};
#pragma unroll 1
      for (int first = 0; first < ds; first += 32 * kBlocksAhead) {
#pragma unroll
        for (int i = 0; i < kBlocksAhead; ++i) {
          const int n = first + i * 32;
          if (n >= ds) break;
          if (first > 0) b[i].LoadGlobal(b_from + n, stored < end_rows);
          FragmentB<T> second[2];
          SetSecond(second, b[i]);
#pragma unroll
          for (int m = 0; m < kRowBlocks; ++m) {
            AddRowProducts<kRows == 8>(scores[m], second,
                                       c + (m * 16 + octet) * c_stride + n + quad * 8,
                                       c + (m * 16 + 8 + octet) * c_stride + n + quad * 8);
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int j = warp * 8 + quad * 2 + half;
        int position = -1;
        if (j < kRing) {
          // The latest position of the prefix that has this place in the ring.
          position = (prefix - 1) / kRing * kRing + j;
          if (position >= prefix) position -= kRing;
          if (prefix == 0) position = -1;
        } else if (j < end_rows) {
          position = prefix + nodes.depth[j - kRing];
        }
        if (position < 0) continue;
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
          for (int high = 0; high < (kRows > 8 ? 2 : 1); ++high) {
            const int row = m * 16 + octet + high * 8;
            if (row >= rows || position < nodes.checkpoint[row]) continue;
            if (j >= kRing && !(nodes.path_mask[row] >> (j - kRing) & 1)) continue;
            weights[row * kWeightStride + position - nodes.checkpoint[row]] =
                scores[m][high * 2 + half];
          }
        }
      }
    }

    // The state term S C_i with the checkpoint that node i reads, 32 rows at a time; each part of
    // the state apart, added in order. A thread's share stays with it.
    float y[kOwn][kVec];
    bool held = true;  // s is of the first checkpoint and the part's first block
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
#pragma unroll 1
      for (int position = nodes.first_checkpoint; position <= nodes.last_checkpoint;
           position += kSegment) {
        float term[kTermTiles][4] = {};
#pragma unroll 1
        for (int block = part; block * 32 < ds; block += kStateParts) {
          if (!held) load_state(position, block);
          held = position == nodes.first_checkpoint && nodes.last_checkpoint == position &&
                 ds <= 32 * kStateParts;
          RowVector<T> from[kTermTiles];
#pragma unroll
          for (int i = 0; i < kTermTiles; ++i) {
            from[i].Load(c + (k * 32 + i * 8 + octet) * c_stride + block * 32 + quad * 8);
          }
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            FragmentA<float> fa;
            SetPair(fa, 0, s[step][0].x, s[step][0].y);
            SetPair(fa, 1, s[step][1].x, s[step][1].y);
            SetPair(fa, 2, s[step][0].z, s[step][0].w);
            SetPair(fa, 3, s[step][1].z, s[step][1].w);
#pragma unroll
            for (int i = 0; i < kTermTiles; ++i) {
              FragmentB<T> fb;
              from[i].Set(fb, 0, step, 0);
              from[i].Set(fb, 1, step, 1);
              Multiply(term[i], fa, fb);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kTermTiles; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int at = i * 8 + quad * 2 + e % 2, row = k * 32 + at;
            if (row < rows && nodes.checkpoint[row] == position) {
              terms[(part * kTermRows + at) * kTermStride + p_tile * 16 + octet + e / 2 * 8] =
                  term[i][e];
            }
          }
        }
      }
      SyncThreads<kConsumers>();
      if (k == 0) {
        // weights = exp(difference of log decays) * score. Across the segment boundary the first
        // segment's rest and the node's own part are added.
#pragma unroll 1
        for (int i = tid; i < rows * kRing; i += kConsumers) {
          const int row = i / kRing, j = i % kRing;
          const int t = nodes.position[row], start = nodes.checkpoint[row];
          if (start + j > t) continue;
          const int segment = t / kSegment * kSegment;
          const float node_decay = decay[new_rows + row];
          const float lj = decay[stored_row(row, start + j)];
          float exponent = node_decay - lj;
          if (start + j < segment) {
            exponent = (decay[stored_row(row, segment - 1)] - lj) + node_decay;
          }
          weights[row * kWeightStride + j] *= expf(exponent);
        }
      }
      const int row = row_of[k];
      if (row >= 0) {
        const float* from = terms + tid / kRowThreads * kTermStride + dim;
        Vector<kVec> sum = Vector<kVec>::Load(from);
#pragma unroll
        for (int i = 1; i < kStateParts; ++i) {
          const Vector<kVec> next = Vector<kVec>::Load(from + i * kTermRows * kTermStride);
#pragma unroll
          for (int v = 0; v < kVec; ++v) sum.v[v] += next.v[v];
        }
        const int segment = nodes.position[row] / kSegment * kSegment;
        float exponent = decay[new_rows + row];
        if (segment > nodes.checkpoint[row]) exponent += decay[stored_row(row, segment - 1)];
        const float state_decay = expf(exponent);
#pragma unroll
        for (int v = 0; v < kVec; ++v) y[k][v] = sum.v[v] * state_decay;
      }
      if (k + 1 < kOwn) SyncThreads<kConsumers>();
    }
    // C is used up: u of the new rows, also into the store, and of earlier pending ones.
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      if (row_of[k] < 0) continue;
      Vector<kVec> u;
#pragma unroll
      for (int v = 0; v < kVec; ++v) u.v[v] = dt[k] * (dim + v < dims ? x[k].v[v] : 0.0f);
      u.Store(pending_u + (nodes.first_pending + row_of[k]) * kSliceDims + dim);
      u.Store(store.u + (new_rows + row_of[k]) * width + first_column + dim);
    }
#pragma unroll 1
    for (int i = tid; i < nodes.first_pending * kSliceDims; i += kConsumers) {
      const int p = i % kSliceDims;
      if (p < dims) {
        pending_u[i] = store.u[(kRing + i / kSliceDims) * width + first_column + p];
      }
    }
    SyncThreads<kConsumers>();

    // The path sum: first the prefix's positions, which nodes share, four at a time.
    int starts[kOwn];
    const float* row_weights[kOwn];  // by position
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      const int row = max(row_of[k], 0);
      starts[k] = row_of[k] < 0 ? INT32_MAX : nodes.checkpoint[row];
      row_weights[k] = weights + row * kWeightStride - nodes.checkpoint[row];
    }
    const int whole = prefix / 4 * 4;
#pragma unroll 2
    for (int position = nodes.first_checkpoint; position < whole; position += 4) {
      const float* from = ring_u + position % kRing * kSliceDims + dim;
      Vector<kVec> u[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) u[i] = Vector<kVec>::Load(from + i * kSliceDims);
#pragma unroll
      for (int k = 0; k < kOwn; ++k) {
        if (position < starts[k]) continue;
        const Vector<4> w = Vector<4>::Load(row_weights[k] + position);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int v = 0; v < kVec; ++v) y[k][v] = fmaf(w.v[i], u[i].v[v], y[k][v]);
        }
      }
    }
    // Then each node's own, skip, gate and the norm's weights.
    const float skip = op.d[head];
    const int heads_per_norm = op.norm_groups == 1 ? op.heads : op.heads / op.norm_groups;
    const int norm_group = op.norm_groups == 1 ? 0 : head / heads_per_norm;
    const int place = norm_group * op.group_columns +
                      (head - norm_group * heads_per_norm) * op.head_dim + first_dim + dim;
    const int squares_of_row = op.heads * op.slices * (kSliceDims / kSquareDims);
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      const int row = row_of[k];
      float squares = 0.0f;
      if (row >= 0) {
        const int t = nodes.position[row];
#pragma unroll 2
        for (int position = max(whole, starts[k]); position <= t; ++position) {
          const float* from = position < prefix
                                  ? ring_u + position % kRing * kSliceDims
                                  : pending_u + nodes.path[row][position - prefix] * kSliceDims;
          const float w = row_weights[k][position];
          const Vector<kVec> u = Vector<kVec>::Load(from + dim);
#pragma unroll
          for (int v = 0; v < kVec; ++v) y[k][v] = fmaf(w, u.v[v], y[k][v]);
        }
        float square[4] = {};
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          if (dim + v >= dims) continue;
          const float value = __fmul_rn(fmaf(skip, x[k].v[v], y[k][v]), gate[k].v[v]);
          square[v] = __fmul_rn(value, value);
          static_cast<T*>(op.act)[ActIndex<T>(kRows, row, place + v)] =
              FromFloat<T>(__fmul_rn(value, op.norm_weight[z_column + v]));
        }
        // One tree over 32 dimensions, however they are spread over threads.
        squares = __fadd_rn(__fadd_rn(square[0], square[1]), __fadd_rn(square[2], square[3]));
      }
#pragma unroll
      for (int other = 1; other < kSquareDims / kVec; other *= 2) {
        squares = __fadd_rn(squares, __shfl_xor_sync(0xffffffffu, squares, other));
      }
      if (row >= 0 && dim % kSquareDims == 0) {
        op.squares[row * squares_of_row + task * (kSliceDims / kSquareDims) + dim / kSquareDims] =
            squares;
      }
    }
    if (task + gridDim.x < op.heads * op.slices) SyncThreads<kConsumers>();  // memory is free
  }
}

// One warp: brings what a block's part of a scan reads of earlier passes and of weights into the
// cache, while the product before it runs.
template <typename T>
__device__ inline void PrefetchScan(const ScanOp& op, const PassNodes& nodes,
                                    const LayerStore<T>& store) {
  const int lane = threadIdx.x % 32;
  const int inner = op.heads * op.head_dim;
  const int channels = inner + 2 * op.groups * op.d_state;
  const int ds = op.padded_d_state, width = op.heads * op.padded_head;
  // `count` rows of `bytes` bytes.
  const auto prefetch = [&](const void* base, int count, int64_t stride, int bytes) {
    const int lines = (bytes + 127) / 128 + 1;  // rows need not begin at a line
#pragma unroll 1
    for (int i = lane; i < count * lines; i += 32) {
      const int row = i / lines, offset = min((i - row * lines) * 128, bytes - 1);
      Prefetch(static_cast<const char*>(base) + row * stride + offset);
    }
  };
#pragma unroll 1
  for (int task = blockIdx.x; task < op.heads * op.slices; task += gridDim.x) {
    const int head = task / op.slices, first_dim = (task - head * op.slices) * kSliceDims;
    const int dims = min(kSliceDims, op.head_dim - first_dim);
    const int tile_bytes = PadTo16(dims) * ds * 4;
    const int64_t tile = (static_cast<int64_t>(head) * PadTo16(op.head_dim) + first_dim) * ds;
#pragma unroll 1
    for (int position = nodes.first_checkpoint; position <= nodes.last_checkpoint;
         position += kSegment) {
      if (position > 0) {
        prefetch(store.checkpoints[position / kSegment % 2] + tile, 1, 0, tile_bytes);
      }
    }
    prefetch(store.u + head * op.padded_head + first_dim, kRing, int64_t{width} * 4, dims * 4);
    prefetch(store.l + head, kRing + nodes.first_pending, int64_t{op.heads} * 4, 4);
    prefetch(op.norm_weight + head * op.head_dim + first_dim, 1, 0, dims * 4);
    // Rows of B, that all heads of a group read, are shared among the tasks.
    const int tasks = op.heads * op.slices;
    for (int r = task; r < kRing; r += tasks) {
      prefetch(store.b + r * op.groups * ds, 1, 0, op.groups * ds * static_cast<int>(sizeof(T)));
    }
  }
#pragma unroll 1
  for (int first = blockIdx.x * op.columns; first < channels; first += gridDim.x * op.columns) {
    const int bytes = min(op.columns, channels - first) * 4;
    prefetch(store.conv + first, op.taps, int64_t{channels} * 4, bytes);
    prefetch(op.conv_weight + first, op.taps + 1, int64_t{op.conv_stride} * 4, bytes);
    prefetch(op.conv_bias + first, 1, 0, bytes);
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
#pragma unroll 1
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
    CopyRow(layer.store.u, layer.u_columns, kRing + node, position % kRing);
    CopyRow(layer.store.b, layer.b_columns, kRing + node, position % kRing);
    CopyRow(layer.store.l, layer.heads, kRing + node, position % kRing);
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
  int heads, head_dim, padded_head, groups, padded_d_state;
};

// Folds the segment of kSegment positions that begins at `segment` into the next checkpoint:
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
  float* u = fold_shared;            // [kSegment][padded head_dim], times its position's weight
  float* b = u + kSegment * padded;  // [kSegment][ds]
  const int first = segment % kRing;
  const LayerStore<T>& store = layer.store;
  const int group = head / (shape.heads / shape.groups);
  const auto decay = [&](int k) {
    return store.l[static_cast<int64_t>(first + k) * shape.heads + head];
  };
  const float last = decay(kSegment - 1);
#pragma unroll 1
  for (int i = threadIdx.x; i < kSegment * padded; i += blockDim.x) {
    const int k = i / padded, p = i % padded;
    float value = 0.0f;
    if (p < shape.head_dim) {
      value =
          store.u[static_cast<int64_t>(first + k) * layer.u_columns + head * shape.padded_head + p];
    }
    u[i] = expf(last - decay(k)) * value;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < kSegment * ds; i += blockDim.x) {
    const int k = i / ds, n = i % ds;
    b[i] = ToFloat(store.b[(static_cast<int64_t>(first + k) * shape.groups + group) * ds + n]);
  }
  __syncthreads();
  const float* from =
      store.checkpoints[segment / kSegment % 2] + static_cast<int64_t>(head) * padded * ds;
  float* to =
      store.checkpoints[(segment / kSegment + 1) % 2] + static_cast<int64_t>(head) * padded * ds;
  const float state_decay = expf(last);
#pragma unroll 1
  for (int quad = threadIdx.x; quad < padded * ds / 4; quad += blockDim.x) {
    const int block = quad / 128, vector = quad / 32 % 4, lane = quad % 32;
    const int p = block / (ds / 32) * 16 + vector % 2 * 8 + lane / 4;
    const int n = block % (ds / 32) * 32 + lane % 4 * 8 + vector / 2 * 4;
    float4 s = reinterpret_cast<const float4*>(from)[quad];
    s = make_float4(state_decay * s.x, state_decay * s.y, state_decay * s.z, state_decay * s.w);
#pragma unroll 4
    for (int k = 0; k < kSegment; ++k) {
      const float uk = u[k * padded + p];
      const float4 bk = *reinterpret_cast<const float4*>(b + k * ds + n);
      s.x = fmaf(uk, bk.x, s.x);
      s.y = fmaf(uk, bk.y, s.y);
      s.z = fmaf(uk, bk.z, s.z);
      s.w = fmaf(uk, bk.w, s.w);
    }
    reinterpret_cast<float4*>(to)[quad] = s;
  }
}

}  // namespace canopy::cuda

#endif  // __CUDACC__
#endif  // CANOPY_VERIFY_TREE_SCAN_CUDA_CUH_
