// What stands between products on the device, row by row: embedding, residual sums with the next
// norm, gated activation, and the selection of the greatest logits. Residual sums are made by warps
// of the product's own operator. What others wait for is sent first, all else is done after that.
//
// A norm is split: its weights are multiplied in where a row is written, and the row's factor
// 1 / rms where the product of that row is read. A warp takes 128 columns of a row (a granule).

#ifndef CANOPY_CORE_OPS_ROWS_CUDA_CUH_
#define CANOPY_CORE_OPS_ROWS_CUDA_CUH_

#include "core/cuda/pass.h"

namespace canopy::cuda {

inline constexpr int kGranule = 128;
CANOPY_HOST_DEVICE constexpr int Granules(int k_steps) { return (k_steps * 16 + 127) / kGranule; }

// Where a norm's input goes: act gets T(x * weight), squares the sums of squares, one a
// granule, or from strips one for four columns (RowNorm::of_quads).
struct NormInput {
  const float* weight = nullptr;  // [padded columns], zero behind the last column
  void* act = nullptr;
  float* squares = nullptr;  // [rows of the bucket][granules]
};

struct EmbedOp {
  const void* table = nullptr;  // T [vocab, columns]
  float* x = nullptr;           // [kMaxRows][padded columns]: the residual stream
  int columns = 0;
  int k_steps = 0;
  NormInput next;
};

// x += factor * partials + bias. Of a product in the same operator: warps that have no unit of it
// come first, and whoever sums waits for what all blocks send.
struct ResidualOp {
  Partials partials;
  RowNorm norm;  // of the product's input, in one group
  const float* bias = nullptr;
  float* x = nullptr;
  int columns = 0;
  int k_steps = 0;
  NormInput next;
};

// act = T(activation(factor * gate + bias) * (factor * up + bias))
struct GatedOp {
  Partials partials;  // [gate | up]
  const float* bias = nullptr;
  int activation = 0;  // Activation
  int columns = 0;
  int k_steps = 0;
  void* act = nullptr;
};

// The greatest logits of each row. Stage 0: of slices; stage 1: of those.
inline constexpr int kSelectSlices = 64;
struct SelectOp {
  const float* logits = nullptr;  // [kMaxRows][ld]
  int ld = 0;
  int vocab = 0;
  int stage = 0;
  float* values = nullptr;    // [kMaxRows][kSelectSlices][kMaxTop]
  int32_t* tokens = nullptr;  // the same
};

}  // namespace canopy::cuda

#ifdef __CUDACC__

#include "core/ops/activation.h"
#include "core/ops/matmul_cuda.cuh"

namespace canopy::cuda {

__device__ inline int Splits(const Partials& p, int column) {
  return __ldg(p.counts + (column >> p.tile_shift));
}

// kCount columns of a row that begin at a multiple of kCount, from their splits in order, once they
// are there. Loads first, of as many splits as any column has, so as not to wait for their number.
template <int kCount, int kAhead = 3>
struct SumVector {
  float v[kAhead][kCount];

  __device__ static void LoadAt(float (&v)[kCount], const float* at, bool there) {
    if constexpr (kCount == 4) {
      const float4 q = LoadSent4(at, there);
      v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) v[i] = LoadSent(at + i, there);
    }
  }
  __device__ static void UnsendAt(float* at, bool there) {
    if constexpr (kCount == 4) {
      Unsend4(at, there);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) ::canopy::cuda::Unsend(at + i, there);
    }
  }
  // Whether one of the first `valid` is not there.
  __device__ static bool Unsent(const float (&v)[kCount], int valid) {
    bool unsent = false;
#pragma unroll
    for (int i = 0; i < kCount; ++i) unsent |= i < valid && IsUnsent(v[i]);
    return unsent;
  }

  __device__ void Load(const Partials& p, int row, int column, bool there) {
    const float* at = p.data + (row * p.ld + column);
    const int most = there ? p.most : 0;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) LoadAt(v[k], at + k * p.split_stride, k < most);
  }
  // Whether one of the first `splits` is not there: then Load is to be called again.
  __device__ bool Unsent(int splits, int valid = kCount) const {
    bool unsent = false;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) unsent |= k < splits && Unsent(v[k], valid);
    return unsent;
  }
  // Asks again for those of the first `splits` that are not there; whether there were some. Faster
  // than Load for the few columns of a scan that a block sends, slower for residual sums of many
  // rows (docs/performance.md).
  __device__ bool LoadMissing(const Partials& p, int row, int column, int splits) {
    const float* at = p.data + (row * p.ld + column);
    bool missing = false;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const bool is = k < splits && Unsent(v[k], kCount);
      if (is) LoadAt(v[k], at + k * p.split_stride, true);
      missing |= is;
    }
    return missing;
  }
  // The sums, 0 behind the first `valid`. Unsend is to follow, when what is made of them is on its
  // way.
  __device__ void Finish(const Partials& p, int row, int column, int splits, float (&sum)[kCount],
                         int valid = kCount) const {
    const float* at = p.data + (row * p.ld + column);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      sum[i] = v[0][i];
#pragma unroll
      for (int k = 1; k < kAhead; ++k) sum[i] = k < splits ? sum[i] + v[k][i] : sum[i];
    }
