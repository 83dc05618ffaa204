#include "core/ops/matmul_cpu.h"

#include <algorithm>

#include "core/ops/packed_matrix.h"
#include "core/ops/simd.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/ops/matmul_cpu.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

// Tiles keep their sums in an array of vectors, which lives in registers only if every loop over it
// is unrolled, also where the optimiser would not do so by itself. Not in builds with sanitizers,
// whose checks would be unrolled as well: they take minutes to compile.
#ifndef CANOPY_UNROLL
#if defined(__clang__)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define CANOPY_UNROLL
#else
#define CANOPY_UNROLL _Pragma("clang loop unroll(full)")
#endif
#elif defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CANOPY_UNROLL
#else
#define CANOPY_UNROLL _Pragma("GCC unroll 32")
#endif
#endif

HWY_BEFORE_NAMESPACE();
namespace canopy {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, 16>;
using V = hn::Vec<D>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(D()));
constexpr int kHalf = kPanel / 2;
// A unit is kLanes columns of a panel's lower half and the kLanes columns 16 further: what one
// vector of bf16 words widens to.
constexpr int kUnits = kHalf / kLanes;

// Weights of one unit at one k, widened exactly.
struct F32Weights {
  static constexpr int kRowBytes = kPanel * 4;
  static constexpr int kUnitBytes = kLanes * 4;
  static HWY_INLINE void Load(const unsigned char* p, V& low, V& high) {
    const auto* weights = reinterpret_cast<const float*>(p);
    low = hn::Load(D(), weights);
    high = hn::Load(D(), weights + kHalf);
  }
};

struct BF16Weights {
  static constexpr int kRowBytes = kPanel * 2;
  static constexpr int kUnitBytes = kLanes * 4;
  static HWY_INLINE void Load(const unsigned char* p, V& low, V& high) {
    const hn::RebindToUnsigned<D> du;
    const auto words = hn::Load(du, reinterpret_cast<const uint32_t*>(p));
    low = hn::BitCast(D(), hn::ShiftLeft<16>(words));
    high = hn::BitCast(D(), hn::And(words, hn::Set(du, 0xffff0000u)));
  }
};

struct F16Weights {
  static constexpr int kRowBytes = kPanel * 2;
  static constexpr int kUnitBytes = kLanes * 2;
  static HWY_INLINE void Load(const unsigned char* p, V& low, V& high) {
    const hn::Rebind<hwy::float16_t, D> dh;
    const auto* weights = reinterpret_cast<const hwy::float16_t*>(p);
    low = hn::PromoteTo(D(), hn::Load(dh, weights));
    high = hn::PromoteTo(D(), hn::Load(dh, weights + kHalf));
  }
};

// What follows a tile's sums, here [rows, units, low and high, kLanes]: bias, the values before,
// and only columns that y has.
HWY_NOINLINE void StoreSums(const MatMulKernelArgs& args, const float* sums, int row, int rows,
                            int first_unit, int units) {
  const D d;
  for (int r = row; r < row + rows; ++r) {
    for (int unit = first_unit; unit < first_unit + units; ++unit) {
      for (int half = 0; half < 2; ++half, sums += kLanes) {
        const int column = unit / kUnits * kPanel + unit % kUnits * kLanes + half * kHalf;
        const int count = std::min(kLanes, args.n - column);
        float* y = args.y + r * args.y_stride + column;
        if (count == kLanes) {
          V sum = hn::Load(d, sums);
          if (args.bias != nullptr) sum = hn::Add(sum, hn::LoadU(d, args.bias + column));
          if (args.accumulate) sum = hn::Add(hn::LoadU(d, y), sum);
          hn::StoreU(sum, d, y);
        } else {
          for (int i = 0; i < count; ++i) {
            float sum = sums[i];
            if (args.bias != nullptr) sum += args.bias[column + i];
            if (args.accumulate) sum = y[i] + sum;
            y[i] = sum;
          }
        }
      }
    }
  }
}

// How far ahead of its use a weight is asked for, in bytes. The hardware's prefetcher stops at
// pages and is slow to start where many rows make the stream slow; measured with 2, 3, 4 and 8 KiB
// on Zen 4: without it 16 rows take a fifth longer.
constexpr int64_t PrefetchBytes(int rows) { return rows <= 4 ? 8192 : 4096; }

