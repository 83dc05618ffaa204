// Bodies of pass_kernel.cuh, instantiated for one element type by each pass_kernel_*.cu.

#include "models/pass_kernel.cuh"

namespace canopy::cuda {

// Warps that prepare operators.
inline constexpr int kHelpers = 2;
// The first computing thread tells others that all are done with an operator, while the warp from
// kReader on takes the next one's description (behind a strip the first warp has done so by then).
// For racecheck all tell.
inline constexpr int kReader = 32;
inline constexpr int kFinishedArrivals = kRacecheck ? kConsumers : 1;

// A barrier for each operator, of which two are used in turn: nobody is two operators ahead.
struct Turns {
  uint64_t barriers[2];

  __device__ void Init(uint32_t arrivals) {
    for (uint64_t& barrier : barriers) BarrierInit(&barrier, arrivals);
  }
  __device__ void Arrive(int op) { BarrierArrive(&barriers[op & 1], 1); }
  __device__ void ArriveWarp(int op) {
    __syncwarp();
    BarrierArriveWarp(&barriers[op & 1], 1);
  }
  __device__ void Wait(int op) { BarrierWait(&barriers[op & 1], op >> 1 & 1); }
};

// What the roles of a block tell each other.
struct Signals {
  uint64_t weights_here[kMostRingSlots * kPieces], weights_empty[kMostRingSlots];
  uint64_t acts_here[kMostActSlots], acts_empty[kMostActSlots];
  PartInfo infos[kMostRingSlots];
  Turns finished;        // by this block, and where a barrier follows by all
  Turns copied;          // its description
  Turns passed;          // all blocks are done with its last but one predecessor
  Turns helped;          // it is prepared
  RingPlace place;       // of the computing warps, for the next product
  RingPlace next_place;  // and behind the one that runs, while warps may still read the former
  uint64_t factored;     // of a scan: factors of its input's norm are there
  uint64_t strip_sums;   // of a strip are there
  uint64_t began;        // by DeviceClock
};

// Made anew where it is used, so that nobody holds it in registers. shared: behind the slots.
template <typename T, int kRowTiles>
__device__ __forceinline__ Ring RingOf(const PassArguments& arguments, char* shared) {
  Signals& signals = *reinterpret_cast<Signals*>(shared);
  const RingShape shape = arguments.ring;
  return {shared - shape.bytes(),
          shared + SharedLayout<T>::kFixed,
          signals.infos,
          signals.weights_here,
          signals.weights_empty,
          signals.acts_here,
          signals.acts_empty,
          shape,
          kRowTiles};
}

// What blocks tell each other about operators that they are done with.
struct Progress {
  uint32_t* counters;
  uint32_t base[2];

