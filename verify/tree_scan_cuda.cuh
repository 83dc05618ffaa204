// The tree scan of Mamba-2 on the device, one operator from in_proj to out_proj's input. Formulas
// and exactness as in verify/tree_scan.h.
//
// Blocks take a tile of channels of x, some groups of eight side by side, and make in_proj's x and
// z of those themselves (an own product, core/ops/matmul_cuda.cuh): these never leave the block. B,
// C and dt, that all blocks need, are the early part of that product. While one or two groups of
// four warps multiply, the others do all that x and z are not needed for: each block sends a few
// columns of B, C and dt to all, convolved and activated; then the log decays, scores C . B, the
// state term S C, and the sum over the prefix's part of the path. With x and z come the convolution
// along ancestors, the sum over the path's pending nodes, D skip, gate and the gated norm's
// weights. Nobody waits for more than the numbers that he reads. Scores of 64 rows, of which each
// block needs all, are made by one block each and sent, too. A single node's scan ends in the
// registers in which the product leaves x and z.
//
// Products whose sum does not run over positions (C . B over the state, S C) are tensor core
// products of operands that hold every f32 bit; the sum over a path is one chain of fused
// multiply-adds in path order. The checkpoint is read once and nothing of it is written.
//
// What did not pay (docs/performance.md): scores and state term by wgmma; to look for B before C is
// there; B of the pass's nodes through shared memory; B of two groups ahead, or two or three groups
// of B at once; loops over blocks of states in the place of code laid out in full; scores of 16 or
// 32 rows made by one block each and sent to all; two rows a thread behind x and z.
//
// Both products run over the state in blocks of 32, of which a lane l holds the eight from
// 8 (l % 4) on, so that operands are vectors in memory. Checkpoints S are stored as halves of first
// operands: blocks [p / 8][n / 32] of 256 f32, p the channel of x, in which S[p, n] is element n %
// 4 of vector n % 8 / 4 * 32 + lane, with lane = p % 8 * 4 + n % 32 / 8.

#ifndef CANOPY_VERIFY_TREE_SCAN_CUDA_CUH_
#define CANOPY_VERIFY_TREE_SCAN_CUDA_CUH_

#include <type_traits>

#include "core/cuda/pass.h"
#include "core/ops/matmul_cuda.cuh"
#include "verify/row_products_cuda.cuh"

namespace canopy::cuda {

inline constexpr int kGroup = 8;       // channels
inline constexpr int kMostGroups = 8;  // of a tile
inline constexpr int kMostTileHeads = 2;
// Of the computing warps the last ones, which in_proj's tiles leave free.
template <typename T>
constexpr int EarlyWarps(int row_tiles) {
  return kConsumerWarps - (RowsFirst<T>(row_tiles) ? 4 : 2 * kMostGroups * kGroup / 64 * 4);
}
inline constexpr int kEarlyBarrier = 3;  // of them

// Channels of x, z and u: [heads][padded_head]; those of the convolution are x, B and C. A tile has
// `tile_groups` groups of them, the last of a group of heads fewer; in_proj makes x and z of a
// group side by side, 16 outputs. Early columns: B and C [groups][d_state], dt [heads].
struct ScanOp {
  int heads = 0;
  int head_dim = 0;
  int padded_head = 0;  // to a multiple of kGroup
  int groups = 0;       // of heads, that share B and C
  int d_state = 0;
  int padded_d_state = 0;  // to a multiple of 32
  int taps = 0;            // kernel - 1
  int channels = 0;        // padded to a multiple of 4
  int sent_columns = 0;    // of B, C and dt, that a block takes at a time
  int tile_groups = 0;
  int tiles_of_group = 0;  // of heads
  // Tiles of this operator, one a block: where there are more than blocks, several operators of a
  // layer have some each, and the first one sends B, C and dt.
  int first_tile = 0;
  int tiles = 0;
  int number = 0;                // of the operator among the scans of its pass
  Partials partials;             // of early columns
  const char* packed = nullptr;  // a block's part, see ScanLayout: [blocks][packed_bytes]
  int packed_bytes = 0;
  float dt_min = 0.0f;
  float dt_max = 0.0f;
  int norm_groups = 1;
  // B, C, dt and scores as they are sent, see kUnsent: [kMaxRows] rows of sent_bytes bytes, of T
  // [2][groups * padded_d_state] and f32 [heads] and [groups][kRing + kMaxRows].
  char* sent = nullptr;
  int sent_bytes = 0;   // a multiple of 16
  void* act = nullptr;  // out_proj's input, before the norm's factor
  // [kMaxRows][norm_groups][square_parts]: of the channels of a norm group in each tile that has
  // some. Of one norm group they are sent up to 16 rows; of several, 0 where parts are fewer.
  float* squares = nullptr;
  int square_parts = 0;

  CANOPY_HOST_DEVICE int HeadGroups() const { return padded_head / kGroup; }
  CANOPY_HOST_DEVICE int Tiles() const { return groups * tiles_of_group; }
  // The first group of channels of a tile.
  CANOPY_HOST_DEVICE int FirstGroup(int tile) const {
    const int of = tile / tiles_of_group;
    return of * (heads / groups) * HeadGroups() + (tile - of * tiles_of_group) * tile_groups;
  }
  CANOPY_HOST_DEVICE int TileOf(int group) const {
    const int each = heads / groups * HeadGroups(), of = group / each;
    return of * tiles_of_group + (group - of * each) / tile_groups;
  }
  CANOPY_HOST_DEVICE int GroupsOf(int tile) const {
    const int left = (heads / groups) * HeadGroups() - tile % tiles_of_group * tile_groups;
    return left < tile_groups ? left : tile_groups;
  }
};

template <typename T>
CANOPY_HOST_DEVICE constexpr int SentScoresAt(int groups, int padded_d_state, int heads) {
  return 2 * groups * padded_d_state * static_cast<int>(sizeof(T)) + PadTo(4, heads) * 4;
}
inline constexpr int kSentScores = kRing + kMaxRows;  // of a row and group
template <typename T>
CANOPY_HOST_DEVICE constexpr int SentBytes(int groups, int padded_d_state, int heads) {
  return SentScoresAt<T>(groups, padded_d_state, heads) + groups * kSentScores * 4;
}

inline constexpr int kMostSentColumns = 64;
// Floats between rows of weights, and more than a tile's channels between rows of theirs: vectors,
// and rows in different banks.
inline constexpr int kWeightStride = kRing + 4;
inline constexpr int kPadding = 4;

// Rows of a tile's channels: the convolution's weights of inputs 0, 1, ... positions back, its
// bias, the norm's weights, in_proj's bias of x and of z. Then, not packed, its inputs of the
// prefix, and zeros.
inline constexpr int kConvBias = kMaxTaps + 1;
inline constexpr int kNormRow = kConvBias + 1;
inline constexpr int kXBias = kNormRow + 1;
inline constexpr int kZBias = kXBias + 1;
inline constexpr int kPackedRows = kZBias + 1;
inline constexpr int kInputRow = kPackedRows;
inline constexpr int kZeroRow = kInputRow + kMaxTaps;
// And of the columns of B, C and dt that a block sends: weights, bias, and in_proj's bias; then
// inputs.
inline constexpr int kSentBias = kMaxTaps + 1;
inline constexpr int kSentInBias = kSentBias + 1;
inline constexpr int kSentRows = kSentInBias + 1;
inline constexpr int kDecays = kRing + kMaxRows;

// A block's tile, known when the model is loaded.
struct ScanTile {
  int first_group, groups;  // of channels
  int state_group;          // of heads
  int first_head, heads;
  int first_head_groups;        // groups of the first head
  int place[kMostGroups];       // of a group's channels in act
  int16_t dims[kMostGroups];    // that are there of a group
  int16_t zeros[kMostGroups];   // of act behind the group, the last one of its norm group
  int16_t square[kMostGroups];  // place of the sum of squares of the tile in the group's norm group

  CANOPY_HOST_DEVICE int column() const { return first_group * kGroup; }
  CANOPY_HOST_DEVICE int channels() const { return groups * kGroup; }
};

// What a block reads of a model's weights for its part of a scan, besides in_proj's: the tile, D
// and A of its heads, rows of the columns it sends and of its channels. In bytes.
struct ScanPacked {
  int skip, sent, conv, bytes;

  CANOPY_HOST_DEVICE ScanPacked(int sent_columns, int channels) {
    skip = PadTo16(static_cast<int>(sizeof(ScanTile)));  // [heads of a tile][D, A]
    sent = skip + kMostTileHeads * 2 * 4;
    conv = sent + PadTo(4, kSentRows * sent_columns) * 4;
    bytes = conv + kPackedRows * channels * 4;
  }
};

// Shared memory of the operator, in bytes, for buckets of `rows` rows and tiles of `channels`.
// First what x and z make, in the place of the product's activations and what was needed before;
// from `terms` on what stays; from `decay` on what is brought while operators before are at work.
template <typename T>
struct ScanLayout {
  int stride;  // floats between rows of raw, gate, x and terms
  int raw, gate, x, pending_u, squares;
  int c, sent, terms, weights, dt, boundary, decay, packed, conv, sent_inputs, ring_u, end;

