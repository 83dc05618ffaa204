// What a model keeps of one sequence: the committed prefix and the pending nodes.
//
//   state.position()                      tokens in the prefix
//   model.Forward({{&state, tokens, parents}}, workspace)      adds pending nodes
//   state.Commit(path)                    the path's nodes become the prefix, the others are gone
//   state.DropPending()                   nothing of the tree remains
//
// Storage (docs/architecture.md, "State"). W = kSegment. Position p of the prefix and pending node
// k have a row each in a mixer's row store: ring row p % (2 W), and row 2 W + k. A recurrent mixer
// has two checkpoints; the one before position c (a multiple of W) is checkpoints[(c / W) % 2], and
// the node at position t reads c(t) = W * max(0, floor((t - W) / W)). The newest checkpoint stands
// at W * floor(position / W).

#ifndef CANOPY_CORE_DECODE_STATE_H_
#define CANOPY_CORE_DECODE_STATE_H_

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/backend.h"
#include "core/status.h"
#include "core/tensor.h"
#include "trees/ids.h"

namespace canopy {

class LanguageModel;

// Folding happens at multiples of kSegment, and a pending tree has at most kMaxTreeHeight levels
// (W and L in docs/architecture.md): with both 32 a node is at most 64 positions
// away from its checkpoint and two checkpoints are enough.
inline constexpr int kSegment = 32;
inline constexpr int kMaxTreeHeight = 32;
inline constexpr int kRing = 2 * kSegment;

// The checkpoint that the node at absolute position t reads; also the first position on its path
// that it sums over.
constexpr int64_t CheckpointFor(int64_t t) {
  return t < kSegment ? 0 : (t - kSegment) / kSegment * kSegment;
}

struct StateOptions {
  int max_positions = 0;  // prefix plus tree height; 0: the model's own limit
  int max_pending = 64;   // nodes
};

// Keys of the prefix are stored in blocks of kKeyBlock positions, [kv_heads][head_dim][kKeyBlock],
// so that one vector holds a dimension of that many keys; those of pending nodes and all values are
// rows. head_dim is padded to kRowAlign in rows.
inline constexpr int kKeyBlock = 16;
struct AttentionState {
  Tensor key_blocks;    // [blocks * kv_heads * head_dim, kKeyBlock] f32
  Tensor pending_keys;  // [max_pending, kv_heads * padded head_dim] f32
  Tensor values;  // [positions + max_pending, kv_heads * padded head_dim] f32; pending node k is
                  // row positions + k
};

struct RecurrentState {
  Tensor checkpoints[2];  // [heads * d_state, head_dim] f32 each: S with head_dim innermost
  Tensor inputs;          // u: [kRing + max_pending, heads * padded head_dim] f32
  Tensor keys;            // B: [kRing + max_pending, groups * padded d_state] f32
  Tensor log_decay;       // l within the aligned segment: [kRing + max_pending, heads] f32
};

// Row (p % (kernel - 1)) holds the input at prefix position p; row kernel - 1 + k that of pending
// node k.
struct ConvState {
  Tensor rows;  // [kernel - 1 + max_pending, channels] f32
};

// A layer uses the parts that its mixer needs; the others stay empty.
struct LayerState {
  AttentionState attention;
  RecurrentState recurrent;
  ConvState conv;
};

// Where a model keeps a sequence: its layers' tensors on its device.
class StateStorage {
 public:
  virtual ~StateStorage() = default;
  // An empty prefix: what is read before it is written becomes zero. A fault of the device is
  // reported by the next pass.
  virtual void Clear() = 0;
  // `from` was made by the same model with the same options.
  virtual absl::Status CopyFrom(const StateStorage& from) = 0;
};

// Of the CPU.
class LayerStorage final : public StateStorage {
 public:
  explicit LayerStorage(std::vector<LayerState> l) : layers(std::move(l)) {}
  void Clear() override;
  absl::Status CopyFrom(const StateStorage& from) override;

  std::vector<LayerState> layers;
};

struct StateMemory {
  size_t checkpoint_bytes = 0;  // recurrent checkpoints and the convolution's tail
  size_t ring_bytes = 0;        // rows of committed positions that are not folded yet
  size_t kv_bytes_per_position = 0;
  size_t pending_bytes_per_node = 0;  // in all layers, KV row included
  size_t total_bytes = 0;             // what the allocator gave
};

// One sequence. Not thread-safe; copying is deleted, Fork() copies. The model must outlive it.
class DecodeState {
 public:
  // Used by LanguageModel::NewState.
  DecodeState(const LanguageModel* model, const StateOptions& options,
              std::unique_ptr<StateStorage> storage, StateMemory memory);
  DecodeState(const DecodeState&) = delete;
  DecodeState& operator=(const DecodeState&) = delete;

  const LanguageModel& model() const { return *model_; }
  const StateOptions& options() const { return options_; }
  const StateMemory& memory() const { return memory_; }

  int position() const { return position_; }                        // length of the prefix
  int pending() const { return static_cast<int>(tokens_.size()); }  // number of pending nodes
  TokenId token(NodeId node) const { return tokens_[node.value]; }  // as given, or resolved
  NodeId parent(NodeId node) const { return parents_[node.value]; }
  int depth(NodeId node) const { return depths_[node.value]; }  // 0 under the prefix

  // Makes `path` (pending nodes from a child of the prefix downwards, each the parent of the next)
  // the end of the prefix and drops all other pending nodes. An empty path drops them all.
  // InvalidArgument, with nothing changed, if it is not such a path.
  absl::Status Commit(std::span<const NodeId> path);
  void DropPending();
  // Drops pending nodes numbered `nodes` and above.
  void DropPendingFrom(int nodes);
  // Puts tokens in the place of the pending nodes' promised ones, see LanguageModel::Resolve.
  absl::Status ResolvePending();
  // An empty prefix and no pending nodes; memory is kept.
  void Reset();
  // A copy of everything. Costs memory().total_bytes.
  absl::StatusOr<std::unique_ptr<DecodeState>> Fork() const;

  // For models: the storage and the bookkeeping of a pass.
  StateStorage& storage() { return *storage_; }
  void AddPending(TokenId token, NodeId parent);
  void Advance(int positions) { position_ += positions; }

 private:
  const LanguageModel* model_;
  StateOptions options_;
  std::unique_ptr<StateStorage> storage_;
  StateMemory memory_;
  int position_ = 0;
  std::vector<TokenId> tokens_;
  std::vector<NodeId> parents_;
  std::vector<int32_t> depths_;
};

}  // namespace canopy

#endif  // CANOPY_CORE_DECODE_STATE_H_
