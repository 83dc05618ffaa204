// The tree scan of Mamba-2 on the device, one operator from in_proj's sums to out_proj's input.
// Formulas and exactness as in verify/tree_scan.h.
//
// B, C and dt are what in_proj makes first. Some take a few of their columns for all nodes:
// convolution along ancestors, activation, and the results are sent to all blocks. Of few rows
// these are warps of every block that are free while in_proj goes on; else the operator begins with
// it, in blocks that have no slice. Blocks take a slice of 64 dimensions of a head: the same for x,
// the log decays, scores C . B, the state term S C, the sum over the path, D skip, gate and the
// gated norm's weights. Nobody waits for more than the numbers that he reads.
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
#include "core/ops/matmul_cuda.cuh"
#include "verify/row_products_cuda.cuh"

namespace canopy::cuda {

// Whether warps that are free send B, C and dt while in_proj is at work. For more rows two in a
// block are too few.
CANOPY_HOST_DEVICE constexpr bool SendsEarly(int bucket_rows) { return bucket_rows <= 8; }

// Columns of in_proj's sums: B and C [groups][d_state], dt [heads]; from x_column on x and z
// [heads][padded_head]. Channels of the convolution are those of x, B and C.
struct ScanOp {
  int heads = 0;
  int head_dim = 0;
  int padded_head = 0;  // to a multiple of 4
  int groups = 0;
  int d_state = 0;
  int padded_d_state = 0;  // to a multiple of 32
  int slices = 0;          // of kSliceDims dimensions, of a head
  int taps = 0;            // kernel - 1
  int channels = 0;        // padded to a multiple of 4
  int sent_columns = 0;    // of B, C and dt, that a block takes at a time
  int vector_shift = 0;    // 1 << this: 16-byte vectors of a row of C, or more
  int x_column = 0;
  Partials partials;
  const float* in_bias = nullptr;
  const float* conv_weight = nullptr;  // [taps + 1][channels]
  const float* conv_bias = nullptr;    // [channels]
  const float* a = nullptr;            // [heads]
  const float* d = nullptr;
  const float* dt_bias = nullptr;
  float dt_min = 0.0f;
  float dt_max = 0.0f;
  const float* norm_weight = nullptr;  // [heads][padded_head]
  int norm_groups = 1;
  int group_columns = 0;  // of a norm group in act: padded to k-steps
  // B, C and dt as they are sent, see kUnsent: [kMaxRows] rows of sent_bytes bytes, of T [2][groups
  // * padded_d_state] and f32 [heads].
  char* sent = nullptr;
  int sent_bytes = 0;   // a multiple of 16
  void* act = nullptr;  // out_proj's input, before the norm's factor
  // [kMaxRows][heads * slices * kSliceDims / kSquareDims]
  float* squares = nullptr;
};

template <typename T>
CANOPY_HOST_DEVICE constexpr int SentBytes(int groups, int padded_d_state, int heads) {
  return 2 * groups * padded_d_state * static_cast<int>(sizeof(T)) + PadTo(4, heads) * 4;
}

inline constexpr int kMostSentColumns = 64;
inline constexpr int kSliceDims = 64;
inline constexpr int kSquareDims = 32;
// Parts of the state whose terms are made by different warps.
inline constexpr int kStateParts = kConsumerWarps / (kSliceDims / 16);
// Floats between rows of weights and of state terms: vectors, and rows in different banks.
inline constexpr int kWeightStride = kRing + 4;
inline constexpr int kTermStride = kSliceDims + 4;

// What a slice needs of the convolution before its inputs: weights, bias, inputs of the prefix.
// Then the norm's weights, D and A, and zeros.
inline constexpr int kConvRows = (kMaxTaps + 1) + 1 + kMaxTaps;
inline constexpr int kStagedFloats = (kConvRows + 2) * kSliceDims + 4;

// Shared memory of the operator, in bytes, for buckets of `rows` rows. pending_u takes the place of
// c once that is used up, terms that of the convolution's inputs. From `decay` on stands what is
// brought while the product before is still at work; `early` is of the warps that send meanwhile.
template <typename T>
struct ScanLayout {
  int dt, boundary, c, pending_u, weights, terms, raw, decay, conv, ring_u, early, end;

  CANOPY_HOST_DEVICE ScanLayout(int rows, int padded_d_state) {
    dt = 0;
    boundary = dt + kMaxRows * 4;
    weights = boundary + kMaxRows * 4;
    terms = weights + rows * kWeightStride * 4;
    raw = terms;
    const int terms_bytes = kStateParts * (rows < 32 ? rows : 32) * kTermStride * 4;
    const int raw_bytes = rows * kTermStride * 4;
    c = terms + (terms_bytes > raw_bytes ? terms_bytes : raw_bytes);
    pending_u = c;
    const int c_bytes = rows * RowStride<T>(padded_d_state) * static_cast<int>(sizeof(T));
    const int u_bytes = kMaxRows * kSliceDims * 4;
    decay = c + (c_bytes > u_bytes ? c_bytes : u_bytes);
    if (decay < kMatmulWorkBytes) decay = kMatmulWorkBytes;
    conv = decay + (kRing + kMaxRows) * 4;
    ring_u = conv + kStagedFloats * 4;
    early = ring_u + kRing * kSliceDims * 4;
    end = early + (SendsEarly(rows) ? rows * kMostSentColumns * 4 : 0);
  }
};

}  // namespace canopy::cuda

