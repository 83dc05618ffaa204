// The few PTX instructions that passes on the device are made of, and what stands for them where a
// compute capability does not have them.

#ifndef CANOPY_CORE_CUDA_PTX_CUH_
#define CANOPY_CORE_CUDA_PTX_CUH_

#include <cuda_bf16.h>

#include <cstdint>

#include "core/cuda/pass.h"

namespace canopy::cuda {

__device__ inline uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The end of the block's dynamic shared memory, which begins at `begin`.
__device__ inline char* SharedEnd(char* begin) {
  uint32_t bytes;
  asm volatile("mov.u32 %0, %dynamic_smem_size;" : "=r"(bytes));
  return begin + bytes;
}

// Barriers in shared memory (mbarrier): phases with a parity, completed by arrivals and by bytes.
__device__ inline void BarrierInit(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)),
               "r"(arrivals)
               : "memory");
}
__device__ inline void BarrierArrive(uint64_t* barrier, uint32_t arrivals) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
               "r"(arrivals)
               : "memory");
#else
  for (; arrivals > 0; --arrivals) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(barrier))
                 : "memory");
  }
#endif
}
// Waits until the phase of that parity is complete.
#if __CUDA_ARCH__ >= 900
#define CANOPY_TRY_WAIT "try_wait"  // sleeps meanwhile
#else
#define CANOPY_TRY_WAIT "test_wait"
#endif
__device__ inline void BarrierWait(uint64_t* barrier, uint32_t parity) {
  const uint32_t address = SharedAddress(barrier);
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n .reg .pred p;\n"
        " mbarrier." CANOPY_TRY_WAIT
        ".parity.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
  }
}
// Arrives, and waits for the others.
__device__ inline void BarrierSync(uint64_t* barrier, uint32_t arrivals) {
  const uint32_t address = SharedAddress(barrier);
  if (arrivals > 1) BarrierArrive(barrier, arrivals - 1);
  uint64_t phase;
  asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1];" : "=l"(phase) : "r"(address) : "memory");
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n .reg .pred p;\n"
        " mbarrier." CANOPY_TRY_WAIT
        ".shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(address), "l"(phase)
        : "memory");
  }
}
#undef CANOPY_TRY_WAIT

// Arrives for the warp, which is to call it as a whole: kWarpArrivals times `arrivals`.
inline constexpr int kWarpArrivals = kRacecheck ? 32 : 1;
__device__ inline void BarrierArriveWarp(uint64_t* barrier, uint32_t arrivals) {
  if (kRacecheck || threadIdx.x % 32 == 0) BarrierArrive(barrier, arrivals);
}

// What is read once a pass should not push out what is read again.
__device__ inline uint64_t EvictFirst() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ inline uint64_t EvictNormal() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Streams bytes (a multiple of 16, both sides 16-byte aligned) to shared memory: one arrival at the
// barrier, once they are there. By kStreamThreads threads, of which one leads: one thread's bulk
// copy, or 16 bytes at a time by a warp where there is none.
#if __CUDA_ARCH__ >= 900
inline constexpr int kStreamThreads = 1;
__device__ inline void SyncStream() {}
// One arrival, and `bytes` that are to come.
__device__ inline void BarrierExpect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
}
__device__ inline void StreamCopy(void* to, const void* from, uint32_t bytes, uint64_t* barrier,
                                  uint64_t policy) {
  BarrierExpect(barrier, bytes);
  if (bytes == 0) return;
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(SharedAddress(to)),
      "l"(from), "r"(bytes), "r"(SharedAddress(barrier)), "l"(policy)
      : "memory");
}
#define CANOPY_HAS_CLUSTERS 1
// The box of a tensor map that begins at element x of row y, to 128-byte aligned shared memory; the
// barrier, which expects them, is told of its bytes.
__device__ inline void StreamBox(void* to, const void* map, int x, int y, uint64_t* barrier,
                                 uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(SharedAddress(to)),
      "l"(map), "r"(x), "r"(y), "r"(SharedAddress(barrier)), "l"(policy)
      : "memory");
}
__device__ inline void PrefetchMap(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Where something of this block's shared memory lies in that of the cluster's block `rank`, and a
// store there, of which that block's barrier is told 4 bytes.
__device__ inline uint32_t AddressIn(const void* at, uint32_t rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(SharedAddress(at)), "r"(rank));
  return address;
}
__device__ inline void StoreIn(uint32_t to, float v, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to),
      "f"(v), "r"(barrier)
      : "memory");
}
#else
inline constexpr int kStreamThreads = 32;
__device__ inline void SyncStream() { __syncwarp(); }
__device__ inline void StreamCopy(void* to, const void* from, uint32_t bytes, uint64_t* barrier,
                                  uint64_t policy) {
  const uint32_t lane = threadIdx.x % 32;
  for (uint32_t at = lane * 16; at < bytes; at += 32 * 16) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(
                     SharedAddress(to) + at),
                 "l"(static_cast<const char*>(from) + at), "l"(policy)
                 : "memory");
  }
  // The phase now waits for the lane's copies as well.
  asm volatile("cp.async.mbarrier.arrive.shared::cta.b64 [%0];" ::"r"(SharedAddress(barrier))
               : "memory");
  SyncStream();
  if (lane == 0) BarrierArrive(barrier, 1);
}
#endif
__device__ inline bool LeadsStream() { return kStreamThreads == 1 || threadIdx.x % 32 == 0; }

