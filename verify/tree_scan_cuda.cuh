// The tree scan of Mamba-2 on the device, one operator from in_proj's sums to out_proj's input:
// convolution along ancestors, activation, dt, log decays, scores, state term, path sum, D skip,
// gate and the gated norm's weights. Formulas and exactness as in verify/tree_scan.h.
//
// A block takes a slice of a head: a few of its dimensions ("p") for all nodes of the pass. B, C
// and scores are made again by every slice, which is cheaper than a barrier of the grid. Products
// whose sum does not run over positions (C . B over the state, S C) are tensor core products of
// operands that hold every f32 bit; the sum over a path is one chain of fused multiply-adds in path
// order. The checkpoint is read once and nothing of it is written.
//
// Checkpoints S are stored as the tensor cores' first operand: blocks [p / 16][n / 16] of 256 f32,
// in which S[p, n] is element e % 4 of vector e / 4 * 32 + lane, with lane = p % 8 * 4 + n % 8 / 2
// and e = n % 16 / 8 * 4 + p % 16 / 8 * 2 + n % 2.

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
  const float* conv_bias = nullptr;  // [channels]
  const float* a = nullptr;          // [heads]
  const float* d = nullptr;
  const float* dt_bias = nullptr;
  float dt_min = 0.0f;
  float dt_max = 0.0f;
  const float* norm_weight = nullptr;  // [heads * head_dim]
  int norm_groups = 1;
  int group_columns = 0;     // of a norm group in act: padded to k-steps
  void* act = nullptr;       // out_proj's input, before the norm's factor
  float* squares = nullptr;  // [kMaxRows][heads * slices * slice / 16]
};

CANOPY_HOST_DEVICE constexpr int PadTo16(int n) { return (n + 15) / 16 * 16; }

// Floats between the weights of two nodes: odd, so that nodes lie in different banks.
inline constexpr int kWeightStride = 65;
// Elements between rows of B and C beyond the state: so that eight rows lie in different banks.
inline constexpr int kRowPad = 8;

// Shared memory of the scan, in bytes, for buckets of `rows` rows.
template <typename T>
struct ScanLayout {
  // b, c: of new nodes; ring_b, ring_u: of the prefix's last kRing positions; pending_u, which
  // takes the place of c and b once those are used up; raw: the convolution's inputs of `chunk`
  // channels.
  int c, b, pending_u, ring_b, ring_u, x, raw, weights, decay, dt, factor, end;
  int chunk;

  CANOPY_HOST_DEVICE ScanLayout(int rows, int slice, int padded_d_state) {
    const int row_bytes = (padded_d_state + kRowPad) * static_cast<int>(sizeof(T));
    c = 0;
    b = c + rows * row_bytes;
    pending_u = 0;
    const int first = b + rows * row_bytes;
    const int second = kMaxRows * slice * 4;
    ring_b = first > second ? first : second;
    ring_u = ring_b + kRing * row_bytes;
    x = ring_u + kRing * slice * 4;
    weights = x + rows * slice * static_cast<int>(sizeof(T));
    // The raw inputs lie where weights will be, and where those are small, in more room.
    raw = weights;
    chunk = 5120 / rows < 64 ? 64 : 5120 / rows / 64 * 64;
    const int raw_bytes = rows * chunk * 4;
    const int weight_bytes = rows * kWeightStride * 4;
    decay = weights + (raw_bytes > weight_bytes ? raw_bytes : weight_bytes);
    dt = decay + (kRing + kMaxRows) * 4;
    factor = dt + kMaxRows * 4;
    end = factor + kMaxRows * 4;
  }
};

}  // namespace canopy::cuda

#ifdef __CUDACC__

#include "core/ops/rows_cuda.cuh"

namespace canopy::cuda {

// The channels that a slice needs, numbered: its x, then B, then C.
struct SliceChannels {
  int x, dims;  // first channel of x, and how many
  int b, c;     // first channels of the group's
  int d_state;