#ifdef __CUDACC__

#include "core/ops/rows_cuda.cuh"

namespace canopy::cuda {

// B, C and dt of all nodes, `op.sent_columns` columns from `begin` on, once they come: into the
// store and to all blocks.
template <typename T, int kBarrier, int kThreads>
__device__ __forceinline__ void SendColumns(const ScanOp& op, const PassNodes& nodes,
                                            const LayerStore<T>& store, int begin,
                                            const float* factors, int thread, float* raw) {
  const int states = op.groups * op.d_state, b_width = op.groups * op.padded_d_state;
  const int width = op.heads * op.padded_head;
  const int rows = nodes.rows, columns = op.sent_columns;
  // A thread has one column and every `step`-th row.
  const int step = kThreads / columns;
  const int first_row = thread / columns, own = thread - first_row * columns;
  const int column = begin + own, channel = width + column;
  const bool active = first_row < step && column < 2 * states + op.heads;
  const bool is_dt = column >= 2 * states, in_conv = active && !is_dt;
  // Everything is asked for at once.
  const int splits = active ? Splits(op.partials, column) : 0;
  Sum1 sum;
  sum.Load(op.partials, first_row, column, active && first_row < rows);
  float weights[kMaxTaps + 1], first_inputs[kMaxTaps];
  const float* bias = is_dt ? op.dt_bias + (column - 2 * states) : op.conv_bias + channel;
  const float own_bias = LoadWeight(bias, active);
  const float in_bias = LoadWeight(op.in_bias + column, active && op.in_bias != nullptr);
  const float* conv = store.conv + channel;
#pragma unroll
  for (int m = 0; m <= kMaxTaps; ++m) {  // m positions before the node
    weights[m] =
        LoadWeight(op.conv_weight + (op.taps - m) * op.channels + channel, in_conv && m <= op.taps);
  }
#pragma unroll
  for (int m = 0; m < kMaxTaps; ++m) {
    const int tap = first_row < rows ? nodes.taps[first_row][m] : -1;
    first_inputs[m] = LoadNew(conv + (-2 - tap) * op.channels, in_conv && tap <= -2);
  }
#pragma unroll 1
  for (int row = first_row; active && row < rows; row += step) {
    if (row != first_row) sum.Load(op.partials, row, column, true);
    while (sum.Unsent(splits)) sum.Load(op.partials, row, column, true);
    const float value =
        fmaf(factors[row], FinishOne(sum, op.partials, row, column, splits), in_bias);
    if (is_dt) {
      const float v = value + own_bias;
      const float soft = fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v)));
      float* to = reinterpret_cast<float*>(op.sent + row * op.sent_bytes +
                                           2 * b_width * static_cast<int>(sizeof(T)));
      Send(to + (column - 2 * states), fminf(fmaxf(soft, op.dt_min), op.dt_max));
    } else {
      raw[row * columns + own] = value;
      store.conv[(op.taps + nodes.first_pending + row) * op.channels + channel] = value;
    }
  }
  __syncwarp();
  SyncWarps<kBarrier, kThreads>();
  if (!in_conv) return;
  const bool is_c = column >= states;
  const int state = is_c ? column - states : column;
  const int group = op.groups == 1 ? 0 : state / op.d_state, n = state - group * op.d_state;
  const int at = group * op.padded_d_state + n;
  // The last column sends the zeros behind it.
  const int count = n + 1 < op.d_state ? 1 : op.padded_d_state - n;
#pragma unroll 1
  for (int row = first_row; row < rows; row += step) {
    float sum = own_bias;
#pragma unroll
    for (int m = kMaxTaps; m > 0; --m) {
      const int tap = nodes.taps[row][m - 1];
      float input = first_inputs[m - 1];
      if (row != first_row) input = LoadNew(conv + (-2 - tap) * op.channels, tap <= -2);
      if (tap >= 0) input = raw[tap * columns + own];
      if (m <= op.taps) sum = fmaf(weights[m], input, sum);
    }
    const T y = FromFloat<T>(Silu(fmaf(weights[0], raw[row * columns + own], sum)));
    T* to = reinterpret_cast<T*>(op.sent + row * op.sent_bytes) + (is_c ? b_width : 0) + at;
    SendElement(to, y);
#pragma unroll 1
    for (int i = 1; i < count; ++i) SendElement(to + i, FromFloat<T>(0.0f));
    if (!is_c) store.b[(kRing + nodes.first_pending + row) * b_width + at] = y;
  }
}

