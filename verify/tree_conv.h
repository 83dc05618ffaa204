// Causal depthwise convolution along the paths of a tree.

#ifndef CANOPY_VERIFY_TREE_CONV_H_
#define CANOPY_VERIFY_TREE_CONV_H_

#include "core/cpu_backend.h"
#include "core/decode_state.h"
#include "core/status.h"
#include "core/tensor.h"
#include "verify/tree_plan.h"

namespace canopy {

// out[i, c] = silu(bias[c] + sum over b of weight[kernel - 1 - b, c] * in[the b-th ancestor of i,
// c]), summed from the oldest input to the newest by fused multiply-adds; inputs before position 0
// are left out. Then the inputs of the new nodes are kept in `state`.
//   in   [pass rows, channels] f32, readable up to PaddedColumns(channels)
//   weight [kernel, channels], bias [1, channels] (zeros where the model has none)
//   out  [pass rows, channels] f32, written up to PaddedColumns(channels)
// Bytes a row: (kernel + 1) * channels * 4 and the weights.
absl::Status TreeConvSilu(CpuBackend& cpu, const TreePlan& plan, ConstMatrix in, ConstMatrix weight,
                          ConstMatrix bias, ConvState& state, Matrix out);

// The inputs of a committed path take their places in the tail.
void CommitConv(const DecodeState& state, std::span<const NodeId> path, int kernel,
                ConvState& conv);

}  // namespace canopy

#endif  // CANOPY_VERIFY_TREE_CONV_H_
