// What this machine can do at most: the two numbers that benchmarks measure themselves against.

#ifndef CANOPY_BENCH_CEILINGS_H_
#define CANOPY_BENCH_CEILINGS_H_

#include <cstddef>

#include "core/cpu_backend.h"

namespace canopy {

// Bytes a second at which all threads of the pool together read a buffer of `bytes` that was
// written before: the median of several passes. 512 MiB is beyond any cache; 32 MiB is the size of
// a small model.
double MeasureReadBandwidth(CpuBackend& cpu, size_t bytes);

// f32 multiply-adds a second of all threads of the pool together, on the widest vectors that the
// operators use, from registers alone: the median of several passes.
double MeasureMultiplyAddPeak(CpuBackend& cpu);

}  // namespace canopy

#endif  // CANOPY_BENCH_CEILINGS_H_