// The block's columns. By thread `thread` of kThreads, whose barrier is kBarrier. raw: shared
// memory, [rows][sent_columns].
template <typename T, int kBarrier, int kThreads>
__device__ __forceinline__ void SendStates(const ScanOp& op, const PassNodes& nodes,
                                           const LayerStore<T>& store, const float* factors,
                                           int thread, float* raw) {
  const int columns = 2 * op.groups * op.d_state + op.heads;
  // The last blocks begin with these, for there may be more blocks than slices of heads.
#pragma unroll 1
  for (int begin = (gridDim.x - 1 - blockIdx.x) * op.sent_columns; begin < columns;
       begin += gridDim.x * op.sent_columns) {
    SendColumns<T, kBarrier, kThreads>(op, nodes, store, begin, factors, thread, raw);
    __syncwarp();
    SyncWarps<kBarrier, kThreads>();
  }
}
// Of the computing warps.
template <typename T>
__device__ __noinline__ void SendStatesAtLast(const ScanOp& op, const PassNodes& nodes,
                                              const LayerStore<T>& store, const float* factors,
                                              float* raw) {
  SendStates<T, 1, kConsumers>(op, nodes, store, factors, threadIdx.x, raw);
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
  // Not through the multiprocessor's cache, which may hold what stood there in an earlier pass.
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

// A slice of a head, a block's task. All threads read it, so that not each has to work it out.
struct ScanSlice {
  int head, group, first_dim, dims;
  int column;  // the first, of x or z or u
  int place;   // of it in act
  int zeros;   // of act behind the slice, which is the last one of its norm group

  __device__ ScanSlice(const ScanOp& op, int task) {
    head = task / op.slices;
    group = head / (op.heads / op.groups);
    first_dim = (task - head * op.slices) * kSliceDims;
    dims = min(kSliceDims, op.head_dim - first_dim);
    column = head * op.padded_head + first_dim;
    const int heads_per_norm = op.heads / op.norm_groups, norm_group = head / heads_per_norm;
    place = norm_group * op.group_columns + (head - norm_group * heads_per_norm) * op.head_dim +
            first_dim;
    const bool last = place + dims == norm_group * op.group_columns + heads_per_norm * op.head_dim;
    zeros = last ? op.group_columns - heads_per_norm * op.head_dim : 0;
  }
};

// What a slice of a head reads of weights and of earlier passes, by thread `thread` of `threads`.
template <typename T>
__device__ inline void StageSlice(const ScanOp& op, const PassNodes& nodes,
                                  const LayerStore<T>& store, int task, const ScanLayout<T>& layout,
                                  char* work, int thread, int threads) {
  const int head = task / op.slices, first_dim = (task - head * op.slices) * kSliceDims;
  const int padded_dims = PadTo(4, min(kSliceDims, op.head_dim - first_dim));
  const int first_column = head * op.padded_head + first_dim, width = op.heads * op.padded_head;
  float* decay = reinterpret_cast<float*>(work + layout.decay);
  float* conv = reinterpret_cast<float*>(work + layout.conv);
  float* ring_u = reinterpret_cast<float*>(work + layout.ring_u);
  constexpr int kVectors = kSliceDims / 4;
#pragma unroll 4
  for (int i = thread; i < kRing * kVectors; i += threads) {
    const int r = i / kVectors, p = i % kVectors * 4;
    if (p < padded_dims) {
      CopyAsync16(ring_u + r * kSliceDims + p, store.u + (r * width + first_column + p));
    }
  }
  // Rows of 64 floats: weights of inputs 0, 1, ... positions back, bias, stored inputs, weights of
  // the norm, zeros.
#pragma unroll 4
  for (int i = thread; i < (kConvRows + 2) * kVectors; i += threads) {
    const int r = i / kVectors, p = i % kVectors * 4;
    const float* from = op.conv_weight + (op.taps - r) * op.channels;
    bool there = r <= op.taps;
    if (r == kMaxTaps + 1) from = op.conv_bias, there = true;
    if (r > kMaxTaps + 1) {
      from = store.conv + (r - kMaxTaps - 2) * op.channels;
      there = r - kMaxTaps - 2 < op.taps;
    }
    if (r == kConvRows) from = op.norm_weight, there = true;
    if (r == kConvRows + 1) there = false;
    const float4 v = LoadNew4(from + first_column + p, there && p < padded_dims);
    *reinterpret_cast<float4*>(conv + r * kSliceDims + p) = v;
  }
  if (thread < 2) {
    conv[(kConvRows + 2) * kSliceDims + thread] = LoadWeight((thread == 0 ? op.d : op.a) + head);
  }
#pragma unroll 4
  for (int i = thread; i < kRing + nodes.first_pending; i += threads) {
    decay[i] = LoadNew(store.l + (i * op.heads + head));
  }
  CopiesWait();
}

// The operator.
template <typename T, int kRowTiles>
__device__ __forceinline__ void Scan(const ScanOp& op, const PassNodes& nodes,
                                     const LayerStore<T>& store, const float* factors, char* work,
                                     ScanSlice* shared_slice) {
  constexpr int kRows = 8 * kRowTiles;
  constexpr int kVec = kRows < 32 ? kRows / 8 : 4;    // dimensions of a thread
  constexpr int kRowThreads = kSliceDims / kVec;      // threads of a row
  constexpr int kOwn = kRows <= 32 ? 1 : kRows / 32;  // rows of a thread
  constexpr int kTermTiles = kRowTiles < 4 ? kRowTiles : 4;
  constexpr int kTermRows = 8 * kTermTiles;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, quad = lane % 4, octet = lane / 4;
  const ScanLayout<T> layout(kRows, op.padded_d_state);
  float* dts = reinterpret_cast<float*>(work + layout.dt);
  float* conv = reinterpret_cast<float*>(work + layout.conv);
  float* raw = reinterpret_cast<float*>(work + layout.raw);
  T* c = reinterpret_cast<T*>(work + layout.c);
  float* pending_u = reinterpret_cast<float*>(work + layout.pending_u);
  float* ring_u = reinterpret_cast<float*>(work + layout.ring_u);
  float* weights = reinterpret_cast<float*>(work + layout.weights);
  float* terms = reinterpret_cast<float*>(work + layout.terms);
  float* decay = reinterpret_cast<float*>(work + layout.decay);
  float* boundary = reinterpret_cast<float*>(work + layout.boundary);
  const int ds = op.padded_d_state, c_stride = RowStride<T>(ds);
  const int rows = nodes.rows, prefix = nodes.prefix;
  const int new_rows = kRing + nodes.first_pending;  // stored rows before those of this pass
  const int end_rows = new_rows + rows;
  const int width = op.heads * op.padded_head;
  const int b_width = op.groups * ds;
  if constexpr (!SendsEarly(kRows)) SendStatesAtLast<T>(op, nodes, store, factors, raw);
#pragma unroll 1
  for (int task = blockIdx.x; task < op.heads * op.slices; task += gridDim.x) {
    // The first slice and what it reads were brought already.
    if (task != static_cast<int>(blockIdx.x)) {
      if (tid == 0) *shared_slice = ScanSlice(op, task);
      StageSlice<T>(op, nodes, store, task, layout, work, tid, kConsumers);
      SyncThreads<kConsumers>();
    }
    const ScanSlice& slice = *shared_slice;
    const int head = slice.head, dims = slice.dims;
    // A thread's rows and dimensions, of which it has z and x.
    // The first rows' are the last warps', since the first ones have more to do with stored rows.
    const int own = tid ^ (kConsumers - 1);
    const int dim = own % kRowThreads * kVec;
    const int column = slice.column + dim;
    const int x_column = op.x_column + column, z_column = x_column + width;
    const bool has_dim = dim < PadTo(4, dims);
    const int z_splits = has_dim ? Splits(op.partials, z_column) : 0;
    const int x_splits = has_dim ? Splits(op.partials, x_column) : 0;
    int row_of[kOwn];
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      const int row = own / kRowThreads + k * 32;
      row_of[k] = row < rows && has_dim ? row : -1;
    }
    SumVector<kVec> sum_x, sum_z;
    const auto load_sums = [&](int k) {
      sum_x.Load(op.partials, row_of[k], x_column, row_of[k] >= 0);
      sum_z.Load(op.partials, row_of[k], z_column, row_of[k] >= 0);
    };
    // Of few rows whole warps have nothing, and do not look for it.
    constexpr bool kFew = kRows <= 8;
    if (!kFew || (own & ~31) / kRowThreads < rows) load_sums(0);
    Vector<kVec> gate[kOwn];
    // S: 16 dimensions a warp, and a part of the states.
    const int p_tile = warp % (kSliceDims / 16), part = warp / (kSliceDims / 16);
    const bool has_tile = p_tile * 16 < dims;
    const int tile_floats =
        (head * PadTo16(op.head_dim) + slice.first_dim + p_tile * 16) * ds + lane * 4;
    float4 s[2][2];
    const auto load_state = [&](int position, int block) {
      const float* at = store.checkpoints[position / kSegment % 2] + (tile_floats + block * 512);
      const bool there = position > 0 && has_tile && block * 32 < ds;
#pragma unroll
      for (int i = 0; i < 4; ++i) s[i / 2][i % 2] = LoadWeight4(at + i * 128, there);
    };
    if (kOwn == 1) {  // else they would not fit the registers
      load_state(nodes.first_checkpoint, part);
    }

    // dt, B, eight stored rows a warp, and C; of the new nodes as other blocks send them.
    const int stored = warp * 8 + octet;
    const bool receives = stored >= new_rows, has_stored = stored < end_rows;
    const int state_column = slice.group * ds;
    const T* b_stored = store.b + stored * b_width;
    const T* b_sent = reinterpret_cast<const T*>(op.sent + (stored - new_rows) * op.sent_bytes);
    const T* b_from = (receives ? b_sent : b_stored) + (state_column + quad * 8);
    // A thread has vectors of C that are kConsumers >> shift rows apart, and dt of a row.
    constexpr int kPer16 = 16 / sizeof(T);
    const int shift = op.vector_shift, c_thread = tid ^ 256, dt_row = tid ^ 384;
    const int vector = c_thread & ((1 << shift) - 1);
    const bool has_vector = vector * kPer16 < ds;
    const char* c_sent =
        op.sent + (b_width + state_column + vector * kPer16) * static_cast<int>(sizeof(T));
    const char* dt_sent =
        op.sent + 2 * b_width * static_cast<int>(sizeof(T)) + head * 4 + dt_row * op.sent_bytes;
    RowVector<T> b[kBlocksAhead];
    uint4 c_here = {0, 0, 0, 0};
    float dt_here = 0.0f;
    const auto load_c = [&](int r) {
      c_here = LoadSentBits(c_sent + r * op.sent_bytes, r < rows && has_vector);
    };
    const auto load_sent = [&] {
      if (!kFew || (dt_row & ~31) < rows) {
        dt_here = LoadSent(reinterpret_cast<const float*>(dt_sent), dt_row < rows);
      }
      if (!kFew || (c_thread & ~31) >> shift < rows) load_c(c_thread >> shift);
      if (kFew && warp * 8 >= end_rows) return;
#pragma unroll
      for (int k = 0; k < kBlocksAhead; ++k) {
        b[k].LoadSent(b_from + k * 32, has_stored && k * 32 < ds);
      }
    };
    const auto unsent = [&] {
      bool is = IsUnsent<T>(c_here) || IsUnsent(dt_here);
      if (kFew && !receives) return is;
#pragma unroll
      for (int k = 0; k < kBlocksAhead; ++k) is |= receives && b[k].Unsent();
      return is;
    };
    const auto receive = [&] {
      if (kOwn > 1) load_sent();
      while (unsent()) load_sent();
      if (dt_row < rows) dts[dt_row] = dt_here;
#pragma unroll 1
      for (int r = c_thread >> shift; r < rows; r += kConsumers >> shift) {
        if (r != c_thread >> shift) load_c(r);
        while (IsUnsent<T>(c_here)) load_c(r);
        if (has_vector) *reinterpret_cast<uint4*>(c + r * c_stride + vector * kPer16) = c_here;
      }
    };
    if constexpr (SendsEarly(kRows)) {
      load_sent();
      receive();
    }

    // in_proj's sums: z and x of the thread's rows.
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      if (k > 0) load_sums(k);
      if (row_of[k] < 0) continue;
      while (sum_x.Unsent(x_splits) || sum_z.Unsent(z_splits)) load_sums(k);
      const int row = row_of[k];
      const float factor = factors[row];
      Vector<kVec> value;
      sum_x.Finish(op.partials, row, x_column, x_splits, value.v);
      sum_z.Finish(op.partials, row, z_column, z_splits, gate[k].v);
      const bool with_bias = op.in_bias != nullptr;
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        value.v[v] = fmaf(factor, value.v[v], LoadWeight(op.in_bias + x_column + v, with_bias));
        gate[k].v[v] =
            Silu(fmaf(factor, gate[k].v[v], LoadWeight(op.in_bias + z_column + v, with_bias)));
      }
      value.Store(raw + row * kTermStride + dim);
      value.Store(store.conv + ((op.taps + nodes.first_pending + row) * op.channels + column));
    }
    if (kOwn > 1) load_state(nodes.first_checkpoint, part);
    if constexpr (SendsEarly(kRows)) CopiesWait();
    SyncThreads<kConsumers>();
    if (!SendsEarly(kRows) && kOwn == 1) load_sent();  // else it would not fit the registers

    // Convolution along ancestors.
    Vector<kVec> x[kOwn];
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      const int row = row_of[k];
      if (row < 0) continue;
      Vector<kVec> sum = Vector<kVec>::Load(conv + (kMaxTaps + 1) * kSliceDims + dim);
      Vector<kVec> inputs[kMaxTaps + 1];