// Brings a line into the cache of the device.
__device__ inline void Prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// 16 bytes on their way to shared memory while the thread goes on; CopiesWait waits for the
// thread's.
__device__ inline void CopyAsync16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(SharedAddress(to)), "l"(from)
               : "memory");
}
// 4 bytes, through the multiprocessor's cache: of what nobody has read so in this pass before it
// was written.
__device__ inline void CopyAsync4(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(SharedAddress(to)), "l"(from)
               : "memory");
}
__device__ inline void CopiesWait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Order ordinary accesses with those of bulk copies, where there are some: to all memory, to shared
// memory alone, and the making of barriers.
#if __CUDA_ARCH__ >= 900
__device__ inline void FenceProxyAsync() { asm volatile("fence.proxy.async;" ::: "memory"); }
__device__ inline void FenceProxyAsyncShared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ inline void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  FenceProxyAsync();
}
#else
__device__ inline void FenceProxyAsync() {}
__device__ inline void FenceProxyAsyncShared() {}
__device__ inline void FenceBarrierInit() {}
#endif

// Loads of what other blocks wrote in this pass: not through the cache of the multiprocessor. With
// a condition they are one predicated instruction (the compiler makes branches of its own
// intrinsics), and 0 where it does not hold.
#define CANOPY_LOADS(name, how)                                                 \
  __device__ inline float name(const float* at, bool there = true) {            \
    float v;                                                                    \
    asm volatile(                                                               \
        "{\n .reg .pred p;\n setp.ne.s32 p, %2, 0;\n mov.f32 %0, 0f00000000;\n" \
        " @p ld" how ".f32 %0, [%1];\n}"                                        \
        : "=f"(v)                                                               \
        : "l"(at), "r"(static_cast<int>(there)));                               \
    return v;                                                                   \
  }                                                                             \
  __device__ inline float4 name##4(const float* at, bool there = true) {        \
    float4 v;                                                                   \
    asm volatile(                                                               \
        "{\n .reg .pred p;\n setp.ne.s32 p, %5, 0;\n mov.f32 %0, 0f00000000;\n" \
        " mov.f32 %1, 0f00000000;\n mov.f32 %2, 0f00000000;\n"                  \
        " mov.f32 %3, 0f00000000;\n"                                            \
        " @p ld" how ".v4.f32 {%0, %1, %2, %3}, [%4];\n}"                       \
        : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)                            \
        : "l"(at), "r"(static_cast<int>(there)));                               \
    return v;                                                                   \
  }
#define CANOPY_LOAD_BITS(name, how)                                                         \
  __device__ inline uint4 name(const void* at, bool there = true) {                         \
    uint4 v;                                                                                \
    asm volatile(                                                                           \
        "{\n .reg .pred p;\n setp.ne.s32 p, %5, 0;\n mov.u32 %0, 0;\n mov.u32 %1, 0;\n"     \
        " mov.u32 %2, 0;\n mov.u32 %3, 0;\n @p ld" how ".v4.u32 {%0, %1, %2, %3}, [%4];\n}" \
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)                                        \
        : "l"(at), "r"(static_cast<int>(there)));                                           \
    return v;                                                                               \
  }
