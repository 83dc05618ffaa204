// What stands between products on the device, row by row: embedding, residual sums with the next
// norm, gated activation, and the selection of the greatest logits.
//
// A norm is split: its weights are multiplied in where a row is written, and the row's factor
// 1 / rms where the product of that row is read. Four lanes take one k-step (16 columns) of a row.

#ifndef CANOPY_CORE_OPS_ROWS_CUDA_CUH_
#define CANOPY_CORE_OPS_ROWS_CUDA_CUH_

#include "core/cuda/pass.h"

namespace canopy::cuda {

// Where a norm's input goes: act gets T(x * weight), squares the sums of squares, one a k-step.
struct NormInput {
  const float* weight = nullptr;  // [padded columns], zero behind the last column
  void* act = nullptr;
  float* squares = nullptr;  // [kMaxRows][k_steps]
};

struct EmbedOp {
  const void* table = nullptr;  // T [vocab, columns]
  float* x = nullptr;           // [kMaxRows][padded columns]: the residual stream
  int columns = 0;
  int k_steps = 0;
  NormInput next;
};

// x += factor * partials + bias
struct ResidualOp {
  Partials partials;
  RowNorm norm;  // of the product's input; split s belongs to group s * groups / splits
  const float* bias = nullptr;
  float* x = nullptr;
  int columns = 0;
  int k_steps = 0;
  NormInput next;
};

// act = T(activation(factor * gate + bias) * (factor * up + bias))
struct GatedOp {
  Partials partials;  // [gate | up]
  RowNorm norm;
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
  Selected* out = nullptr;
};

}  // namespace canopy::cuda

#ifdef __CUDACC__

#include "core/ops/activation.h"
#include "core/ops/matmul_cuda.cuh"

namespace canopy::cuda {

// Sums over splits, in order; loads go out four at a time.
__device__ inline float Sum(const Partials& p, int row, int column) {
  const float* at = p.data + static_cast<int64_t>(row) * p.ld + column;
  const int64_t stride = static_cast<int64_t>(kMaxRows) * p.ld;
  float sum = 0.0f;
#pragma unroll 1
  for (int s = 0; s < p.splits; s += 4) {
    float v[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = s + k < p.splits ? __ldcg(at + (s + k) * stride) : 0.0f;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (s + k < p.splits) sum += v[k];
    }
  }
  return sum;
}

// Columns 4 * quad to 4 * quad + 3: kAhead splits loaded at a time, then all added with the factors
// of the splits' groups.
template <int kAhead>
struct Loaded4 {
  float4 v[kAhead];
};
__device__ inline const float4* Quads(const Partials& p, int row, int quad) {
  return reinterpret_cast<const float4*>(p.data + static_cast<int64_t>(row) * p.ld) + quad;
}
template <int kAhead>
__device__ inline void Load4(const Partials& p, int row, int quad, int first,
                             Loaded4<kAhead>& loaded) {
  const float4* at = Quads(p, row, quad);
  const int64_t stride = static_cast<int64_t>(kMaxRows) * p.ld / 4;
#pragma unroll
  for (int s = 0; s < kAhead; ++s) {
    if (first + s < p.splits) loaded.v[s] = __ldcg(at + (first + s) * stride);
  }
}
template <int kAhead>
__device__ inline float4 Sum4(const Partials& p, int row, int quad, Loaded4<kAhead>& loaded,
                              const float* factors, int groups) {
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
  const int per_group = groups == 1 ? p.splits : p.splits / groups;
  int in_group = 0;
  const float* factor = factors + row;
#pragma unroll 1
  for (int first = 0; first < p.splits; first += kAhead) {
    if (first > 0) Load4(p, row, quad, first, loaded);
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (first + s < p.splits) {
        const float f = *factor;
        const float4 v = loaded.v[s];
        sum.x += f * v.x;
        sum.y += f * v.y;
        sum.z += f * v.z;
        sum.w += f * v.w;
        if (++in_group == per_group) {
          in_group = 0;
          factor += kMaxRows;
        }
      }
    }
  }
  return sum;
}

template <typename T>
__device__ inline void StoreAct4(void* act, int bucket_rows, int row, int quad, float4 v) {
  // Columns 4q, 4q + 1 and 4q + 2, 4q + 3 of a k-step are two pairs of ActivationSlot.
  T* to = static_cast<T*>(act) + (static_cast<int64_t>(quad / 4) * bucket_rows + row) * 16;
  const int first = ActivationSlot(quad % 4 * 4), second = ActivationSlot(quad % 4 * 4 + 2);
  if constexpr (sizeof(T) == 2) {
    __stcg(reinterpret_cast<uint32_t*>(to + first), PackBf16(v.x, v.y));
    __stcg(reinterpret_cast<uint32_t*>(to + second), PackBf16(v.z, v.w));
  } else {
    __stcg(reinterpret_cast<float2*>(to + first), make_float2(v.x, v.y));
    __stcg(reinterpret_cast<float2*>(to + second), make_float2(v.z, v.w));
  }
}

