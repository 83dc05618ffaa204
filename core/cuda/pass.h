// What host and device share of a pass: limits, the description of its nodes, and views of its
// buffers.
//
// A pass is one launch of one persistent kernel (models/pass_kernel.cuh), a block on every
// multiprocessor. It walks a list of operators. Between some stands a barrier of the whole grid;
// what reads a product's sums, but the head's, begins at once and waits for each one (kUnsent). Up
// to 16 rows products wait for activations in the same way, and all blocks are done with an
// operator not when the next one begins, but the one after that. Blocks have sixteen warps that
// compute and four that serve them: one streams weights, in an order that is fixed when the model
// is loaded, into a ring of slots in shared memory and so runs ahead of the operators as far as the
// ring is long; one brings activations once they are there; two prepare the operators that come
// next. With few rows pairs of blocks may do without some of this, see core/ops/strip_cuda.cuh.
//
// Activations that a matrix product reads are kept as the tensor cores want them:
//   act [k_steps][rows of the bucket][16]   T, elements of a k-step in the order of ActIndex
// Products leave sums over parts of K ("splits"), which their reader adds in order:
//   partials [kMaxRows][splits][columns]    f32

#ifndef CANOPY_CORE_CUDA_PASS_H_
#define CANOPY_CORE_CUDA_PASS_H_

#include <cstdint>

#include "core/decode_state.h"
#include "core/language_model.h"

#ifdef __CUDACC__
#define CANOPY_HOST_DEVICE __host__ __device__
#else
#define CANOPY_HOST_DEVICE
#endif