#pragma unroll
      for (int m = 0; m <= kMaxTaps; ++m) {
        const int tap = m == 0 ? row : nodes.taps[row][m - 1], earlier = -2 - tap;
        // Rows of the prefix, or zeros.
        const float* from =
            conv + (earlier < 0 ? kConvRows + 1 : kMaxTaps + 2 + earlier) * kSliceDims;
        if (tap >= 0) from = raw + tap * kTermStride;
        if (earlier >= op.taps) {
          inputs[m] = Vector<kVec>::LoadNew(store.conv + (earlier * op.channels + column));
        } else {
          inputs[m] = Vector<kVec>::Load(from + dim);
        }
      }
#pragma unroll
      for (int m = kMaxTaps; m >= 0; --m) {
        if (m > op.taps) continue;
        const Vector<kVec> weight = Vector<kVec>::Load(conv + m * kSliceDims + dim);
#pragma unroll
        for (int v = 0; v < kVec; ++v) sum.v[v] = fmaf(weight.v[v], inputs[m].v[v], sum.v[v]);
      }
#pragma unroll
      for (int v = 0; v < kVec; ++v) x[k].v[v] = Silu(sum.v[v]);
    }
    if constexpr (!SendsEarly(kRows)) {
      receive();
      CopiesWait();
      SyncThreads<kConsumers>();
    }
    const float* norm_weights = conv + kConvRows * kSliceDims;
    const float* d_and_a = conv + (kConvRows + 2) * kSliceDims;
    // Log decays along the path, each from the start of its aligned segment, and the one at the end
    // of the segment before the node's: a row a thread, few of each warp.
    {
      const int row = ((kConsumerWarps - 3 - warp) & (kConsumerWarps - 1)) + lane * kConsumerWarps;
      if (row < rows) {
        const int t = nodes.position[row], start = nodes.checkpoint[row];
        const int segment = t / kSegment * kSegment;
        const float a = d_and_a[1];
        const int from = max(start, prefix);
        float l = start < prefix ? decay[(prefix - 1) % kRing] : 0.0f;
        float at_boundary =
            segment > start && segment < prefix ? decay[(segment - 1) % kRing] : 0.0f;
        const uint8_t* path = nodes.path[row] - prefix;
#pragma unroll 4
        for (int position = from; position <= t; ++position) {
          // Of the earlier pending nodes the stored value is the sum so far.
          const int node = path[position] - nodes.first_pending;
          const float stored_l = decay[node < 0 ? new_rows + node : 0];
          if (position == segment && segment > start) at_boundary = l;
          const float next = fmaf(dts[max(node, 0)], a, position % kSegment == 0 ? 0.0f : l);
          l = node < 0 ? stored_l : next;
        }
        decay[new_rows + row] = l;
        boundary[row] = at_boundary;
        if (slice.first_dim == 0) store.l[(new_rows + row) * op.heads + head] = l;
      }
    }
    // Scores C_i . B_j.
    constexpr int kRowBlocks = (kRows + 15) / 16;
    float scores[kRowBlocks][4] = {};
    if (warp * 8 < end_rows) {
#pragma unroll 1
      for (int first = 0; first < ds; first += 32 * kBlocksAhead) {
#pragma unroll
        for (int i = 0; i < kBlocksAhead; ++i) {
          const int n = first + i * 32;
          if (n >= ds) break;
          if (first > 0) {
            do {
              b[i].LoadSent(b_from + n, has_stored);
            } while (receives && b[i].Unsent());
          }
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
    }
    // The state term S C_i with the checkpoint that node i reads, 32 rows at a time; each part of
    // the state apart, added in order. The first checkpoint's terms of the first rows are made with
    // the scores.
    const bool one_checkpoint = nodes.first_checkpoint == nodes.last_checkpoint;
    const auto make_terms = [&](int k, int position, bool held, float(&term)[kTermTiles][4]) {
#pragma unroll
      for (int i = 0; i < kTermTiles * 4; ++i) term[i / 4][i % 4] = 0.0f;
#pragma unroll 1
      for (int block = part; block * 32 < ds; block += kStateParts) {
        if (!held || block > part) load_state(position, block);
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
    };
    const auto keep_terms = [&](int k, int position, const float(&term)[kTermTiles][4]) {
      float* to = terms + (part * kTermRows + quad * 2) * kTermStride + p_tile * 16 + octet;
#pragma unroll
      for (int i = 0; i < kTermTiles; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = k * 32 + i * 8 + quad * 2 + e % 2;
          if (one_checkpoint || (row < rows && nodes.checkpoint[row] == position)) {
            to[(i * 8 + e % 2) * kTermStride + e / 2 * 8] = term[i][e];
          }
        }
      }
    };
    float term[kTermTiles][4];
    make_terms(0, nodes.first_checkpoint, true, term);
    SyncThreads<kConsumers>();

    // weights[i][position of j - checkpoint of i] = exp(difference of log decays) * score. Across
    // the segment boundary the first segment's rest and the node's own part are added.
    {
      int positions[2];  // of the lane's two stored rows, -1: none
      float decays[2];
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
        positions[half] = position;
        decays[half] = decay[j];
      }
#pragma unroll
      for (int i = 0; i < (kRows + 7) / 8; ++i) {
        const int row = i * 8 + octet;
        if (row >= rows || warp * 8 >= end_rows) continue;
        const int start = nodes.checkpoint[row];
        const int segment = nodes.position[row] / kSegment * kSegment;
        const float node_decay = decay[new_rows + row];
        const float at_boundary = boundary[row];
        const uint64_t mask = nodes.path_mask[row];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int position = positions[half];
          const int pending = warp * 8 + quad * 2 + half - kRing;
          const bool on_path = pending < 0 || (mask >> (pending & 63) & 1) != 0;
          const float exponent = position < segment ? (at_boundary - decays[half]) + node_decay
                                                    : node_decay - decays[half];
          if (position >= start && on_path) {
            weights[row * kWeightStride + position - start] =
                scores[i / 2][i % 2 * 2 + half] * expf(exponent);
          }
        }
      }
    }
    float y[kOwn][kVec];
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      if (k > 0) {
        make_terms(k, nodes.first_checkpoint, one_checkpoint && ds <= 32 * kStateParts, term);
        SyncThreads<kConsumers>();  // the last rows' terms are read
      }
      keep_terms(k, nodes.first_checkpoint, term);