  __device__ int count() const { return dims + 2 * d_state; }
  __device__ int Channel(int i) const {
    if (i < dims) return x + i;
    return i < dims + d_state ? b + i - dims : c + i - dims - d_state;
  }
};

template <typename T, int kRowTiles>
__device__ __noinline__ void ScanSlice(const ScanOp& op, const PassNodes& nodes, int head,
                                       int slice, char* work) {
  constexpr int kRows = 8 * kRowTiles;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const LayerStore<T>& store = static_cast<const LayerStore<T>*>(nodes.layers)[op.layer];
  const ScanLayout<T> layout(kRows, op.slice, op.padded_d_state);
  T* c = reinterpret_cast<T*>(work + layout.c);
  T* b = reinterpret_cast<T*>(work + layout.b);
  float* pending_u = reinterpret_cast<float*>(work + layout.pending_u);
  T* ring_b = reinterpret_cast<T*>(work + layout.ring_b);
  float* ring_u = reinterpret_cast<float*>(work + layout.ring_u);
  T* x = reinterpret_cast<T*>(work + layout.x);
  float* raw = reinterpret_cast<float*>(work + layout.raw);
  float* weights = reinterpret_cast<float*>(work + layout.weights);
  float* decay = reinterpret_cast<float*>(work + layout.decay);
  float* dt = reinterpret_cast<float*>(work + layout.dt);
  float* factor = reinterpret_cast<float*>(work + layout.factor);

  const int inner = op.heads * op.head_dim;
  const int channels = inner + 2 * op.groups * op.d_state;
  const int group = head / (op.heads / op.groups);
  const int first_dim = slice * op.slice;
  const int dims = min(op.slice, op.head_dim - first_dim);
  const int first_x = head * op.head_dim + first_dim;
  const int ds = op.padded_d_state;
  const int c_stride = ds + kRowPad;
  const int rows = nodes.rows;
  const int new_rows = kRing + nodes.first_pending;  // stored rows before those of this pass
  const int end_rows = new_rows + rows;
  const bool first_of_group = head % (op.heads / op.groups) == 0 && slice == 0;

  // What was stored before this pass is asked for first: rows of the prefix, and the checkpoint.
  const int p_tiles = op.slice / 16;
  const int p_tile = warp % p_tiles;
  const bool has_tile = first_dim + p_tile * 16 < op.head_dim;
  const int64_t head_floats = static_cast<int64_t>(PadTo16(op.head_dim)) * ds;
  const int64_t tile_floats =
      head * head_floats + static_cast<int64_t>(first_dim / 16 + p_tile) * ds * 16;
  {
    constexpr int kPer16 = 16 / sizeof(T);
    const int vectors = ds / kPer16;
#pragma unroll 1
    for (int i = tid; i < kRing * vectors; i += kConsumers) {
      const int r = i / vectors, n = i % vectors * kPer16;
      CopyAsync16(ring_b + r * c_stride + n,
                  store.b + (static_cast<int64_t>(r) * op.groups + group) * ds + n);
    }
    if (inner % 4 == 0 && op.head_dim % 4 == 0) {
      const int quads = op.slice / 4;
#pragma unroll 1
      for (int i = tid; i < kRing * quads; i += kConsumers) {
        const int r = i / quads, p = i % quads * 4;
        if (p < dims) {
          CopyAsync16(ring_u + r * op.slice + p,
                      store.u + static_cast<int64_t>(r) * inner + first_x + p);
        }
      }
    } else {
#pragma unroll 1
      for (int i = tid; i < kRing * op.slice; i += kConsumers) {
        const int r = i / op.slice, p = i % op.slice;
        if (p < dims) ring_u[i] = store.u[static_cast<int64_t>(r) * inner + first_x + p];
      }
    }
  }
  // Padding of the state takes part in products; rows that are not there do not matter to others.
  if (op.d_state < ds) {
#pragma unroll 1
    for (int i = tid; i < kRows * c_stride; i += kConsumers) {
      c[i] = FromFloat<T>(0.0f);
      b[i] = FromFloat<T>(0.0f);
    }
  }
  // dt of row `tid`, before bias and factor.
  float raw_dt = tid < rows ? Sum(op.partials, tid, inner + channels + head) : 0.0f;
#pragma unroll 1
  for (int r = tid; r < new_rows; r += kConsumers) {
    decay[r] = store.l[static_cast<int64_t>(r) * op.heads + head];
  }
  RowFactors(op.norm, rows, factor);
  SyncThreads<kConsumers>();
  if (tid < rows) {
    raw_dt *= factor[tid];
    if (op.in_bias != nullptr) raw_dt += op.in_bias[inner + channels + head];
    const float v = raw_dt + op.dt_bias[head];
    const float soft = fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v)));
    dt[tid] = fminf(fmaxf(soft, op.dt_min), op.dt_max);
  }

  // Convolution and activation, `chunk` channels at a time for all rows.
  const SliceChannels own = {first_x, dims, inner + group * op.d_state,
                             inner + (op.groups + group) * op.d_state, op.d_state};
  const bool quads = (inner | dims | first_x | op.d_state) % 4 == 0;
