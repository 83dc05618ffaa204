// How the element-wise operators share rows among threads.

#ifndef CANOPY_CORE_OPS_PARALLEL_ROWS_H_
#define CANOPY_CORE_OPS_PARALLEL_ROWS_H_

#include <algorithm>
#include <cstdint>

#include "core/cpu_backend.h"

namespace canopy {

// Calls work(first_row, end_row) for ranges that cover [0, rows). `elements` is the work in
// elements of a few operations each: below a few microseconds' worth, one call in place is cheaper
// than a launch.
template <typename F>
void ParallelRows(CpuBackend& cpu, int rows, int64_t elements, const F& work) {
  constexpr int64_t kSerialElements = 8192;
  const int tasks = elements < kSerialElements ? 1 : std::min(rows, cpu.pool().threads());
  cpu.pool().Run(tasks, [&](int task) {
    work(static_cast<int>(int64_t{rows} * task / tasks),
         static_cast<int>(int64_t{rows} * (task + 1) / tasks));
  });
}

}  // namespace canopy

#endif  // CANOPY_CORE_OPS_PARALLEL_ROWS_H_
