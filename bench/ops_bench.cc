// The dense operators on the shapes of real models, beside what the machine can do at most.
//
//   build/release/ops_bench --benchmark_filter=m2-16m
//
// A product's counters: GB/s of weights streamed (each weight once, as stored), GFMA/s, and their
// shares of the two ceilings that are measured at the start of the same run. "set" entries are all
// products of one pass of a model, one after the other, whose weights are distinct as they are in
// the model.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "bench/ceilings.h"
#include "benchmark/benchmark.h"
#include "core/ops/activation.h"
#include "core/ops/matmul.h"
#include "core/ops/norm.h"
#include "core/ops/rope.h"

namespace canopy {
namespace {

struct Shape {
  int out = 0;
  int in = 0;
  int count = 1;  // in the model
};

struct Model {
  std::string name;
  std::vector<Shape> shapes;
};

const std::vector<Model>& Models() {
  static const std::vector<Model> models = {
      {"m2-16m", {{1804, 384, 13}, {384, 768, 13}, {8192, 384, 1}}},
      {"llama-16m", {{640, 384, 9}, {384, 384, 9}, {2048, 384, 9}, {384, 1024, 9}}},
  };
  return models;
}

struct Machine {
  std::unique_ptr<CpuBackend> cpu;
  double read_large = 0.0;
  double read_small = 0.0;
  double multiply_adds = 0.0;
};

Machine& TheMachine() {
  static Machine machine = [] {
    Machine m;
    m.cpu = *CpuBackend::Create();
    m.read_large = MeasureReadBandwidth(*m.cpu, size_t{512} << 20);
    m.read_small = MeasureReadBandwidth(*m.cpu, size_t{32} << 20);
    m.multiply_adds = MeasureMultiplyAddPeak(*m.cpu);
    return m;
  }();
  return machine;
}

Tensor Filled(int rows, int columns) {
  Tensor tensor = *Tensor::Allocate(*TheMachine().cpu, rows, columns);
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) {
      tensor.view().row(r)[c] = static_cast<float>((r * 31 + c * 17) % 64 - 32) / 32.0f;
    }
  }
  return tensor;
}

PackedMatrix Weights(DType dtype, int out, int in) {
  // bf16 and f16 of small magnitude: any pattern with a middling exponent.
  std::vector<uint16_t> bits(static_cast<size_t>(out) * in * SizeOf(dtype) / 2);
  for (size_t i = 0; i < bits.size(); ++i) {
    bits[i] = static_cast<uint16_t>((dtype == DType::kF16 ? 0x2c00 : 0x3d00) + i * 37 % 512);
  }
  const PackedMatrix::Source source{bits.data(), out};
  return *PackedMatrix::Pack(*TheMachine().cpu, dtype, in, {&source, 1});
}

