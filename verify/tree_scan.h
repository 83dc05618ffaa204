// The tree scan of Mamba-2: every node of a tree through accumulated state transitions.
//
// After STree (arXiv 2505.14969, eq. 6 to 9), with checkpoints at aligned positions:
//   l_i = l_parent(i) + dt_i * A            within an aligned segment of kSegment positions
//   y_i = exp(l_i') S C_i + sum over j on the path of exp(l_i' - l_j') (C_i . B_j) u_j + D x_i
// where u = dt * x, the path begins at the node's checkpoint, and l' runs on across the segment
// boundary: l' of the second segment is the first segment's last l plus the segment's own. A sum
// runs in path order, one chain of fused multiply-adds an output element, state term first, so a
// node's bits depend on its path alone.

#ifndef CANOPY_VERIFY_TREE_SCAN_H_
#define CANOPY_VERIFY_TREE_SCAN_H_

#include <span>

#include "core/cpu_backend.h"
#include "core/decode_state.h"
#include "core/status.h"
#include "core/tensor.h"
#include "verify/tree_plan.h"

namespace canopy {

struct SsdShape {
  int heads = 0;
  int head_dim = 0;
  int groups = 0;  // of B and C; heads is a multiple of it
  int d_state = 0;

  int inner() const { return heads * head_dim; }
  int channels() const { return inner() + 2 * groups * d_state; }
  int padded_head_dim() const { return PaddedColumns(head_dim); }
  int padded_d_state() const { return PaddedColumns(d_state); }
};

// [heads] each, readable up to PaddedColumns(heads).
struct SsdParams {
  const float* a = nullptr;  // A < 0
  const float* d = nullptr;  // D
  const float* dt_bias = nullptr;
  float dt_min = 0.0f;  // dt is clamped to [dt_min, dt_max] after softplus
  float dt_max = 0.0f;
};

// Scratch of a pass of at most `rows` new nodes; shared by all layers of the largest shape.
struct ScanScratch {
  Tensor dt;      // [rows, heads]
  Tensor c;       // C with padded groups: [rows, groups * padded d_state]
  Tensor scores;  // C_i . B_j: [rows * groups, kRing]

  static absl::StatusOr<ScanScratch> Allocate(Backend& backend, int rows, const SsdShape& shape);
};

// Allocates the checkpoints and rows of one layer.
absl::StatusOr<RecurrentState> AllocateSsdState(Backend& backend, const SsdShape& shape,
                                                int max_pending);

//   xbc  [pass rows, channels]: x | B | C after convolution and activation
//   dt   [pass rows, heads]: before bias and softplus
//   y    [pass rows, inner]
// Keeps u, B and l of the new nodes in `state`. A chain is folded as its segments fill up.
// Bytes: the checkpoint once, the path's rows; the state is written only where a chain folds.
absl::Status TreeScan(CpuBackend& cpu, const TreePlan& plan, const SsdShape& shape,
                      const SsdParams& params, ConstMatrix xbc, ConstMatrix dt,
                      RecurrentState& state, ScanScratch& scratch, Matrix y);

// Moves the rows of a committed path into the ring and, where the prefix then reaches the end of a
// segment, folds it. To be called before the state's position advances.
absl::Status CommitSsd(CpuBackend& cpu, const DecodeState& sequence, std::span<const NodeId> path,
                       const SsdShape& shape, RecurrentState& state);

}  // namespace canopy

#endif  // CANOPY_VERIFY_TREE_SCAN_H_