#pragma unroll 1
    for (int k = kAhead; k < splits; ++k) {
      float next[kCount];
      do {
        LoadAt(next, at + k * p.split_stride, true);
      } while (Unsent(next, valid));
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum[i] += next[i];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] = i < valid ? sum[i] : 0.0f;
  }
  // Makes the place ready for the next sums.
  __device__ static void Unsend(const Partials& p, int row, int column, int splits) {
    float* at = p.data + (row * p.ld + column);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) UnsendAt(at + k * p.split_stride, k < splits);
#pragma unroll 1
    for (int k = kAhead; k < splits; ++k) UnsendAt(at + k * p.split_stride, true);
  }
};

using Sum1 = SumVector<1>;
template <int kAhead>
__device__ inline float FinishOne(const SumVector<1, kAhead>& sum, const Partials& p, int row,
                                  int column, int splits) {
  float value[1];
  sum.Finish(p, row, column, splits, value);
  return value[0];
}
__device__ inline float Sum(const Partials& p, int row, int column) {
  const int splits = Splits(p, column);
  Sum1 sum;
  do {
    sum.Load(p, row, column, true);
  } while (sum.Unsent(splits));
  const float value = FinishOne(sum, p, row, column, splits);
  sum.Unsend(p, row, column, splits);
  return value;
}

// Columns column to column + 3 of an act, to the products that read it.
template <typename T>
__device__ inline void SendAct4(void* act, int bucket_rows, int row, int column, float4 v) {
  T* to = static_cast<T*>(act) + ActIndex<T>(bucket_rows, row, column);
  if constexpr (sizeof(T) == 2) {
    SendPacked(to, PackBf16(v.x, v.y), PackBf16(v.z, v.w));
  } else {
    Send2(to, v.x, v.y);
    Send2(to + 4, v.z, v.w);
  }
}

// What a product adds to the residual stream, and sums of squares of four columns: the same
// expressions wherever they are made, for the same bits.
__device__ inline float4 AddScaled(float4 x, float f, const float4& sum, const float4& bias) {
  return make_float4(fmaf(f, sum.x, x.x) + bias.x, fmaf(f, sum.y, x.y) + bias.y,
                     fmaf(f, sum.z, x.z) + bias.z, fmaf(f, sum.w, x.w) + bias.w);
}
__device__ inline float Squares4(const float4& x) {
  return fmaf(x.w, x.w, fmaf(x.z, x.z, fmaf(x.y, x.y, x.x * x.x)));
}

// x [4] of a row becomes the next norm's input; w [4] of the norm's weights. All lanes of a warp
// call it for a granule.
template <typename T>
__device__ inline void WriteNormInput(const NormInput& next, int bucket_rows, int granules,
                                      bool active, int row, int column, float4 x, float4 w) {
  if (active) {
    SendAct4<T>(next.act, bucket_rows, row, column,
                make_float4(x.x * w.x, x.y * w.y, x.z * w.z, x.w * w.w));
  }
  const float squares = WarpSum(Squares4(x));
  Send(next.squares + row * granules + column / kGranule, squares, column % kGranule == 0);
}

// Calls task(row, column, active) for every granule of every row, over the whole grid: a warp a
// granule, four columns a lane, active where they are there. Warps from `first_warp` on come first.
template <typename F>
__device__ inline void ForGranules(int rows, int k_steps, const F& task, int first_warp = 0) {
  const int granules = Granules(k_steps), total = rows * granules;
  const int warp = (threadIdx.x / 32 + kConsumerWarps - first_warp) % kConsumerWarps;
#pragma unroll 1
  for (int i = blockIdx.x + warp * gridDim.x; i < total; i += kConsumerWarps * gridDim.x) {
    const int row = i / granules;
    const int column = (i - row * granules) * kGranule + threadIdx.x % 32 * 4;
    task(row, column, column < k_steps * 16);
  }
}

