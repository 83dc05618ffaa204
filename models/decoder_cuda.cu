#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <climits>
#include <cmath>
#include <cstring>
#include <iterator>
#include <span>
#include <utility>

#include "core/cuda/timing.h"
#include "models/decoder_cuda.h"
#include "models/forward_check.h"
#include "models/pass_kernel.cuh"
#include "verify/tree_plan.h"

namespace canopy {
namespace {

using cuda::kMaxRows;

constexpr int kBuckets = 4;
constexpr int kBucketRows[kBuckets] = {8, 16, 32, 64};
// Products have enough shared memory, then every operator but scan and attention has.
static_assert(8 * cuda::kConsumerWarps * cuda::kMaxHeadDim <= cuda::kMatmulWorkBytes);

// Random weights for synthetic models: uniform with the variance 1 / columns, from a hash of the
// element's place, so that they are the same on every device of one size.
template <typename T>
__global__ void FillRandom(T* data, int64_t count, float bound, uint64_t seed) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    uint64_t x = (static_cast<uint64_t>(i) + seed) * 0x9e3779b97f4a7c15ull;
    x ^= x >> 32;
    x *= 0xd6e8feb86659fd93ull;
    x ^= x >> 32;
    const float unit = static_cast<float>(x >> 40) * 0x1p-23f - 1.0f;
    data[i] = cuda::FromFloat<T>(bound * unit);
  }
}

bool SameShape(const ProductShape& a, const ProductShape& b) {
  return a.out == b.out && a.in == b.in;
}

// A matrix in the order in which it is streamed.
struct DeviceMatrix {
  Buffer weights;
  Buffer counts;      // splits of each tile; of an own product of its early ones
  Buffer first_acts;  // FirstActs [kBuckets][blocks]
  cuda::MatmulOp op;
  ProductShape shape;
  int splits = 0;            // the most of a tile
  bool same_splits = false;  // all tiles have as many

  cuda::Partials Sums(float* data) const {
    int shift = 0;
    const int tile_blocks = op.early_tiles > 0 ? 1 : op.tile_blocks;
    while (1 << shift < tile_blocks * 16) ++shift;
    if (same_splits) shift = 31;
    return {data, counts.as<uint8_t>(), splits, shift, op.split_stride, op.ld};
  }
};

std::vector<cuda::MatmulOp> ProductsOf(const std::vector<cuda::Op>& ops) {
  std::vector<cuda::MatmulOp> products;
  for (const cuda::Op& op : ops) {
    if (op.product() != nullptr) products.push_back(*op.product());
  }
  return products;
}

// Gives operators their turns. Where not all tell, barriers stand around those that do not.
void SetTurns(std::vector<cuda::Op>* ops, bool all_tell) {
  std::array<int, 2> turns = {};
  for (size_t i = 0; i < ops->size(); ++i) {
    cuda::Op& op = (*ops)[i];
    op.counter = static_cast<int>(i % 2);
    op.turn = op.barrier != 0 || all_tell ? ++turns[op.counter] : 0;
    CHECK(op.turn > 0 || ((*ops)[i - 1].barrier != 0 && (*ops)[i + 1].barrier != 0));
    if (op.product() != nullptr && i > 0 && (*ops)[i - 1].barrier == 0) {
      op.product()->counter_before = (*ops)[i - 1].counter;
      op.product()->turn_before = (*ops)[i - 1].turn;
    }
  }
}
std::vector<std::array<int, 2>> TurnsAfter(const std::vector<cuda::Op>& ops) {
  std::vector<std::array<int, 2>> after = {{0, 0}};
  for (const cuda::Op& op : ops) {
    after.push_back(after.back());
    if (op.turn > 0) after.back()[op.counter] = op.turn;
  }
  return after;
}

// Columns of a product's input, where groups are padded to whole k-steps.
struct Columns {
  int count = 0;
  int groups = 1;

  int width() const { return count / groups; }
  int padded_width() const { return cuda::PadTo16(width()); }
  int k_steps() const { return groups * padded_width() / 16; }
  int Place(int column) const { return column / width() * padded_width() + column % width(); }
};

// Numbers from `first` on in `parts` parts of `width`, each padded to `padded` with -1.
std::vector<int> PaddedParts(int first, int parts, int width, int padded) {
  std::vector<int> result;
  for (int i = 0; i < parts; ++i) {
    for (int k = 0; k < padded; ++k) result.push_back(k < width ? first + i * width + k : -1);
  }
  return result;
}
template <typename T>
class Storage final : public StateStorage {
 public:
  explicit Storage(CudaBackend& backend) : cuda(backend) {}

  void Clear() override {
    // As on the CPU, only the checkpoint before position 0 is read before it is written.
    for (size_t i = 0; i < layers.size(); ++i) {
      if (checkpoint_bytes[i] > 0) {
        cudaMemsetAsync(layers[i].checkpoints[0], 0, checkpoint_bytes[i], cuda.stream());
      }
    }
    deferred = {};
  }
  absl::Status CopyFrom(const StateStorage& other) override {
    const auto& from = static_cast<const Storage&>(other);
    CHECK(from.memory.bytes() == memory.bytes());
    RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(memory.data(), from.memory.data(), memory.bytes(),
                                         cudaMemcpyDeviceToDevice, cuda.stream()),
                         "copying a state");
    deferred = from.deferred;
    return cuda.Synchronize();
  }

  CudaBackend& cuda;
  Buffer memory;  // everything but `attention` and `tables`
  std::vector<cuda::LayerStore<T>> layers;
  std::vector<size_t> checkpoint_bytes;
  Buffer tables;  // LayerStore<T> [layers], then CommitLayer<T> [layers]
  const cuda::CommitLayer<T>* commit = nullptr;
  Buffer attention;  // scratch of the keys' blocks
  // Rows of the prefix that are in the places of pending nodes still; the next pass moves them.
  cuda::CommitPath deferred;
};

class CudaWorkspace final : public Workspace {
 public:
  ~CudaWorkspace() override {
    if (logits_host != nullptr) cudaFreeHost(logits_host);
  }
  // On the device.
  size_t bytes() const override { return memory.bytes() + tables.bytes(); }

  int max_rows = 0;
  Buffer memory;  // activations, partial sums, scratch
  Buffer tables;  // operators and products of every bucket, counters, clocks
  cuda::Op* ops[kBuckets] = {};
  cuda::MatmulOp* products[kBuckets] = {};  // of those
  int product_count = 0;
  std::vector<std::string> names;  // of the operators, the same in every bucket
  uint32_t* counters = nullptr;
  uint32_t counters_base[2] = {};
  // How often all blocks have told on them when a bucket's first operators are done, by their
  // number.
  std::vector<std::array<int, 2>> turns[kBuckets];
  float* logits = nullptr;  // [kMaxRows][ld]
  int logits_ld = 0;
  int64_t* clocks = nullptr;

  float* logits_host = nullptr;  // [logits_rows][padded vocab], pinned
  int logits_rows = 0;
  uint32_t pass = 0;  // number of the one that was launched last
  std::vector<TokenId> top;
  std::vector<int> first_row;
  TreePlan plan;

  // The last pass, for Repeat.
  int last_bucket = -1;
  cuda::PassArguments last;
  cuda::PassNodes last_nodes = {};
  cuda::PassCommit last_commit;  // once only: the pass writes the rows that it reads
  bool reports = true;
};

// Cuts one allocation into aligned pieces: first all are asked for, then placed.
class Pieces {
 public:
  template <typename P>
  void Add(P** to, size_t count) {
    const size_t bytes = (count * sizeof(P) + 255) / 256 * 256;
    pieces_.push_back({reinterpret_cast<void**>(to), bytes_});
    bytes_ += bytes;
  }
  absl::StatusOr<Buffer> Place(Backend& backend) {
    ASSIGN_OR_RETURN(Buffer buffer, backend.Allocate(std::max<size_t>(bytes_, 256)));
    for (const auto& [to, offset] : pieces_) *to = buffer.as<char>() + offset;
    return buffer;
  }

 private:
  std::vector<std::pair<void**, size_t>> pieces_;
  size_t bytes_ = 0;
};

template <typename T>
class CudaDecoder final : public CudaModel {
 public:
  CudaDecoder(CudaBackend& cuda, DecoderSpec spec, DType dtype)
      : cuda_(cuda), spec_(std::move(spec)), dtype_(dtype) {}

  absl::Status Prepare();

  const ModelInfo& info() const override { return spec_.info; }
  absl::StatusOr<std::unique_ptr<DecodeState>> NewState(const StateOptions& options) const override;
  absl::StatusOr<std::unique_ptr<Workspace>> NewWorkspace(int max_rows) const override;
  absl::StatusOr<ForwardResult> Forward(std::span<const ForwardItem> items,
                                        Workspace& workspace) const override;
  double DeviceSeconds() const override { return cuda_.device_seconds(); }
  const Backend* promises() const override { return &cuda_; }
  absl::StatusOr<double> Resolve(std::span<TokenId> tokens) const override {
    return cuda_.Resolve(tokens);
  }
  int MaxRows() const override { return kBucketRows[LastBucket()]; }
  size_t PassBytes(int nodes, int context) const override;
  absl::StatusOr<std::vector<double>> Repeat(Workspace& workspace, int repetitions) const override;
  absl::StatusOr<std::vector<OperatorTime>> Breakdown(Workspace& workspace) const override;
  std::vector<ProductShape> Products() const override;
  int StripLayers() const override;
  absl::StatusOr<std::vector<double>> TimeProduct(const ProductShape& shape, int rows,
                                                  int repetitions) const override;

 private:
  // Every product's matrix with its shape, in the order of a pass.
  struct Product {
    const DeviceMatrix* matrix;
    ProductShape shape;
    bool whole = true;  // not a part of the one before it
  };
  std::vector<Product> AllProducts() const;

  // Shared memory of a bucket's operators, and the buckets whose kernels have enough of it for all
  // layers.
  int WorkBytes(int bucket) const {
    return cuda_.shared_bytes() - rings_[bucket].bytes() - cuda::SharedLayout<T>::kFixed;
  }
  int LastBucket() const {
    int bucket = kBuckets - 1;
    while (bucket >= 0 && !has_bucket_[bucket]) --bucket;
    return bucket;
  }
  bool HasSsd() const { return (mixers_ & cuda::kSsdMixers) != 0; }
  // Rows of a prompt's next chunk, of `left` from `position` on. Chunks end at a fold; they have up
  // to two segments where they begin at one.
  int ChunkRows(int position, int left) const {
    const int into = position % kSegment;
    return std::min({left, into == 0 ? kMaxRows : kSegment - into, MaxRows()});
  }
  // Rows of an item's next pass, of `left` that are to come.
  int PassRows(const ForwardItem& item, int position, int left) const {
    return item.commit_chain ? ChunkRows(position, left) : std::min(left, MaxRows());
  }
  int BucketFor(int rows) const {
    int bucket = 0;
    while (kBucketRows[bucket] < rows || !has_bucket_[bucket]) ++bucket;
    return bucket;
  }

  // Weights of one block on the device.
  struct Layer {
    std::vector<DeviceMatrix> in;  // q, k and v, or in_proj, for each operator of a scan
    DeviceMatrix out, gate_up, down;
    const float* norm = nullptr;
    const float* mlp_norm = nullptr;
    const float* in_bias = nullptr;
    const float* out_bias = nullptr;
    const float* gate_up_bias = nullptr;
    const float* down_bias = nullptr;
    const float* q_norm = nullptr;
    const float* k_norm = nullptr;
    const float* inv_freq = nullptr;
    std::vector<Buffer> packed;  // ScanPacked [blocks], of each operator of a scan
    cuda::ScanOp scan;           // what does not depend on a workspace
    int node_group[kBuckets] = {};
  };