#pragma unroll 1
      for (int position = nodes.first_checkpoint + kSegment; position <= nodes.last_checkpoint;
           position += kSegment) {
        make_terms(k, position, false, term);
        keep_terms(k, position, term);
      }
      if (k + 1 == kOwn) {
        // C is used up.
        if (kOwn > 1 || !one_checkpoint) {
          SyncThreads<kConsumers>();
        }
        // u of the new rows, also into the store, and of earlier pending ones.
#pragma unroll
        for (int n = 0; n < kOwn; ++n) {
          if (row_of[n] < 0) continue;
          Vector<kVec> u;
#pragma unroll
          for (int v = 0; v < kVec; ++v) {
            u.v[v] = dts[row_of[n]] * (dim + v < dims ? x[n].v[v] : 0.0f);
          }
          u.Store(pending_u + (nodes.first_pending + row_of[n]) * kSliceDims + dim);
          u.Store(store.u + (new_rows + row_of[n]) * width + column);
        }
#pragma unroll 1
        for (int i = tid; i < nodes.first_pending * kSliceDims; i += kConsumers) {
          const int p = i % kSliceDims;
          if (p < dims) {
            pending_u[i] = store.u[(kRing + i / kSliceDims) * width + slice.column + p];
          }
        }
      }
      SyncThreads<kConsumers>();
      const int row = row_of[k];
      if (row < 0) continue;
      const float* from = terms + own / kRowThreads * kTermStride + dim;
      Vector<kVec> sum = Vector<kVec>::Load(from);