  CANOPY_HOST_DEVICE ScanLayout(int rows, int padded_d_state, int sent_columns, int channels) {
    stride = channels + kPadding;
    const int row_bytes = rows * stride * 4;
    raw = 0;
    gate = raw + row_bytes;
    x = gate + row_bytes;
    pending_u = x + row_bytes;
    squares = pending_u + kMaxRows * channels * 4;
    const int late_end = squares + rows * kMostGroups * 4;
    c = x > ActBytes(rows / 8) ? x : ActBytes(rows / 8);
    sent = c + rows * RowStride<T>(padded_d_state) * static_cast<int>(sizeof(T));
    const int early_end = sent + PadTo(4, rows * sent_columns) * 4;
    terms = early_end > late_end ? early_end : late_end;
    weights = terms + row_bytes;
    dt = weights + kMostTileHeads * rows * kWeightStride * 4;
    boundary = dt + kMostTileHeads * rows * 4;
    decay = boundary + kMostTileHeads * rows * 4;
    if (decay < kMatmulWorkBytes) decay = kMatmulWorkBytes;
    packed = decay + kMostTileHeads * kDecays * 4;
    const ScanPacked in_packed(sent_columns, channels);
    conv = packed + in_packed.conv;
    sent_inputs = conv + (kZeroRow + 1) * channels * 4;
    ring_u = sent_inputs + PadTo(4, kMaxTaps * sent_columns) * 4;
    end = ring_u + kRing * channels * 4;
  }
};

}  // namespace canopy::cuda

#ifdef __CUDACC__

#include "core/ops/strip_cuda.cuh"

namespace canopy::cuda {

// Item `item` of rows that have `each` items; both are small.
__device__ inline int RowOfItem(int item, int each) {
  return __float2int_rd(__fdividef(static_cast<float>(item) + 0.5f, static_cast<float>(each)));
}

// The block's columns of B, C and dt. The last blocks have the first ones, for there may be more
// blocks than tiles.
__device__ inline int FirstSentColumn(const ScanOp& op) {
  return (gridDim.x - 1 - blockIdx.x) * op.sent_columns;
}

// The block's columns of B, C and dt of all nodes, once their sums come: into the store and to all
// blocks. By thread `thread` of kThreads. staged: rows of ScanPacked; inputs: of the prefix, and
// raw: [rows][sent_columns], in shared memory.
template <typename T, int kThreads>
__device__ __forceinline__ void SendColumns(const ScanOp& op, const PassNodes& nodes,
                                            const LayerStore<T>& store, const float* factors,
                                            int thread, const float* staged, const float* inputs,
                                            float* raw) {
  const int states = op.groups * op.d_state, b_width = op.groups * op.padded_d_state;
  const int width = op.heads * op.padded_head;
  const int rows = nodes.rows, columns = op.sent_columns;
  // A thread has one column and every `step`-th row.
  const int step = RowOfItem(kThreads, columns);
  const int first_row = RowOfItem(thread, columns), own = thread - first_row * columns;
  const int column = FirstSentColumn(op) + own;
  const bool active = first_row < min(step, rows) && column < 2 * states + op.heads;
  const bool is_dt = column >= 2 * states, in_conv = active && !is_dt;
  const int splits = active ? Splits(op.partials, column) : 0;
  const float own_bias = staged[kSentBias * columns + own];
  const float in_bias = staged[kSentInBias * columns + own];
#pragma unroll 1
  for (int row = first_row; active && row < rows; row += step) {
    SumVector<1, kMostEarlySplits> sum;
    sum.Load(op.partials, row, column, true);
    while (sum.LoadMissing(op.partials, row, column, splits)) {
    }
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
    }
  }
  __syncwarp();
  SyncWarps<kEarlyBarrier, kThreads>();
  const bool is_c = column >= states;
  const int state = is_c ? column - states : column;
  const int group = RowOfItem(state, op.d_state), n = state - group * op.d_state;
  const int at = group * op.padded_d_state + n;
  // The last column sends the zeros behind it.
  const int count = n + 1 < op.d_state ? 1 : op.padded_d_state - n;
  float* conv = store.conv + (width + column);
#pragma unroll 1
  for (int row = first_row; in_conv && row < rows; row += step) {
    float sum = own_bias;
#pragma unroll
    for (int m = kMaxTaps; m > 0; --m) {
      const int tap = nodes.taps[row][m - 1], earlier = -2 - tap;
      float input = 0.0f;
      if (tap >= 0) input = raw[tap * columns + own];
      if (tap <= -2) {
        input = earlier < op.taps ? inputs[earlier * columns + own]
                                  : LoadNew(conv + earlier * op.channels);
      }
      if (m <= op.taps) sum = fmaf(staged[m * columns + own], input, sum);
    }
    const float value = raw[row * columns + own];
    const T y = FromFloat<T>(Silu(fmaf(staged[own], value, sum)));
    T* to = reinterpret_cast<T*>(op.sent + row * op.sent_bytes) + (is_c ? b_width : 0) + at;
    SendElement(to, y);
#pragma unroll 1
    for (int i = 1; i < count; ++i) SendElement(to + i, FromFloat<T>(0.0f));
    if (!is_c) store.b[(kRing + nodes.first_pending + row) * b_width + at] = y;
    conv[(op.taps + nodes.first_pending + row) * op.channels] = value;
  }
  __syncwarp();  // nobody goes on to wait for what others of the warp have yet to send
#pragma unroll 1
  for (int row = first_row; active && row < rows; row += step) {
    SumVector<1, kMostEarlySplits>::Unsend(op.partials, row, column, splits);
  }
  __syncwarp();
}

// Vectors of 16 bytes of C of the pass's nodes as other blocks send them: kBatch for each of
// kThreads threads, from the `first`-th on, row by row.
template <typename T, int kBatch, int kThreads>
struct SentRows {
  static constexpr int kPer16 = 16 / sizeof(T);
  uint4 v[kBatch];

  template <typename Task>
  static __device__ __forceinline__ void ForEach(const ScanOp& op, int rows, int first,
                                                 const Task& task) {
    const int vectors = op.padded_d_state / kPer16;
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int item = first + k * kThreads, row = RowOfItem(item, vectors);
      task(k, row, item - row * vectors, row < rows);
    }
  }
  // from: of the first row.
  __device__ __forceinline__ void Ask(const ScanOp& op, const char* from, int rows, int first) {
    ForEach(op, rows, first, [&](int k, int row, int at, bool there) {
      v[k] = LoadSentBits(from + (row * op.sent_bytes + at * 16), there);
    });
  }
  // Waits for the last 32, by each warp: with many rows all that is missing is too much to ask for
  // again and again.
  static __device__ __forceinline__ void AwaitSome(const ScanOp& op, const char* from, int rows,
                                                   int lane) {
    const int vectors = op.padded_d_state / kPer16, item = max(rows * vectors - 32, 0) + lane;
    const int row = RowOfItem(item, vectors), at = item - row * vectors;
    uint4 v;
    do {
      v = LoadSentBits(from + (row * op.sent_bytes + at * 16), row < rows);
    } while (IsUnsent<T>(v));
    __syncwarp();
  }
  // Once they have come, place(row, column) is where each goes.
  template <typename Place>
  __device__ __forceinline__ void Take(const ScanOp& op, const char* from, int rows, int first,
                                       const Place& place) {
    bool unsent;
    do {
      unsent = false;
      ForEach(op, rows, first, [&](int k, int row, int at, bool) {
        if (!IsUnsent<T>(v[k])) return;
        v[k] = LoadSentBits(from + (row * op.sent_bytes + at * 16), true);
        unsent = true;
      });
    } while (unsent);
    ForEach(op, rows, first, [&](int k, int row, int at, bool there) {
      if (there) *reinterpret_cast<uint4*>(place(row, at * kPer16)) = v[k];
    });
  }
};

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

// Of the operator's tiles; not every block has one.
__device__ inline bool HasTile(const ScanOp& op) { return static_cast<int>(blockIdx.x) < op.tiles; }
__device__ inline int TileOfBlock(const ScanOp& op) {
  return op.first_tile + static_cast<int>(blockIdx.x);
}

