#include "core/decode_state.h"

#include <cstring>

#include "core/language_model.h"

namespace canopy {
namespace {

void CopyTensor(const Tensor& from, Tensor& to) {
  if (from.bytes() != 0) std::memcpy(to.view().data, from.view().data, from.bytes());
}

}  // namespace

void LayerStorage::Clear() {
  // The first fold starts from the checkpoint before position 0, which is zero. Everything else is
  // written before it is read.
  for (LayerState& layer : layers) {
    const Tensor& first = layer.recurrent.checkpoints[0];
    if (first.bytes() != 0) std::memset(first.view().data, 0, first.bytes());
  }
}

absl::Status LayerStorage::CopyFrom(const StateStorage& other) {
  const auto& source = static_cast<const LayerStorage&>(other);
  CHECK(source.layers.size() == layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    const LayerState& from = source.layers[i];
    LayerState& to = layers[i];
    CopyTensor(from.attention.key_blocks, to.attention.key_blocks);
    CopyTensor(from.attention.pending_keys, to.attention.pending_keys);
    CopyTensor(from.attention.values, to.attention.values);
    for (int c : {0, 1}) CopyTensor(from.recurrent.checkpoints[c], to.recurrent.checkpoints[c]);
    CopyTensor(from.recurrent.inputs, to.recurrent.inputs);
    CopyTensor(from.recurrent.keys, to.recurrent.keys);
    CopyTensor(from.recurrent.log_decay, to.recurrent.log_decay);
    CopyTensor(from.conv.rows, to.conv.rows);
  }
  return absl::OkStatus();
}

DecodeState::DecodeState(const LanguageModel* model, const StateOptions& options,
                         std::unique_ptr<StateStorage> storage, StateMemory memory)
    : model_(model), options_(options), storage_(std::move(storage)), memory_(memory) {
  tokens_.reserve(options.max_pending);
  parents_.reserve(options.max_pending);
  depths_.reserve(options.max_pending);
}

absl::Status DecodeState::Commit(std::span<const NodeId> path) {
  NodeId above = kPrefix;
  for (NodeId node : path) {
    if (node.value < 0 || node.value >= pending()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "commit: node ", node.value, " is not one of the ", pending(), " pending nodes"));
    }
    if (parent(node) != above) {
      return absl::InvalidArgumentError(
          absl::StrCat("commit: node ", node.value, " hangs under node ", parent(node).value,
                       ", but the path has node ", above.value, " before it (-1 is the prefix)"));
    }
    above = node;
  }
  RETURN_IF_ERROR(model_->CommitRows(*this, path));
  position_ += static_cast<int>(path.size());
  DropPending();
  return absl::OkStatus();
}

void DecodeState::DropPending() { DropPendingFrom(0); }

void DecodeState::DropPendingFrom(int nodes) {
  if (nodes >= pending()) return;
  tokens_.resize(nodes);
  parents_.resize(nodes);
  depths_.resize(nodes);
}

absl::Status DecodeState::ResolvePending() { return model_->Resolve(tokens_).status(); }

void DecodeState::Reset() {
  DropPending();
  position_ = 0;
  storage_->Clear();
}

absl::StatusOr<std::unique_ptr<DecodeState>> DecodeState::Fork() const {
  ASSIGN_OR_RETURN(std::unique_ptr<DecodeState> fork, model_->NewState(options_));
  RETURN_IF_ERROR(fork->storage_->CopyFrom(*storage_));
  fork->position_ = position_;
  fork->tokens_.assign(tokens_.begin(), tokens_.end());
  fork->parents_.assign(parents_.begin(), parents_.end());
  fork->depths_.assign(depths_.begin(), depths_.end());
  return fork;
}

void DecodeState::AddPending(TokenId token, NodeId parent) {
  depths_.push_back(parent == kPrefix ? 0 : depths_[parent.value] + 1);
  tokens_.push_back(token);
  parents_.push_back(parent);
}

}  // namespace canopy