  __device__ explicit Progress(const PassArguments& arguments)
      : counters(arguments.counters),
        base{arguments.counters_base[0], arguments.counters_base[1]} {}
  __device__ void Tell(int counter) const { AddRelease(counters + counter * kCounterStride, 1); }
  __device__ void Await(int counter, int turn) const {
    const uint32_t all = (counter == 0 ? base[0] : base[1]) + turn * gridDim.x;
    while (static_cast<int32_t>(LoadAcquire(counters + counter * kCounterStride) - all) < 0) {
    }
  }
};

// A function of its own, so that nothing is held in registers for it.
__device__ __noinline__ inline void AwaitHelp(Turns& helped, int op) { helped.Wait(op); }

// Puts tokens in the place of the nodes' promised ones, which earlier passes have chosen. One that
// is no token of this model, about which Resolve tells the host, is scored as another.
__device__ inline void TakePromised(const PassArguments& arguments, PassNodes& nodes) {
  const int row = threadIdx.x;
  if (row >= nodes.rows) return;
  int token = nodes.token[row];
  if (token >= 0) return;
  const Promise promise = ToPromise(token);
  token = __ldcg(&arguments.selections[PlaceOf(promise.pass)].token[promise.row][promise.k]);
  nodes.token[row] = token < 0 || token >= arguments.vocab ? 0 : token;
}

// Whether a kernel has code for strips.
template <typename T, int kRowTiles, int kMixers>
constexpr bool HasStrips() {
  return sizeof(T) == 2 && 8 * kRowTiles == kStripRows && (kMixers & kSsdMixers) != 0;
}

// What the computing warps do.
template <typename T, int kRowTiles, int kMixers>
__device__ __forceinline__ void Consume(const PassArguments& arguments, const PassCommit& commit,
                                        Signals& signals, char* shared) {
  using Layout = SharedLayout<T>;
  if (arguments.clocks != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
    arguments.clocks[0] = clock64();
  }
  // The operator moves to one place that never changes: else the compiler does not see that what it
  // says is the same for all threads, and serialises wgmma. By a warp.
  Turns* const helped = &signals.helped;
  const auto copy_op = [=](int i) {
    AwaitHelp(*helped, i);
    static_assert(Layout::kTurn % sizeof(uint4) == 0);
    const uint4* from = reinterpret_cast<const uint4*>(shared + Layout::TurnAt(i));
#pragma unroll
    for (int at = threadIdx.x % 32; at < Layout::kTurn / 16; at += 32) {
      reinterpret_cast<uint4*>(shared + Layout::kOpAt)[at] = from[at];
    }
  };
  const auto take_op = [&](int i) {
    if (threadIdx.x / 32 == kReader / 32) copy_op(i);
    SyncThreads<kConsumers>();
  };
  const auto clock = [clocks = arguments.clocks](int i) {
    if (clocks != nullptr && blockIdx.x == 0 && threadIdx.x == 0) clocks[i + 1] = clock64();
  };
  const auto tell_finished = [finished = &signals.finished](int i) {
    if constexpr (kRacecheck) {
      SyncThreads<kConsumers>();
      finished->Arrive(i);
    } else if (threadIdx.x == 0) {
      finished->Arrive(i);
    }
  };
  TakePromised(arguments, *reinterpret_cast<PassNodes*>(shared + Layout::kNodesAt));
  // Readers of the prefix stand behind the first operator's barrier.
  if (commit.path.length > 0) {
    CommitRows<T>(static_cast<const CommitLayer<T>*>(commit.layers), commit.layer_count,
                  commit.path, blockIdx.x + threadIdx.x / 32 * gridDim.x,
                  kConsumerWarps * gridDim.x);
  }
  take_op(0);
  for (int i = 0; i < arguments.op_count; ++i) {
    constexpr int kBucket = 8 * kRowTiles;
    const PassNodes& nodes = *reinterpret_cast<const PassNodes*>(shared + Layout::kNodesAt);
    const Op& op = *reinterpret_cast<const Op*>(shared + Layout::kOpAt);
    const LayerStore<T>& store = *reinterpret_cast<const LayerStore<T>*>(shared + Layout::kStoreAt);
    char* work = shared + Layout::kFixed;
    float* work_floats = reinterpret_cast<float*>(work);
    float* factors = reinterpret_cast<float*>(shared + Layout::kFactorsAt);
    const FirstActs& first_acts =
        *reinterpret_cast<const FirstActs*>(shared + Layout::kFirstActsAt);
    switch (op.kind) {
      case OpKind::kEmbed:
        Embed<T>(op.embed, nodes, kBucket);
        break;
      case OpKind::kMatmul:
      case OpKind::kResidual:
        ConsumeMatmul<T, kRowTiles>(
            *op.product(), first_acts, nodes.rows, RingOf<T, kRowTiles>(arguments, shared),
            signals.place, &signals.next_place, reinterpret_cast<float*>(work + kActRingBytes));
        if (op.kind == OpKind::kResidual) {
          Residual<T, kBucket>(op.sum.residual, op.sum.out.TileUnits(), nodes);
        }
        break;
      case OpKind::kScan:
        if constexpr ((kMixers & kSsdMixers) != 0) {
          Scan<T, kRowTiles>(op.ssd.in, op.ssd.scan, op.norm, nodes, store, first_acts,
                             RingOf<T, kRowTiles>(arguments, shared), signals.place,
                             &signals.next_place, &signals.factored, factors, work);
        }
        if constexpr (HasStrips<T, kRowTiles, kMixers>()) {
          if (op.strip_follows != 0) {
            // Described where it came to, in the meantime the operator behind it moves.
            FenceProxyAsyncShared();
            if (threadIdx.x / 32 == kReader / 32) AwaitHelp(*helped, i + 1);
            SyncThreads<kConsumers>();
            clock(i);
            tell_finished(i);
            ++i;
            const Op& strip = *reinterpret_cast<const Op*>(shared + Layout::TurnAt(i));
            float* const sums =
                reinterpret_cast<float*>(SharedEnd(shared - arguments.ring.bytes()) -
                                         StripSumBytes(strip.sum.out.strip_groups));
            StripResidual(strip.sum.out, strip.sum.residual, nodes,
                          RingOf<T, kRowTiles>(arguments, shared), signals.next_place,
                          &signals.place, &signals.strip_sums, strip.sum.number, work, sums,
                          [=] { copy_op(i + 1); });
            FenceProxyAsyncShared();
            SyncThreads<kConsumers>();
            clock(i);
            tell_finished(i);
            continue;
          }
        }
        break;
      case OpKind::kAttentionInputs:
        if constexpr ((kMixers & kAttentionMixers) != 0) {
          AttentionInputs<T>(op.attention, nodes, store, factors, work_floats);
        }
        break;
      case OpKind::kAttendBlocks:
        if constexpr ((kMixers & kAttentionMixers) != 0) {
          Attend<T>(op.attention, nodes, store, work);
        }
        break;
      case OpKind::kCombineBlocks:
        if constexpr ((kMixers & kAttentionMixers) != 0) {
          CombineBlocks<T>(op.attention, nodes, kBucket);
        }
        break;
      case OpKind::kGated:
        Gated<T>(op.gated, nodes, factors, kBucket);
        break;
      case OpKind::kSelect:
        Select(op.select, nodes, arguments.selections + PlaceOf(arguments.number),
               &arguments.result->selected);
        break;
    }
    // What this block wrote will be seen by others (bulk copies read it after a fence of their own
    // thread), and bulk copies may write its shared memory. A product has used what they write
    // alone, and has handed that on slot by slot.
    const bool all_blocks = op.barrier != 0;
    const int counter = op.counter, turn = op.turn;
    if (op.kind != OpKind::kMatmul) FenceProxyAsyncShared();
    SyncThreads<kConsumers>();
    if (threadIdx.x == 0 && all_blocks) {
      const Progress progress(arguments);
      progress.Tell(counter);
      progress.Await(counter, turn);
    }
    if (threadIdx.x == kReader) signals.place = signals.next_place;
    clock(i);
    tell_finished(i);
    if (i + 1 < arguments.op_count) take_op(i + 1);
  }
  // After the last operator's barrier.
  if (arguments.result != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
    *arguments.device_ns += DeviceClock() - signals.began;
    arguments.result->device_ns = *arguments.device_ns;
    StoreReleaseSystem(&arguments.result->number, arguments.number);
  }
}

// A struct on its way from memory to shared memory, in the registers of a warp.
template <typename Struct>
struct Description {
  static constexpr int kWords = sizeof(Struct) / 4, kEach = (kWords + 31) / 32;
  uint32_t words[kEach] = {};