// Rows [row, row + kRows) of kCount units, the first of which is `unit` (counted over all panels).
template <class W, int kRows, int kCount>
HWY_NOINLINE void Tile(const MatMulKernelArgs& args, int row, int unit) {
  const D d;
  const float* x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = args.x + (row + r) * args.x_stride;
  const unsigned char* weights[kCount];
  for (int u = 0; u < kCount; ++u) {
    weights[u] = args.weights + int64_t{(unit + u) / kUnits} * args.k * W::kRowBytes +
                 (unit + u) % kUnits * W::kUnitBytes;
  }

  V sums[kRows][2 * kCount];
  CANOPY_UNROLL
  for (int r = 0; r < kRows; ++r) {
    CANOPY_UNROLL
    for (int v = 0; v < 2 * kCount; ++v) sums[r][v] = hn::Zero(d);
  }
  const int64_t k_end = args.k;
  for (int64_t k = 0; k < k_end; ++k) {
    // Past the end of the weights a prefetch does nothing.
    for (int64_t line = 0; line < W::kRowBytes; line += 64) {
      __builtin_prefetch(weights[0] + k * W::kRowBytes + PrefetchBytes(kRows) + line);
    }
    CANOPY_UNROLL
    for (int u = 0; u < kCount; ++u) {
      V low, high;
      W::Load(weights[u] + k * W::kRowBytes, low, high);
      CANOPY_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const V broadcast = hn::Set(d, x[r][k]);
        sums[r][2 * u] = hn::MulAdd(low, broadcast, sums[r][2 * u]);
        sums[r][2 * u + 1] = hn::MulAdd(high, broadcast, sums[r][2 * u + 1]);
      }
    }
  }

  // The common case straight from the registers: whole columns without a bias.
  if (kCount == 1 && args.bias == nullptr) {
    const int column = unit / kUnits * kPanel + unit % kUnits * kLanes;
    if (column + kHalf + kLanes <= args.n) {
      float* y = args.y + row * args.y_stride + column;
      CANOPY_UNROLL
      for (int r = 0; r < kRows; ++r, y += args.y_stride) {
        V low = sums[r][0];
        V high = sums[r][1];
        if (args.accumulate) {
          low = hn::Add(hn::LoadU(d, y), low);
          high = hn::Add(hn::LoadU(d, y + kHalf), high);
        }
        hn::StoreU(low, d, y);
        hn::StoreU(high, d, y + kHalf);
      }
      return;
    }
  }
  HWY_ALIGN float block[kRows * 2 * kCount * kLanes];
  CANOPY_UNROLL
  for (int r = 0; r < kRows; ++r) {
    CANOPY_UNROLL
    for (int v = 0; v < 2 * kCount; ++v) {
      hn::Store(sums[r][v], d, block + (r * 2 * kCount + v) * kLanes);
    }
  }
  StoreSums(args, block, row, kRows, unit, kCount);
}

// Up to two rows work on a whole panel at a time, one stream of weights, which is what the memory
// gives most for. More rows work on a unit at a time, as many as leave room in the registers (16 of
// AVX2, 32 of the others). A tile of eight rows on AVX-512 reaches 98% of the multiply-add peak.
constexpr int kMaxRows = kLanes == 8 ? 6 : 8;
constexpr int kFewRowsUnits = kUnits <= 4 ? kUnits : 1;

// One panel.
template <class W>
void Rows(const MatMulKernelArgs& args, int row, int rows, int panel) {
  const int begin = panel * kUnits;
  const int end = begin + kUnits;
  if (rows <= 2) {
    for (int unit = begin; unit < end; unit += kFewRowsUnits) {
      if (rows == 1) {
        Tile<W, 1, kFewRowsUnits>(args, row, unit);
      } else {
        Tile<W, 2, kFewRowsUnits>(args, row, unit);
      }
    }
    return;
  }
  for (int unit = begin; unit < end; ++unit) {
    switch (rows) {
      case 3:
        Tile<W, 3, 1>(args, row, unit);
        break;
      case 4:
        Tile<W, 4, 1>(args, row, unit);
        break;
      case 5:
        Tile<W, 5, 1>(args, row, unit);
        break;
      case 6:
        Tile<W, 6, 1>(args, row, unit);
        break;
      case 7:
        Tile<W, HWY_MIN(7, kMaxRows), 1>(args, row, unit);
        break;
      default:
        Tile<W, kMaxRows, 1>(args, row, unit);
        break;
    }
  }
}

template <class W>
void Block(const MatMulKernelArgs& args, int row_begin, int row_end, int panel_begin,
           int panel_end) {
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    for (int row = row_begin; row < row_end; row += kMaxRows) {
      Rows<W>(args, row, std::min(kMaxRows, row_end - row), panel);
    }
  }
}

void MatMulBlockImpl(const MatMulKernelArgs& args, int row_begin, int row_end, int panel_begin,
                     int panel_end) {
  switch (args.dtype) {
    case DType::kF32:
      return Block<F32Weights>(args, row_begin, row_end, panel_begin, panel_end);
    case DType::kBF16:
      return Block<BF16Weights>(args, row_begin, row_end, panel_begin, panel_end);
    default:
      return Block<F16Weights>(args, row_begin, row_end, panel_begin, panel_end);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace canopy
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace canopy {

HWY_EXPORT(MatMulBlockImpl);

void MatMulBlock(const MatMulKernelArgs& args, int row_begin, int row_end, int panel_begin,
                 int panel_end) {
  HWY_DYNAMIC_DISPATCH(MatMulBlockImpl)(args, row_begin, row_end, panel_begin, panel_end);
}

}  // namespace canopy
#endif  // HWY_ONCE