// What the block's part of a scan reads of weights and of earlier passes, into shared memory. One
// warp, which has all of it under way at once.
template <typename T, int kRowTiles>
__device__ __noinline__ void StageScan(const ScanOp& op, const PassNodes& nodes,
                                       const LayerStore<T>& store, char* work) {
  const int lane = threadIdx.x % 32;
  const int channels = op.tile_groups * kGroup, width = op.heads * op.padded_head;
  const ScanLayout<T> layout(8 * kRowTiles, op.padded_d_state, op.sent_columns, channels);
  const char* packed = op.packed + static_cast<int64_t>(blockIdx.x) * op.packed_bytes;
#pragma unroll 4
  for (int at = lane * 16; at < op.packed_bytes; at += 32 * 16) {
    CopyAsync16(work + layout.packed + at, packed + at);
  }
  const int group = op.FirstGroup(TileOfBlock(op)), column = group * kGroup;
  const int vectors = HasTile(op) ? op.GroupsOf(TileOfBlock(op)) * (kGroup / 4) : 0;
  // A lane takes every 32nd vector of 16 bytes of rows of the tile's channels.
  const auto copy_rows = [&](int count, const auto& to, const auto& from) {
    int row = 0, vector = lane;
#pragma unroll 1
    for (int i = lane; i < count * vectors; i += 32, vector += 32) {
      while (vector >= vectors) vector -= vectors, ++row;
      CopyAsync16(to(row) + vector * 4, from(row) + column + vector * 4);
    }
  };
  float* ring_u = reinterpret_cast<float*>(work + layout.ring_u);
  const auto place = [&](int row) { return (nodes.first_checkpoint + row) % kRing; };
  copy_rows(
      nodes.prefix - nodes.first_checkpoint,
      [&](int row) { return ring_u + place(row) * channels; },
      [&](int row) { return store.u + place(row) * width; });
  float* inputs = reinterpret_cast<float*>(work + layout.conv) + kInputRow * channels;
  copy_rows(
      op.taps, [&](int row) { return inputs + row * channels; },
      [&](int row) { return store.conv + row * op.channels; });
  for (int i = lane; i < channels; i += 32) {
    inputs[(kZeroRow - kInputRow) * channels + i] = 0.0f;
  }
  // Decays of two heads and inputs of the columns that are sent: single floats.
  const int head = group / op.HeadGroups(), heads = HasTile(op) ? min(2, op.heads - head) : 0;
  float* decay = reinterpret_cast<float*>(work + layout.decay);
#pragma unroll 1
  for (int i = lane; i < kMostTileHeads * (kRing + nodes.first_pending); i += 32) {
    const int row = i / kMostTileHeads, h = i % kMostTileHeads;
    if (h < heads) {
      CopyAsync4(decay + h * kDecays + row, store.l + (row * op.heads + head + h));
    }
  }
  if (op.first_tile == 0) {
    float* sent_inputs = reinterpret_cast<float*>(work + layout.sent_inputs);
    const int first = FirstSentColumn(op), states = 2 * op.groups * op.d_state;
#pragma unroll 1
    for (int i = lane; i < op.taps * op.sent_columns; i += 32) {
      const int tap = RowOfItem(i, op.sent_columns), column = first + i - tap * op.sent_columns;
      if (column < states) {
        CopyAsync4(sent_inputs + i, store.conv + (tap * op.channels + width + column));
      }
    }
  }
  CopiesWait();
}

// Into the state terms: their decay, and the path sum over the prefix, whose rows nodes share: of
// more than 16 rows a thread has two. By thread `thread` of `threads`.
template <typename T, int kRowTiles>
__device__ __forceinline__ void AddPrefix(const ScanOp& op, const PassNodes& nodes, char* work,
                                          const ScanTile& tile, int thread, int threads) {
  constexpr int kRows = 8 * kRowTiles;
  const int channels = op.tile_groups * kGroup, rows = nodes.rows, prefix = nodes.prefix;
  const int new_rows = kRing + nodes.first_pending;
  const ScanLayout<T> layout(kRows, op.padded_d_state, op.sent_columns, channels);
  float* terms = reinterpret_cast<float*>(work + layout.terms);
  const float* weights = reinterpret_cast<const float*>(work + layout.weights);
  const float* boundary = reinterpret_cast<const float*>(work + layout.boundary);
  const float* decay = reinterpret_cast<const float*>(work + layout.decay);
  const float* ring_u = reinterpret_cast<const float*>(work + layout.ring_u);
  constexpr int kVec = kRows <= 8 ? 2 : 4, kOwn = kRows > 16 ? 2 : 1, kApart = kRows / 2;
  const int each = channels / kVec, whole = prefix / 4 * 4;
#pragma unroll 1
  for (int item = thread; item < (kOwn > 1 ? min(rows, kApart) : rows) * each; item += threads) {
    const int first_row = RowOfItem(item, each), dim = (item - first_row * each) * kVec;
    if (dim >= tile.channels()) continue;
    const int h = dim / kGroup >= tile.first_head_groups ? 1 : 0;
    const float* decays = decay + h * kDecays;
    int starts[kOwn];
    const float* row_weights[kOwn];  // by position
    Vector<kVec> y[kOwn];
    int shared_from = 0;
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      const int row = first_row + k * kApart < rows ? first_row + k * kApart : first_row;
      const int start = nodes.checkpoint[row];
      starts[k] = start;
      shared_from = max(shared_from, start);
      row_weights[k] = weights + (h * kRows + row) * kWeightStride - start;
      const int segment = nodes.position[row] / kSegment * kSegment;
      float exponent = decays[new_rows + row];
      if (segment > start) exponent += boundary[h * kRows + row];
      const float state_decay = expf(exponent);
      y[k] = Vector<kVec>::Load(terms + row * layout.stride + dim);
#pragma unroll
      for (int v = 0; v < kVec; ++v) y[k].v[v] *= state_decay;
    }
    const auto add_four = [&](int k, int position, const Vector<kVec>(&u)[4]) {
      const Vector<4> w = Vector<4>::Load(row_weights[k] + position);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) y[k].v[v] = fmaf(w.v[i], u[i].v[v], y[k].v[v]);
      }
    };
    const auto load_four = [&](int position, Vector<kVec>(&u)[4]) {
      const float* from = ring_u + position % kRing * channels + dim;
#pragma unroll
      for (int i = 0; i < 4; ++i) u[i] = Vector<kVec>::Load(from + i * channels);
    };
    if constexpr (kOwn > 1) {
      // Positions that only some of the thread's rows begin with.
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
#pragma unroll(kVec < 4 ? 4 : 2)
    for (int position = shared_from; position < whole; position += 4) {
      Vector<kVec> u[4];
      load_four(position, u);
#pragma unroll
      for (int k = 0; k < kOwn; ++k) add_four(k, position, u);
    }
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
#pragma unroll 1
      for (int position = max(whole, starts[k]); position < prefix; ++position) {
        const float w = row_weights[k][position];
        const Vector<kVec> u = Vector<kVec>::Load(ring_u + position % kRing * channels + dim);
#pragma unroll
        for (int v = 0; v < kVec; ++v) y[k].v[v] = fmaf(w, u.v[v], y[k].v[v]);
      }
      if (first_row + k * kApart < rows) {
        y[k].Store(terms + (first_row + k * kApart) * layout.stride + dim);
      }
    }
  }
}

// Makes weights of what were scores so far, by thread `thread` of `threads`.
template <typename T, int kRowTiles>
__device__ __forceinline__ void WeightScores(const ScanOp& op, const PassNodes& nodes, char* work,
                                             const ScanTile& tile, int thread, int threads) {
  constexpr int kRows = 8 * kRowTiles;
  const int rows = nodes.rows, prefix = nodes.prefix;
  const int new_rows = kRing + nodes.first_pending;
  const ScanLayout<T> layout(kRows, op.padded_d_state, op.sent_columns, op.tile_groups * kGroup);
  float* weights = reinterpret_cast<float*>(work + layout.weights);
  const float* boundary = reinterpret_cast<const float*>(work + layout.boundary);
  const float* decay = reinterpret_cast<const float*>(work + layout.decay);
  // Positions from a node's checkpoint to the node.
  const int most = min(kRing, nodes.deepest - nodes.first_checkpoint + 1);
#pragma unroll 1
  for (int item = thread; item < rows * most; item += threads) {
    const int row = RowOfItem(item, most), k = item - row * most;
    const int start = nodes.checkpoint[row], position = start + k, t = nodes.position[row];
    if (position > t) continue;
    const int j = position < prefix ? position % kRing : kRing + nodes.path[row][position - prefix];
    float* to = weights + row * kWeightStride + k;
    const float score = *to;
#pragma unroll
    for (int h = 0; h < kMostTileHeads; ++h) {
      if (h >= tile.heads) continue;
      const float* decays = decay + h * kDecays;
      const float node_decay = decays[new_rows + row];
      const float exponent = position < t / kSegment * kSegment
                                 ? (boundary[h * kRows + row] - decays[j]) + node_decay
                                 : node_decay - decays[j];
      to[h * kRows * kWeightStride] = score * expf(exponent);
    }
  }
}

// Whether each block makes some scores and sends them to all, instead of all of its own. That is
// one hop more, and pays with many rows alone.
template <typename T>
constexpr bool SharesScores(int row_tiles) {
  return RowsFirst<T>(row_tiles);
}

// Stored rows of B that nodes of the pass read, in groups of eight: of the prefix, then pending.
struct StoredGroups {
  static constexpr int kRingGroups = kRing / 8;
  int ring_first, ring_groups, all;

  // Of the prefix those that no node reads are left out.
  __device__ __forceinline__ static StoredGroups Of(const PassNodes& nodes) {
    const int ring_groups = (nodes.prefix - nodes.first_checkpoint + 7) / 8;
    return {nodes.first_checkpoint % kRing / 8, ring_groups,
            ring_groups + (nodes.first_pending + nodes.rows + 7) / 8};
  }
  __device__ __forceinline__ int operator[](int i) const {
    return i < ring_groups ? (ring_first + i) % kRingGroups : kRingGroups + i - ring_groups;
  }
};