CANOPY_LOADS(LoadNew, ".global.cg")
CANOPY_LOADS(LoadWeight, ".global.nc")  // of weights, which nobody writes
CANOPY_LOADS(LoadSent, ".relaxed.gpu.global")
CANOPY_LOAD_BITS(LoadNewBits, ".global.cg")
CANOPY_LOAD_BITS(LoadSentBits, ".relaxed.gpu.global")
#undef CANOPY_LOADS
#undef CANOPY_LOAD_BITS
// And stores of what they will read.
__device__ inline void StoreNew(float* to, float v, bool there = true) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.s32 p, %2, 0;\n @p st.global.cg.f32 [%0], %1;\n}" ::"l"(to),
      "f"(v), "r"(static_cast<int>(there))
      : "memory");
}
__device__ inline void StoreNew4(float* to, float4 v, bool there = true) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.s32 p, %5, 0;\n"
      " @p st.global.cg.v4.f32 [%0], {%1, %2, %3, %4};\n}" ::"l"(to),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(static_cast<int>(there))
      : "memory");
}

// What is sent from block to block without a barrier in between: memory holds kUnsent where nothing
// was written, and the one who reads a value (LoadSent until it is not kUnsent), or where many do a
// later operator, puts kUnsent back for the next time; before that time all blocks are done with
// the operator that did. It is a number that is no result: as f32 a NaN, and as two bf16, that
// arithmetic does not make; Send sees to that. A bf16 is sent as 16 bits and read with its
// neighbours as one vector, of which each half word is looked at: that 16 bits come whole is not in
// the PTX memory model, but so of the device.
inline constexpr uint32_t kUnsent = 0xffffffffu;
__device__ inline bool IsUnsent(float v) { return __float_as_uint(v) == kUnsent; }
__device__ inline bool IsUnsent(float4 v) {
  return IsUnsent(v.x) || IsUnsent(v.y) || IsUnsent(v.z) || IsUnsent(v.w);
}
// Whether a part of a vector of T is not there yet.
template <typename T>
__device__ inline bool IsUnsent(const uint4& v) {
  if constexpr (sizeof(T) == 2) {
    // Whether a half of w has all bits: a half of ~w is zero.
    const auto full = [](uint32_t w) { return (0xfffefffeu - w) & w; };
    return ((full(v.x) | full(v.y) | full(v.z) | full(v.w)) & 0x80008000u) != 0;
  } else {
    return v.x == kUnsent || v.y == kUnsent || v.z == kUnsent || v.w == kUnsent;
  }
}
__device__ inline void Send(float* to, float v, bool there = true) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.s32 p, %2, 0;\n @p st.relaxed.gpu.global.f32 [%0], %1;\n}" ::"l"(
          to),
      "f"(IsUnsent(v) ? __uint_as_float(0x7fffffffu) : v), "r"(static_cast<int>(there))
      : "memory");
}
// The same of an element of a vector that is read as a whole.
__device__ inline void SendElement(float* to, float v) { Send(to, v); }
__device__ inline void SendElement(__nv_bfloat16* to, __nv_bfloat16 v) {
  const unsigned short bits = __bfloat16_as_ushort(v);
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(to),
               "h"(bits == 0xffff ? static_cast<unsigned short>(0x7fff) : bits)
               : "memory");
}
// Two f32, and four bf16 as they are packed: no bits of those that PackBf16 makes are kUnsent's.
__device__ inline void Send2(float* to, float a, float b) {
  const float none = __uint_as_float(0x7fffffffu);
  asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1, %2};" ::"l"(to),
               "f"(IsUnsent(a) ? none : a), "f"(IsUnsent(b) ? none : b)
               : "memory");
}
__device__ inline void SendPacked(void* to, uint32_t a, uint32_t b) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(a), "r"(b) : "memory");
}
__device__ inline void Unsend2(float* at) {
  asm volatile("st.global.cg.v2.u32 [%0], {%1, %1};" ::"l"(at), "r"(kUnsent) : "memory");
}
__device__ inline float2 LoadSent2(const float* at) {
  float2 v;
  asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];"
               : "=f"(v.x), "=f"(v.y)
               : "l"(at)
               : "memory");
  return v;
}
__device__ inline void Unsend(float* at, bool there = true) {
  StoreNew(at, __uint_as_float(kUnsent), there);
}
__device__ inline void Unsend4(float* at, bool there = true) {
  const float v = __uint_as_float(kUnsent);
  StoreNew4(at, make_float4(v, v, v, v), there);
}

