// What a model's weights and states cost, computed from its sizes alone, and the comparison with
// what the allocator gave. `canopy inspect` prints the one and fails on the other.
//
// Kept of a pending node, in f32 (docs/architecture.md, "State"):
//   attention   its K and V rows                      2 * kv_heads * head_dim
//   SSD         u = dt * x, B, log decay              heads * head_dim + groups * d_state + heads
//               its input of the convolution          heads * head_dim + 2 * groups * d_state
// Rows in memory are padded: each vector of head_dim or d_state, and each row, to 64 bytes.

#ifndef CANOPY_MODELS_MEMORY_PLAN_H_
#define CANOPY_MODELS_MEMORY_PLAN_H_

#include <cstddef>
#include <string>
#include <vector>

#include "core/cpu_backend.h"
#include "core/language_model.h"
#include "core/status.h"
#include "models/decoder.h"

namespace canopy {

// Bytes. Of one layer, or of all.
struct StatePlan {
  size_t checkpoint = 0;         // two of S, and the convolution's last kernel - 1 inputs
  size_t ring = 0;               // rows of committed positions that are not folded yet
  size_t per_position = 0;       // K and V of a position of the prefix
  size_t per_node = 0;           // a pending node
  size_t per_node_unpadded = 0;  // the numbers above alone, without padding

  StatePlan& operator+=(const StatePlan& other);
  // A state's size; the prefix is allocated in blocks of kKeyBlock positions.
  size_t Total(const StateOptions& options) const;
};

struct MemoryPlan {
  std::vector<StatePlan> layers;
  StatePlan total;
  size_t matrices = 0;  // weights on the backend, panel padding included
};

MemoryPlan PlanMemory(const DecoderSpec& spec);

// Allocates states of several sizes and compares what the backend gave, and what
// DecodeState::memory() says, with the plan. Internal, with both numbers, where they differ.
// Nothing else may allocate meanwhile.
absl::Status CheckMemory(CpuBackend& backend, const LanguageModel& model, const MemoryPlan& plan);

}  // namespace canopy

#endif  // CANOPY_MODELS_MEMORY_PLAN_H_