  __device__ void Load(const Struct* from) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int word = i * 32 + threadIdx.x % 32;
      if (word < kWords) words[i] = __ldg(reinterpret_cast<const uint32_t*>(from) + word);
    }
  }
  __device__ void Store(char* to) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int word = i * 32 + threadIdx.x % 32;
      if (word < kWords) reinterpret_cast<uint32_t*>(to)[word] = words[i];
    }
  }
  template <int kOffset>
  __device__ int Word() const {
    return static_cast<int>(__shfl_sync(0xffffffffu, words[kOffset / 128], kOffset / 4 % 32));
  }
};

// What the warps that help do: while an operator runs, they tell the other blocks that the one
// before it is done, bring the description of the next but one into shared memory, wait for the
// other blocks, make the factors of the rows whose sums the next one will read, and bring what a
// scan reads of earlier passes into shared memory or into the cache.
template <typename T, int kRowTiles, int kMixers>
__device__ __forceinline__ void Help(const PassArguments& arguments, const PassNodes& nodes,
                                     Signals& signals, char* shared) {
  using Layout = SharedLayout<T>;
  constexpr bool kSsd = (kMixers & kSsdMixers) != 0, kAttention = (kMixers & kAttentionMixers) != 0;
  const int helper = threadIdx.x / 32 - kConsumerWarps - 2, lane = threadIdx.x % 32;
  float* factors = reinterpret_cast<float*>(shared + Layout::kFactorsAt);
  const Progress progress(arguments);
  const auto place = [&](int i) { return shared + Layout::TurnAt(i); };
  const auto store_of = [&](int i) -> const LayerStore<T>& {
    return *reinterpret_cast<const LayerStore<T>*>(place(i) + Layout::kOp);
  };
  const auto op_at = [&](int i) -> const Op& { return *reinterpret_cast<const Op*>(place(i)); };
  const auto is_scan = [&](int i) {
    return kSsd && i >= 0 && i < arguments.op_count && op_at(i).kind == OpKind::kScan;
  };
  const auto stage = [&](int i) {
    StageScan<T, kRowTiles>(op_at(i).ssd.scan, nodes, store_of(i), shared + Layout::kFixed);
  };
  Description<Op> coming;
  Description<LayerStore<T>> coming_store;
  const auto fetch = [&](int i) {
    if (i >= arguments.op_count) return;
    coming.Load(arguments.ops + i);
    if (nodes.layers != nullptr) {  // not so for products alone
      coming_store.Load(static_cast<const LayerStore<T>*>(nodes.layers) +
                        coming.template Word<offsetof(Op, layer)>());
    }
  };
  const auto put = [&](int i) {
    if (i >= arguments.op_count) return;
    coming.Store(place(i));
    coming_store.Store(place(i) + Layout::kOp);
  };
  if (helper == 0) {
    fetch(0);
    put(0);
  }
  bool scan_before = false;
  for (int i = 0; i <= arguments.op_count; ++i) {
    // The description is fetched before there is place for it.
    if (helper == 0) fetch(i + 1);
    if (i >= 2) signals.finished.Wait(i - 2);
    const Op& op = op_at(i);
    if (helper == 0) {
      // Where operator i + 1 will be described still stands i - 2. After a barrier all know that it
      // is done.
      const Op& done = op_at(i + 1);
      const int counter = done.counter, turn = i >= 2 && done.barrier == 0 ? done.turn : 0;
      __syncwarp();
      if (turn > 0 && lane == 0) progress.Tell(counter);
      if (i == arguments.op_count) break;
      put(i + 1);
      signals.copied.ArriveWarp(i);
      if (lane == 0) {
        if (turn > 0) progress.Await(counter, turn);
        signals.passed.Arrive(i);
      }
      __syncwarp();
#pragma unroll 1
      for (const Sent& sent : op.used_up) {
        for (int at = blockIdx.x * 32 + lane; at < sent.vectors; at += gridDim.x * 32) {
          __stcg(sent.data + at, make_uint4(kUnsent, kUnsent, kUnsent, kUnsent));
        }
      }
    } else {
      if (i == arguments.op_count) break;
      signals.copied.Wait(i);
      if (SendsActs(8 * kRowTiles) && op.product() != nullptr && lane == 0) {
        *reinterpret_cast<uint4*>(place(i) + Layout::kOp + Layout::kStore) =
            __ldg(reinterpret_cast<const uint4*>(op.product()->first_acts + blockIdx.x));
      }
      // Behind the first operator's barrier, for a commit moves rows that the scan reads.
      if (i == 1 && is_scan(1)) {
        signals.finished.Wait(0);
        stage(1);
      }
      if (kAttention && op.kind == OpKind::kAttentionInputs) {
        PrefetchKeys<T>(op.attention, nodes, store_of(i), blockIdx.x, lane, 32);
      }
      signals.passed.Wait(i);
    }
    if (op.norm.squares != nullptr && !is_scan(i)) {
      HelpRowFactors(op.norm, nodes.rows, helper, kHelpers, factors);
    }
    __syncwarp();
    const bool scan = is_scan(i);
    if (helper == 1 && scan_before && scan) {
      signals.finished.Wait(i - 1);
      stage(i);
    }
    scan_before = scan;
    if (helper == 0 && is_scan(i + 1)) {
      PrefetchScan<T>(op_at(i + 1).ssd.scan, nodes, store_of(i + 1));
    }
    signals.helped.ArriveWarp(i);
    // While the operator before a scan multiplies, which needs none of that memory.
    if (helper == 1 && i >= 1 && is_scan(i + 1) && !scan) {
      signals.finished.Wait(i - 1);
      stage(i + 1);
    }
  }
}

