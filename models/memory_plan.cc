#include "models/memory_plan.h"

#include <algorithm>
#include <memory>
#include <variant>

namespace canopy {
namespace {

constexpr size_t kFloat = sizeof(float);
constexpr size_t kRowBytes = 64;

// Floats rounded up to whole 64-byte rows, in bytes.
size_t Padded(size_t floats) { return (floats * kFloat + kRowBytes - 1) / kRowBytes * kRowBytes; }

StatePlan PlanLayer(const AttentionSpec& spec) {
  const size_t kv_heads = spec.kv_heads;
  const size_t head_dim = spec.head_dim;
  StatePlan plan;
  // Keys are stored dimension by dimension, so that only values are padded.
  plan.per_position = kv_heads * (head_dim * kFloat + Padded(head_dim));
  plan.per_node = 2 * kv_heads * Padded(head_dim);
  plan.per_node_unpadded = 2 * kv_heads * head_dim * kFloat;
  return plan;
}

StatePlan PlanLayer(const SsdSpec& spec) {
  const size_t heads = spec.heads;
  const size_t head_dim = spec.head_dim;
  const size_t groups = spec.groups;
  const size_t d_state = spec.d_state;
  const size_t channels = heads * head_dim + 2 * groups * d_state;
  const size_t scan_row = heads * Padded(head_dim) + groups * Padded(d_state) + Padded(heads);
  StatePlan plan;
  plan.checkpoint =
      2 * heads * d_state * Padded(head_dim) + (spec.conv_kernel - 1) * Padded(channels);
  plan.ring = 2 * kSegment * scan_row;
  plan.per_node = scan_row + Padded(channels);
  plan.per_node_unpadded = (heads * head_dim + groups * d_state + heads + channels) * kFloat;
  return plan;
}

absl::Status Compare(const std::string& what, size_t allocated, size_t planned) {
  if (allocated == planned) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("memory of ", what, ": the allocator gave ", allocated,
                                          " bytes, the model's sizes ask for ", planned));
}

absl::Status CheckState(CpuBackend& backend, const LanguageModel& model, const StatePlan& plan,
                        const StateOptions& options) {
  const size_t before = backend.memory().bytes_in_use;
  ASSIGN_OR_RETURN(const std::unique_ptr<DecodeState> state, model.NewState(options));
  const size_t allocated = backend.memory().bytes_in_use - before;
  const std::string label = absl::StrCat("a state of ", options.max_positions, " positions and ",
                                         options.max_pending, " pending nodes");
  RETURN_IF_ERROR(Compare(label, allocated, plan.Total(options)));
  const StateMemory& memory = state->memory();
  RETURN_IF_ERROR(Compare(label + " (reported)", memory.total_bytes, allocated));
  RETURN_IF_ERROR(Compare("checkpoints", memory.checkpoint_bytes, plan.checkpoint));
  RETURN_IF_ERROR(Compare("committed rows that are not folded", memory.ring_bytes, plan.ring));
  RETURN_IF_ERROR(
      Compare("a position of the prefix", memory.kv_bytes_per_position, plan.per_position));
  return Compare("a pending node", memory.pending_bytes_per_node, plan.per_node);
}

}  // namespace

StatePlan& StatePlan::operator+=(const StatePlan& other) {
  checkpoint += other.checkpoint;
  ring += other.ring;
  per_position += other.per_position;
  per_node += other.per_node;
  per_node_unpadded += other.per_node_unpadded;
  return *this;
}

size_t StatePlan::Total(const StateOptions& options) const {
  const size_t blocks = (static_cast<size_t>(options.max_positions) + kKeyBlock - 1) / kKeyBlock;
  return checkpoint + ring + per_position * blocks * kKeyBlock + per_node * options.max_pending;
}

MemoryPlan PlanMemory(const DecoderSpec& spec) {
  MemoryPlan plan;
  plan.matrices = spec.head.bytes() + (spec.embedding ? spec.embedding->bytes() : 0);
  for (const BlockSpec& block : spec.blocks) {
    plan.layers.push_back(
        std::visit([](const auto& mixer) { return PlanLayer(mixer); }, block.mixer));
    plan.total += plan.layers.back();
    if (const auto* attention = std::get_if<AttentionSpec>(&block.mixer)) {
      plan.matrices += attention->qkv.bytes() + attention->out.bytes();
    } else {
      const SsdSpec& ssd = std::get<SsdSpec>(block.mixer);
      plan.matrices += ssd.in_proj.bytes() + ssd.out_proj.bytes();
    }
    if (block.mlp) plan.matrices += block.mlp->gate_up.bytes() + block.mlp->down.bytes();
  }
  return plan;
}

absl::Status CheckMemory(CpuBackend& backend, const LanguageModel& model, const MemoryPlan& plan) {
  const int most = std::min(model.info().max_positions, 1000);
  for (const StateOptions options : {StateOptions{.max_positions = most, .max_pending = 64},
                                     StateOptions{.max_positions = most, .max_pending = 65},
                                     StateOptions{.max_positions = 1, .max_pending = 1}}) {
    RETURN_IF_ERROR(CheckState(backend, model, plan.total, options));
  }
  return absl::OkStatus();
}

}  // namespace canopy