  // Addresses in a workspace's memory, the same for every bucket but the activations. Of what is
  // sent there are some, used in turn: the last is made ready while the next is in use. Two where
  // the operator that reads it is the one that sends it, or makes it ready itself.
  static constexpr int kActPlaces = 3;
  struct Places {
    float* x;
    T* act_hidden[kBuckets];  // the first; then `acts` has the others, and those of act_mixed
    T* acts[kBuckets];
    float* partials[2];
    // Of more than 16 rows or several norm groups, which are not sent, one place for all layers: a
    // scan writes them when its in_proj is done, which needs sums that all products before it made
    // with what they read here. Then those that are sent, kActPlaces.
    float* scan_squares;
    float* sent_squares;
    char* scan_sent[2];
    T* q;
    float* select_values;
    int32_t* select_tokens;
  };

  absl::Status CommitRows(DecodeState& state, std::span<const NodeId> path) const override;
  // Leaves the path's rows to the state's next pass, or moves them now and folds.
  absl::Status CommitPath(DecodeState& state, const cuda::CommitPath& path) const;

  // outputs: which output of the matrix a column of the product is, -1: none; empty: the same.
  absl::StatusOr<DeviceMatrix> Upload(const PackedMatrix& matrix, const Columns& columns,
                                      cuda::MatmulOp op, const std::vector<int>& outputs = {});
  absl::StatusOr<const float*> Upload(const std::vector<float>& values, int padded = 0);
  // whole: where the result is read as it is, and not from splits.
  cuda::MatmulOp Plan(int outputs, const Columns& columns, bool whole = false) const;
  // Of out_proj, cut so that few rows can take it in strips where these suit.
  cuda::MatmulOp PlanOut(size_t layer, const cuda::ScanOp& scan, const Columns& columns) const;
  // Whether a layer is a scan that the next layer's follows at once: a strip goes on from one and
  // is read by the other.
  bool ScanFollows(size_t layer) const;
  bool StripsFit(const cuda::MatmulOp& op, const cuda::ScanOp& scan) const;
  absl::Status PrepareStrips();
  // Of early outputs and tiles of `tile_blocks` blocks.
  cuda::MatmulOp PlanOwn(int early, int tiles, int tile_blocks, const Columns& columns) const;
  absl::Status PrepareScan(const SsdSpec& ssd, int layer, cuda::ScanOp* scan) const;
  absl::StatusOr<Buffer> PackScan(const SsdSpec& ssd, const cuda::ScanOp& scan, int group_columns,
                                  int first_tile) const;
  std::vector<cuda::Op> Program(int bucket, const CudaWorkspace& ws, const Places& at,
                                std::vector<std::string>* names) const;
  void FillNodes(DecodeState& state, int rows, int first_pending, bool chain, int top,
                 std::span<const TokenId> tokens, CudaWorkspace& ws, cuda::PassNodes* nodes) const;
  absl::Status RunPass(DecodeState& state, std::span<const TokenId> tokens, int first_pending,
                       bool chain, bool head, int top, CudaWorkspace& ws) const;
  // InvalidArgument for a promise that will not hold until the items' last pass.
  absl::Status CheckPromises(std::span<const ForwardItem> items) const;
  static absl::Status CheckRepeatable(const CudaWorkspace& ws);
  // Runs ws.last, with a clock at every operator if `clocks` is not null.
  absl::Status Launch(CudaWorkspace& ws, int64_t* clocks = nullptr) const;
  Storage<T>& StorageOf(DecodeState& state) const {
    return static_cast<Storage<T>&>(state.storage());
  }

  void AddPieces(Pieces& pieces, Places& places, CudaWorkspace& ws) const;
  // Elements of a product's input of the residual stream's width, and behind it, in f32, the sums
  // of squares of its norm.
  size_t HiddenActs(int bucket) const {
    return size_t{1} * kBucketRows[bucket] * hidden_steps_ * 16;
  }
  size_t HiddenInput(int bucket) const {
    return HiddenActs(bucket) + size_t{1} * kBucketRows[bucket] *
                                    cuda::PadTo(4, cuda::Granules(hidden_steps_)) * sizeof(float) /
                                    sizeof(T);
  }

  // Sums of squares of four columns each, of a strip's rows.
  size_t QuadSquares() const {
    return has_strips_ ? size_t{32} * kBucketRows[0] * cuda::Granules(hidden_steps_) : 0;
  }

  CudaBackend& cuda_;
  DecoderSpec spec_;
  const DType dtype_;
  std::vector<Buffer> buffers_;
  std::vector<Layer> layers_;
  DeviceMatrix head_;
  const float* final_norm_ = nullptr;
  const T* embedding_ = nullptr;
  const cuda::FoldShape* fold_shapes_ = nullptr;
  int fold_heads_ = 0;
  int fold_shared_ = 0;
  int taps_ = 0;
  int hidden_steps_ = 0;
  int mixed_steps_ = 0;
  size_t partial_floats_ = 0;
  int scan_squares_ = 0;
  int scan_head_dim_ = 0, scan_heads_ = 0, scan_groups_ = 0, scan_norm_groups_ = 0;
  int sent_bytes_ = 0;
  int q_columns_ = 0;
  std::array<cuda::RingShape, kBuckets> rings_ = {};  // of weights
  std::array<bool, kBuckets> has_bucket_ = {true, true, true, true};
  size_t stream_bytes_ = 0;  // of weights that a pass reads
  uint64_t seed_ = 1;
  int mixers_ = 0;  // kSsdMixers, kAttentionMixers
  // Whether all blocks run in clusters for strips, whether layers take those with few rows, and
  // their tensor maps.
  bool has_clusters_ = false;
  bool has_strips_ = false;
  Buffer strip_maps_;
};

template <typename T>
cuda::MatmulOp CudaDecoder<T>::Plan(int outputs, const Columns& columns, bool whole) const {
  const int blocks = cuda_.multiprocessors();
  constexpr int kUnitRows = 16 * cuda::kUnitBlocks;
  cuda::MatmulOp best;
  double best_cost = 0.0;
  for (int units = 1; units <= cuda::kMostTileUnits; units *= 2) {
    cuda::MatmulOp op;
    op.tile_blocks = units * cuda::kUnitBlocks;
    op.blocks = (outputs + kUnitRows - 1) / kUnitRows * cuda::kUnitBlocks;
    op.columns = outputs;
    op.k_steps = columns.k_steps();
    for (op.quantum = whole ? op.k_steps : 1; op.quantum <= op.k_steps; op.quantum *= 2) {
      const cuda::MatmulCut cut(op, blocks);
      int splits = 0;
      for (int tile = 0; tile * cut.per_tile < cut.total; ++tile) {
        splits = std::max(splits, cut.Splits(tile));
      }
      // Bytes through one multiprocessor at 32 rows: its weights, its activations, which come
      // meanwhile, and the sums of a tile that it writes and reads, which do not; and what each
      // further split costs the reader.
      const double steps = static_cast<double>((cut.total + cut.runs - 1) / cut.runs) * op.quantum;
      const double cost = steps * units * cuda::kUnitBytes<T> + 32.0 * steps * 16 * sizeof(T) +
                          4.0 * 32 * units * kUnitRows * 4 + 2048.0 * splits;
      if (splits <= cuda::kMostSplits && (best.blocks == 0 || cost < best_cost)) {
        best = op;
        best_cost = cost;
        best.split_stride = best.blocks * 16;
        best.ld = splits * best.split_stride;
      }
      if (whole) break;
    }
  }
  return best;
}

template <typename T>
bool CudaDecoder<T>::StripsFit(const cuda::MatmulOp& op, const cuda::ScanOp& scan) const {
  const cuda::ScanLayout<T> layout(kBucketRows[0], scan.padded_d_state, scan.sent_columns,
                                   scan.tile_groups * cuda::kGroup);
  return op.strip_groups > 0 && cuda::StripPieceBytes(op) <= rings_[0].slot_bytes / cuda::kPieces &&
         cuda::StripActBytes(op.k_steps) <= layout.decay &&
         layout.end + cuda::StripSumBytes(op.strip_groups) <= WorkBytes(0);
}

template <typename T>
cuda::MatmulOp CudaDecoder<T>::PlanOut(size_t layer, const cuda::ScanOp& scan,
                                       const Columns& columns) const {
  const int hidden = spec_.info.hidden_size;
  if (has_clusters_ && columns.groups == 1 && ScanFollows(layer)) {
    const cuda::MatmulOp op = cuda::PlanStrips(hidden, columns.k_steps(), cuda_.multiprocessors(),
                                               rings_[0].slot_bytes / cuda::kPieces);
    if (StripsFit(op, scan)) return op;
  }
  return Plan(hidden, columns);
}

template <typename T>
bool CudaDecoder<T>::ScanFollows(size_t i) const {
  const auto is_scan = [&](size_t k) {
    return k < spec_.blocks.size() && std::holds_alternative<SsdSpec>(spec_.blocks[k].mixer);
  };
  return is_scan(i) && is_scan(i + 1) && !spec_.blocks[i].mlp;
}

template <typename T>
int CudaDecoder<T>::StripLayers() const {
  return static_cast<int>(std::count_if(layers_.begin(), layers_.end(), [](const Layer& layer) {
    return layer.out.op.strips != nullptr;
  }));
}

// Makes the tensor maps of layers whose out_proj is cut for strips.
template <typename T>
absl::Status CudaDecoder<T>::PrepareStrips() {
  std::vector<size_t> with;
  for (size_t i = 0; i + 1 < layers_.size(); ++i) {
    // What the next layer's scan reads comes to shared memory meanwhile.
    if (ScanFollows(i) && StripsFit(layers_[i].out.op, layers_[i].scan) &&
        StripsFit(layers_[i].out.op, layers_[i + 1].scan)) {
      with.push_back(i);
    }
  }
  if (with.empty()) return absl::OkStatus();
  // The driver's function, without linking to it.
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  RETURN_IF_CUDA_ERROR(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                        cudaEnableDefault, &found),
                       "looking for cuTensorMapEncodeTiled");
#else
  RETURN_IF_CUDA_ERROR(
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found),
      "looking for cuTensorMapEncodeTiled");
#endif
  if (found != cudaDriverEntryPointSuccess || function == nullptr) return absl::OkStatus();
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  std::vector<CUtensorMap> maps(with.size());
  ASSIGN_OR_RETURN(strip_maps_, cuda_.Allocate(maps.size() * sizeof(CUtensorMap)));
  for (size_t i = 0; i < with.size(); ++i) {
    cuda::MatmulOp& op = layers_[with[i]].out.op;
    // Elements of 8 bytes: blocks of a k-step by the k-steps of all tiles.
    const cuuint64_t sizes[] = {cuuint64_t(op.tile_blocks) * cuda::kBlockBytes<T> / 8,
                                cuuint64_t(op.blocks / op.tile_blocks) * op.k_steps};
    const cuuint64_t strides[] = {sizes[0] * 8};
    const cuuint32_t box[] = {cuuint32_t(op.strip_groups) * cuda::kBlockBytes<T> / 16,
                              cuuint32_t(op.strip_steps)};
    const cuuint32_t element_strides[] = {1, 1};
    const CUresult result = encode(
        &maps[i], CU_TENSOR_MAP_DATA_TYPE_FLOAT64, 2, const_cast<void*>(op.weights), sizes, strides,
        box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
      return absl::InternalError(absl::StrCat("layer ", with[i], ": out_proj of ", op.columns,
                                              " x ", op.k_steps * 16,
                                              " as a tensor map: CUDA driver error ", result));
    }
    op.strips = strip_maps_.as<CUtensorMap>() + i;
  }
  has_strips_ = true;
  return cuda_.ToDevice(strip_maps_.data(), maps.data(), maps.size() * sizeof(CUtensorMap));
}

