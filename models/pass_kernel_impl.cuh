// Bodies of pass_kernel.cuh, instantiated for one element type by each pass_kernel_*.cu.

#include "models/pass_kernel.cuh"

namespace canopy::cuda {

// What the computing warps do.
template <typename T, int kRowTiles>
__device__ inline void Consume(const PassArguments& arguments, Ring& ring, const PassNodes& nodes,
                               uint32_t* finished, Op& op, char* work) {
  // The operator at hand is in shared memory; the next one's words come while this one runs.
  constexpr int kOpWords = sizeof(Op) / 4;
  static_assert(sizeof(Op) % 4 == 0 && kOpWords <= 2 * kConsumers);
  uint32_t words[2] = {};
  const auto load_op = [&](int i) {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(arguments.ops + i);
    for (int k = 0; k < 2; ++k) {
      const int word = threadIdx.x + k * kConsumers;
      if (word < kOpWords && i < arguments.op_count) words[k] = __ldg(from + word);
    }
  };
  const auto keep_op = [&] {
    for (int k = 0; k < 2; ++k) {
      const int word = threadIdx.x + k * kConsumers;
      if (word < kOpWords) reinterpret_cast<uint32_t*>(&op)[word] = words[k];
    }
  };
  load_op(0);
  keep_op();
  SyncThreads<kConsumers>();
  uint32_t barrier = arguments.counter_base;
  if (arguments.clocks != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
    arguments.clocks[0] = clock64();
  }
  for (int i = 0; i < arguments.op_count; ++i) {
    load_op(i + 1);
    constexpr int kBucket = 8 * kRowTiles;
    float* work_floats = reinterpret_cast<float*>(work);
    switch (op.kind) {
      case OpKind::kEmbed:
        Embed<T>(op.embed, nodes, kBucket);
        break;
      case OpKind::kMatmul:
        ConsumeMatmul<T, kRowTiles>(op.matmul, nodes.rows, ring, work_floats);
        break;
      case OpKind::kScan:
        Scan<T, kRowTiles>(op.scan, nodes, work);
        break;
      case OpKind::kAttentionInputs:
        AttentionInputs<T>(op.attention, nodes, work_floats);
        break;
      case OpKind::kAttendBlocks:
        if (op.attention.head_dim <= 64) {
          AttendBlocks<T, 2>(op.attention, nodes, work_floats);
        } else if (op.attention.head_dim <= 128) {
          AttendBlocks<T, 4>(op.attention, nodes, work_floats);
        } else {
          AttendBlocks<T, 8>(op.attention, nodes, work_floats);
        }
        break;
      case OpKind::kCombineBlocks:
        CombineBlocks<T>(op.attention, nodes, kBucket);
        break;
      case OpKind::kResidual:
        Residual<T>(op.residual, nodes, kBucket, work_floats);
        break;
      case OpKind::kGated:
        Gated<T>(op.gated, nodes, kBucket, work_floats);
        break;
      case OpKind::kSelect:
        Select(op.select, nodes);
        break;
    }
    const bool grid_barrier = op.barrier != 0;
    if (grid_barrier) {
      // What this thread wrote is read by bulk copies of other blocks, too.
      FenceProxyAsync();
      SyncThreads<kConsumers>();
      if (threadIdx.x == 0) {
        AddRelease(arguments.counter, 1);
        barrier += gridDim.x;
        while (static_cast<int32_t>(LoadAcquire(arguments.counter) - barrier) < 0) {
        }
        FenceProxyAsync();
      }
    } else {
      SyncThreads<kConsumers>();
    }
    if (threadIdx.x == 0) {
      StoreReleaseShared(finished, i + 1);
      if (arguments.clocks != nullptr && blockIdx.x == 0) arguments.clocks[i + 1] = clock64();
    }
    keep_op();
    SyncThreads<kConsumers>();
  }
}

template <typename T, int kRowTiles>
__global__ void __launch_bounds__(kBlockThreads, 1) PassKernel(PassArguments arguments) {
  extern __shared__ __align__(128) char shared[];
  using Layout = SharedLayout<T>;
  uint64_t* barriers = reinterpret_cast<uint64_t*>(shared + Layout::kRing);
  uint32_t* finished = reinterpret_cast<uint32_t*>(barriers + 24);  // operators, by the whole grid
  PassNodes* nodes = reinterpret_cast<PassNodes*>(shared + Layout::kRing + Layout::kBarriers);
  Op* op = reinterpret_cast<Op*>(shared + Layout::kRing + Layout::kBarriers + Layout::kNodes);
  char* work = shared + Layout::kFixed;

  Ring ring = {shared, barriers, barriers + 8, barriers + 16};
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots<T>; ++i) {
      BarrierInit(&ring.weights_here[i], 1);
      BarrierInit(&ring.acts_here[i], 1);
      BarrierInit(&ring.empty[i], kConsumerWarps);
    }
    *finished = 0;
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    FenceProxyAsync();
  }
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(PassNodes) / 4); i += kBlockThreads) {
    reinterpret_cast<uint32_t*>(nodes)[i] =
        __ldcg(reinterpret_cast<const uint32_t*>(arguments.nodes) + i);
  }
  __syncthreads();

  if (threadIdx.x >= kConsumers) {
    LowerRegisters<56>();
    if (threadIdx.x == kConsumers) {
      const uint64_t policy = arguments.stream_weights_once ? EvictFirst() : EvictNormal();
      for (int i = 0; i < arguments.op_count; ++i) {
        if (arguments.ops[i].kind == OpKind::kMatmul) {
          StreamWeights<T>(arguments.ops[i].matmul, kRowTiles, ring, policy);
        }
      }
    } else if (threadIdx.x == kConsumers + 32) {
      const uint64_t policy = EvictNormal();
      for (int i = 0; i < arguments.op_count; ++i) {
        if (arguments.ops[i].kind != OpKind::kMatmul) continue;
        while (LoadAcquireShared(finished) < static_cast<uint32_t>(i)) {
        }
        FenceProxyAsync();
        StreamActs<T>(arguments.ops[i].matmul, kRowTiles, ring, policy);
      }
    } else if (threadIdx.x >= kConsumers + 64 && threadIdx.x < kConsumers + 96) {
      for (int i = 0; i < arguments.op_count; ++i) {
        if (arguments.ops[i].kind != OpKind::kScan) continue;
        // One operator ahead.
        while (LoadAcquireShared(finished) + 1 < static_cast<uint32_t>(i)) {
        }
        PrefetchScan<T>(arguments.ops[i].scan, *nodes);
      }
    }
  } else {
    RaiseRegisters<224>();
    Consume<T, kRowTiles>(arguments, ring, *nodes, finished, *op, work);
  }
}

