// Products of rows with rows on the tensor cores, C . B of the scan and q . k of attention: a warp
// holds eight rows as the second operand and multiplies all rows of the first one, which lie in
// shared memory.
//
// Sums run over the columns in blocks of 32, of which a lane l holds the eight from 8 (l % 4) on,
// so that operands are vectors in memory. The order is the same for every row.

#ifndef CANOPY_VERIFY_ROW_PRODUCTS_CUDA_CUH_
#define CANOPY_VERIFY_ROW_PRODUCTS_CUDA_CUH_

#include "core/cuda/pass.h"

namespace canopy::cuda {

inline constexpr int kBlocksAhead = 4;  // of 32 columns, that a warp loads at once

// Elements between rows in shared memory: an odd number of 64 bytes, so that the vectors of
// two rows lie in different banks.
template <typename T>
CANOPY_HOST_DEVICE constexpr int RowStride(int padded_columns) {
  constexpr int kElements = 64 / sizeof(T);
  return padded_columns + (padded_columns / kElements % 2 == 0 ? kElements : 0);
}

}  // namespace canopy::cuda

#ifdef __CUDACC__

#include "core/cuda/ptx.cuh"

namespace canopy::cuda {

// Eight elements of a row from 8 (lane % 4) on, of a block of 32: operands of two k-steps.
template <typename T>
struct RowVector;
template <>
struct RowVector<__nv_bfloat16> {
  uint4 v = {0, 0, 0, 0};

  __device__ void Load(const __nv_bfloat16* at) { v = *reinterpret_cast<const uint4*>(at); }
  __device__ void LoadGlobal(const __nv_bfloat16* at, bool there) { v = LoadNewBits(at, there); }
  // As another block sends it.
  __device__ void LoadSent(const __nv_bfloat16* at, bool there) { v = LoadSentBits(at, there); }
  __device__ bool Unsent() const { return IsUnsent<__nv_bfloat16>(v); }
  __device__ uint32_t Pair(int step, int half) const {
    return step == 0 ? (half == 0 ? v.x : v.y) : (half == 0 ? v.z : v.w);
  }
  template <typename Fragment>
  __device__ void Set(Fragment& f, int i, int step, int half) const {
    f.r[i] = Pair(step, half);
  }
};
template <>
struct RowVector<float> {
  float4 v[2] = {};

  __device__ void Load(const float* at) {
    v[0] = reinterpret_cast<const float4*>(at)[0];
    v[1] = reinterpret_cast<const float4*>(at)[1];
  }
  __device__ void LoadGlobal(const float* at, bool there) {
    v[0] = LoadNew4(at, there);
    v[1] = LoadNew4(at + 4, there);
  }
  __device__ void LoadSent(const float* at, bool there) {
    v[0] = LoadSent4(at, there);
    v[1] = LoadSent4(at + 4, there);
  }
  __device__ bool Unsent() const { return IsUnsent(v[0]) || IsUnsent(v[1]); }
  template <typename Fragment>
  __device__ void Set(Fragment& f, int i, int step, int half) const {
    if (half == 0) {
      SetPair(f, i, v[step].x, v[step].y);
    } else {
      SetPair(f, i, v[step].z, v[step].w);
    }
  }
};

// A vector of each of eight rows as the second operand of two k-steps.
template <typename T>
__device__ __forceinline__ void SetSecond(FragmentB<T> (&fragments)[2], const RowVector<T>& rows) {
#pragma unroll
  for (int e = 0; e < 4; ++e) rows.Set(fragments[e / 2], e % 2, e / 2, e % 2);
}

// A block of 32 columns of sixteen rows, or with kEight of eight, as the first operand: the lane's
// vectors of rows l / 4 and l / 4 + 8.
template <typename T, bool kEight>
struct RowPair {
  RowVector<T> low, high;

  __device__ __forceinline__ void Load(const T* low_at, const T* high_at) {
    low.Load(low_at);
    if (!kEight) high.Load(high_at);
  }
  // Adds the products of k-step `step` of two with the eight rows of the second operand.
  __device__ __forceinline__ void AddProducts(float (&sums)[4], const FragmentB<T> (&second)[2],
                                              int step) const {
    FragmentA<T> first;
    low.Set(first, 0, step, 0);
    high.Set(first, 1, step, 0);
    low.Set(first, 2, step, 1);
    high.Set(first, 3, step, 1);
    Multiply(sums, first, second[step]);
  }
};

}  // namespace canopy::cuda

#endif  // __CUDACC__
#endif  // CANOPY_VERIFY_ROW_PRODUCTS_CUDA_CUH_