template <typename T>
cuda::MatmulOp CudaDecoder<T>::PlanOwn(int early, int tiles, int tile_blocks,
                                       const Columns& columns) const {
  const int blocks = cuda_.multiprocessors();
  cuda::MatmulOp op;
  op.k_steps = op.quantum = columns.k_steps();
  op.tile_blocks = tile_blocks;
  op.blocks = tiles * tile_blocks;
  op.early_tiles = (early + 15) / 16;
  op.early_runs = cuda::EarlyRuns(op.early_tiles, op.k_steps, blocks);
  op.early_columns = early;
  op.split_stride = op.early_tiles * 16;
  const cuda::MatmulCut cut(op, blocks);
  int splits = 0;
  for (int tile = 0; tile < op.early_tiles; ++tile) {
    splits = std::max(splits, cut.EarlySplits(tile));
  }
  // Where sums of the tiles go that the operator does not keep: when the product is timed alone.
  op.late_column = splits * op.split_stride;
  op.columns = op.ld = op.late_column + op.blocks * 16;
  return op;
}

template <typename T>
absl::StatusOr<DeviceMatrix> CudaDecoder<T>::Upload(const PackedMatrix& matrix,
                                                    const Columns& columns, cuda::MatmulOp op,
                                                    const std::vector<int>& outputs) {
  DeviceMatrix result;
  op.group_steps = columns.padded_width() / 16;
  op.norm.groups = columns.groups;  // which parts end with
  const int blocks = cuda_.multiprocessors();
  const cuda::MatmulCut cut(op, blocks);
  std::vector<uint8_t> counts;
  if (op.early_tiles > 0) {
    for (int tile = 0; tile < op.early_tiles; ++tile) {
      counts.push_back(static_cast<uint8_t>(cut.EarlySplits(tile)));
    }
  } else {
    for (int tile = 0; tile * cut.per_tile < cut.total; ++tile) {
      counts.push_back(static_cast<uint8_t>(cut.Splits(tile)));
    }
  }
  result.splits = *std::max_element(counts.begin(), counts.end());
  result.same_splits = *std::min_element(counts.begin(), counts.end()) == result.splits;
  // The kernels count quanta and the places of sums in 32 bits.
  if (int64_t{cut.total} * blocks > INT_MAX || int64_t{cut.early_total} * blocks > INT_MAX ||
      int64_t{kMaxRows} * op.ld > INT_MAX) {
    return absl::UnimplementedError(absl::StrCat("a matrix of ", matrix.out_features(), " by ",
                                                 matrix.in_features(),
                                                 " is too large for the device's products"));
  }
  std::vector<cuda::FirstActs> acts;
  for (const int rows : kBucketRows) {
    for (int block = 0; block < blocks; ++block) {
      acts.push_back(cuda::ListActs<T>(op, rows / 8, block, blocks));
    }
  }
  const size_t acts_bytes = acts.size() * sizeof(cuda::FirstActs);
  ASSIGN_OR_RETURN(result.first_acts, cuda_.Allocate(acts_bytes));
  RETURN_IF_ERROR(cuda_.ToDevice(result.first_acts.data(), acts.data(), acts_bytes));
  ASSIGN_OR_RETURN(result.counts, cuda_.Allocate(counts.size()));
  RETURN_IF_ERROR(cuda_.ToDevice(result.counts.data(), counts.data(), counts.size()));
  const int all_blocks = op.early_tiles + op.blocks;
  const int64_t elements = int64_t{all_blocks} * op.k_steps * 256;
  ASSIGN_OR_RETURN(result.weights, cuda_.Allocate(elements * sizeof(T)));
  stream_bytes_ += elements * sizeof(T);
  T* weights = result.weights.as<T>();
  op.weights = weights;
  if (matrix.data() == nullptr) {
    FillRandom<T><<<1024, 256, 0, cuda_.stream()>>>(
        weights, elements, std::sqrt(3.0f / static_cast<float>(columns.count)), seed_);
    RETURN_IF_CUDA_ERROR(cudaGetLastError(), "making random weights");
    seed_ += elements;
  } else {
    // A tile at a time, so that the copy in between stays small.
    std::vector<T> host;
    std::vector<float> row(matrix.in_features());
    for (int first = 0; first < all_blocks;) {
      const int count = first < op.early_tiles ? 1 : std::min(op.tile_blocks, all_blocks - first);
      const int64_t from = int64_t{first} * op.k_steps * 256;
      host.assign(int64_t{count} * op.k_steps * 256, T(0.0f));
      for (int m = first * 16; m < (first + count) * 16; ++m) {
        const int output = !outputs.empty() ? outputs[m] : m < matrix.out_features() ? m : -1;
        if (output < 0) continue;
        matrix.UnpackRow(output, row.data());
        for (int k = 0; k < columns.count; ++k) {
          host[cuda::PackedElement<T>(op, m, columns.Place(k)) - from] = T(row[k]);
        }
      }
      RETURN_IF_ERROR(cuda_.ToDevice(weights + from, host.data(), host.size() * sizeof(T)));
      first += count;
    }
  }
  result.op = op;
  result.shape = {matrix.out_features(), columns.count};
  if (&matrix != &spec_.head) {
    partial_floats_ = std::max(partial_floats_, static_cast<size_t>(kMaxRows) * op.ld);
  }
  return result;
}

template <typename T>
absl::StatusOr<const float*> CudaDecoder<T>::Upload(const std::vector<float>& values, int padded) {
  if (values.empty()) return static_cast<const float*>(nullptr);
  std::vector<float> all(values);
  all.resize(std::max<size_t>(padded, values.size()), 0.0f);
  ASSIGN_OR_RETURN(Buffer buffer, cuda_.Allocate(all.size() * sizeof(float)));
  RETURN_IF_ERROR(cuda_.ToDevice(buffer.data(), all.data(), all.size() * sizeof(float)));
  const float* data = buffer.as<float>();
  buffers_.push_back(std::move(buffer));
  return data;
}

template <typename T>
absl::Status CudaDecoder<T>::PrepareScan(const SsdSpec& ssd, int layer, cuda::ScanOp* scan) const {
  scan->heads = ssd.heads;
  scan->head_dim = ssd.head_dim;
  scan->groups = ssd.groups;
  scan->d_state = ssd.d_state;
  scan->padded_head = cuda::PadTo(cuda::kGroup, ssd.head_dim);
  scan->padded_d_state = cuda::PadTo(32, ssd.d_state);
  scan->taps = ssd.conv_kernel - 1;
  scan->dt_min = ssd.dt_min;
  scan->dt_max = ssd.dt_max;
  scan->norm_groups = ssd.norm_groups;
  scan->channels = cuda::PadTo(4, ssd.heads * scan->padded_head + 2 * ssd.groups * ssd.d_state);
  scan->sent_bytes = cuda::SentBytes<T>(scan->groups, scan->padded_d_state, scan->heads);
  const auto unsupported = [&](const std::string& what) {
    return absl::UnimplementedError(
        absl::StrCat("layer ", layer, ": ", what, "; use the device cpu for this model"));
  };
  if (scan->taps < 1 || scan->taps > cuda::kMaxTaps) {
    return unsupported(absl::StrCat("a convolution over ", ssd.conv_kernel,
                                    " positions; the CUDA kernels have 2 to ", cuda::kMaxTaps + 1));
  }
  if (ssd.heads % ssd.norm_groups != 0) {
    return unsupported(absl::StrCat(ssd.norm_groups, " norm groups do not divide ", ssd.heads,
                                    " heads, which the CUDA kernels need"));
  }
  // As few channels a block as that takes, in one operator or some, of at most two heads a tile.
  const int blocks = cuda_.multiprocessors(), head_groups = scan->HeadGroups();
  const int groups = ssd.heads / ssd.groups * head_groups;
  int best = INT_MAX;
  for (int tile_groups = 1; tile_groups <= std::min(cuda::kMostGroups, head_groups + 1);
       ++tile_groups) {
    const int tiles = (groups + tile_groups - 1) / tile_groups;
    const int operators = (ssd.groups * tiles + blocks - 1) / blocks;
    if (operators * (tile_groups + 1) >= best) continue;
    best = operators * (tile_groups + 1);
    scan->tile_groups = tile_groups;
    scan->tiles_of_group = tiles;
  }
  for (int of = 0; of < ssd.norm_groups; ++of) {
    const int each = ssd.heads / ssd.norm_groups * head_groups;
    scan->square_parts = std::max(scan->square_parts,
                                  scan->TileOf((of + 1) * each - 1) - scan->TileOf(of * each) + 1);
  }
  const int sent = 2 * ssd.groups * ssd.d_state + ssd.heads;
  scan->sent_columns = (sent + blocks - 1) / blocks;
  if (scan->sent_columns > cuda::kMostSentColumns) {
    return unsupported(absl::StrCat(ssd.groups, " groups of B and C with ", ssd.d_state,
                                    " states, more than ", blocks, " multiprocessors take"));
  }
  return absl::OkStatus();
}

template <typename T>
absl::StatusOr<Buffer> CudaDecoder<T>::PackScan(const SsdSpec& ssd, const cuda::ScanOp& scan,
                                                int group_columns, int first_tile) const {
  const int blocks = cuda_.multiprocessors(), channels = scan.tile_groups * cuda::kGroup;
  const cuda::ScanPacked layout(scan.sent_columns, channels);
  const int inner = ssd.inner(), states = 2 * ssd.groups * ssd.d_state;
  const auto at = [](std::span<const float> values, int64_t i) {
    return values.empty() ? 0.0f : values[i];
  };
  const auto weight = [&](int back, int channel) {
    return back > scan.taps
               ? 0.0f
               : ssd.conv_weight[int64_t{scan.taps - back} * PaddedColumns(ssd.channels()) +
                                 channel];
  };
  std::vector<char> all(size_t{1} * blocks * layout.bytes);
  for (int block = 0; block < blocks; ++block) {
    char* to = all.data() + size_t{1} * block * layout.bytes;
    float* sent = reinterpret_cast<float*>(to + layout.sent);
    for (int i = 0; i < scan.sent_columns; ++i) {
      const int column = (blocks - 1 - block) * scan.sent_columns + i;
      if (column >= states + ssd.heads) break;
      const bool is_dt = column >= states;
      for (int back = 0; !is_dt && back <= cuda::kMaxTaps; ++back) {
        sent[back * scan.sent_columns + i] = weight(back, inner + column);
      }
      sent[cuda::kSentBias * scan.sent_columns + i] =
          is_dt ? at(ssd.dt_bias, column - states) : at(ssd.conv_bias, inner + column);
      sent[cuda::kSentInBias * scan.sent_columns + i] = at(ssd.in_proj_bias, 2 * inner + column);
    }
    const int index = first_tile + block;
    if (index >= scan.Tiles()) continue;
    cuda::ScanTile& tile = *new (to) cuda::ScanTile();
    const int head_groups = scan.HeadGroups(), norm_heads = ssd.heads / ssd.norm_groups;
    tile.first_group = scan.FirstGroup(index);
    tile.groups = scan.GroupsOf(index);
    tile.state_group = index / scan.tiles_of_group;
    tile.first_head = tile.first_group / head_groups;
    tile.heads = (tile.first_group + tile.groups - 1) / head_groups - tile.first_head + 1;
    tile.first_head_groups =
        std::min(tile.groups, (tile.first_head + 1) * head_groups - tile.first_group);
    float* skip = reinterpret_cast<float*>(to + layout.skip);
    for (int h = 0; h < tile.heads; ++h) {
      skip[h * 2] = at(ssd.D, tile.first_head + h);
      skip[h * 2 + 1] = ssd.A[tile.first_head + h];
    }
    float* conv = reinterpret_cast<float*>(to + layout.conv);
    for (int g = 0; g < tile.groups; ++g) {
      const int group = tile.first_group + g, head = group / head_groups;
      const int dim = (group - head * head_groups) * cuda::kGroup;
      const int norm_group = head / norm_heads;
      const int in_norm = (head - norm_group * norm_heads) * ssd.head_dim + dim;
      const int dims = std::min(cuda::kGroup, ssd.head_dim - dim),
                width = norm_heads * ssd.head_dim;
      tile.place[g] = norm_group * group_columns + in_norm;
      tile.dims[g] = static_cast<int16_t>(dims);
      tile.zeros[g] = static_cast<int16_t>(in_norm + dims == width ? group_columns - width : 0);
      tile.square[g] = static_cast<int16_t>(norm_group * scan.square_parts + index -
                                            scan.TileOf(norm_group * norm_heads * head_groups));
      for (int k = 0; k < dims; ++k) {
        const int channel = head * ssd.head_dim + dim + k;
        float* column = conv + g * cuda::kGroup + k;
        for (int back = 0; back <= cuda::kMaxTaps; ++back) {
          column[back * channels] = weight(back, channel);
        }
        column[cuda::kConvBias * channels] = at(ssd.conv_bias, channel);
        column[cuda::kNormRow * channels] = ssd.norm_weight[channel];
        column[cuda::kXBias * channels] = at(ssd.in_proj_bias, inner + channel);
        column[cuda::kZBias * channels] = at(ssd.in_proj_bias, channel);
      }
    }
  }
  ASSIGN_OR_RETURN(Buffer buffer, cuda_.Allocate(all.size()));
  RETURN_IF_ERROR(cuda_.ToDevice(buffer.data(), all.data(), all.size()));
  return buffer;
}

