#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>

#include "core/cuda/pass.h"
#include "core/cuda_backend.h"

namespace canopy {
namespace {

// Compiled as all kernels are, so that it tells whether the build has code for a device.
__global__ void Probe() {}

}  // namespace

absl::Status CudaStatus(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return absl::OkStatus();
  const std::string text = absl::StrCat("CUDA: ", doing, ": ", cudaGetErrorName(error), " (",
                                        cudaGetErrorString(error), ")");
  if (error == cudaErrorMemoryAllocation) return absl::ResourceExhaustedError(text);
  return absl::InternalError(text);
}

absl::StatusOr<std::unique_ptr<CudaBackend>> CudaBackend::Create(int device) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (driver == 0) {
      return absl::NotFoundError(
          "device cuda: there is no NVIDIA driver on this machine; use the device cpu");
    }
    return absl::FailedPreconditionError(
        absl::StrCat("device cuda: the driver is for CUDA ", driver / 1000, ".", driver % 1000 / 10,
                     ", and this program needs ", runtime / 1000, ".", runtime % 1000 / 10,
                     "; update the driver, or use the device cpu"));
  }
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
    return absl::NotFoundError(
        "device cuda: there is no CUDA device on this machine; use the device cpu");
  }
  RETURN_IF_CUDA_ERROR(error, "counting devices");
  if (device < 0 || device >= count) {
    return absl::NotFoundError(
        absl::StrCat("device cuda:", device, ": there are ", count, " devices, 0 to ", count - 1));
  }
  cudaDeviceProp properties;
  RETURN_IF_CUDA_ERROR(cudaGetDeviceProperties(&properties, device), "reading device properties");
  std::unique_ptr<CudaBackend> backend(new CudaBackend());
  backend->device_ = device;
  backend->name_ = properties.name;
  backend->capability_ = properties.major * 10 + properties.minor;
  backend->multiprocessors_ = properties.multiProcessorCount;
  backend->shared_bytes_ =
      static_cast<int>(properties.sharedMemPerBlockOptin) - cuda::kRacecheckShared;
  backend->cache_bytes_ = properties.l2CacheSize;
  int clock = 0, width = 0;  // kHz, bits
  RETURN_IF_CUDA_ERROR(cudaDeviceGetAttribute(&clock, cudaDevAttrMemoryClockRate, device),
                       "reading device properties");
  RETURN_IF_CUDA_ERROR(cudaDeviceGetAttribute(&width, cudaDevAttrGlobalMemoryBusWidth, device),
                       "reading device properties");
  backend->nominal_bandwidth_ = 2.0 * 1e3 * clock * width / 8;  // two transfers a clock
  const std::string what =
      absl::StrCat("device cuda:", device, " (", properties.name, ") has compute capability ",
                   properties.major, ".", properties.minor);
  if (backend->capability_ < 80) {
    return absl::FailedPreconditionError(
        absl::StrCat(what, "; Canopy's kernels need 8.0 or later; use the device cpu"));
  }
  RETURN_IF_CUDA_ERROR(cudaSetDevice(device), "choosing the device");
  cudaFuncAttributes attributes;
  const cudaError_t code = cudaFuncGetAttributes(&attributes, Probe);
  if (code == cudaErrorNoKernelImageForDevice || code == cudaErrorUnsupportedPtxVersion) {
    cudaGetLastError();  // it would be found by the next call of somebody else
    return absl::FailedPreconditionError(absl::StrCat(
        what, ", for which this build has no code that the driver can load (",
        cudaGetErrorName(code), "); configure it with -DCANOPY_CUDA_ARCHITECTURES=",
        backend->capability_, backend->capability_ == 90 ? "a" : "", ", or use the device cpu"));
  }
  RETURN_IF_CUDA_ERROR(code, "looking for the build's code for the device");
  RETURN_IF_CUDA_ERROR(cudaStreamCreateWithFlags(&backend->stream_, cudaStreamNonBlocking),
                       "making a stream");
  constexpr size_t kResultBytes = kPromisePasses * sizeof(cuda::PassResult);
  RETURN_IF_CUDA_ERROR(cudaMallocHost(&backend->results_, kResultBytes),
                       "allocating pinned memory");
  std::memset(backend->results_, 0, kResultBytes);
  ASSIGN_OR_RETURN(backend->selections_,
                   backend->Allocate(kPromisePasses * sizeof(cuda::Selected)));
  ASSIGN_OR_RETURN(backend->ns_, backend->Allocate(sizeof(uint64_t)));
  return backend;
}