#pragma unroll
      for (int i = 1; i < kStateParts; ++i) {
        const Vector<kVec> next = Vector<kVec>::Load(from + i * kTermRows * kTermStride);
#pragma unroll
        for (int v = 0; v < kVec; ++v) sum.v[v] += next.v[v];
      }
      const int segment = nodes.position[row] / kSegment * kSegment;
      float exponent = decay[new_rows + row];
      if (segment > nodes.checkpoint[row]) exponent += boundary[row];
      const float state_decay = expf(exponent);
#pragma unroll
      for (int v = 0; v < kVec; ++v) y[k][v] = sum.v[v] * state_decay;
    }

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
    int shared_from = row_of[0] < 0 ? whole : starts[0];
    const auto add_four = [&](int k, int position, const Vector<kVec>(&u)[4]) {
      const Vector<4> w = Vector<4>::Load(row_weights[k] + position);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) y[k][v] = fmaf(w.v[i], u[i].v[v], y[k][v]);
      }
    };
    const auto load_four = [&](int position, Vector<kVec>(&u)[4]) {
      const float* from = ring_u + position % kRing * kSliceDims + dim;
#pragma unroll
      for (int i = 0; i < 4; ++i) u[i] = Vector<kVec>::Load(from + i * kSliceDims);
    };
    if constexpr (kOwn > 1) {
      // Positions that only some of the thread's rows begin with.
      if (row_of[0] >= 0) {
#pragma unroll
        for (int k = 1; k < kOwn; ++k) {
          if (row_of[k] >= 0) shared_from = max(shared_from, starts[k]);
        }
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
#pragma unroll 1
          for (int position = starts[k]; position < min(shared_from, whole); position += 4) {
            Vector<kVec> u[4];
            load_four(position, u);
            add_four(k, position, u);
          }
        }
      }
    }