// Registers a thread from here on, for all warps of a group of four. In code for one architecture
// alone; elsewhere all threads have the same number.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_FEAT_SM100_ALL)
template <int kRegisters>
__device__ inline void RaiseRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void LowerRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
#else
template <int kRegisters>
__device__ inline void RaiseRegisters() {}
template <int kRegisters>
__device__ inline void LowerRegisters() {}
#endif

// A barrier of some warps of a block; 1 is that of the computing warps. For racecheck, which now
// and then misses that such a barrier orders accesses, a barrier in shared memory stands for each.
__device__ inline uint64_t* WarpBarriers() {
  __shared__ uint64_t barriers[kWarpBarriers];
  return barriers;
}
template <int kBarrier>
__device__ inline uint64_t* WarpBarrier() {
  static_assert(kBarrier < kWarpBarriers);
  return WarpBarriers() + kBarrier;
}
template <int kBarrier, int kThreads>
__device__ inline void SyncWarps() {
  if constexpr (kRacecheck) {
    BarrierSync(WarpBarrier<kBarrier>(), 1);
    __syncwarp();
  } else {
    asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
  }
}
// Of a number of threads that divides kConsumers.
template <int kBarrier>
__device__ inline void SyncWarps(int threads) {
  if constexpr (kRacecheck) {
    BarrierSync(WarpBarrier<kBarrier>(), kConsumers / threads);
  } else {
    asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "r"(threads) : "memory");
  }
}
// Counts as one of them and goes on.
template <int kBarrier, int kThreads>
__device__ inline void ArriveWarps() {
  if constexpr (kRacecheck) {
    BarrierArrive(WarpBarrier<kBarrier>(), 1);
  } else {
    asm volatile("bar.arrive %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
  }
}
template <int kThreads>
__device__ inline void SyncThreads() {
  SyncWarps<1, kThreads>();
}

__device__ inline void AddRelease(uint32_t* counter, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}
__device__ inline uint32_t LoadAcquire(const uint32_t* counter) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
// For the host: all that this thread has seen written comes before it.
__device__ inline void StoreReleaseSystem(uint32_t* to, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
// Nanoseconds.
__device__ inline uint64_t DeviceClock() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");
  return now;
}

// d [16, 8] += a [16, 16] b [16, 8], bf16 with f32 sums. Lane l holds, with g = l / 4 and q = l %
// 4: a: rows g and g + 8, columns 2q, 2q + 1 and 8 more; b: column g, rows 2q, 2q + 1 and 8 more;
// d: rows g and g + 8, columns 2q and 2q + 1. A column of d depends on that column of b alone.
__device__ inline void Mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Matrices of 8 x 8 bf16 whose rows of 16 bytes the lanes name: lanes 0 to 7 the first one's, and
// so on. Lane l gets elements 2 (l % 4) and one more of row l / 4.
__device__ inline void LoadMatrices(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}
__device__ inline void LoadMatrices(uint32_t (&m)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(m[0]), "=r"(m[1])
               : "r"(address)
               : "memory");
}
// Four such matrices, each transposed: lane l gets rows 2 (l % 4) and one more of column l / 4.
__device__ inline void LoadTransposed(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(SharedAddress(row))
               : "memory");
}

// wgmma: four warps multiply 64 x 16 with 16 x (8 kTiles), both in shared memory as 8 x 8 matrices
// of 128 bytes, the two of a row of 16 side by side.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define CANOPY_HAS_WGMMA 1

// No swizzle; 128 bytes to the next matrix along K, 256 along M or N.
__device__ inline uint64_t WgmmaOperand(const void* at) {
  return uint64_t{(SharedAddress(at) & 0x3ffff) >> 4} | uint64_t{128 >> 4} << 16 |
         uint64_t{256 >> 4} << 32;
}
// d = a b, or d += a b where `add` is not 0. The compiler is not to touch the sums between Begin
// and End.
template <int kTiles>
__device__ inline void WgmmaHold(float (&sums)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles * 4; ++i) asm volatile("" : "+f"(sums[i / 4][i % 4])::"memory");
}
template <int kTiles>
__device__ inline void WgmmaBegin(float (&sums)[kTiles][4]) {
  WgmmaHold(sums);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
template <int kTiles>
__device__ inline void WgmmaEnd(float (&sums)[kTiles][4]) {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  WgmmaHold(sums);
}
#define CANOPY_WGMMA(n, operands, ...)                                                \
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" CANOPY_WGMMA_ADD_##n            \
               ", 0;\n"                                                               \
               " wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" operands \
               "}, "                                                                  \
               "%" CANOPY_WGMMA_A_##n ", %" CANOPY_WGMMA_B_##n ", p, 1, 1, 0, 0;\n}"  \
               : __VA_ARGS__                                                          \
               : "l"(a), "l"(b), "r"(add)                                             \
               : "memory")