CudaBackend::~CudaBackend() {
  selections_ = Buffer();
  ns_ = Buffer();
  if (results_ != nullptr) cudaFreeHost(results_);
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

std::string CudaBackend::Description() const {
  return absl::StrCat("cuda (", name_, ", sm_", capability_, ", ", multiprocessors_,
                      " multiprocessors)");
}

absl::StatusOr<Buffer> CudaBackend::Allocate(size_t bytes) {
  if (bytes == 0) return Buffer();
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, bytes);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // it is reported here, and not again by the next call
    size_t available = 0, total = 0;
    cudaMemGetInfo(&available, &total);
    return absl::ResourceExhaustedError(
        absl::StrCat("memory of ", name_, ": ", bytes, " bytes asked for, ", available, " of ",
                     total, " are free; ", bytes_in_use_.load(), " are Canopy's"));
  }
  RETURN_IF_CUDA_ERROR(error, "allocating memory");
  const size_t in_use = bytes_in_use_.fetch_add(bytes) + bytes;
  if (in_use > peak_bytes_.load()) peak_bytes_.store(in_use);
  allocations_.fetch_add(1);
  Buffer buffer(this, data, bytes);
  RETURN_IF_CUDA_ERROR(cudaMemsetAsync(data, 0, bytes, stream_), "clearing memory");
  RETURN_IF_ERROR(Synchronize());
  return buffer;
}

void CudaBackend::Free(void* data, size_t bytes) {
  cudaFree(data);
  bytes_in_use_.fetch_sub(bytes);
}

MemoryStats CudaBackend::memory() const {
  return {bytes_in_use_.load(), peak_bytes_.load(), allocations_.load()};
}

absl::Status CudaBackend::ToDevice(void* to, const void* from, size_t bytes) {
  RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_),
                       "copying to the device");
  return Synchronize();
}

absl::Status CudaBackend::ToHost(void* to, const void* from, size_t bytes) {
  RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_),
                       "copying from the device");
  return Synchronize();
}

absl::Status CudaBackend::Synchronize() {
  ++waits_;
  return CudaStatus(cudaStreamSynchronize(stream_), "waiting for the device");
}

cuda::PassResult* CudaBackend::result(uint32_t pass) const {
  return results_ + cuda::PlaceOf(pass);
}
cuda::Selected* CudaBackend::selections() const { return selections_.as<cuda::Selected>(); }

absl::Status CudaBackend::AwaitPass(uint32_t pass) {
  ++waits_;
  const std::atomic_ref<uint32_t> there(result(pass)->number);
  for (uint32_t tries = 1; there.load(std::memory_order_acquire) != pass; ++tries) {
    // An error would never write it.
    if (tries % 4096 != 0) continue;
    const cudaError_t error = cudaStreamQuery(stream_);
    if (error == cudaErrorNotReady) {
      (void)cudaGetLastError();  // it is none, and not to be found by who asks next
      continue;
    }
    RETURN_IF_CUDA_ERROR(error, "waiting for the device");
    if (there.load(std::memory_order_acquire) != pass) {
      return absl::InternalError("the device is done and has not said so");
    }
  }
  waited_ns_ = std::max(waited_ns_, result(pass)->device_ns);
  return absl::OkStatus();
}

absl::StatusOr<double> CudaBackend::Resolve(std::span<TokenId> tokens) {
  uint32_t least_age = cuda::kPassNumbers;
  for (const TokenId token : tokens) {
    if (!IsPromised(token)) continue;
    const cuda::Promise promise = cuda::ToPromise(token.value);
    if (!cuda::Holds(promise, passes_)) {
      return absl::FailedPreconditionError(
          absl::StrCat("a promised token of a pass that is no longer kept; at most ",
                       kPromisePasses - 1, " passes may be launched before it is resolved"));
    }
    const auto age = static_cast<uint32_t>((passes_ - promise.pass) % cuda::kPassNumbers);
    least_age = std::min(least_age, age);
  }
  if (least_age == cuda::kPassNumbers) return 0.0;
  // The passes before the last are done with it.
  const auto last = static_cast<uint32_t>(passes_ - least_age);
  const std::atomic_ref<uint32_t> there(result(last)->number);
  if (there.load(std::memory_order_acquire) != last) RETURN_IF_ERROR(AwaitPass(last));
  waited_ns_ = std::max(waited_ns_, result(last)->device_ns);
  for (TokenId& token : tokens) {
    if (!IsPromised(token)) continue;
    const cuda::Promise promise = cuda::ToPromise(token.value);
    token = TokenId(result(promise.pass)->selected.token[promise.row][promise.k]);
  }
  return Seconds(result(last)->device_ns);
}

void CudaBackend::SkipDeviceTime(uint32_t pass) {
  const uint64_t ns = result(pass)->device_ns;
  skipped_ns_ += ns - waited_ns_;
  waited_ns_ = ns;
}

}  // namespace canopy