template <typename T>
absl::Status CudaDecoder<T>::Prepare() {
  RETURN_IF_ERROR(PrepareSpec(spec_));
  ModelInfo& info = spec_.info;
  const int hidden = info.hidden_size;
  hidden_steps_ = cuda::PadTo16(hidden) / 16;
  const int padded_hidden = hidden_steps_ * 16;
  const Columns hidden_columns{hidden, 1};
  const size_t before = cuda_.memory().bytes_in_use;
  const auto unsupported = [&](size_t layer, const std::string& what) {
    return absl::UnimplementedError(
        absl::StrCat("layer ", layer, ": ", what, "; use the device cpu for this model"));
  };
  for (const BlockSpec& block : spec_.blocks) {
    mixers_ |=
        std::holds_alternative<SsdSpec>(block.mixer) ? cuda::kSsdMixers : cuda::kAttentionMixers;
  }
  const int latency_bytes = cuda::LatencyBytes(cuda_.nominal_bandwidth(), cuda_.multiprocessors());
  for (int bucket = 0; bucket < kBuckets; ++bucket) {
    rings_[bucket] = cuda::RingFor<T>(kBucketRows[bucket] / 8, cuda_.shared_bytes(), HasSsd(),
                                      (mixers_ & cuda::kAttentionMixers) != 0, latency_bytes);
  }
  if (WorkBytes(0) < cuda::kMatmulWorkBytes) {
    return absl::FailedPreconditionError(
        absl::StrCat(cuda_.Description(), " has ", cuda_.shared_bytes(),
                     " bytes of shared memory for a block; Canopy's kernels need ",
                     cuda_.shared_bytes() - WorkBytes(0) + cuda::kMatmulWorkBytes));
  }
  RETURN_IF_CUDA_ERROR(cuda::PreparePass<T>(mixers_, cuda_.shared_bytes()),
                       "preparing the kernels");
  if (sizeof(T) == 2 && HasSsd() && cuda_.capability() >= 90) {
    int clustered = 0;
    has_clusters_ = cuda::ClusteredBlocks<T>(mixers_, cuda::kStripBlocks, cuda_.shared_bytes(),
                                             &clustered) == cudaSuccess &&
                    clustered >= cuda_.multiprocessors();
    (void)cudaGetLastError();  // a device that does not say runs none
  }
  std::vector<cuda::FoldShape> folds;
  for (size_t i = 0; i < spec_.blocks.size(); ++i) {
    BlockSpec& block = spec_.blocks[i];
    Layer layer;
    const int index = static_cast<int>(i);
    ASSIGN_OR_RETURN(layer.norm, Upload(block.norm.weight, padded_hidden));
    folds.push_back({});
    if (auto* attention = std::get_if<AttentionSpec>(&block.mixer)) {
      if (attention->head_dim > cuda::kMaxHeadDim) {
        return absl::UnimplementedError(
            absl::StrCat("layer ", index, ": heads of ", attention->head_dim,
                         " columns; the CUDA kernels have at most ", cuda::kMaxHeadDim));
      }
      const int per_kv = attention->heads / attention->kv_heads;
      const int padded = cuda::PadTo(32, attention->head_dim);
      for (int bucket = 0; bucket < kBuckets; ++bucket) {
        const auto fits = [&](int query_rows) {
          return cuda::AttentionLayout<T>(cuda::PadTo16(query_rows), padded).end <=
                 WorkBytes(bucket);
        };
        int query_rows = cuda::MostQueryRows(padded);
        while (query_rows > 8 && !fits(query_rows)) query_rows /= 2;
        layer.node_group[bucket] = fits(query_rows) ? query_rows / per_kv : 0;
        has_bucket_[bucket] &= layer.node_group[bucket] > 0;
      }
      if (LastBucket() < 0) {
        return unsupported(
            i, absl::StrCat(per_kv, " heads of ", attention->head_dim,
                            " columns to a head of keys, more than fit the ", cuda_.shared_bytes(),
                            " bytes of shared memory of ", cuda_.Description()));
      }
      const Columns out{attention->heads * attention->head_dim, 1};
      ASSIGN_OR_RETURN(DeviceMatrix qkv,
                       Upload(attention->qkv, hidden_columns,
                              Plan(attention->qkv.out_features(), hidden_columns)));
      layer.in.push_back(std::move(qkv));
      ASSIGN_OR_RETURN(layer.out, Upload(attention->out, out, Plan(hidden, out)));
      ASSIGN_OR_RETURN(layer.in_bias, Upload(attention->qkv_bias));
      ASSIGN_OR_RETURN(layer.out_bias, Upload(attention->out_bias, padded_hidden));
      ASSIGN_OR_RETURN(layer.q_norm, Upload(attention->q_norm));
      ASSIGN_OR_RETURN(layer.k_norm, Upload(attention->k_norm));
      ASSIGN_OR_RETURN(layer.inv_freq, Upload(attention->rope_inv_freq));
      mixed_steps_ = std::max(mixed_steps_, out.k_steps());
      q_columns_ = std::max(q_columns_, attention->heads * padded);
    } else {
      const SsdSpec& ssd = std::get<SsdSpec>(block.mixer);
      RETURN_IF_ERROR(PrepareScan(ssd, index, &layer.scan));
      const Columns out{ssd.inner(), ssd.norm_groups};
      cuda::ScanOp& scan = layer.scan;
      const std::vector<int> inner = PaddedParts(0, ssd.heads, ssd.head_dim, scan.padded_head);
      const int states = 2 * ssd.groups * ssd.d_state, early = states + ssd.heads;
      scan.packed_bytes =
          cuda::ScanPacked(scan.sent_columns, scan.tile_groups * cuda::kGroup).bytes;
      // Of in_proj: B, C and dt, then tiles of x and z.
      const int blocks = cuda_.multiprocessors();
      for (int first = 0; first < scan.Tiles(); first += blocks) {
        const int tiles = std::min(blocks, scan.Tiles() - first);
        const cuda::MatmulOp own =
            PlanOwn(first == 0 ? early : 0, tiles, scan.tile_groups, hidden_columns);
        std::vector<int> outputs =
            PaddedParts(2 * ssd.inner(), 1, first == 0 ? early : 0, own.early_tiles * 16);
        for (int tile = first; tile < first + tiles; ++tile) {
          for (int g = 0; g < scan.tile_groups; ++g) {
            for (const int x_or_z : {ssd.inner(), 0}) {
              for (int k = 0; k < cuda::kGroup; ++k) {
                const int channel = (scan.FirstGroup(tile) + g) * cuda::kGroup + k;
                const int z = g < scan.GroupsOf(tile) ? inner[channel] : -1;
                outputs.push_back(z < 0 ? -1 : x_or_z + z);
              }
            }
          }
        }
        ASSIGN_OR_RETURN(DeviceMatrix in, Upload(ssd.in_proj, hidden_columns, own, outputs));
        layer.in.push_back(std::move(in));
        ASSIGN_OR_RETURN(Buffer packed, PackScan(ssd, scan, out.padded_width(), first));
        layer.packed.push_back(std::move(packed));
      }
      ASSIGN_OR_RETURN(layer.out, Upload(ssd.out_proj, out, PlanOut(i, scan, out)));
      ASSIGN_OR_RETURN(layer.out_bias, Upload(ssd.out_proj_bias, padded_hidden));
      mixed_steps_ = std::max(mixed_steps_, out.k_steps());
      const int squares = scan.norm_groups * scan.square_parts;
      if (scan_squares_ > 0 &&
          (squares != scan_squares_ || scan.taps != taps_ || ssd.head_dim != scan_head_dim_ ||
           ssd.heads != scan_heads_ || ssd.groups != scan_groups_ ||
           ssd.norm_groups != scan_norm_groups_)) {
        return absl::UnimplementedError(
            absl::StrCat("layer ", index,
                         ": its SSD mixer has other sizes than those before it, "
                         "which the CUDA kernels do not have; use the device cpu"));
      }
      scan_squares_ = squares;
      taps_ = scan.taps;
      scan_head_dim_ = ssd.head_dim;
      scan_heads_ = ssd.heads;
      scan_groups_ = ssd.groups;
      scan_norm_groups_ = ssd.norm_groups;
      if (ssd.norm_groups > cuda::kMostNormGroups) {
        return unsupported(i, absl::StrCat(ssd.norm_groups, " norm groups; the CUDA kernels have ",
                                           cuda::kMostNormGroups));
      }
      sent_bytes_ = std::max(sent_bytes_, scan.sent_bytes);
      for (int bucket = 0; bucket < kBuckets; ++bucket) {
        const int needed = cuda::ScanLayout<T>(kBucketRows[bucket], scan.padded_d_state,
                                               scan.sent_columns, scan.tile_groups * cuda::kGroup)
                               .end;
        cuda::RingShape& ring = rings_[bucket];
        while (needed > WorkBytes(bucket) && ring.bytes() > cuda::Smaller(ring).bytes()) {
          ring = cuda::Smaller(ring);
        }
        has_bucket_[bucket] &= needed <= WorkBytes(bucket);
      }
      fold_shared_ = std::max<int>(
          fold_shared_, kSegment * (scan.padded_head + scan.padded_d_state) * sizeof(float));
      if (LastBucket() < 0 || fold_shared_ > cuda_.shared_bytes()) {
        return unsupported(i, absl::StrCat("a state of ", ssd.d_state, ", too large for the ",
                                           cuda_.shared_bytes(), " bytes of shared memory of ",
                                           cuda_.Description()));
      }
      folds.back() = {ssd.heads, ssd.head_dim, scan.padded_head, ssd.groups, scan.padded_d_state};
      fold_heads_ = std::max(fold_heads_, ssd.heads);
    }
    if (block.mlp) {
      MlpSpec& mlp = *block.mlp;
      const Columns middle{mlp.intermediate, 1};
      ASSIGN_OR_RETURN(layer.mlp_norm, Upload(block.mlp_norm->weight, padded_hidden));
      ASSIGN_OR_RETURN(layer.gate_up, Upload(mlp.gate_up, hidden_columns,
                                             Plan(2 * mlp.intermediate, hidden_columns)));
      ASSIGN_OR_RETURN(layer.down, Upload(mlp.down, middle, Plan(hidden, middle)));
      ASSIGN_OR_RETURN(layer.gate_up_bias, Upload(mlp.gate_up_bias));
      ASSIGN_OR_RETURN(layer.down_bias, Upload(mlp.down_bias, padded_hidden));
      mixed_steps_ = std::max(mixed_steps_, middle.k_steps());
    }
    // What is on the device now is not kept twice.
    const auto drop = [](PackedMatrix& m) {
      m = PackedMatrix::Blank(m.dtype(), m.out_features(), m.in_features());
    };
    if (auto* attention = std::get_if<AttentionSpec>(&block.mixer)) {
      drop(attention->qkv);
      drop(attention->out);
    } else {
      drop(std::get<SsdSpec>(block.mixer).in_proj);
      drop(std::get<SsdSpec>(block.mixer).out_proj);
    }
    if (block.mlp) {
      drop(block.mlp->gate_up);
      drop(block.mlp->down);
    }
    layers_.push_back(std::move(layer));
  }
  ASSIGN_OR_RETURN(final_norm_, Upload(spec_.final_norm.weight, padded_hidden));
  ASSIGN_OR_RETURN(head_, Upload(spec_.head, hidden_columns,
                                 Plan(info.vocab_size, hidden_columns, /*whole=*/true)));
  // The embedding, row by row.
  const PackedMatrix& embedding = spec_.embedding ? *spec_.embedding : spec_.head;
  const int64_t embedding_elements = int64_t{info.vocab_size} * hidden;
  ASSIGN_OR_RETURN(Buffer table, cuda_.Allocate(embedding_elements * sizeof(T)));
  if (embedding.data() == nullptr) {
    FillRandom<T><<<1024, 256, 0, cuda_.stream()>>>(table.as<T>(), embedding_elements, 1.0f, seed_);
    RETURN_IF_CUDA_ERROR(cudaGetLastError(), "making random weights");
  } else {
    std::vector<T> rows(embedding_elements);
    std::vector<float> row(hidden);
    for (int v = 0; v < info.vocab_size; ++v) {
      embedding.UnpackRow(v, row.data());
      for (int k = 0; k < hidden; ++k) rows[int64_t{v} * hidden + k] = T(row[k]);
    }
    RETURN_IF_ERROR(cuda_.ToDevice(table.data(), rows.data(), embedding_elements * sizeof(T)));
  }
  embedding_ = table.as<T>();
  buffers_.push_back(std::move(table));
  spec_.embedding.reset();
  spec_.head = PackedMatrix::Blank(dtype_, info.vocab_size, hidden);
  RETURN_IF_ERROR(PrepareStrips());
  if (HasSsd()) {
    ASSIGN_OR_RETURN(Buffer shapes, cuda_.Allocate(folds.size() * sizeof(cuda::FoldShape)));
    RETURN_IF_ERROR(cuda_.ToDevice(shapes.data(), folds.data(), shapes.bytes()));
    fold_shapes_ = shapes.as<cuda::FoldShape>();
    buffers_.push_back(std::move(shapes));
  }
  RETURN_IF_ERROR(cuda_.Synchronize());
  info.dtype = dtype_;
  info.weight_bytes = cuda_.memory().bytes_in_use - before;
  info.prefers_top = true;
  info.max_nodes = kMaxRows;
  return absl::OkStatus();
}