// x [4] of a row becomes the next norm's input; w [4] of the norm's weights. All lanes of a warp
// call it.
template <typename T>
__device__ inline void WriteNormInput(const NormInput& next, int bucket_rows, int k_steps,
                                      bool active, int row, int quad, float4 x, float4 w) {
  float squares = x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
  squares += __shfl_xor_sync(0xffffffffu, squares, 1);
  squares += __shfl_xor_sync(0xffffffffu, squares, 2);
  if (!active) return;
  StoreAct4<T>(next.act, bucket_rows, row, quad,
               make_float4(x.x * w.x, x.y * w.y, x.z * w.z, x.w * w.w));
  if (quad % 4 == 0) __stcg(next.squares + row * k_steps + quad / 4, squares);
}

// Calls task(row, quad) for every four columns of every row, over the whole grid; all lanes of a
// warp call, with active = false where there is nothing to do.
template <typename F>
__device__ inline void ForQuads(int rows, int k_steps, const F& task) {
  const int total = rows * k_steps;
#pragma unroll 1
  for (int base = 0; base * static_cast<int>(gridDim.x) < total; base += kConsumers / 4) {
    const int index = (base + threadIdx.x / 4) * gridDim.x + blockIdx.x;
    const bool active = index < total;
    const int row = active ? index / k_steps : 0;
    const int quad = active ? index % k_steps * 4 + threadIdx.x % 4 : threadIdx.x % 4;
    task(active, row, quad);
  }
}

template <typename T>
__device__ inline void Embed(const EmbedOp& op, const PassNodes& nodes, int bucket_rows) {
  const int ld = op.k_steps * 16;
  ForQuads(nodes.rows, op.k_steps, [&](bool active, int row, int quad) {
    float4 x = {0.0f, 0.0f, 0.0f, 0.0f};
    if (active) {
      const T* from =
          static_cast<const T*>(op.table) + static_cast<int64_t>(nodes.token[row]) * op.columns;
      float* values = &x.x;
#pragma unroll 1
      for (int i = 0; i < 4; ++i) {
        if (quad * 4 + i < op.columns) values[i] = ToFloat(from[quad * 4 + i]);
      }
      __stcg(reinterpret_cast<float4*>(op.x + static_cast<int64_t>(row) * ld) + quad, x);
    }
    const float4 w = reinterpret_cast<const float4*>(op.next.weight)[quad];
    WriteNormInput<T>(op.next, bucket_rows, op.k_steps, active, row, quad, x, w);
  });
}

template <typename T>
__device__ __noinline__ void Residual(const ResidualOp& op, const PassNodes& nodes, int bucket_rows,
                                      float* work) {
  const int ld = op.k_steps * 16;
  bool first = true;
  ForQuads(nodes.rows, op.k_steps, [&](bool active, int row, int quad) {
    float4 x = {0.0f, 0.0f, 0.0f, 0.0f};
    float4* to = reinterpret_cast<float4*>(op.x + static_cast<int64_t>(row) * ld) + quad;
    Loaded4<8> loaded;
    float4 w = {0.0f, 0.0f, 0.0f, 0.0f};
    if (active) {
      x = __ldcg(to);
      w = reinterpret_cast<const float4*>(op.next.weight)[quad];
      Load4(op.partials, row, quad, 0, loaded);
    }
    if (first) {  // while those loads are under way
      RowFactors(op.norm, nodes.rows, work);
      SyncThreads<kConsumers>();
      first = false;
    }
    if (active) {
      float4 sum = Sum4(op.partials, row, quad, loaded, work, op.norm.groups);
      if (op.bias != nullptr) {
        const float4 bias = reinterpret_cast<const float4*>(op.bias)[quad];
        sum = make_float4(sum.x + bias.x, sum.y + bias.y, sum.z + bias.z, sum.w + bias.w);
      }
      x = make_float4(x.x + sum.x, x.y + sum.y, x.z + sum.z, x.w + sum.w);
      __stcg(to, x);
    }
    WriteNormInput<T>(op.next, bucket_rows, op.k_steps, active, row, quad, x, w);
  });
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
__device__ __noinline__ void Gated(const GatedOp& op, const PassNodes& nodes, int bucket_rows,
                                   float* work) {
  RowFactors(op.norm, nodes.rows, work);
  SyncThreads<kConsumers>();
  const bool vectors = op.columns % 4 == 0;
  ForQuads(nodes.rows, op.k_steps, [&](bool active, int row, int quad) {
    if (!active) return;
    float4 y = {0.0f, 0.0f, 0.0f, 0.0f};
    float gates[4], ups[4];
    if (vectors && quad * 4 < op.columns) {
      Loaded4<4> gate, up;
      const int up_quad = op.columns / 4 + quad;
      Load4(op.partials, row, quad, 0, gate);
      Load4(op.partials, row, up_quad, 0, up);
      const float4 g = Sum4(op.partials, row, quad, gate, work, 1);
      const float4 u = Sum4(op.partials, row, up_quad, up, work, 1);
      gates[0] = g.x, gates[1] = g.y, gates[2] = g.z, gates[3] = g.w;
      ups[0] = u.x, ups[1] = u.y, ups[2] = u.z, ups[3] = u.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        gates[i] = 0.0f;
        ups[i] = 0.0f;
        if (quad * 4 + i >= op.columns) continue;
#pragma unroll 1
        for (int s = 0; s < op.partials.splits; ++s) {
          const float* at = op.partials.data +
                            (static_cast<int64_t>(s) * kMaxRows + row) * op.partials.ld + quad * 4 +
                            i;
          gates[i] += work[row] * __ldcg(at);
          ups[i] += work[row] * __ldcg(at + op.columns);
        }
      }
    }
    float* values = &y.x;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = quad * 4 + i;
      if (column >= op.columns) break;
      float gate = gates[i], up = ups[i];
      if (op.bias != nullptr) {
        gate += op.bias[column];
        up += op.bias[op.columns + column];
      }
      values[i] = Activate(op.activation, gate) * up;
    }
    StoreAct4<T>(op.act, bucket_rows, row, quad, y);
  });
}