template <typename T, int kRowTiles, int kMixers>
__global__ void __launch_bounds__(kBlockThreads, 1)
    PassKernel(PassArguments arguments, const __grid_constant__ PassNodes given,
               const __grid_constant__ PassCommit commit) {
  extern __shared__ __align__(128) char slots[];
  using Layout = SharedLayout<T>;
  const RingShape shape = arguments.ring;
  char* shared = slots + shape.bytes();
  Signals& signals = *reinterpret_cast<Signals*>(shared);
  PassNodes* nodes = reinterpret_cast<PassNodes*>(shared + Layout::kNodesAt);
  static_assert(sizeof(Signals) <= Layout::kSignals);
  if (threadIdx.x == 0) {
    for (int i = 0; i < shape.slots * kPieces; ++i) BarrierInit(&signals.weights_here[i], 1);
    for (int i = 0; i < shape.slots; ++i) BarrierInit(&signals.weights_empty[i], kEmptyArrivals);
    for (int i = 0; i < ActSlots(kRowTiles); ++i) {
      BarrierInit(&signals.acts_here[i], kActsArrivals);
      BarrierInit(&signals.acts_empty[i], kEmptyArrivals);
    }
    signals.finished.Init(kFinishedArrivals);
    signals.copied.Init(kWarpArrivals);
    signals.passed.Init(1);
    BarrierInit(&signals.factored, Dones<T>(kRowTiles));
    BarrierInit(&signals.strip_sums, 1);
    signals.helped.Init(kWarpArrivals * kHelpers + 1);  // and who brings activations
    if constexpr (kRacecheck) {
      // Threads of each, as those that use them say; of kProductBarrier arrivals.
      constexpr int kEarly = 32 * EarlyWarps<T>(kRowTiles);
      const int threads[kWarpBarriers] = {1,   kConsumers, 1,          kEarly,    kEarly - 128,
                                          128, kEarly,     kConsumers, kConsumers};
      for (int i = 0; i < kWarpBarriers; ++i) BarrierInit(WarpBarriers() + i, threads[i]);
    }
    signals.place = signals.next_place = {};
    signals.began = DeviceClock();
    FenceBarrierInit();
  }
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(PassNodes) / 4); i += kBlockThreads) {
    reinterpret_cast<uint32_t*>(nodes)[i] = reinterpret_cast<const uint32_t*>(&given)[i];
  }
  __syncthreads();

  if (threadIdx.x >= kConsumers) {
    LowerRegisters<64>();
    Ring ring = RingOf<T, kRowTiles>(arguments, shared);
    const auto streams = [](int first) { return threadIdx.x - first < kStreamThreads; };
    if (streams(kConsumers)) {
      const uint64_t policy = arguments.stream_weights_once ? EvictFirst() : EvictNormal();
      MatmulOp op = arguments.products[0];
      for (int i = 0; i < arguments.product_count; ++i) {
        // The next one's description comes while this one is streamed.
        const MatmulOp next = arguments.products[min(i + 1, arguments.product_count - 1)];
        if (HasStrips<T, kRowTiles, kMixers>()) FetchStripMap(next);
        if (HasStrips<T, kRowTiles, kMixers>() && op.strips != nullptr) {
          StreamStrip(op, ring, policy);
        } else {
          StreamWeights<T>(op, ring, policy);
        }
        op = next;
      }
    } else if (streams(kConsumers + 32)) {
      const Progress progress(arguments);
      const uint64_t policy = EvictNormal();
      MatmulOp op = arguments.products[0];
      const bool leads = LeadsStream();
      int next = 0;  // operator
      const auto arrive_before = [&](int end) {
        for (; leads && next < end; ++next) {
          if (next >= 2) signals.finished.Wait(next - 2);
          signals.helped.Arrive(next);
        }
      };
      for (int i = 0; i < arguments.product_count; ++i) {
        const MatmulOp later = arguments.products[min(i + 1, arguments.product_count - 1)];
        // In step with the others, by whose barriers it waits.
        arrive_before(op.index + 1);
        // Who computes a strip brings its activations.
        if (HasStrips<T, kRowTiles, kMixers>() && op.strips != nullptr) {
          op = later;
          continue;
        }
        const auto await_finished = [&] {
          if (leads && op.index > 0) signals.finished.Wait(op.index - 1);
          SyncStream();
        };
        // Where activations are sent there may be nothing to bring.
        if (SendsActs(8 * kRowTiles)) await_finished();
        StreamActs<T>(op, ring, policy, [&] {
          if (!SendsActs(8 * kRowTiles)) await_finished();
          if (leads && op.turn_before > 0) progress.Await(op.counter_before, op.turn_before);
          SyncStream();
          FenceProxyAsync();
        });
        op = later;
      }
      arrive_before(arguments.op_count);
    } else if (threadIdx.x >= kConsumers + 64) {
      Help<T, kRowTiles, kMixers>(arguments, *nodes, signals, shared);
    }
  } else {
    RaiseRegisters<104>();
    Consume<T, kRowTiles, kMixers>(arguments, commit, signals, shared);
  }
}