#define CANOPY_WGMMA_ADD_8 "6"
#define CANOPY_WGMMA_ADD_16 "10"
#define CANOPY_WGMMA_ADD_32 "18"
#define CANOPY_WGMMA_ADD_64 "34"
#define CANOPY_WGMMA_A_8 "4"
#define CANOPY_WGMMA_B_8 "5"
#define CANOPY_WGMMA_A_16 "8"
#define CANOPY_WGMMA_B_16 "9"
#define CANOPY_WGMMA_A_32 "16"
#define CANOPY_WGMMA_B_32 "17"
#define CANOPY_WGMMA_A_64 "32"
#define CANOPY_WGMMA_B_64 "33"
#define CANOPY_WGMMA_ADD_80 "42"
#define CANOPY_WGMMA_A_80 "40"
#define CANOPY_WGMMA_B_80 "41"
#define CANOPY_WGMMA_ADD_128 "66"
#define CANOPY_WGMMA_A_128 "64"
#define CANOPY_WGMMA_B_128 "65"
#define CANOPY_WGMMA_TILE(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define CANOPY_WGMMA_TILES_8(n)                                                     \
  CANOPY_WGMMA_TILE(n), CANOPY_WGMMA_TILE(n + 1), CANOPY_WGMMA_TILE(n + 2),         \
      CANOPY_WGMMA_TILE(n + 3), CANOPY_WGMMA_TILE(n + 4), CANOPY_WGMMA_TILE(n + 5), \
      CANOPY_WGMMA_TILE(n + 6), CANOPY_WGMMA_TILE(n + 7)
#define CANOPY_WGMMA_LIST_64                                                               \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23," \
  "%24,%25,%26,%27,%28,%29,%30,%31"
__device__ inline void Wgmma(float (&d)[1][4], uint64_t a, uint64_t b, int add) {
  CANOPY_WGMMA(8, "%0,%1,%2,%3", CANOPY_WGMMA_TILE(0));
}
__device__ inline void Wgmma(float (&d)[2][4], uint64_t a, uint64_t b, int add) {
  CANOPY_WGMMA(16, "%0,%1,%2,%3,%4,%5,%6,%7", CANOPY_WGMMA_TILE(0), CANOPY_WGMMA_TILE(1));
}
__device__ inline void Wgmma(float (&d)[4][4], uint64_t a, uint64_t b, int add) {
  CANOPY_WGMMA(32, "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", CANOPY_WGMMA_TILE(0),
               CANOPY_WGMMA_TILE(1), CANOPY_WGMMA_TILE(2), CANOPY_WGMMA_TILE(3));
}
__device__ inline void Wgmma(float (&d)[8][4], uint64_t a, uint64_t b, int add) {
  CANOPY_WGMMA(64, CANOPY_WGMMA_LIST_64, CANOPY_WGMMA_TILES_8(0));
}
__device__ inline void Wgmma(float (&d)[10][4], uint64_t a, uint64_t b, int add) {
  CANOPY_WGMMA(80, CANOPY_WGMMA_LIST_64 ",%32,%33,%34,%35,%36,%37,%38,%39", CANOPY_WGMMA_TILES_8(0),
               CANOPY_WGMMA_TILE(8), CANOPY_WGMMA_TILE(9));
}
__device__ inline void Wgmma(float (&d)[16][4], uint64_t a, uint64_t b, int add) {
  CANOPY_WGMMA(128,
               CANOPY_WGMMA_LIST_64
               ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,"
               "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63",
               CANOPY_WGMMA_TILES_8(0), CANOPY_WGMMA_TILES_8(8));
}
#endif  // __CUDA_ARCH_FEAT_SM90_ALL

__device__ inline uint32_t PackBf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

// A pair of floats as three pairs of bf16 whose sum is exact to 24 bits.
struct SplitPair {
  uint32_t high, middle, low;
};
__device__ inline float Bf16Of(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }
__device__ inline SplitPair Split(float x, float y) {
  const float xh = Bf16Of(x), yh = Bf16Of(y);
  const float xr = x - xh, yr = y - yh;
  const float xm = Bf16Of(xr), ym = Bf16Of(yr);
  return {PackBf16(xh, yh), PackBf16(xm, ym), PackBf16(xr - xm, yr - ym)};
}