// The block's part of the scores C_i . B_j, by one warp: of 16 rows and eight stored rows at a
// time.
template <typename T, int kRowTiles>
__device__ __forceinline__ void SendScores(const ScanOp& op, const PassNodes& nodes,
                                           const LayerStore<T>& store) {
  constexpr int kRowBlocks = kRowTiles / 2, kAhead = sizeof(T) == 2 ? kBlocksAhead : 1;
  const int lane = threadIdx.x % 32, quad = lane % 4, octet = lane / 4;
  const int ds = op.padded_d_state, b_width = op.groups * ds, rows = nodes.rows;
  const int new_rows = kRing + nodes.first_pending, end_rows = new_rows + rows;
  const StoredGroups stored = StoredGroups::Of(nodes);
  const int scores_at = SentScoresAt<T>(op.groups, ds, op.heads);
#pragma unroll 1
  for (int task = blockIdx.x; task < op.groups * stored.all * kRowBlocks; task += gridDim.x) {
    const int m = task % kRowBlocks, i = task / kRowBlocks, state_group = i / stored.all;
    const int group = stored[i - state_group * stored.all], j = group * 8 + octet;
    if (m * 16 >= rows) continue;
    const T* sent_b = reinterpret_cast<const T*>(op.sent + (j - new_rows) * op.sent_bytes);
    const T* b_from =
        (j >= new_rows ? sent_b : store.b + j * b_width) + state_group * ds + quad * 8;
    const bool b_there = j < end_rows, b_sent = j >= new_rows && b_there;
    const int low = m * 16 + octet, high = low + 8;
    const T* c_low = reinterpret_cast<const T*>(op.sent + low * op.sent_bytes) + b_width +
                     state_group * ds + quad * 8;
    const T* c_high = reinterpret_cast<const T*>(op.sent + high * op.sent_bytes) + b_width +
                      state_group * ds + quad * 8;
    float scores[4] = {};
#pragma unroll 1
    for (int first = 0; first < ds; first += 32 * kAhead) {
      RowVector<T> b[kAhead];
      RowPair<T, false> c[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int n = first + k * 32;
        b[k].LoadSent(b_from + n, b_there && n < ds);
        c[k].low.LoadSent(c_low + n, low < rows && n < ds);
        c[k].high.LoadSent(c_high + n, high < rows && n < ds);
      }
      bool unsent;
      do {
        unsent = false;
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          const int n = first + k * 32;
          if (b_sent && b[k].Unsent()) b[k].LoadSent(b_from + n, true), unsent = true;
          if (c[k].low.Unsent()) c[k].low.LoadSent(c_low + n, true), unsent = true;
          if (c[k].high.Unsent()) c[k].high.LoadSent(c_high + n, true), unsent = true;
        }
      } while (unsent);
      __syncwarp();
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (first + k * 32 >= ds) break;
        FragmentB<T> second[2];
        SetSecond(second, b[k]);
#pragma unroll
        for (int step = 0; step < 2; ++step) c[k].AddProducts(scores, second, step);
      }
    }
    float* to = reinterpret_cast<float*>(op.sent + low * op.sent_bytes + scores_at) +
                state_group * kSentScores + group * 8 + quad * 2;
    if (low < rows) Send2(to, scores[0], scores[1]);
    if (high < rows) Send2(to + 8 * op.sent_bytes / 4, scores[2], scores[3]);
  }
  __syncwarp();
}

// Weights of the tile's heads from scores as they come, four positions at a time:
// weights[i][position of j - checkpoint of i] = exp(difference of log decays) * score, as
// WeightScores makes them. By thread `thread` of kThreads.
template <typename T, int kRowTiles, int kThreads>
__device__ __forceinline__ void WeightSentScores(const ScanOp& op, const PassNodes& nodes,
                                                 char* work, const ScanTile& tile, int thread) {
  constexpr int kRows = 8 * kRowTiles, kBatch = 3;
  const int rows = nodes.rows, prefix = nodes.prefix;
  const int new_rows = kRing + nodes.first_pending;
  const ScanLayout<T> layout(kRows, op.padded_d_state, op.sent_columns, op.tile_groups * kGroup);
  float* weights = reinterpret_cast<float*>(work + layout.weights);
  const float* boundary = reinterpret_cast<const float*>(work + layout.boundary);
  const float* decay = reinterpret_cast<const float*>(work + layout.decay);
  const char* sent = op.sent + SentScoresAt<T>(op.groups, op.padded_d_state, op.heads) +
                     tile.state_group * kSentScores * 4;
  // Four positions from a node's checkpoint to the node are an item.
  const int most = min(kRing, nodes.deepest - nodes.first_checkpoint + 1);
  const int each = (most + 3) / 4, items = rows * each;
  // By all threads, so that warps come back together.
#pragma unroll 1
  for (int at = 0; at < items; at += kBatch * kThreads) {
    const int first = at + thread;
    float score[kBatch][4];
    int place[kBatch];        // in weights of the first head
    int stored[kBatch] = {};  // stored rows, one in each byte
    const auto ask = [&](int n, bool all) {
      const float* from = reinterpret_cast<const float*>(
          sent + RowOfItem(first + n * kThreads, each) * op.sent_bytes);
      const uint32_t j = stored[n];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = j >> (8 * e) & 0xff;
        if (all || IsUnsent(score[n][e])) score[n][e] = LoadSent(from + row, row != 0xff);
      }
    };
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int item = first + n * kThreads, row = RowOfItem(item, each);
      const int k = (item - row * each) * 4;
      const bool there = item < items;
      const int start = there ? nodes.checkpoint[row] : 0, t = there ? nodes.position[row] : -1;
      uint32_t bytes = 0;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int position = start + k + e;
        uint32_t j = 0xff;
        if (position <= t) {
          j = position < prefix ? position % kRing : kRing + nodes.path[row][position - prefix];
        }
        bytes |= j << (8 * e);
      }
      place[n] = row * kWeightStride + k;
      stored[n] = bytes;
      ask(n, true);
    }
    bool unsent;
    do {
      unsent = false;
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        bool missing = false;
#pragma unroll
        for (int e = 0; e < 4; ++e) missing |= IsUnsent(score[n][e]);
        if (missing) ask(n, false), unsent = true;
      }
    } while (unsent);
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      if (first + n * kThreads >= items) break;
      const int row = RowOfItem(first + n * kThreads, each);
      const int position = nodes.checkpoint[row] + place[n] % kWeightStride;
      const bool before = position < nodes.position[row] / kSegment * kSegment;
#pragma unroll
      for (int h = 0; h < kMostTileHeads; ++h) {
        if (h >= tile.heads) continue;
        const float* decays = decay + h * kDecays;
        const float node_decay = decays[new_rows + row];
        const float at_boundary = boundary[h * kRows + row];
        float w[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int j = static_cast<uint32_t>(stored[n]) >> (8 * e) & 0xff;
          const float l = j == 0xff ? 0.0f : decays[j];
          const float exponent = before ? (at_boundary - l) + node_decay : node_decay - l;
          w[e] = score[n][e] * expf(exponent);
        }
        *reinterpret_cast<float4*>(weights + h * kRows * kWeightStride + place[n]) =
            make_float4(w[0], w[1], w[2], w[3]);
      }
    }
  }
}

// Two rows of a first operand's halves of S in a block of 32 states, by step and half.
struct StateBlock {
  float4 v[2][2];
};

// Factors of the rows that the product read, by warp `warp` of kWarps, once the sums of squares
// come.
template <int kRowTiles, int kWarps>
__device__ __forceinline__ void MakeFactors(const RowNorm& norm, int rows, int warp,
                                            float* factors) {
  constexpr int kBatch = kRowTiles < 8 ? kRowTiles : 8;
  const int lane = threadIdx.x % 32;
  if (8 * kRowTiles == kStripRows && norm.of_quads != 0) {
#pragma unroll 1
    for (int row = warp; row < rows; row += kWarps) {
      const float factor = QuadFactor(norm, row);
      if (lane == 0) factors[row] = factor;
    }
    return;
  }
#pragma unroll 1
  for (int first = warp; first < rows; first += kBatch * kWarps) {
    float sums[kBatch] = {};
#pragma unroll 1
    for (int part = lane; part < PadTo(32, norm.count); part += 32) {
      float v[kBatch];
      bool unsent;
      do {
        unsent = false;
#pragma unroll
        for (int n = 0; n < kBatch; ++n) {
          const int row = first + n * kWarps;
          v[n] = LoadSent(norm.squares + row * norm.count + part, part < norm.count && row < rows);
          unsent |= SendsActs(8 * kRowTiles) && IsUnsent(v[n]);
        }
      } while (unsent);
#pragma unroll
      for (int n = 0; n < kBatch; ++n) sums[n] += v[n];
    }
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kBatch; ++n) sums[n] = WarpSum(sums[n]);
    if (lane == 0) {
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        const int row = first + n * kWarps;
        if (row < rows) factors[row] = rsqrtf(fmaf(sums[n], norm.inverse_width, norm.eps));
      }
    }
  }
}

// How often done() of ScanEarly is called.
template <typename T>
constexpr int Dones(int row_tiles) {
  return kRacecheck ? 32 * EarlyWarps<T>(row_tiles) : 1;
}