template <typename T>
absl::StatusOr<std::unique_ptr<DecodeState>> CudaDecoder<T>::NewState(
    const StateOptions& requested) const {
  ASSIGN_OR_RETURN(const StateOptions options, CheckStateOptions(spec_.info, requested));
  const size_t before = cuda_.memory().bytes_in_use;
  auto storage = std::make_unique<Storage<T>>(cuda_);
  StateMemory memory;
  const int count = static_cast<int>(layers_.size());
  storage->layers.resize(count);
  storage->checkpoint_bytes.resize(count);
  std::vector<cuda::CommitLayer<T>> commit(count);
  Pieces pieces;
  // Prompts are read as pending chains, so there is always room for the longest.
  const int pending = kMaxRows;
  const int rows = kRing + pending;
  int attention_floats = 0;  // of a key block
  for (int i = 0; i < count; ++i) {
    cuda::LayerStore<T>& store = storage->layers[i];
    cuda::CommitLayer<T>& committed = commit[i];
    if (const auto* attention = std::get_if<AttentionSpec>(&spec_.blocks[i].mixer)) {
      const int padded = cuda::PadTo(32, attention->head_dim);
      const size_t columns = size_t{1} * attention->kv_heads * padded;
      pieces.Add(&store.k, (options.max_positions + pending) * columns);
      pieces.Add(&store.v, (options.max_positions + pending) * columns);
      memory.kv_bytes_per_position += 2 * columns * sizeof(T);
      memory.pending_bytes_per_node += 2 * columns * sizeof(T);
      committed.kv_columns = static_cast<int>(columns);
      attention_floats =
          std::max(attention_floats, kMaxRows * attention->heads * cuda::BlockSums(padded));
    } else {
      const SsdSpec& ssd = std::get<SsdSpec>(spec_.blocks[i].mixer);
      const cuda::ScanOp& scan = layers_[i].scan;
      const size_t floats = size_t{1} * ssd.heads * scan.padded_head * scan.padded_d_state;
      const size_t b_columns = size_t{1} * ssd.groups * scan.padded_d_state;
      pieces.Add(&store.checkpoints[0], floats);
      pieces.Add(&store.checkpoints[1], floats);
      const int u_columns = scan.heads * scan.padded_head;
      pieces.Add(&store.u, size_t{1} * rows * u_columns);
      pieces.Add(&store.b, rows * b_columns);
      pieces.Add(&store.l, size_t{1} * rows * ssd.heads);
      pieces.Add(&store.conv, size_t{1} * (scan.taps + pending) * scan.channels);
      storage->checkpoint_bytes[i] = floats * sizeof(float);
      const size_t row =
          u_columns * sizeof(float) + b_columns * sizeof(T) + ssd.heads * sizeof(float);
      const size_t conv_row = scan.channels * sizeof(float);
      memory.checkpoint_bytes += 2 * floats * sizeof(float) + scan.taps * conv_row;
      memory.ring_bytes += row * kRing;
      memory.pending_bytes_per_node += row + conv_row;
      committed.u_columns = u_columns;
      committed.b_columns = static_cast<int>(b_columns);
      committed.heads = ssd.heads;
      committed.channels = scan.channels;
      committed.taps = scan.taps;
    }
  }
  ASSIGN_OR_RETURN(storage->memory, pieces.Place(cuda_));
  for (int i = 0; i < count; ++i) commit[i].store = storage->layers[i];
  const size_t store_bytes = count * sizeof(cuda::LayerStore<T>);
  ASSIGN_OR_RETURN(storage->tables,
                   cuda_.Allocate(store_bytes + count * sizeof(cuda::CommitLayer<T>)));
  RETURN_IF_ERROR(cuda_.ToDevice(storage->tables.data(), storage->layers.data(), store_bytes));
  char* commit_at = storage->tables.template as<char>() + store_bytes;
  RETURN_IF_ERROR(cuda_.ToDevice(commit_at, commit.data(), count * sizeof(cuda::CommitLayer<T>)));
  storage->commit = reinterpret_cast<const cuda::CommitLayer<T>*>(commit_at);
  if (attention_floats > 0) {
    const int64_t blocks = cuda::KeyBlockOf(options.max_positions + kMaxRows) + 1;
    ASSIGN_OR_RETURN(storage->attention, cuda_.Allocate(blocks * attention_floats * sizeof(float)));
    RETURN_IF_CUDA_ERROR(cudaMemsetAsync(storage->attention.data(), 0xff,
                                         storage->attention.bytes(), cuda_.stream()),
                         "clearing memory");
  }
  memory.total_bytes = cuda_.memory().bytes_in_use - before;
  return std::make_unique<DecodeState>(this, options, std::move(storage), memory);
}

template <typename T>
void CudaDecoder<T>::AddPieces(Pieces& pieces, Places& p, CudaWorkspace& ws) const {
  const size_t hidden = hidden_steps_ * 16;
  pieces.Add(&p.x, kMaxRows * hidden);
  for (int b = 0; b < kBuckets; ++b) {
    pieces.Add(&p.act_hidden[b], HiddenInput(b));
    pieces.Add(&p.acts[b], (kActPlaces - 1) * HiddenInput(b) +
                               kActPlaces * kBucketRows[b] * size_t{1} * mixed_steps_ * 16);
  }
  for (float*& partials : p.partials) pieces.Add(&partials, partial_floats_);
  pieces.Add(&p.scan_squares, size_t{1} * kMaxRows * scan_squares_);
  pieces.Add(&p.sent_squares,
             kActPlaces * std::max(size_t{1} * kMaxRows * scan_squares_,
                                   size_t{1} * kBucketRows[0] * scan_squares_ + QuadSquares()));
  pieces.Add(&p.q, size_t{1} * kMaxRows * q_columns_);
  for (char*& sent : p.scan_sent) pieces.Add(&sent, size_t{1} * kMaxRows * sent_bytes_);
  pieces.Add(&ws.logits, size_t{1} * kMaxRows * head_.op.ld);
  pieces.Add(&p.select_values, size_t{1} * kMaxRows * cuda::kSelectSlices * kMaxTop);
  pieces.Add(&p.select_tokens, size_t{1} * kMaxRows * cuda::kSelectSlices * kMaxTop);
}

