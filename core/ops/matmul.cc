#include "core/ops/matmul.h"

#include <algorithm>
#include <vector>

#include "core/ops/matmul_cpu.h"

namespace canopy {
namespace {

// Multiply-adds below which a product runs on the caller alone: less than the cost of a launch.
constexpr int64_t kSerialWork = 1 << 16;
// Multiply-adds of a task: some 20 microseconds of a core's peak. Shorter tasks would wait for each
// other, longer ones leave threads idle at the end.
constexpr int64_t kTaskWork = 1 << 20;
// Rows that are worked on together: theirs of x stay in the L2 cache while the weights pass by.
constexpr int kRowChunk = 64;

int CeilDiv(int a, int b) { return (a + b - 1) / b; }

}  // namespace

absl::Status MatMul(CpuBackend& cpu, ConstMatrix x, const PackedMatrix& w, Matrix y,
                    const MatMulOptions& options) {
  if (x.columns != w.in_features() || y.columns != w.out_features() || x.rows != y.rows) {
    return absl::InvalidArgumentError(
        absl::StrCat("MatMul: x [", x.rows, ", ", x.columns, "], weights [", w.out_features(), ", ",
                     w.in_features(), "], y [", y.rows, ", ", y.columns,
                     "]; expected x [rows, in_features] and y [rows, out_features] for weights "
                     "[out_features, in_features]"));
  }
  if (x.rows == 0) return absl::OkStatus();

  MatMulKernelArgs args;
  args.x = x.data;
  args.x_stride = x.stride;
  args.weights = static_cast<const unsigned char*>(w.data());
  args.dtype = w.dtype();
  args.k = w.in_features();
  args.n = w.out_features();
  args.y = y.data;
  args.y_stride = y.stride;
  args.bias = options.bias;
  args.accumulate = options.accumulate;

  // No split changes a bit of the result: every element is its own chain over k.
  const int panels = w.panels();
  const int threads = cpu.pool().threads();
  const int64_t work = int64_t{x.rows} * args.k * panels * kPanel;
  if (threads == 1 || work < kSerialWork) {
    MatMulBlock(args, 0, x.rows, 0, panels);
    return absl::OkStatus();
  }
  int row_tasks = CeilDiv(x.rows, kRowChunk);
  const int64_t wanted = std::max<int64_t>(threads, work / kTaskWork);
  const int column_tasks =
      static_cast<int>(std::min<int64_t>(panels, (wanted + row_tasks - 1) / row_tasks));
  // More threads than panels: split rows further.
  if (column_tasks * row_tasks < threads)
    row_tasks = std::min(x.rows, CeilDiv(threads, column_tasks));
  int row_step = CeilDiv(x.rows, row_tasks);
  if (row_tasks > 1) row_step = CeilDiv(row_step, 8) * 8;  // whole tiles
  row_tasks = CeilDiv(x.rows, row_step);
  cpu.pool().Run(column_tasks * row_tasks, [&](int task) {
    const int column_task = task / row_tasks;
    const int row_task = task % row_tasks;
    MatMulBlock(args, std::min(x.rows, row_task * row_step),
                std::min(x.rows, (row_task + 1) * row_step),
                static_cast<int>(int64_t{panels} * column_task / column_tasks),
                static_cast<int>(int64_t{panels} * (column_task + 1) / column_tasks));
  });
  return absl::OkStatus();
}

void MatMulReference(ConstMatrix x, const PackedMatrix& w, Matrix y, const MatMulOptions& options) {
  std::vector<float> weights(w.in_features());
  for (int n = 0; n < w.out_features(); ++n) {
    w.UnpackRow(n, weights.data());
    for (int r = 0; r < x.rows; ++r) {
      double sum = 0.0;
      for (int k = 0; k < w.in_features(); ++k) sum += double{x.row(r)[k]} * weights[k];
      if (options.bias != nullptr) sum += options.bias[n];
      if (options.accumulate) sum += y.row(r)[n];
      y.row(r)[n] = static_cast<float>(sum);
    }
  }
}

}  // namespace canopy
