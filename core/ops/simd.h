// The SIMD targets that the operators are compiled for. Included before any header of Highway.
//
// Three on x86-64: AVX-512 (AVX3), AVX2 with FMA, and the compiler's baseline; NEON on arm64. The
// others are left out because they would cost compile time for the same code (AVX3_DL, ZEN4, SPR),
// for machines without fused multiply-add (SSSE3, SSE4), or have vectors without a size (SVE),
// which cannot be elements of an array.
//
// On targets with fused multiply-add all operators give the same bits; on the x86-64 baseline a
// product and its addition round apart, so results differ from those of newer machines in the last
// bits.

#ifndef CANOPY_CORE_OPS_SIMD_H_
#define CANOPY_CORE_OPS_SIMD_H_

#ifdef HWY_HIGHWAY_PER_TARGET
#error "core/ops/simd.h must come before Highway's headers"
#endif

#define HWY_DISABLED_TARGETS                                                                \
  (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL | HWY_AVX3_ZEN4 | HWY_AVX3_SPR | HWY_SVE | HWY_SVE2 | \
   HWY_SVE_256 | HWY_SVE2_128)
#include "hwy/detect_targets.h"
// Targets that came after Highway 1.0.3.
#ifndef HWY_AVX3_ZEN4
#define HWY_AVX3_ZEN4 0
#endif
#ifndef HWY_AVX3_SPR
#define HWY_AVX3_SPR 0
#endif

#include <cstdint>
#include <string>
#include <vector>

namespace canopy {

// The target that the operators run on here: "AVX3", "AVX2", "NEON", "SCALAR", ...
std::string SimdTargetName();

// For tests: the targets that this machine can run, and a switch to one of them (0: back to the
// best). Not thread-safe.
std::vector<int64_t> RunnableSimdTargets();
void UseSimdTarget(int64_t target);

}  // namespace canopy

#endif  // CANOPY_CORE_OPS_SIMD_H_