#pragma unroll(kVec < 4 ? 4 : 2)
    for (int position = shared_from; position < whole; position += 4) {
      Vector<kVec> u[4];
      load_four(position, u);
#pragma unroll
      for (int k = 0; k < kOwn; ++k) {
        if (k == 0 || row_of[k] >= 0) add_four(k, position, u);
      }
    }
    // Then each node's own, skip, gate and the norm's weights.
    const float skip = d_and_a[0];
    const int place = slice.place + dim;
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
        float square[4] = {}, out[4] = {};
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          if (dim + v >= dims) continue;
          const float value = __fmul_rn(fmaf(skip, x[k].v[v], y[k][v]), gate[k].v[v]);
          square[v] = __fmul_rn(value, value);
          out[v] = __fmul_rn(value, norm_weights[dim + v]);
        }
        if (kVec == 4 && op.head_dim % 4 == 0) {
          SendAct4<T>(op.act, kRows, row, place, make_float4(out[0], out[1], out[2], out[3]));
        } else {
#pragma unroll
          for (int v = 0; v < kVec; ++v) {
            if (dim + v >= dims) continue;
            SendElement(static_cast<T*>(op.act) + ActIndex<T>(kRows, row, place + v),
                        FromFloat<T>(out[v]));
          }
        }
        if (dim == 0) {
#pragma unroll 1
          for (int i = 0; i < slice.zeros; ++i) {
            SendElement(static_cast<T*>(op.act) + ActIndex<T>(kRows, row, place + dims + i),
                        FromFloat<T>(0.0f));
          }
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
  const int ds = op.padded_d_state;
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
    // Rows of B, that all heads of a group read, are shared among the tasks.
    const int tasks = op.heads * op.slices;
    for (int r = task; r < kRing; r += tasks) {
      prefetch(store.b + r * op.groups * ds, 1, 0, op.groups * ds * static_cast<int>(sizeof(T)));
    }
  }
}