#pragma unroll 1
  for (int begin = 0; begin < own.count(); begin += layout.chunk) {
    const int count = min(layout.chunk, own.count() - begin);
    if (begin > 0) SyncThreads<kConsumers>();  // raw is free
    if (quads) {
      // Four channels a load, four splits at a time.
      const int row_quads = count / 4;
      const int64_t split_stride = static_cast<int64_t>(kMaxRows) * op.partials.ld / 4;
#pragma unroll 2
      for (int i = tid; i < rows * row_quads; i += kConsumers) {
        const int row = i / row_quads, k = (i - row * row_quads) * 4;
        const int channel = own.Channel(begin + k);
        const float4* from = Quads(op.partials, row, (inner + channel) / 4);
        float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
        for (int split = 0; split < op.partials.splits; split += 4, from += 4 * split_stride) {
          float4 v[4];
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            if (split + n < op.partials.splits) v[n] = __ldcg(from + n * split_stride);
          }
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            if (split + n < op.partials.splits) {
              sum.x += v[n].x;
              sum.y += v[n].y;
              sum.z += v[n].z;
              sum.w += v[n].w;
            }
          }
        }
        const float f = factor[row];
        sum = make_float4(f * sum.x, f * sum.y, f * sum.z, f * sum.w);
        if (op.in_bias != nullptr) {
          const float4 bias = *reinterpret_cast<const float4*>(op.in_bias + inner + channel);
          sum = make_float4(sum.x + bias.x, sum.y + bias.y, sum.z + bias.z, sum.w + bias.w);
        }
        *reinterpret_cast<float4*>(raw + row * layout.chunk + k) = sum;
        if (begin + k < dims || first_of_group) {
          const int64_t to = op.taps + nodes.first_pending + row;
          *reinterpret_cast<float4*>(store.conv + to * channels + channel) = sum;
        }
      }
    } else {
#pragma unroll 1
      for (int i = tid; i < rows * count; i += kConsumers) {
        const int row = i / count, k = i % count;
        const int channel = own.Channel(begin + k);
        float value = factor[row] * Sum(op.partials, row, inner + channel);
        if (op.in_bias != nullptr) value += op.in_bias[inner + channel];
        raw[row * layout.chunk + k] = value;
        if (begin + k < dims || first_of_group) {
          const int64_t to = op.taps + nodes.first_pending + row;
          store.conv[to * channels + channel] = value;
        }
      }
    }
    SyncThreads<kConsumers>();
    // A thread has one channel, so that its weights are read once, and every `step`-th row.
    const int step = max(1, kConsumers / count);