template <typename T, int kRowTiles>
cudaError_t Launch(int blocks, int shared_bytes, PassArguments arguments, cudaStream_t stream) {
  void* parameters[] = {&arguments};
  return cudaLaunchCooperativeKernel(PassKernel<T, kRowTiles>, dim3(blocks), dim3(kBlockThreads),
                                     parameters, shared_bytes, stream);
}

template <typename T>
cudaError_t LaunchPass(int bucket_rows, int blocks, int shared_bytes,
                       const PassArguments& arguments, cudaStream_t stream) {
  switch (bucket_rows) {
    case 8:
      return Launch<T, 1>(blocks, shared_bytes, arguments, stream);
    case 16:
      return Launch<T, 2>(blocks, shared_bytes, arguments, stream);
    case 32:
      return Launch<T, 4>(blocks, shared_bytes, arguments, stream);
    case 64:
      return Launch<T, 8>(blocks, shared_bytes, arguments, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename T>
cudaError_t PreparePass(int shared_bytes) {
  for (const void* kernel : {reinterpret_cast<const void*>(PassKernel<T, 1>),
                             reinterpret_cast<const void*>(PassKernel<T, 2>),
                             reinterpret_cast<const void*>(PassKernel<T, 4>),
                             reinterpret_cast<const void*>(PassKernel<T, 8>)}) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  return cudaFuncSetAttribute(FoldKernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              shared_bytes);
}

template <typename T>
cudaError_t LaunchCommit(const CommitLayer<T>* layers, int layer_count, const CommitPath& path,
                         cudaStream_t stream) {
  CommitRowsKernel<T><<<dim3(path.length, layer_count), 256, 0, stream>>>(layers, path);
  return cudaGetLastError();
}

template <typename T>
cudaError_t LaunchFold(const CommitLayer<T>* layers, const FoldShape* shapes, int layer_count,
                       int heads, int shared_bytes, int segment, cudaStream_t stream) {
  FoldKernel<T><<<dim3(heads, layer_count), 256, shared_bytes, stream>>>(layers, shapes, segment);
  return cudaGetLastError();
}

#define CANOPY_INSTANTIATE_PASS(T)                                                                \
  template cudaError_t LaunchPass<T>(int, int, int, const PassArguments&, cudaStream_t);          \
  template cudaError_t PreparePass<T>(int);                                                       \
  template cudaError_t LaunchCommit<T>(const CommitLayer<T>*, int, const CommitPath&,             \
                                       cudaStream_t);                                             \
  template cudaError_t LaunchFold<T>(const CommitLayer<T>*, const FoldShape*, int, int, int, int, \
                                     cudaStream_t)

}  // namespace canopy::cuda