template <typename T>
__device__ __forceinline__ void Embed(const EmbedOp& shared_op, const PassNodes& nodes,
                                      int bucket_rows) {
  const EmbedOp op = shared_op;
  ForGranules(nodes.rows, op.k_steps, [&](int row, int column, bool active) {
    float4 x = {0.0f, 0.0f, 0.0f, 0.0f};
    const float4 w = LoadWeight4(op.next.weight + column, active);
    if (active) {
      const T* from =
          static_cast<const T*>(op.table) + static_cast<int64_t>(nodes.token[row]) * op.columns;
      float* values = &x.x;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (column + i < op.columns) values[i] = ToFloat(from[column + i]);
      }
      StoreNew4(op.x + row * op.k_steps * 16 + column, x);
    }
    WriteNormInput<T>(op.next, bucket_rows, Granules(op.k_steps), active, row, column, x, w);
  });
}

// product_units: of the product in the same operator.
template <typename T, int kBucketRows>
__device__ __forceinline__ void Residual(const ResidualOp& shared_op, int product_units,
                                         const PassNodes& nodes) {
  constexpr int kMultipliedBarrier = 8;
  const int first_warp = product_units == kMostTileUnits ? 0 : product_units * 4;
  // Sums are looked for when the block's own are sent: not earlier, for that is in the way of those
  // who multiply. Who has none to make does not wait.
  const int warp = static_cast<int>(threadIdx.x / 32) - first_warp;
  const int granules = nodes.rows * Granules(shared_op.k_steps);
  bool multiplied =
      first_warp == 0 || warp < 0 || static_cast<int>(blockIdx.x + warp * gridDim.x) >= granules;
  if (multiplied && first_warp > 0) ArriveWarps<kMultipliedBarrier, kConsumers>();
  const ResidualOp op = shared_op;
  const auto await_multiplied = [&] {
    if (!multiplied) SyncWarps<kMultipliedBarrier, kConsumers>();
    multiplied = true;
  };
  ForGranules(
      nodes.rows, op.k_steps,
      [&](int row, int column, bool active) {
        float* at = op.x + row * op.k_steps * 16 + column;
        const int splits = active && column < op.columns ? Splits(op.partials, column) : 0;
        float4 x = LoadNew4(at, active);
        const float4 w = LoadWeight4(op.next.weight + column, active);
        const float4 bias = LoadWeight4(op.bias + column, active && op.bias != nullptr);
        const float f = RowFactor::Of<SendsActs(kBucketRows)>(op.norm, row);
        const int valid = min(4, op.columns - column);
        await_multiplied();
        SumVector<4, 8> partials;
        partials.Load(op.partials, row, column, active && valid > 0);
        while (partials.Unsent(splits, valid)) partials.Load(op.partials, row, column, true);
        float sum[4];
        partials.Finish(op.partials, row, column, splits, sum, valid);
        x = AddScaled(x, f, make_float4(sum[0], sum[1], sum[2], sum[3]), bias);
        WriteNormInput<T>(op.next, kBucketRows, Granules(op.k_steps), active, row, column, x, w);
        partials.Unsend(op.partials, row, column, splits);
        StoreNew4(at, x, active);
      },
      first_warp);
}

__device__ inline float Activate(int activation, float x) {
  switch (static_cast<Activation>(activation)) {
    case Activation::kSilu:
      return Silu(x);
    case Activation::kGelu:
      return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case Activation::kGeluTanh:
      return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case Activation::kRelu:
      return fmaxf(x, 0.0f);
    case Activation::kRelu2: {
      const float positive = fmaxf(x, 0.0f);
      return positive * positive;
    }
  }
  return x;
}

template <typename T>
__device__ __forceinline__ void Gated(const GatedOp& shared_op, const PassNodes& nodes,
                                      const float* factors, int bucket_rows) {
  const GatedOp op = shared_op;
  const bool vectors = op.columns % 4 == 0;
  ForGranules(nodes.rows, op.k_steps, [&](int row, int column, bool active) {
    float gate[4] = {}, up[4] = {};
    const int up_column = op.columns + column;
    const bool in_vectors = vectors && column < op.columns;
    const int gate_splits = in_vectors ? Splits(op.partials, column) : 0;
    const int up_splits = in_vectors ? Splits(op.partials, up_column) : 0;
    if (vectors) {
      SumVector<4> gates, ups;
      do {
        gates.Load(op.partials, row, column, in_vectors);
        ups.Load(op.partials, row, up_column, in_vectors);
      } while (gates.Unsent(gate_splits) || ups.Unsent(up_splits));
      gates.Finish(op.partials, row, column, gate_splits, gate);
      ups.Finish(op.partials, row, up_column, up_splits, up);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (column + i >= op.columns) continue;
        gate[i] = Sum(op.partials, row, column + i);
        up[i] = Sum(op.partials, row, up_column + i);
      }
    }
    const float f = factors[row];
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool bias = op.bias != nullptr && column + i < op.columns;
      const float gate_bias = LoadWeight(op.bias + column + i, bias);
      const float up_bias = LoadWeight(op.bias + up_column + i, bias);
      y[i] = Activate(op.activation, fmaf(f, gate[i], gate_bias)) * fmaf(f, up[i], up_bias);
    }
    if (active) {
      SendAct4<T>(op.act, bucket_rows, row, column, make_float4(y[0], y[1], y[2], y[3]));
    }
    SumVector<4>::Unsend(op.partials, row, column, gate_splits);
    SumVector<4>::Unsend(op.partials, row, up_column, up_splits);
  });
}