// The operators of a pass, for one bucket.
template <typename T>
std::vector<cuda::Op> CudaDecoder<T>::Program(int bucket, const CudaWorkspace& ws, const Places& at,
                                              std::vector<std::string>* names) const {
  const int hidden = spec_.info.hidden_size;
  std::vector<cuda::Op> ops;
  std::vector<ProductShape> shapes;  // of the operators that are products
  // Whether products wait for each activation, and not for a barrier before them.
  const bool sends_acts = cuda::SendsActs(kBucketRows[bucket]);
  // What was sent is used up when the operator after its reader runs, which makes it ready again.
  struct UsedUp {
    size_t op;
    void* data;
    size_t bytes;
  };
  std::vector<UsedUp> used_up;
  const int rows = kBucketRows[bucket];
  const size_t hidden_elements = HiddenInput(bucket);
  const size_t mixed_elements = size_t{1} * rows * mixed_steps_ * 16;
  const size_t squares = size_t{1} * rows * scan_squares_;
  const size_t quads = bucket == 0 ? QuadSquares() : 0;
  float* const sent_quads = at.sent_squares + kActPlaces * squares;
  T* hidden_acts[kActPlaces] = {at.act_hidden[bucket]};
  T* mixed_acts[kActPlaces];
  T* act = at.acts[bucket];
  for (int i = 1; i < kActPlaces; ++i, act += hidden_elements) hidden_acts[i] = act;
  for (int i = 0; i < kActPlaces; ++i, act += mixed_elements) mixed_acts[i] = act;
  const size_t other_elements = act - at.acts[bucket];
  int sums_place = 0, hidden_place = 0, mixed_place = 0, squares_place = 0, other_sent = 0;
  int scans = 0, strips = 0;
  // The product of the next operator; `last` of those that read their input.
  const auto product = [&](const DeviceMatrix& matrix, T* act, float* out,
                           const cuda::RowNorm& norm, bool last = true) {
    cuda::MatmulOp op = matrix.op;
    if (bucket != 0) op.strips = nullptr;
    op.act = act;
    op.out = out;
    op.norm = norm;
    if (sends_acts && last) {
      used_up.push_back({ops.size() + 2, act, size_t{1} * rows * op.k_steps * 16 * sizeof(T)});
    }
    op.first_acts = matrix.first_acts.as<cuda::FirstActs>() + bucket * cuda_.multiprocessors();
    shapes.resize(ops.size());
    shapes.push_back(matrix.shape);
    return op;
  };
  const auto matmul = [&](const DeviceMatrix& matrix, T* act, float* out,
                          const cuda::RowNorm& norm) {
    cuda::Op op;
    op.kind = cuda::OpKind::kMatmul;
    op.matmul = product(matrix, act, out, norm);
    op.barrier = out == ws.logits;
    ops.push_back(op);
    return matrix.Sums(out);
  };
  // What the next operator sends was made ready two operators before it or earlier.
  const auto sends = [&](const void* data) {
    for (const UsedUp& sent : used_up) CHECK(sent.data != data || sent.op + 2 <= ops.size());
  };
  const auto next_place = [&](int* place, int places) {
    return sends_acts ? *place = (*place + 1) % places : 0;
  };
  const auto squares_of = [&](T* hidden_act) {
    return reinterpret_cast<float*>(hidden_act + HiddenActs(bucket));
  };
  // Whether a strip sends it, whose sums of squares are of four columns and lie elsewhere.
  bool of_quads = false;
  const auto hidden_squares = [&] {
    return of_quads ? sent_quads + hidden_place * quads : squares_of(hidden_acts[hidden_place]);
  };
  const auto next_input = [&](const float* weight, bool from_strip) {
    T* const next = hidden_acts[next_place(&hidden_place, kActPlaces)];
    of_quads = from_strip;
    sends(next);
    sends(hidden_squares());
    return cuda::NormInput{weight, next, hidden_squares()};
  };
  // The norm of the input at hand, whose factors operator `reader` needs.
  const auto hidden_norm = [&](float eps, size_t reader) {
    float* const squares = hidden_squares();
    const int count = cuda::Granules(hidden_steps_);
    if (sends_acts) {
      const size_t floats = of_quads ? quads : size_t{1} * rows * cuda::PadTo(4, count);
      used_up.push_back({reader + 2, squares, floats * sizeof(float)});
    }
    return cuda::RowNorm{squares, count, 1, of_quads, 1.0f / static_cast<float>(hidden), eps};
  };
  {
    cuda::Op op;
    op.kind = cuda::OpKind::kEmbed;
    op.embed = {embedding_,
                at.x,
                hidden,
                hidden_steps_,
                {layers_[0].norm, hidden_acts[0], squares_of(hidden_acts[0])}};
    // Whatever the last pass left: its last operators, or all after the layers, may not have run.
    // Embed's own outputs may still hold that pass's values, which its barrier keeps from readers.
    if (sends_acts) used_up.push_back({0, at.acts[bucket], other_elements * sizeof(T)});
    ops.push_back(op);
  }
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    const BlockSpec& block = spec_.blocks[i];
    const float* after_block = i + 1 < layers_.size() ? layers_[i + 1].norm : final_norm_;
    const auto next_sums = [&] { return at.partials[next_place(&sums_place, 2)]; };
    // norm: of the input in one group, whose factor the residual sum applies.
    const auto residual = [&](const DeviceMatrix& matrix, T* act, const cuda::RowNorm& product_norm,
                              const cuda::RowNorm& norm, const float* bias, const float* next) {
      cuda::Op op;
      op.kind = cuda::OpKind::kResidual;
      op.barrier = !sends_acts;
      float* const sums = next_sums();
      op.sum.out = product(matrix, act, sums, product_norm);
      op.sum.number = strips;
      if (op.sum.out.strips != nullptr) {
        ops.back().strip_follows = 1;
        ++strips;
      }
      op.sum.residual = {matrix.Sums(sums),
                         norm,
                         bias,
                         at.x,
                         hidden,
                         hidden_steps_,
                         next_input(next, op.sum.out.strips != nullptr)};
      ops.push_back(op);
    };
    T* const hidden_act = hidden_acts[hidden_place];
    float* const in_sums = next_sums();
    T* const mixed = mixed_acts[next_place(&mixed_place, kActPlaces)];
    cuda::RowNorm out_norm;
    if (const auto* attention = std::get_if<AttentionSpec>(&block.mixer)) {
      const cuda::Partials in = matmul(layer.in[0], hidden_act, in_sums, {});
      cuda::Op op;
      op.layer = static_cast<int>(i);
      op.attention = {attention->heads,
                      attention->kv_heads,
                      attention->head_dim,
                      cuda::PadTo(32, attention->head_dim),
                      layer.node_group[bucket],
                      attention->scale,
                      in,
                      layer.in_bias,
                      layer.q_norm,
                      layer.k_norm,
                      attention->qk_norm_eps,
                      layer.inv_freq,
                      2 * static_cast<int>(attention->rope_inv_freq.size()),
                      at.q,
                      mixed};
      for (const cuda::OpKind kind : {cuda::OpKind::kAttentionInputs, cuda::OpKind::kAttendBlocks,
                                      cuda::OpKind::kCombineBlocks}) {
        op.kind = kind;
        op.barrier = kind == cuda::OpKind::kAttentionInputs ||
                     (kind == cuda::OpKind::kCombineBlocks && !sends_acts);
        if (kind == cuda::OpKind::kCombineBlocks) sends(mixed);
        op.norm = kind == cuda::OpKind::kAttentionInputs ? hidden_norm(block.norm.eps, ops.size())
                                                         : cuda::RowNorm{};
        ops.push_back(op);
      }
    } else {
      const SsdSpec& ssd = std::get<SsdSpec>(block.mixer);
      cuda::Op op;
      op.layer = static_cast<int>(i);
      cuda::ScanOp& scan = op.ssd.scan;
      op.kind = cuda::OpKind::kScan;
      scan = layer.scan;
      scan.partials = layer.in[0].Sums(in_sums);
      scan.act = mixed;
      const bool sends_squares = sends_acts && ssd.norm_groups == 1;
      scan.squares =
          sends_squares
              ? at.sent_squares + size_t{1} * next_place(&squares_place, kActPlaces) * squares
              : at.scan_squares;
      scan.sent = at.scan_sent[other_sent = 1 - other_sent];
      for (const void* data :
           {scan.act, static_cast<void*>(scan.squares), static_cast<void*>(scan.sent)}) {
        sends(data);
      }
      op.norm = hidden_norm(block.norm.eps, ops.size() + layer.in.size() - 1);
      op.barrier = !sends_acts || ssd.norm_groups > 1;
      for (const DeviceMatrix& in : layer.in) {
        const bool last = &in == &layer.in.back();
        op.ssd.in = product(in, hidden_act, in_sums, {}, last);
        scan.tiles = in.op.blocks / in.op.tile_blocks;
        scan.packed = layer.packed[&in - &layer.in[0]].template as<char>();
        scan.number = scans++;
        if (last) {
          used_up.push_back({ops.size() + 2, scan.sent, size_t{1} * rows * scan.sent_bytes});
        }
        ops.push_back(op);
        scan.first_tile += scan.tiles;
      }
      out_norm = {scan.squares,
                  scan_squares_ / ssd.norm_groups,
                  static_cast<int16_t>(ssd.norm_groups),
                  0,
                  static_cast<float>(ssd.norm_groups) / static_cast<float>(ssd.inner()),
                  ssd.norm_eps};
      if (sends_squares) {
        used_up.push_back({ops.size() + 2, scan.squares, squares * sizeof(float)});
      }
    }
    // Factors of several groups of columns are the product's business, one alone the reader's.
    const bool grouped = out_norm.groups > 1;
    residual(layer.out, mixed, grouped ? out_norm : cuda::RowNorm{},
             grouped ? cuda::RowNorm{} : out_norm, layer.out_bias,
             block.mlp ? layer.mlp_norm : after_block);
    if (block.mlp) {
      const cuda::Partials middle =
          matmul(layer.gate_up, hidden_acts[hidden_place], next_sums(), {});
      T* const gated = mixed_acts[next_place(&mixed_place, kActPlaces)];
      cuda::Op op;
      op.kind = cuda::OpKind::kGated;
      sends(gated);
      op.barrier = !sends_acts;
      op.norm = hidden_norm(block.mlp_norm->eps, ops.size());
      op.gated = {middle,
                  layer.gate_up_bias,
                  static_cast<int>(block.mlp->activation),
                  block.mlp->intermediate,
                  cuda::PadTo16(block.mlp->intermediate) / 16,
                  gated};
      ops.push_back(op);
      residual(layer.down, gated, {}, {}, layer.down_bias, after_block);
    }
  }
  ops.back().barrier = 1;  // the head's product reads the norm's sums at once
  matmul(head_, hidden_acts[hidden_place], ws.logits,
         hidden_norm(spec_.final_norm.eps, ops.size()));
  for (int stage : {0, 1}) {
    cuda::Op op;
    op.kind = cuda::OpKind::kSelect;
    op.select = {ws.logits, head_.op.ld,      spec_.info.vocab_size,
                 stage,     at.select_values, at.select_tokens};
    ops.push_back(op);
  }
  // As with the activations, what the last pass left: of its last scan, and squares of any.
  if (HasSsd()) {
    used_up.push_back({0, at.scan_sent[other_sent], size_t{1} * rows * sent_bytes_});
    if (sends_acts) {
      used_up.push_back({0, at.sent_squares, kActPlaces * (squares + quads) * sizeof(float)});
    }
  }
  for (const UsedUp& sent : used_up) {
    CHECK(sent.op < ops.size() && sent.bytes % 16 == 0);
    cuda::Sent* to = ops[sent.op].used_up;
    const cuda::Sent* const end = to + cuda::kMostUsedUp;
    while (to < end && to->vectors > 0) ++to;
    CHECK(to < end);
    *to = {static_cast<uint4*>(sent.data), static_cast<int32_t>(sent.bytes / 16)};
  }
  // What the kernels rely on. An operator begins when all blocks are done with the last but one: so
  // what warps prepare for the reader of a product while that runs is there and is not in use. A
  // product that reads norms stands behind a barrier. A pass ends with one, with the selection,
  // without it, and without the head.
  for (size_t i = 0; i < ops.size(); ++i) {
    const bool scan = ops[i].kind == cuda::OpKind::kScan;
    CHECK(ops[i].norm.squares == nullptr || scan || ops[i - 1].kind == cuda::OpKind::kMatmul);
    CHECK(ops[i].product() == nullptr || ops[i - 1].barrier != 0 ||
          (sends_acts && ops[i].product()->norm.squares == nullptr));
    // What is brought into shared memory for a scan.
    CHECK(!scan || ops[i - 1].kind == cuda::OpKind::kEmbed ||
          ops[i - 1].kind == cuda::OpKind::kResidual || ops[i - 1].kind == cuda::OpKind::kScan);
    CHECK(i + 4 < ops.size() || ops[i].barrier != 0);
    CHECK(ops[i].strip_follows == 0 || (scan && ops[i].barrier == 0 && ops[i + 1].barrier == 0 &&
                                        ops[i + 2].kind == cuda::OpKind::kScan));
  }
  CHECK(ops[0].barrier != 0);  // it makes ready what the next operator may send
  SetTurns(&ops, sends_acts);
  names->clear();
  shapes.resize(ops.size());
  for (size_t i = 0; i < ops.size(); ++i) {
    const bool is_product = ops[i].product() != nullptr;
    if (is_product) ops[i].product()->index = static_cast<int>(i);
    const std::string name =
        is_product ? absl::StrCat("product ", shapes[i].out, " x ", shapes[i].in) : "";
    names->push_back(!is_product                              ? cuda::Name(ops[i].kind)
                     : ops[i].kind == cuda::OpKind::kScan     ? name + " and scan"
                     : ops[i].kind == cuda::OpKind::kResidual ? name + " and residual"
                                                              : name);
  }
  return ops;
}