// What a tile's scan needs neither x nor z for. By the last EarlyWarps computing warps, which make
// the rows' factors and send B, C and dt; then four make the state term and four log decays and
// scores, with which the first ones help. Where there are twelve, the last four make the state term
// of half the rows, and all weights. done() tells that factors are there.
template <typename T, int kRowTiles, typename Done>
__device__ __forceinline__ void ScanEarly(const ScanOp& op, const PassNodes& nodes,
                                          const LayerStore<T>& store, const RowNorm& norm,
                                          float* factors, char* work, const Done& done) {
  constexpr int kRows = 8 * kRowTiles;
  constexpr bool kFew = kRowTiles <= 2;
  constexpr bool kShares = SharesScores<T>(kRowTiles), kHelps = kRowTiles > 1 && !kShares;
  constexpr int kWarps = EarlyWarps<T>(kRowTiles), kThreads = 32 * kWarps;
  constexpr int kHalfWarps = 4, kHalf = 32 * kHalfWarps, kParts = kShares ? 2 : 1;
  static_assert(kWarps == (1 + kParts) * kHalfWarps);
  constexpr int kTermBarrier = 4, kScoreBarrier = 5, kCHereBarrier = 6;
  const int tid = threadIdx.x - (kConsumers - kThreads);
  const int role = __shfl_sync(0xffffffffu, tid / kHalf, 0);  // 1: decays and scores
  const bool makes_terms = role != 1;
  const int lane = tid % 32, quad = lane % 4, octet = lane / 4;
  const int warp = tid / 32 % kHalfWarps;  // of its role
  const int ds = op.padded_d_state, c_stride = RowStride<T>(ds);
  const int channels = op.tile_groups * kGroup;
  const ScanLayout<T> layout(kRows, ds, op.sent_columns, channels);
  const int rows = nodes.rows, prefix = nodes.prefix;
  const int new_rows = kRing + nodes.first_pending;  // stored rows before those of this pass
  const int end_rows = new_rows + rows;
  const ScanTile& tile = *reinterpret_cast<const ScanTile*>(work + layout.packed);
  const int b_width = op.groups * ds, state_column = tile.state_group * ds;
  const bool has_tile = HasTile(op), sends = op.first_tile == 0;
  T* c = reinterpret_cast<T*>(work + layout.c);
  float* terms = reinterpret_cast<float*>(work + layout.terms);
  float* weights = reinterpret_cast<float*>(work + layout.weights);
  float* dts = reinterpret_cast<float*>(work + layout.dt);
  float* boundary = reinterpret_cast<float*>(work + layout.boundary);
  float* decay = reinterpret_cast<float*>(work + layout.decay);
  const ScanPacked packed(op.sent_columns, channels);
  const float* skip_and_a = reinterpret_cast<const float*>(work + layout.packed + packed.skip);
  const float* sent_staged = reinterpret_cast<const float*>(work + layout.packed + packed.sent);
  const float* sent_inputs = reinterpret_cast<const float*>(work + layout.sent_inputs);
  float* sent_raw = reinterpret_cast<float*>(work + layout.sent);
  MakeFactors<kRowTiles, kWarps>(norm, rows, tid / 32, factors);
  SyncWarps<kEarlyBarrier, kThreads>();
  if (kRacecheck || tid == 0) done();
  if (sends) {
    SendColumns<T, kThreads>(op, nodes, store, factors, tid, sent_staged, sent_inputs, sent_raw);
  }
  const bool one_checkpoint = nodes.first_checkpoint == nodes.last_checkpoint;
  // Warps that have no groups of channels for terms help with scores of more than 8 rows; of fewer
  // it made passes longer (docs/performance.md).
  const int term_warps = kHelps ? min(kHalfWarps, (tile.groups + 1) / 2) : kHalfWarps;
  const int score_warps = 2 * kHalfWarps - term_warps;
  const int score_warp = !makes_terms         ? warp
                         : warp >= term_warps ? kHalfWarps + warp - term_warps
                                              : -1;
  if constexpr (kShares) {
    // By a warp that may have no groups of channels.
    if (sends && tid / 32 == kWarps - 1) SendScores<T, kRowTiles>(op, nodes, store);
  }
  // A group of stored rows of B a warp at a time.
  RowVector<T> b[kBlocksAhead];
  const auto row_at = [&](int group) {
    const int j = group * 8 + octet;
    const T* sent = reinterpret_cast<const T*>(op.sent + (j - new_rows) * op.sent_bytes);
    return (j >= new_rows ? sent : store.b + j * b_width) + (state_column + quad * 8);
  };
  const auto load_rows = [&](int group) {
    const T* from = row_at(group);
    const bool there = group * 8 + octet < end_rows;
#pragma unroll
    for (int k = 0; k < kBlocksAhead; ++k) b[k].LoadSent(from + k * 32, there && k * 32 < ds);
  };
  StoredGroups stored = {};
  if (kHelps) stored = StoredGroups::Of(nodes);
  // Scores C_i . B_j, and of few rows weights[i][position of j - checkpoint of i] =
  // exp(difference of log decays) * score. Across the segment boundary the first segment's rest
  // and the node's own part are added.
  const auto make_scores = [&] {
    constexpr int kRowBlocks = (kRows + 15) / 16;
#pragma unroll 1
    for (int i = score_warp; i < stored.all; i += score_warps) {
      const int group = stored[i];
      const T* from = row_at(group);
      const bool there = group * 8 + octet < end_rows;
      float scores[kRowBlocks][4] = {};
#pragma unroll 1
      for (int first = 0; first < ds; first += 32 * kBlocksAhead) {
        const auto load = [&] {
#pragma unroll
          for (int k = 0; k < kBlocksAhead; ++k) {
            b[k].LoadSent(from + first + k * 32, there && first + k * 32 < ds);
          }
        };
        const auto unsent = [&] {
          bool is = false;
#pragma unroll
          for (int k = 0; k < kBlocksAhead; ++k) is |= b[k].Unsent();
          return is && group * 8 + octet >= new_rows;
        };
        // Who helps has loaded none ahead of its first ones.
        if (first > 0 || (makes_terms && i == score_warp)) load();
        while (unsent()) load();
        FragmentB<T> second[kBlocksAhead][2];
#pragma unroll
        for (int k = 0; k < kBlocksAhead; ++k) SetSecond(second[k], b[k]);
        if (first + 32 * kBlocksAhead >= ds && i + score_warps < stored.all) {
          load_rows(stored[i + score_warps]);
        }
#pragma unroll
        for (int k = 0; k < kBlocksAhead; ++k) {
          const int n = first + k * 32;
          if (n >= ds) break;
          constexpr int kInTurn = kRowBlocks < 2 ? 1 : 2;
#pragma unroll
          for (int m = 0; m < kRowBlocks; m += kInTurn) {
            RowPair<T, kRows == 8> c_rows[kInTurn];
#pragma unroll
            for (int q = 0; q < kInTurn; ++q) {
              const T* at = c + ((m + q) * 16 + octet) * c_stride + n + quad * 8;
              c_rows[q].Load(at, at + 8 * c_stride);
            }
#pragma unroll
            for (int step = 0; step < 2; ++step) {
#pragma unroll
              for (int q = 0; q < kInTurn; ++q) {
                c_rows[q].AddProducts(scores[m + q], second[k], step);
              }
            }
          }
        }
      }
      int positions[2];   // of the lane's two stored rows, -1: none
      uint64_t below[2];  // rows on whose paths they are
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int j = group * 8 + quad * 2 + half;
        int position = -1;
        below[half] = ~uint64_t{0};
        if (j < kRing) {
          // The latest position of the prefix that has this place in the ring.
          position = (prefix - 1) / kRing * kRing + j;
          if (position >= prefix) position -= kRing;
        } else if (j < end_rows) {
          position = prefix + nodes.depth[j - kRing];
          below[half] = nodes.below[j - kRing];
        }
        positions[half] = position;
      }
      if (!kFew && one_checkpoint) {
        // The same place for all rows; those that the pass does not have have places too.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int place = positions[half] - nodes.first_checkpoint;
          float* to = weights + octet * kWeightStride + place;
          const uint64_t wanted = place < 0 ? 0 : below[half] >> octet;
#pragma unroll
          for (int n = 0; n < kRowTiles; ++n) {
            if ((wanted >> (n * 8) & 1) == 0) continue;
            to[n * 8 * kWeightStride] = scores[n / 2][n % 2 * 2 + half];
          }
        }
        continue;
      }
#pragma unroll
      for (int n = 0; n < kRowTiles; ++n) {
        const int row = n * 8 + octet;
        if (row >= rows) continue;
        const int start = nodes.checkpoint[row];
        const int segment = nodes.position[row] / kSegment * kSegment;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int position = positions[half];
          const int j = group * 8 + quad * 2 + half;
          if (position < start || (below[half] >> row & 1) == 0) continue;
          const float score = scores[n / 2][n % 2 * 2 + half];
          if constexpr (!kFew) {
            weights[row * kWeightStride + position - start] = score;
          } else {
#pragma unroll 1
            for (int h = 0; h < tile.heads; ++h) {
              const float* decays = decay + h * kDecays;
              const float node_decay = decays[new_rows + row];
              const float exponent = position < segment
                                         ? (boundary[h * kRows + row] - decays[j]) + node_decay
                                         : node_decay - decays[j];
              weights[(h * kRows + row) * kWeightStride + position - start] =
                  score * expf(exponent);
            }
          }
        }
      }
    }
  };
  if (makes_terms) {
    if (!has_tile) return;
    // The state term S C_i with the checkpoint that node i reads: a warp has two groups of
    // channels.
    constexpr int kAhead = kRowTiles == 1 ? 3 : 2;  // blocks of 32 states
    constexpr int kTermTiles = kRowTiles / kParts;
    const int first_row = role / 2 * kTermTiles * 8;
    const int groups_left = tile.groups - warp * 2;
    StateBlock s[kAhead];
    const auto load_state = [&](int position, int block, StateBlock& to) {
      const float* at = store.checkpoints[position / kSegment % 2] +
                        ((tile.first_group + warp * 2) * kGroup * ds + block * 256 + lane * 4);
      const bool there = position > 0 && block * 32 < ds;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i % 2, step = i / 2;
        to.v[step][half] =
            LoadWeight4(at + (half * kGroup * ds + step * 128), there && half < groups_left);
      }
    };