// Rows of a committed path behind the prefix.
template <typename T>
struct CommitLayer {
  LayerStore<T> store;
  int u_columns, b_columns, heads;  // 0: not an SSD layer
  int channels, taps;
  int kv_columns;  // 0: not attention
};

struct CommitPath {
  int32_t length = 0;
  int32_t position = 0;  // of the first node
  int32_t kv_capacity = 0;
  uint8_t node[kMaxRows] = {};
};

// Copies a row of `columns` elements, part `part` of `parts`, with one warp. Not through the
// multiprocessor's cache, which nobody reads rows through.
template <typename Unit, typename Element>
__device__ inline void CopyRow(Element* rows, int columns, int64_t from, int64_t to, int part,
                               int parts) {
  constexpr int kAhead = 4;
  const int units = columns * static_cast<int>(sizeof(Element)) / static_cast<int>(sizeof(Unit));
  const Unit* source = reinterpret_cast<const Unit*>(rows + from * columns);
  Unit* target = reinterpret_cast<Unit*>(rows + to * columns);
  const int step = 32 * parts;
#pragma unroll 1
  for (int i = part * 32 + threadIdx.x % 32; i < units; i += kAhead * step) {
    Unit held[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (i + k * step < units) held[k] = __ldcg(source + i + k * step);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (i + k * step < units) __stcg(target + i + k * step, held[k]);
    }
  }
}

// What warp `warp` of `warps` does of a commit. No row that is written is read: a path's nodes are
// pending, and their places are of the prefix.
template <typename T>
__device__ __noinline__ void CommitRows(const CommitLayer<T>* layers, int layer_count,
                                        const CommitPath& path, int warp, int warps) {
  constexpr int kKinds = 4;  // of rows: u, b, l and conv, or k and v
  const int rows = layer_count * path.length * kKinds;
  const int parts = max(1, min(16, 2 * warps / rows));
#pragma unroll 1
  for (int task = warp; task < rows * parts; task += warps) {
    const int part = task / rows, row = task - part * rows;
    const int kind = row % kKinds, i = row / kKinds % path.length;
    const CommitLayer<T>& layer = layers[row / kKinds / path.length];
    const int position = path.position + i, node = path.node[i];
    if (layer.heads > 0) {
      const int pending = kRing + node, place = position % kRing;
      if (kind == 0) CopyRow<uint4>(layer.store.u, layer.u_columns, pending, place, part, parts);
      if (kind == 1) CopyRow<uint4>(layer.store.b, layer.b_columns, pending, place, part, parts);
      if (kind == 2) CopyRow<float>(layer.store.l, layer.heads, pending, place, part, parts);
      if (kind == 3 && i >= path.length - layer.taps) {
        CopyRow<uint4>(layer.store.conv, layer.channels, layer.taps + node, position % layer.taps,
                       part, parts);
      }
    } else if (layer.kv_columns > 0 && kind < 2) {
      CopyRow<uint4>(kind == 0 ? layer.store.k : layer.store.v, layer.kv_columns,
                     path.kv_capacity + node, position, part, parts);
    }
  }
}

template <typename T>
__global__ void CommitRowsKernel(const CommitLayer<T>* layers, int layer_count,
                                 const __grid_constant__ CommitPath path) {
  const int warps_of_block = blockDim.x / 32;
  CommitRows<T>(layers, layer_count, path, blockIdx.x * warps_of_block + threadIdx.x / 32,
                gridDim.x * warps_of_block);
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