// Whether (value, token) comes before (best, best_token): the greater, of equals the lower token.
__device__ inline bool Before(float value, int token, float best, int best_token) {
  return value > best || (value == best && token < best_token);
}

// The `top` first of `count` candidates, one warp. token_at(i), value_at(i).
template <typename Value, typename Token, typename Store>
__device__ inline void SelectTop(int count, int top, const Value& value_at, const Token& token_at,
                                 const Store& store) {
  const int lane = threadIdx.x % 32;
  float last = INFINITY;
  int last_token = -1;
#pragma unroll 1
  for (int r = 0; r < top; ++r) {
    float best = -INFINITY;
    int best_token = INT32_MAX;
#pragma unroll 1
    for (int i = lane; i < count; i += 32) {
      const float value = value_at(i);
      const int token = token_at(i);
      const bool after_last = r == 0 || Before(last, last_token, value, token);
      if (after_last && token >= 0 && Before(value, token, best, best_token)) {
        best = value;
        best_token = token;
      }
    }
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
}

__device__ inline void Select(const SelectOp& op, const PassNodes& nodes) {
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
      bool nan = false;
#pragma unroll 1
      for (int i = lane; i < count; i += 32) nan |= isnan(__ldcg(logits + i));
      if (__any_sync(0xffffffffu, nan)) {
        // Told by a value that no logit has.
        if (lane == 0) __stcg(op.values + at, NAN);
        continue;
      }
      SelectTop(
          count, nodes.top, [&](int i) { return __ldcg(logits + i); },
          [&](int i) { return first + i; },
          [&](int r, float value, int token) {
            __stcg(op.values + at + r, value);
            __stcg(op.tokens + at + r, token);
          });
    }
    return;
  }
#pragma unroll 1
  for (int row = warp * gridDim.x + blockIdx.x; row < nodes.rows;
       row += kConsumerWarps * gridDim.x) {
    const int at = row * kSelectSlices * kMaxTop;
    bool nan = false;
#pragma unroll 1
    for (int i = lane; i < kSelectSlices; i += 32)
      nan |= isnan(__ldcg(op.values + at + i * kMaxTop));
    if (__any_sync(0xffffffffu, nan)) {
      if (lane == 0) {
#pragma unroll 1
        for (int r = 0; r < nodes.top; ++r) op.out->token[row][r] = -1;
      }
      continue;
    }
    const auto index = [&](int i) { return at + i / nodes.top * kMaxTop + i % nodes.top; };
    SelectTop(
        kSelectSlices * nodes.top, nodes.top, [&](int i) { return __ldcg(op.values + index(i)); },
        [&](int i) { return __ldcg(op.tokens + index(i)); },
        [&](int r, float, int token) { op.out->token[row][r] = token; });
  }
}

}  // namespace canopy::cuda

#endif  // __CUDACC__
#endif  // CANOPY_CORE_OPS_ROWS_CUDA_CUH_