#pragma unroll
    for (int k = 0; k < kAhead; ++k) load_state(nodes.first_checkpoint, k, s[k]);
    if (role == 0) {
      using SentVectors = SentRows<T, kRowTiles, kHalf>;
      const char* from = op.sent + (b_width + state_column) * static_cast<int>(sizeof(T));
      const int end = rows * (ds / SentVectors::kPer16);
      if (kRowTiles == 8) SentVectors::AwaitSome(op, from, rows, lane);
#pragma unroll 1
      for (int first = tid; first < end; first += kRowTiles * kHalf) {
        SentVectors vectors;
        vectors.Ask(op, from, rows, first);
        vectors.Take(op, from, rows, first,
                     [&](int row, int column) { return c + (row * c_stride + column); });
      }
    }
    if constexpr (kShares) {
      SyncWarps<kTermBarrier, kParts * kHalf>();
    } else if (score_warp < 0) {
      ArriveWarps<kCHereBarrier, kThreads>();
      SyncWarps<kTermBarrier, kHalf>();
    } else {
      ArriveWarps<kTermBarrier, kHalf>();
      SyncWarps<kCHereBarrier, kThreads>();
    }
#pragma unroll 1
    for (int position = nodes.first_checkpoint;
         groups_left > 0 && position <= nodes.last_checkpoint; position += kSegment) {
      float term[kTermTiles][4] = {};
      if (position != nodes.first_checkpoint) {
#pragma unroll
        for (int k = 0; k < kAhead; ++k) load_state(position, k, s[k]);
      }
#pragma unroll 1
      for (int block = 0; block * 32 < ds; ++block) {
        FragmentA<float> fa[2];
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          SetPair(fa[step], 0, s[0].v[step][0].x, s[0].v[step][0].y);
          SetPair(fa[step], 1, s[0].v[step][1].x, s[0].v[step][1].y);
          SetPair(fa[step], 2, s[0].v[step][0].z, s[0].v[step][0].w);
          SetPair(fa[step], 3, s[0].v[step][1].z, s[0].v[step][1].w);
        }
#pragma unroll
        for (int k = 0; k + 1 < kAhead; ++k) s[k] = s[k + 1];
        load_state(position, block + kAhead, s[kAhead - 1]);
        constexpr int kInTurn = kTermTiles < 4 ? kTermTiles : 4;
#pragma unroll
        for (int i = 0; i < kTermTiles; i += kInTurn) {
          RowVector<T> from[kInTurn];
#pragma unroll
          for (int q = 0; q < kInTurn; ++q) {
            from[q].Load(c + (first_row + (i + q) * 8 + octet) * c_stride + block * 32 + quad * 8);
          }
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            FragmentB<T> fb[kInTurn];
#pragma unroll
            for (int q = 0; q < kInTurn; ++q) {
              from[q].Set(fb[q], 0, step, 0);
              from[q].Set(fb[q], 1, step, 1);
            }
            if constexpr (sizeof(T) == 2) {
              MultiplyInTurn(term, i, fa[step], fb);
            } else {
#pragma unroll
              for (int q = 0; q < kInTurn; ++q) Multiply(term[i + q], fa[step], fb[q]);
            }
          }
        }
      }
      float* to = terms + warp * 2 * kGroup + octet;
#pragma unroll
      for (int i = 0; i < kTermTiles; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = first_row + i * 8 + quad * 2 + e % 2;
          const bool wanted = one_checkpoint || (row < rows && nodes.checkpoint[row] == position);
          if (wanted && e / 2 < groups_left) to[row * layout.stride + e / 2 * kGroup] = term[i][e];
        }
      }
    }
  } else {
    const int thread = tid - kHalf;
    if (!has_tile) return;
    if (!kHelps && !kShares) stored = StoredGroups::Of(nodes);
    if (!kShares && score_warp < stored.all) load_rows(stored[score_warp]);
    {
      const int item = thread ^ (kHalf - 1), row = item / kMostTileHeads, h = item % kMostTileHeads;
      if (row < rows && h < tile.heads) {
        const float* from = reinterpret_cast<const float*>(
            op.sent + row * op.sent_bytes + 2 * b_width * static_cast<int>(sizeof(T)) +
            (tile.first_head + h) * 4);
        float dt;
        do {
          dt = LoadSent(from);
        } while (IsUnsent(dt));
        dts[h * kRows + row] = dt;
      }
    }
    SyncWarps<kScoreBarrier, kHalf>();

    // Log decays along the path, each from the start of its aligned segment, and the one at the end
    // of the segment before the node's: a row and head a thread, few of each warp.
    {
      const int item = kHalfWarps - 1 - warp + lane * kHalfWarps;
      const int row = item / kMostTileHeads, h = item % kMostTileHeads;
      if (row < rows && h < tile.heads) {
        float* decays = decay + h * kDecays;
        const int t = nodes.position[row], start = nodes.checkpoint[row];
        const int segment = t / kSegment * kSegment;
        const float a = skip_and_a[h * 2 + 1];
        const int from = max(start, prefix);
        float l = start < prefix ? decays[(prefix - 1) % kRing] : 0.0f;
        float at_boundary =
            segment > start && segment < prefix ? decays[(segment - 1) % kRing] : 0.0f;
        const uint8_t* path = nodes.path[row] - prefix;
#pragma unroll 1
        for (int position = from; position <= t; ++position) {
          // Of the earlier pending nodes the stored value is the sum so far.
          const int node = path[position] - nodes.first_pending;
          const float stored_l = decays[node < 0 ? new_rows + node : 0];
          if (position == segment && segment > start) at_boundary = l;
          const float next =
              fmaf(dts[h * kRows + max(node, 0)], a, position % kSegment == 0 ? 0.0f : l);
          l = node < 0 ? stored_l : next;
        }
        decays[new_rows + row] = l;
        boundary[h * kRows + row] = at_boundary;
        // The block with a head's first channels stores it.
        if (h > 0 || tile.first_group % op.HeadGroups() == 0) {
          store.l[(new_rows + row) * op.heads + tile.first_head + h] = l;
        }
      }
    }
    if constexpr (kShares) {
      ArriveWarps<kCHereBarrier, kThreads>();
      SyncWarps<kScoreBarrier, kHalf>();
    } else {
      SyncWarps<kCHereBarrier, kThreads>();
      if (!kHelps) make_scores();
    }
  }
  if constexpr (kShares) {
    if (makes_terms) SyncWarps<kCHereBarrier, kThreads>();
    WeightSentScores<T, kRowTiles, kThreads>(op, nodes, work, tile, tid);
  }
  if (kHelps && score_warp >= 0) make_scores();
  if constexpr (!kFew && !kShares) {
    SyncWarps<kEarlyBarrier, kThreads>();
    WeightScores<T, kRowTiles>(op, nodes, work, tile, tid, kThreads);
  }
  SyncWarps<kEarlyBarrier, kThreads>();
  AddPrefix<T, kRowTiles>(op, nodes, work, tile, tid, kThreads);
}

// x before the convolution, and the gates before activation, of the tile's sums as the product
// leaves them: a warp has a block of 16 outputs, x, and 8 further z, of channel lane / 4 of its
// group.
template <typename T, int kRowTiles>
__device__ __forceinline__ void KeepTile(const ScanOp& op, int rows, const float* factors,
                                         char* work, const float (&sums)[kRowTiles][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4;
  const ScanLayout<T> layout(8 * kRowTiles, op.padded_d_state, op.sent_columns,
                             op.tile_groups * kGroup);
  if (warp >= reinterpret_cast<const ScanTile*>(work + layout.packed)->groups) return;
  const int channel = warp * kGroup + lane / 4;
  float* raw = reinterpret_cast<float*>(work + layout.raw) + channel;
  float* gates = reinterpret_cast<float*>(work + layout.gate) + channel;
  const float* bias = reinterpret_cast<const float*>(work + layout.conv) + channel;
  const float x_bias = bias[kXBias * op.tile_groups * kGroup];
  const float z_bias = bias[kZBias * op.tile_groups * kGroup];
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int row = n * 8 + quad * 2 + c;
      // Of more rows those that the pass does not have are kept as well; nobody reads them.
      if (kRowTiles == 1 && row >= rows) continue;
      const float factor = factors[row];
      raw[row * layout.stride] = fmaf(factor, sums[n][c], x_bias);
      gates[row * layout.stride] = fmaf(factor, sums[n][2 + c], z_bias);
    }
  }
}

