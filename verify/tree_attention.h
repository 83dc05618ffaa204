// Grouped-query attention of tree nodes over the prefix and their ancestors.

#ifndef CANOPY_VERIFY_TREE_ATTENTION_H_
#define CANOPY_VERIFY_TREE_ATTENTION_H_

#include <span>

#include "core/cpu_backend.h"
#include "core/decode_state.h"
#include "core/status.h"
#include "core/tensor.h"
#include "verify/tree_plan.h"

namespace canopy {

struct AttentionShape {
  int heads = 0;
  int kv_heads = 0;  // heads is a multiple of it
  int head_dim = 0;
  float scale = 0.0f;

  int padded_head_dim() const { return PaddedColumns(head_dim); }
};

// Allocates K and V of one layer.
absl::StatusOr<AttentionState> AllocateAttentionState(Backend& backend, const AttentionShape& shape,
                                                      int max_positions, int max_pending);

// out[i] = sum over j of softmax_j(scale * q_i . k_j) v_j over the prefix and the path to i.
// Keys are taken in blocks of 64 at fixed absolute positions with a running maximum and sum (arXiv
// 2205.14135); a score is one chain of fused multiply-adds over head_dim and values are added in
// path order, so a node's bits depend on its path alone.
//   qkv [pass rows, (heads + 2 * kv_heads) * head_dim] f32, q and k already rotated
//   out [pass rows, heads * head_dim]
// Keeps K and V of the new nodes in `state`. Bytes: K and V of the prefix once a tile of queries.
absl::Status TreeAttention(CpuBackend& cpu, const TreePlan& plan, const AttentionShape& shape,
                           ConstMatrix qkv, AttentionState& state, Matrix out);

// Moves K and V of a committed path behind the prefix. To be called before the state's position
// advances.
void CommitAttention(const DecodeState& sequence, std::span<const NodeId> path,
                     const AttentionShape& shape, AttentionState& state);

}  // namespace canopy

#endif  // CANOPY_VERIFY_TREE_ATTENTION_H_