// All products of `shapes`, `count` of each with weights of their own.
void MatMuls(benchmark::State& state, const std::vector<Shape>& shapes, DType dtype, int rows) {
  Machine& machine = TheMachine();
  std::vector<PackedMatrix> weights;
  double bytes = 0.0, multiply_adds = 0.0;
  int widest = 0, deepest = 0;
  for (const Shape& shape : shapes) widest = std::max(widest, shape.out);
  for (const Shape& shape : shapes) deepest = std::max(deepest, shape.in);
  for (int i = 0;; ++i) {
    bool any = false;
    for (const Shape& shape : shapes) {
      if (i >= shape.count) continue;
      any = true;
      weights.push_back(Weights(dtype, shape.out, shape.in));
      bytes += static_cast<double>(shape.out) * shape.in * SizeOf(dtype);
      multiply_adds += static_cast<double>(shape.out) * shape.in * rows;
    }
    if (!any) break;
  }
  const Tensor x = Filled(rows, deepest);
  const Tensor y = Filled(rows, widest);
  const auto start = std::chrono::steady_clock::now();
  for (auto _ : state) {
    for (const PackedMatrix& w : weights) {
      const Matrix in = x.view().Columns(0, w.in_features());
      const Matrix out = y.view().Columns(0, w.out_features());
      benchmark::DoNotOptimize(MatMul(*machine.cpu, in, w, out));
    }
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const double passes_per_second = state.iterations() / seconds;
  state.counters["GB/s"] = bytes * passes_per_second / 1e9;
  state.counters["of_read"] = bytes * passes_per_second / machine.read_large;
  state.counters["GFMA/s"] = multiply_adds * passes_per_second / 1e9;
  state.counters["of_peak"] = multiply_adds * passes_per_second / machine.multiply_adds;
}

void Launch(benchmark::State& state) {
  ThreadPool& pool = TheMachine().cpu->pool();
  for (auto _ : state) pool.Run(pool.threads(), [](int) {});
}

void Norm(benchmark::State& state) {
  const int rows = static_cast<int>(state.range(0)), columns = static_cast<int>(state.range(1));
  const Tensor x = Filled(rows, columns), y = Filled(rows, columns);
  const std::vector<float> weight(columns, 0.5f);
  for (auto _ : state) {
    benchmark::DoNotOptimize(RmsNorm(*TheMachine().cpu, x.view(), weight.data(), 1e-5f, y.view()));
  }
  state.SetBytesProcessed(state.iterations() * rows * columns * 8);
}

void GatedNorm(benchmark::State& state) {
  const int rows = static_cast<int>(state.range(0)), columns = static_cast<int>(state.range(1));
  const Tensor x = Filled(rows, columns), gate = Filled(rows, columns), y = Filled(rows, columns);
  const std::vector<float> weight(columns, 0.5f);
  for (auto _ : state) {
    benchmark::DoNotOptimize(
        GatedRmsNorm(*TheMachine().cpu, x.view(), gate.view(), weight.data(), 1e-5f, 1, y.view()));
  }
  state.SetBytesProcessed(state.iterations() * rows * columns * 12);
}

void Gated(benchmark::State& state) {
  const int rows = static_cast<int>(state.range(0)), columns = static_cast<int>(state.range(1));
  const Tensor x = Filled(rows, 2 * columns), y = Filled(rows, columns);
  for (auto _ : state) {
    benchmark::DoNotOptimize(
        GatedActivation(*TheMachine().cpu, Activation::kSilu, x.view(), y.view()));
  }
  state.SetBytesProcessed(state.iterations() * rows * columns * 12);
}

void Rope(benchmark::State& state) {
  const int rows = static_cast<int>(state.range(0)), heads = 6, head_dim = 64;
  const Tensor x = Filled(rows, heads * head_dim);
  const std::vector<float> inv_freq = RopeInverseFrequencies(head_dim, 10000.0, nullptr);
  std::vector<int32_t> positions(rows);
  for (int r = 0; r < rows; ++r) positions[r] = 100 + r;
  for (auto _ : state) {
    benchmark::DoNotOptimize(
        ApplyRope(*TheMachine().cpu, x.view(), heads, head_dim, inv_freq, positions));
  }
  state.SetBytesProcessed(state.iterations() * rows * heads * head_dim * 8);
}

void Register() {
  const auto timed = [](benchmark::internal::Benchmark* b) {
    b->UseRealTime()->Unit(benchmark::kMicrosecond);
    return b;
  };
  timed(benchmark::RegisterBenchmark("launch", Launch));
  for (const Model& model : Models()) {
    for (int rows : {1, 2, 4, 8, 16, 32, 64, 512}) {
      timed(benchmark::RegisterBenchmark(
          absl::StrCat("matmul/", model.name, "/set/rows:", rows).c_str(),
          [&model, rows](benchmark::State& s) { MatMuls(s, model.shapes, DType::kBF16, rows); }));
    }
    for (const Shape& shape : model.shapes) {
      for (int rows : {1, 2, 4, 8, 16, 32, 64, 512}) {
        timed(benchmark::RegisterBenchmark(
            absl::StrCat("matmul/", model.name, "/", shape.out, "x", shape.in, "/rows:", rows)
                .c_str(),
            [shape, rows](benchmark::State& s) {
              // Enough copies that the weights do not stay in the L2 cache, as in the model.
              MatMuls(s, {{shape.out, shape.in, std::max(shape.count, 4)}}, DType::kBF16, rows);
            }));
      }
    }
  }
  for (DType dtype : {DType::kF32, DType::kF16}) {
    for (int rows : {1, 16, 512}) {
      timed(benchmark::RegisterBenchmark(
          absl::StrCat("matmul/", std::string(Name(dtype)), "/1804x384/rows:", rows).c_str(),
          [dtype, rows](benchmark::State& s) {
            MatMuls(s, {{1804, 384, 13}}, dtype, rows);
          }));
    }
  }
  for (int rows : {1, 16, 512}) {
    timed(benchmark::RegisterBenchmark("rms_norm", Norm))->Args({rows, 384});
    timed(benchmark::RegisterBenchmark("gated_rms_norm", GatedNorm))->Args({rows, 768});
    timed(benchmark::RegisterBenchmark("gated_silu", Gated))->Args({rows, 1024});
    timed(benchmark::RegisterBenchmark("rope", Rope))->Arg(rows);
  }
}

}  // namespace
}  // namespace canopy

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  const canopy::Machine& machine = canopy::TheMachine();
  const auto figure = [](double value) {
    char text[32];
    std::snprintf(text, sizeof(text), "%.1f", value / 1e9);
    return std::string(text);
  };
  benchmark::AddCustomContext("backend", machine.cpu->Description());
  benchmark::AddCustomContext("read GB/s, 512 MiB", figure(machine.read_large));
  benchmark::AddCustomContext("read GB/s, 32 MiB", figure(machine.read_small));
  benchmark::AddCustomContext("multiply-add peak GFMA/s", figure(machine.multiply_adds));
  canopy::Register();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
