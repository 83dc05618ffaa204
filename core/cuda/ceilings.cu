#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <dlfcn.h>

#include <algorithm>
#include <vector>

#include "core/cuda/ceilings.h"
#include "core/cuda/timing.h"

namespace canopy {
namespace {

__global__ void FillKernel(uint32_t* data, int64_t count) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    // Two bf16 of magnitude below 2 each, random in sign and fraction.
    const uint32_t x = static_cast<uint32_t>(i) * 2654435761u ^ 0x5bd1e995u;
    data[i] = (x & 0x807f807fu) | 0x3f803f80u;
  }
}

__global__ void __launch_bounds__(512)
    ReadKernel(const uint4* data, int64_t count, uint32_t* sink) {
  uint32_t sum = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  for (; i + 7 * step < count; i += 8 * step) {
    uint4 v[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] = __ldcs(data + i + k * step);
#pragma unroll
    for (int k = 0; k < 8; ++k) sum ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
  }
  for (; i < count; i += step) sum ^= data[i].x;
  if (sum == 0x12345678u) *sink = sum;  // so that nothing is left out
}

// Median of `repetitions` calls of launch(i), behind three that are not counted.
template <typename F>
absl::StatusOr<double> MedianSeconds(CudaBackend& cuda, int repetitions, const F& launch) {
  RETURN_IF_ERROR(TimeEach(cuda, 3, launch).status());
  ASSIGN_OR_RETURN(std::vector<double> times, TimeEach(cuda, repetitions, launch));
  std::nth_element(times.begin(), times.begin() + repetitions / 2, times.end());
  return times[repetitions / 2];
}

absl::Status Fill(CudaBackend& cuda, const Buffer& buffer) {
  FillKernel<<<1024, 256, 0, cuda.stream()>>>(buffer.as<uint32_t>(), buffer.bytes() / 4);
  return CudaStatus(cudaGetLastError(), "making random numbers");
}

}  // namespace

absl::StatusOr<double> MeasureReadBandwidth(CudaBackend& cuda) {
  size_t available = 0, total = 0;
  RETURN_IF_CUDA_ERROR(cudaMemGetInfo(&available, &total), "asking for free memory");
  const size_t bytes = std::min<size_t>(size_t{4} << 30, available / 2) / 4096 * 4096;
  ASSIGN_OR_RETURN(const Buffer buffer, cuda.Allocate(bytes));
  ASSIGN_OR_RETURN(const Buffer sink, cuda.Allocate(4));
  RETURN_IF_ERROR(Fill(cuda, buffer));
  ASSIGN_OR_RETURN(const double seconds, MedianSeconds(cuda, 20, [&](int) {
                     ReadKernel<<<4 * cuda.multiprocessors(), 512, 0, cuda.stream()>>>(
                         buffer.as<uint4>(), bytes / 16, sink.as<uint32_t>());
                     return CudaStatus(cudaGetLastError(), "reading memory");
                   }));
  return static_cast<double>(bytes) / seconds;
}

absl::StatusOr<double> TimeCublasProduct(CudaBackend& cuda, int rows, int out, int in,
                                         int repetitions) {
  // Loaded when it is asked for: nothing else needs it.
  static void* const library = [] {
    const std::string name = absl::StrCat("libcublas.so.", CUBLAS_VER_MAJOR);
    void* opened = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    return opened != nullptr ? opened : dlopen("libcublas.so", RTLD_NOW | RTLD_LOCAL);
  }();
  if (library == nullptr) {
    return absl::NotFoundError(
        "cuBLAS (libcublas.so) cannot be loaded; leave out --compare or set LD_LIBRARY_PATH");
  }
  const auto create =
      reinterpret_cast<decltype(&cublasCreate_v2)>(dlsym(library, "cublasCreate_v2"));
  const auto destroy =
      reinterpret_cast<decltype(&cublasDestroy_v2)>(dlsym(library, "cublasDestroy_v2"));
  const auto set_stream =
      reinterpret_cast<decltype(&cublasSetStream_v2)>(dlsym(library, "cublasSetStream_v2"));
  using GemmEx = cublasStatus_t (*)(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int,
                                    int, const void*, const void*, cudaDataType, int, const void*,
                                    cudaDataType, int, const void*, void*, cudaDataType, int,
                                    cublasComputeType_t, cublasGemmAlgo_t);
  const auto gemm = reinterpret_cast<GemmEx>(dlsym(library, "cublasGemmEx"));
  if (create == nullptr || destroy == nullptr || set_stream == nullptr || gemm == nullptr) {
    return absl::NotFoundError("the cuBLAS that was loaded lacks cublasGemmEx");
  }
  // Several copies of the weights, so that none is still in the cache.
  const int64_t elements = int64_t{out} * in;
  const int copies = static_cast<int>(std::clamp<int64_t>(
      4 * static_cast<int64_t>(cuda.cache_bytes()) / (2 * elements) + 1, 2, 64));
  ASSIGN_OR_RETURN(const Buffer w, cuda.Allocate(2 * elements * copies));
  ASSIGN_OR_RETURN(const Buffer x, cuda.Allocate(size_t{2} * rows * in));
  ASSIGN_OR_RETURN(const Buffer y, cuda.Allocate(size_t{2} * rows * out));
  RETURN_IF_ERROR(Fill(cuda, w));
  RETURN_IF_ERROR(Fill(cuda, x));
  cublasHandle_t handle = nullptr;
  if (create(&handle) != CUBLAS_STATUS_SUCCESS) return absl::InternalError("cuBLAS: no handle");
  set_stream(handle, cuda.stream());
  const float one = 1.0f, zero = 0.0f;
  const absl::StatusOr<double> seconds = MedianSeconds(cuda, repetitions, [&](int i) {
    const auto* weights = w.as<__nv_bfloat16>() + elements * (i % copies);
    const cublasStatus_t status =
        gemm(handle, CUBLAS_OP_T, CUBLAS_OP_N, out, rows, in, &one, weights, CUDA_R_16BF, in,
             x.data(), CUDA_R_16BF, in, &zero, y.data(), CUDA_R_16BF, out, CUBLAS_COMPUTE_32F,
             CUBLAS_GEMM_DEFAULT);
    return status == CUBLAS_STATUS_SUCCESS
               ? absl::OkStatus()
               : absl::InternalError(absl::StrCat("cuBLAS: error ", static_cast<int>(status)));
  });
  destroy(handle);
  return seconds;
}

}  // namespace canopy