// The same of sums with the rows first: all four warps have some of each group.
template <typename T, int kRowTiles, int kTiles>
__device__ __forceinline__ void KeepRows(const ScanOp& op, const float* factors, char* work,
                                         const float (&sums)[kTiles][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int channels = op.tile_groups * kGroup, first_row = warp * 16 + lane / 4;
  const ScanLayout<T> layout(8 * kRowTiles, op.padded_d_state, op.sent_columns, channels);
  const int groups = reinterpret_cast<const ScanTile*>(work + layout.packed)->groups;
  const int channel = lane % 4 * 2, at = first_row * layout.stride + channel;
  float* raw = reinterpret_cast<float*>(work + layout.raw) + at;
  float* gates = reinterpret_cast<float*>(work + layout.gate) + at;
  const float* bias = reinterpret_cast<const float*>(work + layout.conv) + channel;
  const float factor[2] = {factors[first_row], factors[first_row + 8]};
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int group = n / 2;
    if (group >= groups) break;
    const float2 b = *reinterpret_cast<const float2*>(
        bias + (n % 2 == 0 ? kXBias : kZBias) * channels + group * kGroup);
    float* to = (n % 2 == 0 ? raw : gates) + group * kGroup;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      *reinterpret_cast<float2*>(to + half * 8 * layout.stride) =
          make_float2(fmaf(factor[half], sums[n][half * 2], b.x),
                      fmaf(factor[half], sums[n][half * 2 + 1], b.y));
    }
  }
}

// Of a row: squares [kMostGroups].
__device__ inline void SendSquares(const ScanOp& op, const ScanTile& tile, const float* squares,
                                   int row) {
  float* to = op.squares + row * op.norm_groups * op.square_parts;
  float sum = 0.0f;
#pragma unroll 1
  for (int g = 0; g < tile.groups; ++g) {
    sum += squares[g];
    const bool last = g + 1 == tile.groups || tile.square[g + 1] != tile.square[g];
    Send(to + tile.square[g], sum, last);
    if (last) sum = 0.0f;
  }
}

// The rest, by all computing threads, once that is done and ScanEarly.
template <typename T, int kRowTiles>
__device__ __forceinline__ void ScanLate(const ScanOp& op, const PassNodes& nodes,
                                         const LayerStore<T>& store, char* work) {
  constexpr int kRows = 8 * kRowTiles;
  constexpr int kVec = kRows < 32 ? kRows / 8 : 4;  // channels of an item
  const int tid = threadIdx.x, channels = op.tile_groups * kGroup;
  const ScanLayout<T> layout(kRows, op.padded_d_state, op.sent_columns, channels);
  const ScanTile& tile = *reinterpret_cast<const ScanTile*>(work + layout.packed);
  const int stride = layout.stride;
  const float* raw = reinterpret_cast<const float*>(work + layout.raw);
  const float* gates = reinterpret_cast<const float*>(work + layout.gate);
  float* xs = reinterpret_cast<float*>(work + layout.x);
  float* pending_u = reinterpret_cast<float*>(work + layout.pending_u);
  float* squares = reinterpret_cast<float*>(work + layout.squares);
  const float* terms = reinterpret_cast<const float*>(work + layout.terms);
  float* weights = reinterpret_cast<float*>(work + layout.weights);
  const float* dts = reinterpret_cast<const float*>(work + layout.dt);
  const float* decay = reinterpret_cast<const float*>(work + layout.decay);
  const float* conv = reinterpret_cast<const float*>(work + layout.conv);
  const float* skips = reinterpret_cast<const float*>(work + layout.packed +
                                                      ScanPacked(op.sent_columns, channels).skip);
  const int rows = nodes.rows, prefix = nodes.prefix, width = op.heads * op.padded_head;

  // For later passes: when what others wait for is on its way, unless a barrier is behind it.
  constexpr bool kStoresLast = SendsActs(kRows);
  const auto store_node = [&](int row, int dim, const Vector<kVec>& u, const Vector<kVec>& input) {
    const int column = tile.column() + dim, pending = nodes.first_pending + row;
    u.Store(store.u + (kRing + pending) * width + column);
    input.Store(store.conv + (op.taps + pending) * op.channels + column);
  };

  // Convolution along ancestors, and u.
  const int each = channels / kVec;
#pragma unroll 1
  for (int item = tid; item < rows * each; item += kConsumers) {
    const int row = RowOfItem(item, each), dim = (item - row * each) * kVec;
    if (dim >= tile.channels()) continue;
    Vector<kVec> sum = Vector<kVec>::Load(conv + kConvBias * channels + dim);
    Vector<kVec> inputs[kMaxTaps + 1];
#pragma unroll
    for (int m = 0; m <= kMaxTaps; ++m) {
      const int tap = m == 0 ? row : nodes.taps[row][m - 1], earlier = -2 - tap;
      // Rows of the prefix, or zeros.
      const float* from = conv + (earlier < 0 ? kZeroRow : kInputRow + earlier) * channels;
      if (tap >= 0) from = raw + tap * stride;
      if (earlier >= op.taps) {
        inputs[m] =
            Vector<kVec>::LoadNew(store.conv + (earlier * op.channels + tile.column() + dim));
      } else {
        inputs[m] = Vector<kVec>::Load(from + dim);
      }
    }
#pragma unroll
    for (int m = kMaxTaps; m >= 0; --m) {
      if (m > op.taps) continue;
      const Vector<kVec> weight = Vector<kVec>::Load(conv + m * channels + dim);
#pragma unroll
      for (int v = 0; v < kVec; ++v) sum.v[v] = fmaf(weight.v[v], inputs[m].v[v], sum.v[v]);
    }
    const int group = dim / kGroup, in_group = dim % kGroup;
    const float dt = dts[(group >= tile.first_head_groups ? kRows : 0) + row];
    Vector<kVec> x, u;
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      x.v[v] = Silu(sum.v[v]);
      u.v[v] = dt * (in_group + v < tile.dims[group] ? x.v[v] : 0.0f);
    }
    x.Store(xs + row * stride + dim);
    u.Store(pending_u + (nodes.first_pending + row) * channels + dim);
    if (!kStoresLast) store_node(row, dim, u, inputs[0]);
  }
#pragma unroll 1
  for (int i = tid; i < nodes.first_pending * tile.channels(); i += kConsumers) {
    const int row = i / tile.channels(), dim = i - row * tile.channels();
    pending_u[row * channels + dim] = store.u[(kRing + row) * width + tile.column() + dim];
  }
  SyncThreads<kConsumers>();

  // The path sum over the pending nodes, skip, gate and the norm's weights.
#pragma unroll 1
  for (int first = 0; first < rows * each; first += kConsumers) {
    const int item = first + tid;
    const int row = RowOfItem(item, each), dim = (item - row * each) * kVec;
    const int group = dim / kGroup, in_group = dim % kGroup;
    float square[4] = {};
    if (row < rows && dim < tile.channels()) {
      const int h = group >= tile.first_head_groups ? 1 : 0;
      const int dims = tile.dims[group] - in_group;  // that are there from dim on
      const float* row_weights =
          weights + (h * kRows + row) * kWeightStride + (prefix - nodes.checkpoint[row]);
      const int count = nodes.position[row] - prefix + 1;
      Vector<kVec> y = Vector<kVec>::Load(terms + row * stride + dim);
      const Vector<kVec> x = Vector<kVec>::Load(xs + row * stride + dim);
      const Vector<kVec> gate = Vector<kVec>::Load(gates + row * stride + dim);
      const Vector<kVec> norm = Vector<kVec>::Load(conv + kNormRow * channels + dim);
#pragma unroll 2
      for (int k = 0; k < count; ++k) {
        const float w = row_weights[k];
        const Vector<kVec> u = Vector<kVec>::Load(pending_u + nodes.path[row][k] * channels + dim);
#pragma unroll
        for (int v = 0; v < kVec; ++v) y.v[v] = fmaf(w, u.v[v], y.v[v]);
      }
      const float skip = skips[h * 2];
      float out[4] = {};
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        if (v >= dims) continue;
        const float value = __fmul_rn(fmaf(skip, x.v[v], y.v[v]), Silu(gate.v[v]));
        square[v] = __fmul_rn(value, value);
        out[v] = __fmul_rn(value, norm.v[v]);
      }
      const int place = tile.place[group] + in_group;
      if (kVec == 4 && op.head_dim % 4 == 0) {
        if (dims > 0) {
          SendAct4<T>(op.act, kRows, row, place, make_float4(out[0], out[1], out[2], out[3]));
        }
      } else {
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          if (v >= dims) continue;
          SendElement(static_cast<T*>(op.act) + ActIndex<T>(kRows, row, place + v),
                      FromFloat<T>(out[v]));
        }
      }
      if (in_group == 0) {
#pragma unroll 1
        for (int i = 0; i < tile.zeros[group]; ++i) {
          SendElement(
              static_cast<T*>(op.act) + ActIndex<T>(kRows, row, place + tile.dims[group] + i),
              FromFloat<T>(0.0f));
        }
      }
    }
    // One tree over the eight channels of a group, however they are spread over threads.
    float sum = kVec == 1
                    ? square[0]
                    : __fadd_rn(__fadd_rn(square[0], square[1]), __fadd_rn(square[2], square[3]));
#pragma unroll
    for (int other = 1; other < kGroup / kVec; other *= 2) {
      sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, other));
    }
    if (row < rows && in_group == 0 && group < tile.groups) {
      squares[row * kMostGroups + group] = sum;
    }
  }
  SyncThreads<kConsumers>();
  if (tid < rows) SendSquares(op, tile, squares + tid * kMostGroups, tid);