// The parameters of a kernel.
static_assert(sizeof(PassArguments) + sizeof(PassNodes) + sizeof(PassCommit) <= 32764);

// Calls task with the kernel for a model and a bucket.
template <typename T, int kMixers, typename F>
cudaError_t WithKernelOf(int bucket_rows, const F& task) {
  switch (bucket_rows) {
    case 8:
      return task(PassKernel<T, 1, kMixers>);
    case 16:
      return task(PassKernel<T, 2, kMixers>);
    case 32:
      return task(PassKernel<T, 4, kMixers>);
    case 64:
      return task(PassKernel<T, 8, kMixers>);
    default:
      return cudaErrorInvalidValue;
  }
}
template <typename T, typename F>
cudaError_t WithKernel(int mixers, int bucket_rows, const F& task) {
  switch (mixers) {
    case kSsdMixers:
      return WithKernelOf<T, kSsdMixers>(bucket_rows, task);
    case kAttentionMixers:
      return WithKernelOf<T, kAttentionMixers>(bucket_rows, task);
    case kSsdMixers | kAttentionMixers:
      return WithKernelOf<T, kSsdMixers | kAttentionMixers>(bucket_rows, task);
    default:
      return cudaErrorInvalidValue;
  }
}

// All blocks run at a time, in clusters of `cluster`.
struct Launch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2] = {};

  Launch(int blocks, int cluster, int shared_bytes, cudaStream_t stream) {
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kBlockThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    attributes[0].id = cudaLaunchAttributeCooperative;
    attributes[0].val.cooperative = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = cluster;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    config.numAttrs = cluster > 1 ? 2 : 1;
  }
  Launch(const Launch&) = delete;
};