#pragma unroll 1
    for (int at = tid; at < step * count; at += kConsumers) {
      const int first_row = at / count, k = begin + at % count;
      const int channel = own.Channel(k);
      const float* raw_column = raw + (k - begin);
      const float* conv_column = store.conv + channel;
      const float bias = op.conv_bias[channel];
      float tap_weights[kMaxTaps + 1];
#pragma unroll
      for (int m = 0; m <= kMaxTaps; ++m) {  // m positions before the node
        if (m <= op.taps) {
          tap_weights[m] = op.conv_weight[(op.taps - m) * op.conv_stride + channel];
        }
      }
#pragma unroll 1
      for (int row = first_row; row < rows; row += step) {
        float inputs[kMaxTaps];
#pragma unroll
        for (int m = 1; m <= kMaxTaps; ++m) {
          if (m > op.taps) continue;
          const int tap = nodes.taps[row][m - 1];
          inputs[m - 1] = tap >= 0    ? raw_column[tap * layout.chunk]
                          : tap == -1 ? 0.0f
                                      : conv_column[static_cast<int64_t>(-2 - tap) * channels];
        }
        float sum = bias;
#pragma unroll
        for (int m = kMaxTaps; m > 0; --m) {
          if (m <= op.taps) sum = fmaf(tap_weights[m], inputs[m - 1], sum);
        }
        sum = fmaf(tap_weights[0], raw_column[row * layout.chunk], sum);
        const T value = FromFloat<T>(Silu(sum));
        if (k < dims) {
          x[row * op.slice + k] = value;
        } else if (k < dims + op.d_state) {
          b[row * c_stride + k - dims] = value;
          if (first_of_group) {
            store.b[(static_cast<int64_t>(new_rows + row) * op.groups + group) * ds + k - dims] =
                value;
          }
        } else {
          c[row * c_stride + k - dims - op.d_state] = value;
        }
      }
    }
  }
  // l of the new nodes: along the path, from the start of the node's aligned segment.
  const float a = op.a[head];
#pragma unroll 1
  for (int row = tid; row < rows; row += kConsumers) {
    const int t = nodes.position[row];
    const int segment = t / kSegment * kSegment;
    float l = 0.0f;
    int next = segment;  // position
    if (segment < nodes.prefix) {
      l = decay[(nodes.prefix - 1) % kRing];
      next = nodes.prefix;
    }
#pragma unroll 1
    for (int p = next; p <= t; ++p) {
      const int node = nodes.path[row][p - nodes.prefix];
      // Of the earlier pending nodes the stored value is the sum so far.
      if (node < nodes.first_pending) {
        l = decay[kRing + node];
      } else {
        const float step = dt[node - nodes.first_pending] * a;
        l = p % kSegment == 0 ? step : l + step;
      }
    }
    store.l[static_cast<int64_t>(new_rows + row) * op.heads + head] = l;
    decay[new_rows + row] = l;
  }
  CopiesWait();
  SyncThreads<kConsumers>();

  // Scores C_i . B_j into weights[i][position of j - checkpoint of i]; eight stored rows a turn.
  constexpr int kRowBlocks = (kRows + 15) / 16;
#pragma unroll 1
  for (int tile = warp; tile < (end_rows + 7) / 8; tile += kConsumerWarps) {
    const int j = tile * 8 + lane / 4;  // the stored row whose B this lane loads
    const T* from = nullptr;
    if (j < kRing) {
      from = ring_b + j * c_stride;
    } else if (j < new_rows) {
      from = store.b + (static_cast<int64_t>(j) * op.groups + group) * ds;
    } else if (j < end_rows) {
      from = b + (j - new_rows) * c_stride;
    }
    float scores[kRowBlocks][4] = {};
#pragma unroll 2
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
    for (int half = 0; half < 2; ++half) {
      const int stored = tile * 8 + lane % 4 * 2 + half;
      int position = -1;
      if (stored < kRing) {
        // The latest position of the prefix that has this place in the ring.
        position = (nodes.prefix - 1) / kRing * kRing + stored;
        if (position >= nodes.prefix) position -= kRing;
        if (nodes.prefix == 0) position = -1;
      } else if (stored < end_rows) {
        position = nodes.prefix + nodes.depth[stored - kRing];
      }
      if (position < 0) continue;
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
        for (int high = 0; high < 2; ++high) {
          const int row = m * 16 + lane / 4 + high * 8;
          if (row >= rows || position < nodes.checkpoint[row]) continue;
          if (stored >= kRing && !(nodes.path_mask[row] >> (stored - kRing) & 1)) continue;
          weights[row * kWeightStride + position - nodes.checkpoint[row]] =
              scores[m][high * 2 + half];
        }
      }
    }
  }
  SyncThreads<kConsumers>();

  const int node_step = kConsumerWarps / p_tiles;
  constexpr int kMost = kRowTiles < 4 ? kRowTiles : 4;  // node tiles of a warp: slice <= 64
  const int p0 = p_tile * 16 + lane / 4;

  // weights = exp(difference of log decays) * score. Across the segment boundary the first
  // segment's rest and the node's own part are added.
  const auto stored_row = [&](int row, int position) {
    return position < nodes.prefix ? position % kRing
                                   : kRing + nodes.path[row][position - nodes.prefix];
  };