#pragma unroll 1
  for (int item = tid; kStoresLast && item < rows * each; item += kConsumers) {
    const int row = RowOfItem(item, each), dim = (item - row * each) * kVec;
    if (dim >= tile.channels()) continue;
    store_node(row, dim,
               Vector<kVec>::Load(pending_u + (nodes.first_pending + row) * channels + dim),
               Vector<kVec>::Load(raw + row * stride + dim));
  }
}

// KeepTile and ScanLate of a single node, whose ancestors' channels are all there: by the warps
// that have x and z, from their registers. await_early() returns when ScanEarly is done; then the
// warps of the product synchronise by sync().
template <typename T, typename AwaitEarly, typename Sync>
__device__ __forceinline__ void ScanOne(const ScanOp& op, const PassNodes& nodes,
                                        const LayerStore<T>& store, const float* factors,
                                        char* work, const float (&sums)[1][4],
                                        const AwaitEarly& await_early, const Sync& sync) {
  constexpr int kRows = 8;
  const int group = threadIdx.x / 32, lane = threadIdx.x % 32, in_group = lane / 4;
  const int channels = op.tile_groups * kGroup, dim = group * kGroup + in_group;
  const ScanLayout<T> layout(kRows, op.padded_d_state, op.sent_columns, channels);
  const ScanTile& tile = *reinterpret_cast<const ScanTile*>(work + layout.packed);
  const bool has_group = group < tile.groups;
  const bool active = has_group && lane % 4 == 0;
  const float* rows = reinterpret_cast<const float*>(work + layout.conv) + dim;
  const float* skips = reinterpret_cast<const float*>(work + layout.packed +
                                                      ScanPacked(op.sent_columns, channels).skip);
  float* squares = reinterpret_cast<float*>(work + layout.squares);
  const int column = tile.column() + dim, width = op.heads * op.padded_head;
  float raw = 0.0f, gate = 0.0f, x = 0.0f;
  if (active) {
    float sum = rows[kConvBias * channels];
#pragma unroll
    for (int m = kMaxTaps; m > 0; --m) {
      if (m > op.taps) continue;
      const int earlier = -2 - nodes.taps[0][m - 1];
      const float input = earlier >= op.taps
                              ? LoadNew(store.conv + (earlier * op.channels + column))
                              : rows[(earlier < 0 ? kZeroRow : kInputRow + earlier) * channels];
      sum = fmaf(rows[m * channels], input, sum);
    }
    raw = fmaf(factors[0], sums[0][0], rows[kXBias * channels]);
    gate = Silu(fmaf(factors[0], sums[0][2], rows[kZBias * channels]));
    x = Silu(fmaf(rows[0], raw, sum));
  }
  await_early();
  float square = 0.0f, u = 0.0f;
  if (active) {
    const int h = group >= tile.first_head_groups ? 1 : 0;
    const int dims = tile.dims[group], place = tile.place[group];
    const float* weights = reinterpret_cast<const float*>(work + layout.weights) +
                           (h * kRows * kWeightStride + nodes.prefix - nodes.checkpoint[0]);
    const int last = nodes.position[0] - nodes.prefix;
    u = reinterpret_cast<const float*>(work + layout.dt)[h * kRows] * (in_group < dims ? x : 0.0f);
    float y = reinterpret_cast<const float*>(work + layout.terms)[dim];
#pragma unroll 1
    for (int k = 0; k < last; ++k) {
      y = fmaf(weights[k], LoadNew(store.u + ((kRing + nodes.path[0][k]) * width + column)), y);
    }
    y = fmaf(weights[last], u, y);
    const float value = __fmul_rn(fmaf(skips[h * 2], x, y), gate);
    if (in_group < dims) {
      square = __fmul_rn(value, value);
      SendElement(static_cast<T*>(op.act) + ActIndex<T>(kRows, 0, place + in_group),
                  FromFloat<T>(__fmul_rn(value, rows[kNormRow * channels])));
    }
    if (in_group == 0) {
#pragma unroll 1
      for (int i = 0; i < tile.zeros[group]; ++i) {
        SendElement(static_cast<T*>(op.act) + ActIndex<T>(kRows, 0, place + dims + i),
                    FromFloat<T>(0.0f));
      }
    }
  }
  // The same tree as ScanLate's.
#pragma unroll
  for (int other = 1; other < kGroup; other *= 2) {
    square = __fadd_rn(square, __shfl_xor_sync(0xffffffffu, square, other * 4));
  }
  if (has_group && lane == 0) squares[group] = square;
  __syncwarp();
  sync();
  if (threadIdx.x == 0) SendSquares(op, tile, squares, 0);
  if (active) {
    store.u[(kRing + nodes.first_pending) * width + column] = u;
    store.conv[(op.taps + nodes.first_pending) * op.channels + column] = raw;
  }
}

template <int kCount>
using Tiles = std::integral_constant<int, kCount>;

// The operator: in_proj and all that comes before out_proj. norm: of in_proj's input, whose factors
// go to shared memory; factored: a barrier for Dones arrivals, used once by each scan.
template <typename T, int kRowTiles>
__device__ __forceinline__ void Scan(const MatmulOp& in, const ScanOp& op, const RowNorm& norm,
                                     const PassNodes& nodes, const LayerStore<T>& store,
                                     const FirstActs& first_acts, const Ring& ring,
                                     const RingPlace& place, RingPlace* next_place,
                                     uint64_t* factored, float* factors, char* work) {
  constexpr int kProductBarrier = 7;
  constexpr bool kRowsFirst = RowsFirst<T>(kRowTiles);
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  const int units = kRowsFirst ? 1 : __shfl_sync(0xffffffffu, in.TileUnits(), 0);
  const bool has_tile = HasTile(op);
  AwaitActs<T, kRowTiles>(in, first_acts, nodes.rows, ring, place, nullptr);
  const auto sync_product = [&] { SyncWarps<kProductBarrier>(units * 128); };
  const auto multiply = [&](auto& sums) {
    ConsumeMatmul<T, kRowTiles, /*kOwn=*/true>(in, nodes.rows, ring, place, next_place, nullptr,
                                               sums);
    BarrierWait(factored, op.number & 1);
  };
  if constexpr (kRowsFirst) {
    if (group == 0) {
      const auto multiply_rows = [&](auto tiles) {
        float sums[decltype(tiles)::value][4] = {};
        multiply(sums);
        if (!has_tile) return;
        sync_product();
        KeepRows<T, kRowTiles>(op, factors, work, sums);
      };
      const int blocks = __shfl_sync(0xffffffffu, in.tile_blocks, 0);
      if (blocks <= 2) {
        multiply_rows(Tiles<4>());
      } else if (blocks <= 5) {
        multiply_rows(Tiles<10>());
      } else {
        multiply_rows(Tiles<16>());
      }
    }
  } else if (group < units) {
    float sums[kRowTiles][4] = {};
    multiply(sums);
    if constexpr (kRowTiles == 1) {
      if (has_tile && nodes.rows == 1) {
        ScanOne<T>(
            op, nodes, store, factors, work, sums, [] { SyncThreads<kConsumers>(); }, sync_product);
        return;
      }
    }
    if (has_tile) {
      sync_product();  // the product's activations are used up
      KeepTile<T, kRowTiles>(op, nodes.rows, factors, work, sums);
    }
  }
  if (group >= (kConsumerWarps - EarlyWarps<T>(kRowTiles)) / 4) {
    ScanEarly<T, kRowTiles>(op, nodes, store, norm, factors, work,
                            [&] { BarrierArrive(factored, 1); });
  }
  if (!has_tile) return;
  SyncThreads<kConsumers>();
  if (kRowTiles == 1 && nodes.rows == 1) return;
  ScanLate<T, kRowTiles>(op, nodes, store, work);
}

// One warp: brings what a block's part of a scan reads of earlier passes into the cache.
template <typename T>
__device__ inline void PrefetchScan(const ScanOp& op, const PassNodes& nodes,
                                    const LayerStore<T>& store) {
  const int lane = threadIdx.x % 32, ds = op.padded_d_state;
  if (HasTile(op)) {
    const int task = TileOfBlock(op);
    const int64_t first = static_cast<int64_t>(op.FirstGroup(task)) * kGroup * ds;
    const int bytes = op.GroupsOf(task) * kGroup * ds * 4;
#pragma unroll 1
    for (int position = nodes.first_checkpoint; position <= nodes.last_checkpoint;
         position += kSegment) {
      if (position == 0) continue;
      const char* from =
          reinterpret_cast<const char*>(store.checkpoints[position / kSegment % 2] + first);
#pragma unroll 1
      for (int at = lane * 128; at < bytes; at += 32 * 128) Prefetch(from + at);
    }
  }
  // Rows of B, that all blocks read, are shared among them.
  const int row_bytes = op.groups * ds * static_cast<int>(sizeof(T));
#pragma unroll 1
  for (int r = blockIdx.x; r < kRing; r += gridDim.x) {
    const char* from = reinterpret_cast<const char*>(store.b) + r * row_bytes;
#pragma unroll 1
    for (int at = lane * 128; at < row_bytes; at += 32 * 128) Prefetch(from + at);
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
  const int padded = shape.padded_head;
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
      value = store.u[static_cast<int64_t>(first + k) * layer.u_columns + head * padded + p];
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
    const int block = quad / 64, vector = quad / 32 % 2, lane = quad % 32;
    const int p = block / (ds / 32) * 8 + lane / 4;
    const int n = block % (ds / 32) * 32 + lane % 4 * 8 + vector * 4;
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