// Operands of Mma as they come from memory: bf16 as it is, f32 split in three.
template <typename T>
struct FragmentA;
template <>
struct FragmentA<__nv_bfloat16> {
  uint32_t r[4];
};
template <>
struct FragmentA<float> {
  uint32_t high[4], middle[4], low[4];
};
template <typename T>
struct FragmentB;
template <>
struct FragmentB<__nv_bfloat16> {
  uint32_t r[2];
};
template <>
struct FragmentB<float> {
  uint32_t high[2], middle[2], low[2];
};

__device__ inline void Multiply(float (&d)[4], const FragmentA<__nv_bfloat16>& a,
                                const FragmentB<__nv_bfloat16>& b) {
  Mma(d, a.r, b.r);
}
// f32 times bf16: exact products of a's three parts.
__device__ inline void Multiply(float (&d)[4], const FragmentA<float>& a,
                                const FragmentB<__nv_bfloat16>& b) {
  Mma(d, a.low, b.r);
  Mma(d, a.middle, b.r);
  Mma(d, a.high, b.r);
}
// Sums from `first` on, of one first operand: each as Multiply makes it, but part by part of all,
// so that none waits for the one before.
template <int kSums, int kCount>
__device__ __forceinline__ void MultiplyInTurn(float (&d)[kSums][4], int first,
                                               const FragmentA<float>& a,
                                               const FragmentB<__nv_bfloat16> (&b)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) Mma(d[first + i], a.low, b[i].r);
#pragma unroll
  for (int i = 0; i < kCount; ++i) Mma(d[first + i], a.middle, b[i].r);
#pragma unroll
  for (int i = 0; i < kCount; ++i) Mma(d[first + i], a.high, b[i].r);
}
// f32 times f32: the six products that reach into 24 bits, the smallest first.
__device__ inline void Multiply(float (&d)[4], const FragmentA<float>& a,
                                const FragmentB<float>& b) {
  Mma(d, a.low, b.high);
  Mma(d, a.high, b.low);
  Mma(d, a.middle, b.middle);
  Mma(d, a.middle, b.high);
  Mma(d, a.high, b.middle);
  Mma(d, a.high, b.high);
}

__device__ inline void SetPair(FragmentA<float>& f, int i, float x, float y) {
  const SplitPair s = Split(x, y);
  f.high[i] = s.high;
  f.middle[i] = s.middle;
  f.low[i] = s.low;
}
__device__ inline void SetPair(FragmentB<float>& f, int i, float x, float y) {
  const SplitPair s = Split(x, y);
  f.high[i] = s.high;
  f.middle[i] = s.middle;
  f.low[i] = s.low;
}
// Elements x and x + 1 of a row that are operand register i.
__device__ inline void LoadPair(FragmentA<__nv_bfloat16>& f, int i, const __nv_bfloat16* x) {
  f.r[i] = *reinterpret_cast<const uint32_t*>(x);
}
__device__ inline void LoadPair(FragmentB<__nv_bfloat16>& f, int i, const __nv_bfloat16* x) {
  f.r[i] = *reinterpret_cast<const uint32_t*>(x);
}
__device__ inline void LoadPair(FragmentA<float>& f, int i, const float* x) {
  const float2 v = *reinterpret_cast<const float2*>(x);
  SetPair(f, i, v.x, v.y);
}
__device__ inline void LoadPair(FragmentB<float>& f, int i, const float* x) {
  const float2 v = *reinterpret_cast<const float2*>(x);
  SetPair(f, i, v.x, v.y);
}

__device__ inline float ToFloat(float x) { return x; }
__device__ inline float ToFloat(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T>
__device__ inline T FromFloat(float x);
template <>
__device__ inline float FromFloat<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 FromFloat<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// One fixed tree over the lanes of a warp.
__device__ inline float WarpSum(float x) {
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}
__device__ inline float WarpMax(float x) {
  for (int lane = 16; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
  return x;
}

// Without the exact division's slow path, which is a call.
__device__ inline float Silu(float x) { return __fdividef(x, 1.0f + expf(-x)); }

}  // namespace canopy::cuda

#endif  // CANOPY_CORE_CUDA_PTX_CUH_