#pragma unroll 1
  for (int i = tid; i < rows * kRing; i += kConsumers) {
    const int row = i / kRing, j = i % kRing;
    const int t = nodes.position[row], start = nodes.checkpoint[row];
    if (start + j > t) continue;
    const int segment = t / kSegment * kSegment;
    const float node_decay = decay[new_rows + row];
    const float lj = decay[stored_row(row, start + j)];
    float exponent;
    if (start + j < segment) {
      exponent = (decay[stored_row(row, segment - 1)] - lj) + node_decay;
    } else {
      exponent = node_decay - lj;
    }
    weights[row * kWeightStride + j] *= expf(exponent);
  }

  // The state term S C_i, for each of the two checkpoints that a node of the pass reads.
  float y[kMost][4] = {};
#pragma unroll 1
  for (int position = nodes.first_checkpoint; position <= nodes.last_checkpoint;
       position += kSegment) {
    if (position == 0 || !has_tile) continue;
    const float* state = store.checkpoints[position / kSegment % 2] + tile_floats;
    float term[kMost][4] = {};
#pragma unroll 1
    for (int n0 = 0; n0 < ds; n0 += 64) {
      float4 v[4][2];
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        if (n0 + step * 16 >= ds) break;
        const float4* at = reinterpret_cast<const float4*>(state + (n0 + step * 16) * 16) + lane;
        v[step][0] = __ldg(at);
        v[step][1] = __ldg(at + 32);
      }
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const int n = n0 + step * 16;
        if (n >= ds) break;
        FragmentA<float> fa;
        SetPair(fa, 0, v[step][0].x, v[step][0].y);
        SetPair(fa, 1, v[step][0].z, v[step][0].w);
        SetPair(fa, 2, v[step][1].x, v[step][1].y);
        SetPair(fa, 3, v[step][1].z, v[step][1].w);
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
  // Where each of this thread's rows begins; a row that is not there reads one that is.
  int starts[kMost][2];
  const float* w[kMost][2];
#pragma unroll
  for (int k = 0; k < kMost; ++k) {
    const int tile = warp / p_tiles + k * node_step;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile * 8 + lane % 4 * 2 + half;
      const bool there = tile < kRowTiles && row < rows;
      starts[k][half] = there ? nodes.checkpoint[row] : INT32_MAX;
      w[k][half] = weights + (there ? row * kWeightStride - nodes.checkpoint[row] : 0);
      if (!there) continue;
      const int segment = nodes.position[row] / kSegment * kSegment;
      float exponent = decay[new_rows + row];
      if (segment > nodes.checkpoint[row]) exponent += decay[stored_row(row, segment - 1)];
      const float state_decay = expf(exponent);
      y[k][half] *= state_decay;
      y[k][2 + half] *= state_decay;
    }
  }
  SyncThreads<kConsumers>();  // C and B are used up, the weights are there

  // u of pending rows, and of the new ones into the store.
#pragma unroll 1
  for (int i = tid; i < (end_rows - kRing) * op.slice; i += kConsumers) {
    const int k = i / op.slice, p = i % op.slice;
    if (p >= dims) continue;
    const int64_t at = static_cast<int64_t>(kRing + k) * inner + first_x + p;
    if (k >= nodes.first_pending) {
      const int row = k - nodes.first_pending;
      const float value = dt[row] * ToFloat(x[row * op.slice + p]);
      store.u[at] = value;
      pending_u[i] = value;
    } else {
      pending_u[i] = store.u[at];
    }
  }
  SyncThreads<kConsumers>();
  if (!has_tile) return;

    // The path sum: first the prefix's positions, which all nodes share, then each node's own.