// Whether (value, token) comes before (best, best_token): the greater, of equals the lower token.
__device__ inline bool Before(float value, int token, float best, int best_token) {
  return value > best || (value == best && token < best_token);
}

// The `top` first of `count` candidates, one warp. token_at(i), value_at(i). False, and nothing is
// stored, where a value is not a number.
template <typename Value, typename Token, typename Store>
__device__ inline bool SelectTop(int count, int top, const Value& value_at, const Token& token_at,
                                 const Store& store) {
  constexpr int kAhead = 8;  // loads of a lane at a time
  bool nan = false;
  const int lane = threadIdx.x % 32;
  float last = INFINITY;
  int last_token = -1;
#pragma unroll 1
  for (int r = 0; r < top; ++r) {
    float best = -INFINITY;
    int best_token = INT32_MAX;
#pragma unroll 1
    for (int first = lane; first < count; first += 32 * kAhead) {
      float values[kAhead];
      int tokens[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int i = first + 32 * k;
        values[k] = i < count ? value_at(i) : -INFINITY;
        tokens[k] = i < count ? token_at(i) : -1;
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        nan |= isnan(values[k]);
        const bool after_last = r == 0 || Before(last, last_token, values[k], tokens[k]);
        if (after_last && tokens[k] >= 0 && Before(values[k], tokens[k], best, best_token)) {
          best = values[k];
          best_token = tokens[k];
        }
      }
    }
    if (__any_sync(0xffffffffu, nan)) return false;
#pragma unroll 1
    for (int other = 16; other > 0; other /= 2) {
      const float value = __shfl_xor_sync(0xffffffffu, best, other);
      const int token = __shfl_xor_sync(0xffffffffu, best_token, other);
      if (Before(value, token, best, best_token)) {
        best = value;
        best_token = token;
      }
    }
    if (lane == 0) store(r, best, best_token == INT32_MAX ? -1 : best_token);
    last = best;
    last_token = best_token;
  }
  return true;
}

// Into `kept`, on the device, and `told`, the host's.
__device__ inline void Select(const SelectOp& op, const PassNodes& nodes, Selected* kept,
                              Selected* told) {
  if (nodes.top == 0) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (op.stage == 0) {
    const int per_slice = (op.vocab + kSelectSlices - 1) / kSelectSlices;
#pragma unroll 1
    for (int task = warp * gridDim.x + blockIdx.x; task < nodes.rows * kSelectSlices;
         task += kConsumerWarps * gridDim.x) {
      const int row = task / kSelectSlices, slice = task % kSelectSlices;
      const int first = slice * per_slice;
      const int count = max(0, min(per_slice, op.vocab - first));
      const float* logits = op.logits + static_cast<int64_t>(row) * op.ld + first;
      const int at = task * kMaxTop;
      const bool numbers = SelectTop(
          count, nodes.top, [&](int i) { return __ldcg(logits + i); },
          [&](int i) { return first + i; },
          [&](int r, float value, int token) {
            __stcg(op.values + at + r, value);
            __stcg(op.tokens + at + r, token);
          });
      // Told by a value that no logit has.
      if (!numbers && lane == 0) __stcg(op.values + at, NAN);
    }
    return;
  }
#pragma unroll 1
  for (int row = warp * gridDim.x + blockIdx.x; row < nodes.rows;
       row += kConsumerWarps * gridDim.x) {
    const int at = row * kSelectSlices * kMaxTop;
    const auto index = [&](int i) { return at + i / nodes.top * kMaxTop + i % nodes.top; };
    const bool numbers = SelectTop(
        kSelectSlices * nodes.top, nodes.top, [&](int i) { return __ldcg(op.values + index(i)); },
        [&](int i) { return __ldcg(op.tokens + index(i)); },
        [&](int r, float, int token) { kept->token[row][r] = told->token[row][r] = token; });
    if (!numbers && lane == 0) {
#pragma unroll 1
      for (int r = 0; r < nodes.top; ++r) kept->token[row][r] = told->token[row][r] = -1;
    }
  }
}

}  // namespace canopy::cuda

#endif  // __CUDACC__
#endif  // CANOPY_CORE_OPS_ROWS_CUDA_CUH_