template <typename T>
absl::StatusOr<std::unique_ptr<Workspace>> CudaDecoder<T>::NewWorkspace(int max_rows) const {
  if (max_rows < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("a workspace of ", max_rows, " rows; at least 1"));
  }
  auto ws = std::make_unique<CudaWorkspace>();
  ws->max_rows = max_rows;
  ws->logits_ld = head_.op.ld;
  Places places;
  Pieces pieces;
  AddPieces(pieces, places, *ws);
  ASSIGN_OR_RETURN(ws->memory, pieces.Place(cuda_));
  const auto unsend = [&](void* data, size_t bytes) -> absl::Status {
    RETURN_IF_CUDA_ERROR(cudaMemsetAsync(data, 0xff, bytes, cuda_.stream()), "clearing memory");
    return absl::OkStatus();
  };
  for (float* partials : places.partials) {
    RETURN_IF_ERROR(unsend(partials, partial_floats_ * sizeof(float)));
  }
  for (char* sent : places.scan_sent) {
    RETURN_IF_ERROR(unsend(sent, size_t{1} * kMaxRows * sent_bytes_));
  }
  // Of norm groups that fewer tiles have a part of.
  RETURN_IF_CUDA_ERROR(
      cudaMemsetAsync(places.scan_squares, 0, size_t{1} * kMaxRows * scan_squares_ * sizeof(float),
                      cuda_.stream()),
      "clearing memory");
  // Once to count the operators, then with the addresses.
  const std::vector<cuda::Op> count = Program(0, *ws, places, &ws->names);
  const size_t op_count = count.size();
  ws->product_count = static_cast<int>(ProductsOf(count).size());
  Pieces tables;
  for (int b = 0; b < kBuckets; ++b) {
    tables.Add(&ws->ops[b], op_count);
    tables.Add(&ws->products[b], ws->product_count);
  }
  tables.Add(&ws->counters, 2 * cuda::kCounterStride);
  tables.Add(&ws->clocks, op_count + 1);
  ASSIGN_OR_RETURN(ws->tables, tables.Place(cuda_));
  for (int b = 0; b < kBuckets; ++b) {
    const std::vector<cuda::Op> program = Program(b, *ws, places, &ws->names);
    ws->turns[b] = TurnsAfter(program);
    RETURN_IF_ERROR(cuda_.ToDevice(ws->ops[b], program.data(), op_count * sizeof(cuda::Op)));
    const std::vector<cuda::MatmulOp> products = ProductsOf(program);
    RETURN_IF_ERROR(
        cuda_.ToDevice(ws->products[b], products.data(), products.size() * sizeof(cuda::MatmulOp)));
  }
  ws->plan.Reserve(kMaxRows);
  return ws;
}

// `chain`: `tokens` stand behind the prefix, as pending nodes 0, 1, ... that the state does not
// know of; otherwise they are its pending nodes from first_pending on.
template <typename T>
void CudaDecoder<T>::FillNodes(DecodeState& state, int rows, int first_pending, bool chain, int top,
                               std::span<const TokenId> tokens, CudaWorkspace& ws,
                               cuda::PassNodes* nodes) const {
  const int prefix = state.position();
  nodes->rows = rows;
  nodes->prefix = prefix;
  nodes->first_pending = first_pending;
  nodes->kv_capacity = state.options().max_positions;
  nodes->top = top;
  Storage<T>& storage = StorageOf(state);
  nodes->layers = storage.tables.data();
  nodes->attention = storage.attention.template as<float>();
  nodes->first_checkpoint = INT_MAX;
  nodes->last_checkpoint = 0;
  std::fill(std::begin(nodes->below), std::end(nodes->below), 0);
  int deepest = 0;
  if (!chain) {
    ws.plan.BuildTree(state, first_pending, 0);
    for (int k = 0; k < state.pending(); ++k) {
      nodes->depth[k] = static_cast<uint8_t>(state.depth(NodeId(k)));
    }
  }
  for (int i = 0; i < rows; ++i) {
    int length = i + 1;
    if (chain) {
      for (int k = 0; k <= i; ++k) nodes->path[i][k] = static_cast<uint8_t>(k);
      nodes->depth[i] = static_cast<uint8_t>(i);
    } else {
      const std::span<const int32_t> path = ws.plan.PendingPath(i);
      length = static_cast<int>(path.size());
      for (int k = 0; k < length; ++k) nodes->path[i][k] = static_cast<uint8_t>(path[k]);
    }
    for (int k = 0; k < length; ++k) nodes->below[nodes->path[i][k]] |= uint64_t{1} << i;
    const int position = prefix + length - 1;
    nodes->token[i] = tokens[i].value;
    nodes->position[i] = position;
    nodes->checkpoint[i] = static_cast<int>(CheckpointFor(position));
    nodes->first_checkpoint = std::min(nodes->first_checkpoint, nodes->checkpoint[i]);
    nodes->last_checkpoint = std::max(nodes->last_checkpoint, nodes->checkpoint[i]);
    deepest = std::max(deepest, position);
    for (int back = 1; back <= cuda::kMaxTaps; ++back) {
      int16_t tap = -1;  // also of a shorter convolution: the kernels look at all taps
      if (back <= taps_ && back < length) {
        const int node = nodes->path[i][length - 1 - back];
        tap = static_cast<int16_t>(node >= first_pending ? node - first_pending
                                                         : -2 - (taps_ + node));
      } else if (back <= taps_ && position - back >= 0) {
        tap = static_cast<int16_t>(-2 - (position - back) % taps_);
      }
      nodes->taps[i][back - 1] = tap;
    }
  }
  nodes->deepest = deepest;
  nodes->key_blocks = cuda::KeyBlockOf(deepest) + 1;
}

template <typename T>
absl::Status CudaDecoder<T>::RunPass(DecodeState& state, std::span<const TokenId> tokens,
                                     int first_pending, bool chain, bool head, int top,
                                     CudaWorkspace& ws) const {
  const int rows = static_cast<int>(tokens.size());
  const int bucket = BucketFor(rows);
  FillNodes(state, rows, first_pending, chain, top, tokens, ws, &ws.last_nodes);
  int count = static_cast<int>(ws.names.size());
  if (!head) {
    count -= 3;
  } else if (top == 0) {
    count -= 2;
  }
  ws.last_bucket = bucket;
  ws.last.ops = ws.ops[bucket];
  ws.last.op_count = count;
  ws.last.products = ws.products[bucket];
  ws.last.product_count = ws.product_count - (head ? 0 : 1);
  Storage<T>& storage = StorageOf(state);
  ws.last_commit = {storage.deferred, storage.commit, static_cast<int>(layers_.size())};
  RETURN_IF_ERROR(Launch(ws));
  storage.deferred = {};
  ws.last_commit = {};
  return absl::OkStatus();
}

template <typename T>
absl::Status CudaDecoder<T>::Launch(CudaWorkspace& ws, int64_t* clocks) const {
  ws.last.counters = ws.counters;
  ws.last.ring = rings_[ws.last_bucket];
  for (int i : {0, 1}) ws.last.counters_base[i] = ws.counters_base[i];
  ws.last.stream_weights_once = stream_bytes_ > cuda_.cache_bytes() / 2;
  ws.last.clocks = clocks;
  if (ws.reports) {
    ws.pass = cuda_.NewPass();
    ws.last.result = cuda_.result(ws.pass);
    ws.last.device_ns = cuda_.device_ns();
    ws.last.number = ws.pass;
    ws.last.vocab = spec_.info.vocab_size;
    ws.last.selections = cuda_.selections();
  }
  const int cluster = ws.last_bucket == 0 && has_strips_ ? cuda::kStripBlocks : 1;
  RETURN_IF_CUDA_ERROR(cuda::LaunchPass<T>(mixers_, kBucketRows[ws.last_bucket],
                                           cuda_.multiprocessors(), cluster, cuda_.shared_bytes(),
                                           ws.last, ws.last_nodes, ws.last_commit, cuda_.stream()),
                       "launching a pass");
  const std::array<int, 2>& turns = ws.turns[ws.last_bucket][ws.last.op_count];
  for (int i : {0, 1}) {
    ws.counters_base[i] += static_cast<uint32_t>(turns[i]) * cuda_.multiprocessors();
  }
  return absl::OkStatus();
}

template <typename T>
absl::Status CudaDecoder<T>::CheckPromises(std::span<const ForwardItem> items) const {
  int passes = 0;
  for (const ForwardItem& item : items) {
    const int count = static_cast<int>(item.tokens.size());
    for (int done = 0; done < count; ++passes) {
      done += PassRows(item, item.state->position() + done, count - done);
    }
  }
  if (items[0].promise && passes > kPromisePasses &&
      std::any_of(items.begin(), items.end(), [](const ForwardItem& item) {
        return item.commit_chain && item.logits == LogitsOf::kAll;
      })) {
    return absl::InvalidArgumentError(absl::StrCat("forward: ", passes,
                                                   " passes whose tokens are promised; at most ",
                                                   kPromisePasses, " are kept"));
  }
  for (const ForwardItem& item : items) {
    for (const TokenId token : item.tokens) {
      if (!IsPromised(token)) continue;
      const cuda::Promise promise = cuda::ToPromise(token.value);
      if (!cuda::Holds(promise, cuda_.passes()) ||
          !cuda::Holds(promise, cuda_.passes() + passes - 1)) {
        return absl::InvalidArgumentError(
            absl::StrCat("forward: a promised token of a pass that is no longer kept; at most ",
                         kPromisePasses - 1, " others may be launched in between"));
      }
    }
  }
  return absl::OkStatus();
}

template <typename T>
absl::StatusOr<ForwardResult> CudaDecoder<T>::Forward(std::span<const ForwardItem> items,
                                                      Workspace& workspace) const {
  auto& ws = static_cast<CudaWorkspace&>(workspace);
  RETURN_IF_ERROR(CheckForward(*this, items, ws.max_rows));
  RETURN_IF_ERROR(CheckPromises(items));
  ws.first_row.clear();
  int wanted = 0;
  for (const ForwardItem& item : items) {
    ws.first_row.push_back(wanted);
    wanted += item.logits == LogitsOf::kAll    ? static_cast<int>(item.tokens.size())
              : item.logits == LogitsOf::kLast ? 1
                                               : 0;
  }
  const int top = items[0].top;
  const bool promise = items[0].promise;
  const int vocab = spec_.info.vocab_size;
  const int64_t stride = PaddedColumns(vocab);
  if (top == 0 && wanted > ws.logits_rows) {
    RETURN_IF_ERROR(cuda_.Synchronize());
    if (ws.logits_host != nullptr) cudaFreeHost(ws.logits_host);
    ws.logits_host = nullptr;
    ws.logits_rows = 0;
    RETURN_IF_CUDA_ERROR(cudaMallocHost(&ws.logits_host, wanted * stride * sizeof(float)),
                         "allocating pinned memory");
    std::memset(ws.logits_host, 0, wanted * stride * sizeof(float));
    ws.logits_rows = wanted;
  }
  ws.top.resize(static_cast<size_t>(wanted) * top);
  int row = 0;           // of the result
  uint32_t awaited = 0;  // the pass that was waited for last
  // Rows [from, from + count) of the pass that was launched last become the result's next rows.
  const auto take = [&](int from, int count) -> absl::Status {
    if (top > 0) {
      if (!promise) {
        RETURN_IF_ERROR(cuda_.AwaitPass(ws.pass));
        awaited = ws.pass;
      }
      const cuda::Selected& selected = cuda_.result(ws.pass)->selected;
      for (int i = 0; i < count; ++i) {
        for (int k = 0; k < top; ++k) {
          ws.top[static_cast<size_t>(row + i) * top + k] = TokenId(
              promise ? cuda::ToToken({ws.pass, from + i, k}) : selected.token[from + i][k]);
        }
      }
    } else {
      RETURN_IF_CUDA_ERROR(cudaMemcpy2DAsync(ws.logits_host + row * stride, stride * sizeof(float),
                                             ws.logits + static_cast<int64_t>(from) * ws.logits_ld,
                                             ws.logits_ld * sizeof(float), vocab * sizeof(float),
                                             count, cudaMemcpyDeviceToHost, cuda_.stream()),
                           "copying logits from the device");
    }
    row += count;
    return absl::OkStatus();
  };
  for (const ForwardItem& item : items) {
    DecodeState& state = *item.state;
    const int count = static_cast<int>(item.tokens.size());
    const int first = state.pending();
    for (int done = 0; done < count;) {
      const int part = PassRows(item, state.position(), count - done);
      const bool last = done + part == count;
      const bool head = item.logits == LogitsOf::kAll || (item.logits == LogitsOf::kLast && last);
      for (int k = done; k < done + part && !item.commit_chain; ++k) {
        state.AddPending(item.tokens[k], item.parents.empty() ? NodeId(k - 1) : item.parents[k]);
      }
      const absl::Status status =
          RunPass(state, item.tokens.subspan(done, part), item.commit_chain ? 0 : first + done,
                  item.commit_chain, head, top, ws);
      if (!status.ok()) {
        state.DropPendingFrom(first);
        return status;
      }
      if (item.logits == LogitsOf::kAll) RETURN_IF_ERROR(take(0, part));
      if (item.logits == LogitsOf::kLast && last) RETURN_IF_ERROR(take(part - 1, 1));
      done += part;
      if (!item.commit_chain) continue;
      cuda::CommitPath path;
      path.length = part;
      path.position = state.position();
      path.kv_capacity = state.options().max_positions;
      for (int k = 0; k < part; ++k) path.node[k] = static_cast<uint8_t>(k);
      RETURN_IF_ERROR(CommitPath(state, path));
      state.Advance(part);
    }
  }
  // Also where nothing is read: the caller's clock is to see this pass, and not the next one.
  if (!promise && awaited != ws.pass) RETURN_IF_ERROR(cuda_.AwaitPass(ws.pass));
  if (top == 0 && wanted > 0) RETURN_IF_ERROR(cuda_.Synchronize());  // logits come in copies
  ForwardResult result;
  if (top == 0 && wanted > 0) result.logits = {ws.logits_host, wanted, vocab, stride};
  result.first_row = ws.first_row;
  result.top = ws.top;
  return result;
}