#pragma unroll 4
  for (int position = nodes.first_checkpoint; position < nodes.prefix; ++position) {
    const float* from = ring_u + position % kRing * op.slice + p0;
    const float u0 = from[0], u1 = from[8];
#pragma unroll
    for (int k = 0; k < kMost; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (position >= starts[k][half]) {
          const float weight = w[k][half][position];
          y[k][half] = fmaf(weight, u0, y[k][half]);
          y[k][2 + half] = fmaf(weight, u1, y[k][2 + half]);
        }
      }
    }
  }
  // The rest of the path, skip, gate and the norm's weights. A loop that is not unrolled:
  // instructions come from memory, too.
  const float skip = op.d[head];
  const int group_width = inner / op.norm_groups;
  int64_t placed[2];
  float norm_weight[2], gate_bias[2];
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int column = first_x + min(p0 + 8 * part, dims - 1);
    const int place = column / group_width * op.group_columns + column % group_width;
    placed[part] = static_cast<int64_t>(place / 16) * kRows * 16 + ActivationSlot(place % 16);
    norm_weight[part] = op.norm_weight[column];
    gate_bias[part] = op.in_bias != nullptr ? op.in_bias[column] : 0.0f;
  }
#pragma unroll 1
  for (int k = 0; k < kMost; ++k) {
    const int tile = warp / p_tiles + k * node_step;
    if (tile >= kRowTiles || tile * 8 >= rows) break;
    float yk[4] = {};
#pragma unroll
    for (int other = 0; other < kMost; ++other) {
      if (other != k) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e) yk[e] = y[other][e];
    }
    float z[4] = {};
#pragma unroll 1
    for (int split = 0; split < op.partials.splits; split += 4) {
      float v[4][4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = tile * 8 + lane % 4 * 2 + e % 2, p = p0 + e / 2 * 8;
          if (split + n < op.partials.splits && row < rows && p < dims) {
            v[n][e] = __ldcg(op.partials.data +
                             (static_cast<int64_t>(split + n) * kMaxRows + row) * op.partials.ld +
                             first_x + p);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = tile * 8 + lane % 4 * 2 + e % 2, p = p0 + e / 2 * 8;
          if (split + n < op.partials.splits && row < rows && p < dims) z[e] += v[n][e];
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile * 8 + lane % 4 * 2 + half;
      float squares = 0.0f;
      if (row < rows) {
        const int start = nodes.checkpoint[row], t = nodes.position[row];
        const float* weight = weights + row * kWeightStride - start;
#pragma unroll 1
        for (int position = max(nodes.prefix, start); position <= t; ++position) {
          const float* from = pending_u + nodes.path[row][position - nodes.prefix] * op.slice + p0;
          yk[half] = fmaf(weight[position], from[0], yk[half]);
          yk[2 + half] = fmaf(weight[position], from[8], yk[2 + half]);
        }
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          const int p = p0 + 8 * part;
          if (p >= dims) continue;
          float value = fmaf(skip, ToFloat(x[row * op.slice + p]), yk[part * 2 + half]);
          value *= Silu(fmaf(factor[row], z[part * 2 + half], gate_bias[part]));
          squares = fmaf(value, value, squares);
          static_cast<T*>(op.act)[placed[part] + row * 16] =
              FromFloat<T>(value * norm_weight[part]);
        }
      }
      // Over the 8 lanes that hold a row's dimensions.
#pragma unroll
      for (int other = 4; other < 32; other *= 2) {
        squares += __shfl_xor_sync(0xffffffffu, squares, other);
      }
      if (lane / 4 == 0 && row < rows) {
        op.squares[(static_cast<int64_t>(row) * op.heads + head) * (op.slices * p_tiles) +
                   slice * p_tiles + p_tile] = squares;
      }
    }
  }
}