namespace canopy::cuda {

inline constexpr int kMaxRows = 64;  // nodes of a pass
inline constexpr int kMaxTaps = 3;   // of a causal convolution, besides a node's own input
inline constexpr int kConsumerWarps = 16;
inline constexpr int kConsumers = 32 * kConsumerWarps;
// And four warps that serve them; registers are given to groups of four.
inline constexpr int kBlockThreads = kConsumers + 128;

// Whether the code is for compute-sanitizer's racecheck (CANOPY_RACECHECK). Of who arrives at a
// barrier in shared memory the tool counts the thread's own accesses alone, not those of others
// that came before by another barrier. So in such code every thread arrives for itself where
// elsewhere one does for a warp or for all.
#ifdef CANOPY_RACECHECK
inline constexpr bool kRacecheck = true;
#else
inline constexpr bool kRacecheck = false;
#endif
// Barriers of some warps, see SyncWarps, and what racecheck takes of a block's shared memory for
// them.
inline constexpr int kWarpBarriers = 9;
inline constexpr int kRacecheckShared = kRacecheck ? 128 : 0;
static_assert(!kRacecheck || kWarpBarriers * 8 <= kRacecheckShared);

CANOPY_HOST_DEVICE constexpr int PadTo(int multiple, int n) {
  return (n + multiple - 1) / multiple * multiple;
}
CANOPY_HOST_DEVICE constexpr int PadTo16(int n) { return PadTo(16, n); }

// Where column `column` of row `row` lies in an act of `bucket_rows` rows. Within a k-step, bf16 is
// stored as 8 x 8 matrices [rows / 8][2][8][8], as wgmma and ldmatrix read them; f32 row by row
// with a lane's four operands side by side.
template <typename T>
CANOPY_HOST_DEVICE constexpr int ActIndex(int bucket_rows, int row, int column) {
  const int step = column / 16 * bucket_rows * 16, k = column % 16;
  if (sizeof(T) == 2) return step + row / 8 * 128 + k / 8 * 64 + row % 8 * 8 + k % 8;
  return step + row * 16 + (k & 7) / 2 * 4 + (k >> 3) * 2 + (k & 1);
}

// One sequence's storage of one layer. Row p % kRing of u, b and l holds position p of the prefix,
// row kRing + k pending node k. Row p % (kernel - 1) of conv holds position p, row kernel - 1 + k
// pending node k. Rows of k and v: positions, then pending nodes.
template <typename T>
struct LayerStore {
  float* checkpoints[2];  // S in operand order, see verify/tree_scan_cuda.cuh
  float* u;               // [kRing + pending, heads * padded head_dim]
  T* b;                   // [kRing + pending, groups * padded d_state]
  float* l;               // [kRing + pending, heads]
  float* conv;            // [kernel - 1 + pending, channels of ScanOp]
  T* k;                   // [positions + pending, kv_heads * padded head_dim]
  T* v;
};

// The nodes of a pass: a parameter of its kernel.
struct PassNodes {
  int32_t rows;                               // new nodes; node i is row i
  int32_t prefix;                             // positions before the tree
  int32_t first_pending;                      // new node i is pending node first_pending + i
  int32_t kv_capacity;                        // rows of k and v before those of pending nodes
  int32_t deepest;                            // position of a node
  int32_t key_blocks;                         // of KeyBlockOf, that the deepest node reads
  int32_t first_checkpoint, last_checkpoint;  // of all nodes
  int32_t top;                                // greatest logits to select in each row; 0: none
  const void* layers;                         // LayerStore<T> [layers]
  float* attention;                           // scratch: [rows][heads][key_blocks][BlockSums]
  int32_t token[kMaxRows];
  int32_t position[kMaxRows];
  int32_t checkpoint[kMaxRows];      // position of the checkpoint that the node reads
  uint8_t path[kMaxRows][kMaxRows];  // pending nodes on the path to the node, itself last
  uint8_t depth[kMaxRows];           // of pending nodes, 0 under the prefix
  uint64_t below[kMaxRows];          // rows of this pass on whose paths a pending node is, as a set
  // Input `back` + 1 positions before the node: a row of this pass, or -1: none, or -2 - r: row r
  // of the conv store.
  int16_t taps[kMaxRows][kMaxTaps];
};

// Output of selection. token -1: the row has logits that are not numbers.
struct Selected {
  int32_t token[kMaxRows][kMaxTop];
};

// What a pass leaves in the host's memory, so that it need not ask for it. A backend's passes run
// in order and are numbered; `number` is written last.
struct PassResult {
  Selected selected;
  uint64_t device_ns;  // that passes took so far, by the device's clock
  uint32_t number;     // of the pass
};

// The selection and the result of pass n are kept in place n % kPromisePasses, until another pass
// needs it.
CANOPY_HOST_DEVICE constexpr int PlaceOf(uint32_t pass) {
  return static_cast<int>(pass % kPromisePasses);
}

// A promised token says which it is: the k-th best of a row of a pass. Of the number of the pass
// there is room for the last bits.
inline constexpr uint32_t kPassNumbers = 1u << 19;
static_assert(kPassNumbers % kPromisePasses == 0);
struct Promise {
  uint32_t pass;  // modulo kPassNumbers
  int row;
  int k;
};
CANOPY_HOST_DEVICE constexpr int32_t ToToken(const Promise& promise) {
  return INT32_MIN +
         static_cast<int32_t>((promise.pass % kPassNumbers * kMaxRows + promise.row) * kMaxTop +
                              promise.k);
}
CANOPY_HOST_DEVICE constexpr Promise ToPromise(int32_t token) {
  const uint32_t code = static_cast<uint32_t>(token) - static_cast<uint32_t>(INT32_MIN);
  return {code / (kMaxRows * kMaxTop), static_cast<int>(code / kMaxTop % kMaxRows),
          static_cast<int>(code % kMaxTop)};
}
// Whether it is a promise of a pass, which are numbered from 1, and holds where `launched` is the
// number of the last one that was.
constexpr bool Holds(const Promise& promise, uint64_t launched) {
  const uint64_t age = (launched - promise.pass) % kPassNumbers;
  return promise.pass < kPassNumbers && age < kPromisePasses && age < launched;
}

// counts: how many splits a tile of 1 << tile_shift columns has, at most `most`. Splits that a tile
// does not have may be read, but never come. Every sum has one reader, see kUnsent.
struct Partials {
  float* data = nullptr;
  const uint8_t* counts = nullptr;
  int most = 0;
  int tile_shift = 0;
  int split_stride = 0;  // columns
  int ld = 0;            // splits * columns
};

// RMSNorm of whole rows or of groups of a row, as sums of squares that are turned into one factor a
// row and group: squares [rows][groups * count], f32, or [rows][count * 32] (of_quads). Up to 16
// rows they are sent (kUnsent): who reads them in the next operator waits for each, all others
// stand behind "all are done with the last but one". Those of several groups are not, and a barrier
// stands behind who writes them.
struct RowNorm {
  const float* squares = nullptr;  // null: no norm, the factor is 1
  int count = 0;                   // parts of a group
  int16_t groups = 1;
  // Whether each part, of 128 columns, comes as the 32 sums of four columns that WarpSum adds.
  int16_t of_quads = 0;
  float inverse_width = 0.0f;  // 1 / columns of a group
  float eps = 0.0f;
};

}  // namespace canopy::cuda

#endif  // CANOPY_CORE_CUDA_PASS_H_