template <typename T>
cudaError_t LaunchPass(int mixers, int bucket_rows, int blocks, int cluster, int shared_bytes,
                       const PassArguments& arguments, const PassNodes& nodes,
                       const PassCommit& commit, cudaStream_t stream) {
  Launch launch(blocks, cluster, shared_bytes, stream);
  return WithKernel<T>(mixers, bucket_rows, [&](auto* kernel) {
    return cudaLaunchKernelEx(&launch.config, kernel, arguments, nodes, commit);
  });
}

template <typename T>
cudaError_t ClusteredBlocks(int mixers, int cluster, int shared_bytes, int* blocks) {
  Launch launch(cluster, cluster, shared_bytes, nullptr);
  int clusters = 0;
  const cudaError_t error = WithKernel<T>(mixers, kStripRows, [&](auto* kernel) {
    cudaFuncAttributes code;
    const cudaError_t asked = cudaFuncGetAttributes(&code, kernel);
    if (asked != cudaSuccess || code.ptxVersion < 90) return asked;
    return cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config);
  });
  *blocks = clusters * cluster;
  return error;
}

template <typename T>
cudaError_t PreparePass(int mixers, int shared_bytes) {
  for (const int bucket_rows : {8, 16, 32, 64}) {
    const cudaError_t error = WithKernel<T>(mixers, bucket_rows, [&](auto* kernel) {
      return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  shared_bytes);
    });
    if (error != cudaSuccess) return error;
  }
  return cudaFuncSetAttribute(FoldKernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              shared_bytes);
}

template <typename T>
cudaError_t LaunchCommit(const CommitLayer<T>* layers, int layer_count, const CommitPath& path,
                         cudaStream_t stream) {
  CommitRowsKernel<T><<<path.length * layer_count, 256, 0, stream>>>(layers, layer_count, path);
  return cudaGetLastError();
}

template <typename T>
cudaError_t LaunchFold(const CommitLayer<T>* layers, const FoldShape* shapes, int layer_count,
                       int heads, int shared_bytes, int segment, cudaStream_t stream) {
  FoldKernel<T><<<dim3(heads, layer_count), 256, shared_bytes, stream>>>(layers, shapes, segment);
  return cudaGetLastError();
}

#define CANOPY_INSTANTIATE_PASS(T)                                                                \
  template cudaError_t LaunchPass<T>(int, int, int, int, int, const PassArguments&,               \
                                     const PassNodes&, const PassCommit&, cudaStream_t);          \
  template cudaError_t PreparePass<T>(int, int);                                                  \
  template cudaError_t ClusteredBlocks<T>(int, int, int, int*);                                   \
  template cudaError_t LaunchCommit<T>(const CommitLayer<T>*, int, const CommitPath&,             \
                                       cudaStream_t);                                             \
  template cudaError_t LaunchFold<T>(const CommitLayer<T>*, const FoldShape*, int, int, int, int, \
                                     cudaStream_t)

}  // namespace canopy::cuda