// One warp: brings what a block's slices read of earlier passes and of weights into the cache,
// while the product before them runs.
template <typename T>
__device__ inline void PrefetchScan(const ScanOp& op, const PassNodes& nodes) {
  const int lane = threadIdx.x % 32;
  const LayerStore<T>& store = static_cast<const LayerStore<T>*>(nodes.layers)[op.layer];
  const int inner = op.heads * op.head_dim;
  const int channels = inner + 2 * op.groups * op.d_state;
  const int ds = op.padded_d_state;
#pragma unroll 1
  for (int task = blockIdx.x; task < op.heads * op.slices; task += gridDim.x) {
    const int head = task / op.slices, first_dim = task % op.slices * op.slice;
    const int dims = min(op.slice, op.head_dim - first_dim);
    const int first_x = head * op.head_dim + first_dim;
    const int group = head / (op.heads / op.groups);
    const int first_b = inner + group * op.d_state;
    // A kind of rows a turn, so that there is one copy of the loop over lines.
#pragma unroll 1
    for (int kind = 0; kind < 16; ++kind) {
      const void* base = nullptr;
      int count = 1, bytes = 4;
      int64_t stride = 0;
      const int part = kind % 3;  // x, B, C
      const int first = part == 0 ? first_x : first_b + (part - 1) * op.groups * op.d_state;
      const int part_bytes = (part == 0 ? dims : op.d_state) * 4;
      if (kind < 3) {
        base = store.conv + first;
        count = op.taps, stride = int64_t{channels} * 4, bytes = part_bytes;
      } else if (kind < 6) {
        base = op.conv_weight + first;
        count = op.taps + 1, stride = int64_t{op.conv_stride} * 4, bytes = part_bytes;
      } else if (kind < 9) {
        base = op.conv_bias + first;
        bytes = part_bytes;
      } else if (kind == 9) {
        base = store.b + group * ds;
        count = kRing, stride = int64_t{op.groups} * ds * sizeof(T), bytes = ds * sizeof(T);
      } else if (kind == 10) {
        base = store.u + first_x;
        count = kRing, stride = int64_t{inner} * 4, bytes = dims * 4;
      } else if (kind == 11) {
        base = store.l + head;
        count = kRing + nodes.first_pending, stride = int64_t{op.heads} * 4;
      } else if (kind == 12) {
        base = op.norm_weight + first_x;
        bytes = dims * 4;
      } else if (kind == 13) {
        base = (lane % 3 == 0 ? op.a : lane % 3 == 1 ? op.d : op.dt_bias) + head;
        count = 32;
      } else {
        const int position = kind == 14 ? nodes.first_checkpoint : nodes.last_checkpoint;
        if (position == 0 || (kind == 15 && position == nodes.first_checkpoint)) continue;
        base = store.checkpoints[position / kSegment % 2] +
               static_cast<int64_t>(head) * PadTo16(op.head_dim) * ds + int64_t{first_dim} * ds;
        bytes = PadTo16(dims) * ds * 4;
      }
      const int lines = (bytes + 127) / 128 + 1;  // rows need not begin at a line
#pragma unroll 1
      for (int i = lane; i < count * lines; i += 32) {
        const int64_t offset = i / lines * stride + min(i % lines * 128, bytes - 1);
        Prefetch(static_cast<const char*>(base) + offset);
      }
    }
  }
}

template <typename T, int kRowTiles>
__device__ inline void Scan(const ScanOp& op, const PassNodes& nodes, char* work) {
  const int tasks = op.heads * op.slices;
#pragma unroll 1
  for (int task = blockIdx.x; task < tasks; task += gridDim.x) {
    SyncThreads<kConsumers>();
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
  int heads, head_dim, groups, d_state, padded_d_state;
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
          store.u[static_cast<int64_t>(first + k) * layer.u_columns + head * shape.head_dim + p];
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
    const int block = quad / 64, half = quad / 32 % 2, lane = quad % 32;
    const int p = block / (ds / 16) * 16 + lane / 4;
    const int n = block % (ds / 16) * 16 + half * 8 + lane % 4 * 2;
    float4 s = reinterpret_cast<const float4*>(from)[quad];
    s = make_float4(state_decay * s.x, state_decay * s.y, state_decay * s.z, state_decay * s.w);
#pragma unroll 1
    for (int k = 0; k < kSegment; ++k) {
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