template <typename T>
absl::Status CudaDecoder<T>::CommitPath(DecodeState& state, const cuda::CommitPath& path) const {
  Storage<T>& storage = StorageOf(state);
  if (storage.deferred.length > 0) {
    return absl::InternalError("commit: the last pass of this state has failed; reset the state");
  }
  const int end = path.position + path.length;
  if (!HasSsd() || path.position / kSegment == end / kSegment) {
    storage.deferred = path;
    return absl::OkStatus();
  }
  const int count = static_cast<int>(layers_.size());
  RETURN_IF_CUDA_ERROR(cuda::LaunchCommit<T>(storage.commit, count, path, cuda_.stream()),
                       "committing a path");
  for (int segment = path.position / kSegment * kSegment; segment + kSegment <= end;
       segment += kSegment) {
    RETURN_IF_CUDA_ERROR(cuda::LaunchFold<T>(storage.commit, fold_shapes_, count, fold_heads_,
                                             fold_shared_, segment, cuda_.stream()),
                         "folding a segment");
  }
  return absl::OkStatus();
}

template <typename T>
absl::Status CudaDecoder<T>::CommitRows(DecodeState& state, std::span<const NodeId> path) const {
  if (path.empty()) return absl::OkStatus();
  cuda::CommitPath committed;
  committed.length = static_cast<int>(path.size());
  committed.position = state.position();
  committed.kv_capacity = state.options().max_positions;
  for (size_t i = 0; i < path.size(); ++i) committed.node[i] = static_cast<uint8_t>(path[i].value);
  return CommitPath(state, committed);
}

template <typename T>
size_t CudaDecoder<T>::PassBytes(int nodes, int context) const {
  size_t bytes = stream_bytes_ + size_t{1} * nodes * spec_.info.hidden_size * sizeof(T);
  for (size_t i = 0; i < layers_.size(); ++i) {
    if (const auto* attention = std::get_if<AttentionSpec>(&spec_.blocks[i].mixer)) {
      bytes +=
          size_t{2} * attention->kv_heads * attention->head_dim * sizeof(T) * (context + nodes);
    } else {
      const SsdSpec& ssd = std::get<SsdSpec>(spec_.blocks[i].mixer);
      const int64_t checkpoint = CheckpointFor(context);
      const size_t row = ssd.inner() * sizeof(float) + ssd.heads * sizeof(float) +
                         ssd.groups * layers_[i].scan.padded_d_state * sizeof(T);
      if (checkpoint > 0) bytes += size_t{4} * ssd.inner() * ssd.d_state;
      bytes += row * (context - checkpoint) + (row + ssd.channels() * sizeof(float)) * nodes;
    }
  }
  return bytes;
}

template <typename T>
absl::Status CudaDecoder<T>::CheckRepeatable(const CudaWorkspace& ws) {
  if (ws.last_bucket < 0) return absl::FailedPreconditionError("repeat: no pass was run");
  for (int i = 0; i < ws.last_nodes.rows; ++i) {
    if (IsPromised(TokenId(ws.last_nodes.token[i]))) {
      return absl::FailedPreconditionError("repeat: the pass read promised tokens");
    }
  }
  return absl::OkStatus();
}

template <typename T>
absl::StatusOr<std::vector<double>> CudaDecoder<T>::Repeat(Workspace& workspace,
                                                           int repetitions) const {
  auto& ws = static_cast<CudaWorkspace&>(workspace);
  RETURN_IF_ERROR(CheckRepeatable(ws));
  ASSIGN_OR_RETURN(std::vector<double> times,
                   TimeEach(cuda_, repetitions, [&](int) { return Launch(ws); }));
  if (ws.reports) cuda_.SkipDeviceTime(ws.pass);  // nobody waited for these
  return times;
}

template <typename T>
absl::StatusOr<std::vector<OperatorTime>> CudaDecoder<T>::Breakdown(Workspace& workspace) const {
  auto& ws = static_cast<CudaWorkspace&>(workspace);
  RETURN_IF_ERROR(CheckRepeatable(ws));
  RETURN_IF_ERROR(Launch(ws, ws.clocks));
  std::vector<int64_t> clocks(ws.last.op_count + 1);
  RETURN_IF_ERROR(cuda_.ToHost(clocks.data(), ws.clocks, clocks.size() * sizeof(int64_t)));
  cuda_.SkipDeviceTime(ws.pass);
  std::vector<OperatorTime> times;
  const double whole = static_cast<double>(clocks.back() - clocks.front());
  for (int i = 0; i < ws.last.op_count; ++i) {
    times.push_back({ws.names[i], static_cast<double>(clocks[i + 1] - clocks[i]) / whole});
  }
  return times;
}

template <typename T>
std::vector<typename CudaDecoder<T>::Product> CudaDecoder<T>::AllProducts() const {
  std::vector<Product> products;
  const int hidden = spec_.info.hidden_size;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    const BlockSpec& block = spec_.blocks[i];
    if (const auto* attention = std::get_if<AttentionSpec>(&block.mixer)) {
      products.push_back({&layer.in[0], {attention->qkv.out_features(), hidden}});
      products.push_back({&layer.out, {hidden, attention->heads * attention->head_dim}});
    } else {
      const SsdSpec& ssd = std::get<SsdSpec>(block.mixer);
      for (const DeviceMatrix& in : layer.in) {
        products.push_back({&in, {ssd.in_proj.out_features(), hidden}, &in == &layer.in[0]});
      }
      products.push_back({&layer.out, {hidden, ssd.inner()}});
    }
    if (block.mlp) {
      products.push_back({&layer.gate_up, {2 * block.mlp->intermediate, hidden}});
      products.push_back({&layer.down, {hidden, block.mlp->intermediate}});
    }
  }
  products.push_back({&head_, {spec_.info.vocab_size, hidden}});
  return products;
}

template <typename T>
std::vector<ProductShape> CudaDecoder<T>::Products() const {
  std::vector<ProductShape> shapes;
  for (const Product& product : AllProducts()) {
    const bool known = std::any_of(shapes.begin(), shapes.end(), [&](const ProductShape& shape) {
      return SameShape(shape, product.shape);
    });
    if (!known) shapes.push_back(product.shape);
  }
  return shapes;
}

template <typename T>
absl::StatusOr<std::vector<double>> CudaDecoder<T>::TimeProduct(const ProductShape& shape, int rows,
                                                                int repetitions) const {
  CHECK(rows >= 1 && rows <= MaxRows());
  const int bucket = BucketFor(rows);
  Places places;
  CudaWorkspace ws;
  Pieces pieces;
  AddPieces(pieces, places, ws);
  ASSIGN_OR_RETURN(ws.memory, pieces.Place(cuda_));
  std::vector<cuda::Op> ops;
  int products = 0;
  const std::vector<Product> all = AllProducts();
  CHECK(std::any_of(all.begin(), all.end(),
                    [&](const Product& p) { return SameShape(p.shape, shape); }));
  // A few rounds, so that the launch does not count.
  while (ops.size() < 64) {
    for (const Product& p : all) {
      if (!SameShape(p.shape, shape)) continue;
      products += p.whole;
      cuda::Op op;
      op.kind = cuda::OpKind::kMatmul;
      op.matmul = p.matrix->op;
      op.matmul.strips = nullptr;
      op.matmul.act =
          shape.in == spec_.info.hidden_size ? places.act_hidden[bucket] : places.acts[bucket];
      op.matmul.out = p.matrix == &head_ ? ws.logits : places.partials[0];
      op.matmul.index = static_cast<int>(ops.size());
      op.matmul.first_acts =
          p.matrix->first_acts.template as<cuda::FirstActs>() + bucket * cuda_.multiprocessors();
      ops.push_back(op);
    }
  }
  SetTurns(&ops, /*all_tell=*/false);
  ws.turns[bucket] = TurnsAfter(ops);
  Pieces tables;
  cuda::Op* device_ops = nullptr;
  cuda::MatmulOp* device_products = nullptr;
  const std::vector<cuda::MatmulOp> described = ProductsOf(ops);
  tables.Add(&device_ops, ops.size());
  tables.Add(&device_products, described.size());
  tables.Add(&ws.counters, 2 * cuda::kCounterStride);
  ASSIGN_OR_RETURN(ws.tables, tables.Place(cuda_));
  RETURN_IF_ERROR(cuda_.ToDevice(device_ops, ops.data(), ops.size() * sizeof(cuda::Op)));
  RETURN_IF_ERROR(
      cuda_.ToDevice(device_products, described.data(), described.size() * sizeof(cuda::MatmulOp)));
  ws.last_nodes.rows = rows;
  ws.reports = false;
  ws.last_bucket = bucket;
  ws.last.ops = device_ops;
  ws.last.op_count = static_cast<int>(ops.size());
  ws.last.products = device_products;
  ws.last.product_count = static_cast<int>(described.size());
  ASSIGN_OR_RETURN(std::vector<double> times, Repeat(ws, repetitions));
  for (double& time : times) time /= products;
  return times;
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaModel>> MakeCudaDecoder(CudaBackend& cuda, DecoderSpec spec,
                                                           DType dtype) {
  const auto make = [&](auto decoder) -> absl::StatusOr<std::unique_ptr<CudaModel>> {
    RETURN_IF_ERROR(decoder->Prepare());
    return std::unique_ptr<CudaModel>(std::move(decoder));
  };
  switch (dtype) {
    case DType::kBF16:
      return make(std::make_unique<CudaDecoder<__nv_bfloat16>>(cuda, std::move(spec), dtype));
    case DType::kF32:
      return make(std::make_unique<CudaDecoder<float>>(cuda, std::move(spec), dtype));
    default:
      return absl::UnimplementedError(
          absl::StrCat("the CUDA backend computes in bf16 or f32, not ", std::string(Name(dtype))));
  }
}

}  // namespace canopy
