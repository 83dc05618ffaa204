// The persistent kernel of a pass: walks a list of operators on all multiprocessors.
//
// What did not pay (docs/performance.md): a flag a block instead of a counter for the grid's
// barrier; all operators as called functions, which save registers to local memory (attention's
// blocks are such a function, since there it saves the others more); an
// operator's description loaded by the computing warps themselves, whose registers it then did not
// fit; attention's code in the kernels of models without attention; in_proj as two products with
// the scan's inputs in between; looking at mbarriers all the time.

#ifndef CANOPY_MODELS_PASS_KERNEL_CUH_
#define CANOPY_MODELS_PASS_KERNEL_CUH_

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

#include "core/cuda/pass.h"
#include "core/ops/matmul_cuda.cuh"
#include "core/ops/rows_cuda.cuh"
#include "core/ops/strip_cuda.cuh"
#include "verify/tree_attention_cuda.cuh"
#include "verify/tree_scan_cuda.cuh"

namespace canopy::cuda {

enum class OpKind : int32_t {
  kEmbed,
  kMatmul,
  kScan,
  kAttentionInputs,
  kAttendBlocks,
  kCombineBlocks,
  kResidual,
  kGated,
  kSelect,
};
inline constexpr int kOpKinds = 9;
constexpr const char* Name(OpKind kind) {
  constexpr const char* kNames[kOpKinds] = {"embed",  "matmul",  "scan",     "attention inputs",
                                            "attend", "combine", "residual", "gated activation",
                                            "select"};
  return kNames[static_cast<int>(kind)];
}

// What was sent before and is used up: made ready to be sent again while an operator runs.
struct Sent {
  uint4* data = nullptr;
  int32_t vectors = 0;
};

inline constexpr int kMostUsedUp = 3;

struct Op {
  OpKind kind = OpKind::kEmbed;
  int32_t layer = 0;
  // Whether all blocks are to be done with it before any goes on. Else the next one waits for each
  // value that it reads, see kUnsent, and all are done with it before the operator after that.
  int32_t barrier = 1;
  // The counter of blocks that are done with it, and how often all of them have been told on that
  // counter when they are: 0 where they do not tell, since barriers stand around it.
  int32_t counter = 0;
  int32_t turn = 0;
  // Of a scan whether a strip of out_proj follows, with which a block goes on at once.
  int32_t strip_follows = 0;
  Sent used_up[kMostUsedUp];
  // Of the input of the product before it, whose sums it reads (HelpRowFactors), or of a scan's own
  // product (MakeFactors).
  RowNorm norm;
  union {  // by kind
    EmbedOp embed;
    MatmulOp matmul;
    struct {
      MatmulOp in;
      ScanOp scan;
    } ssd;
    AttentionOp attention;
    struct {
      MatmulOp out;
      ResidualOp residual;
      int32_t number;  // of strips before it
    } sum;
    GatedOp gated;
    SelectOp select;
  };

  Op() : embed() {}

  CANOPY_HOST_DEVICE const MatmulOp* product() const {
    return kind == OpKind::kMatmul     ? &matmul
           : kind == OpKind::kScan     ? &ssd.in
           : kind == OpKind::kResidual ? &sum.out
                                       : nullptr;
  }
  MatmulOp* product() { return const_cast<MatmulOp*>(std::as_const(*this).product()); }
};

inline constexpr int kCounterStride = 32;

struct PassArguments {
  const Op* ops = nullptr;
  int op_count = 0;
  // The products among them, for the threads that stream.
  const MatmulOp* products = nullptr;
  int product_count = 0;
  // Two counters of blocks that are done with an operator, of operators in turn, monotonic and
  // kCounterStride apart, and their values before the pass.
  uint32_t* counters = nullptr;
  uint32_t counters_base[2] = {};
  int stream_weights_once = 1;   // whether the weights are larger than the cache
  int64_t* clocks = nullptr;     // [op_count + 1] of block 0, or null
  PassResult* result = nullptr;  // the host's, of this pass, or null
  uint64_t* device_ns = nullptr;
  uint32_t number = 0;             // of the pass
  int vocab = 0;                   // tokens of the embedding
  Selected* selections = nullptr;  // [kPromisePasses], of the passes before
  RingShape ring = {};             // see RingFor
};

// A commit that a pass does before anything else: of the path that became the prefix since the
// state's last pass. Of length 0 where there is none.
struct PassCommit {
  CommitPath path;
  const void* layers = nullptr;  // CommitLayer<T> [layer_count]
  int layer_count = 0;
};

// Dynamic shared memory that a block asks for: all there is less what the driver keeps. First comes
// the ring of weights, then this fixed part. Behind it, operators work; products have the ring of
// activations there, then their factors.
template <typename T>
struct SharedLayout {
  static constexpr int kSignals = 512;
  static constexpr int kNodes = (sizeof(PassNodes) + 127) / 128 * 128;
  static constexpr int kOp = (sizeof(Op) + 15) / 16 * 16;
  static constexpr int kNodesAt = kSignals;
  // The operator at hand, its layer's store and its first activations, and those of three
  // operators, the next two among them, in turn.
  static constexpr int kStore = (sizeof(LayerStore<T>) + 15) / 16 * 16;
  static constexpr int kTurn = kOp + kStore + static_cast<int>(sizeof(FirstActs));
  static constexpr int kOpAt = kNodesAt + kNodes;
  static constexpr int kStoreAt = kOpAt + kOp;
  static constexpr int kFirstActsAt = kStoreAt + kStore;
  static constexpr int kNextAt = kOpAt + kTurn;
  static constexpr int kFactorsAt = kNextAt + 3 * kTurn;
  static constexpr int kFixed = (kFactorsAt + kMaxRows * 4 + 127) / 128 * 128;

  CANOPY_HOST_DEVICE static constexpr int TurnAt(int i) { return kNextAt + i % 3 * kTurn; }
};

// What mixes positions in a model's layers. A kernel has no code for what its model has not, since
// that would take registers from the rest.
inline constexpr int kSsdMixers = 1, kAttentionMixers = 2;

// rows: of the bucket, 8, 16, 32 or 64. shared_bytes: all that a block may have. cluster: blocks of
// a cluster, kStripBlocks where there are strips.
template <typename T>
cudaError_t LaunchPass(int mixers, int bucket_rows, int blocks, int cluster, int shared_bytes,
                       const PassArguments& arguments, const PassNodes& nodes,
                       const PassCommit& commit, cudaStream_t stream);
template <typename T>
cudaError_t PreparePass(int mixers, int shared_bytes);
// How many blocks of the smallest bucket's kernel the device runs at a time in such clusters: 0 if
// the code that the device has of it was made for a compute capability without them.
template <typename T>
cudaError_t ClusteredBlocks(int mixers, int cluster, int shared_bytes, int* blocks);
template <typename T>
cudaError_t LaunchCommit(const CommitLayer<T>* layers, int layer_count, const CommitPath& path,
                         cudaStream_t stream);
template <typename T>
cudaError_t LaunchFold(const CommitLayer<T>* layers, const FoldShape* shapes, int layer_count,
                       int heads, int shared_bytes, int segment, cudaStream_t stream);

}  // namespace canopy::cuda

#endif  // CANOPY_MODELS_PASS_KERNEL_CUH_
