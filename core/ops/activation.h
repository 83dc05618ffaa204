// Element-wise activations.

#ifndef CANOPY_CORE_OPS_ACTIVATION_H_
#define CANOPY_CORE_OPS_ACTIVATION_H_

#include <string_view>

#include "core/cpu_backend.h"
#include "core/status.h"
#include "core/tensor.h"

namespace canopy {

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu, kRelu2 };

// "silu" and "swish", "gelu", "gelu_new" and "gelu_pytorch_tanh", "relu", "relu2", as config.json's
// hidden_act spells them. Unimplemented names the spelling and lists those that are known.
absl::StatusOr<Activation> ParseActivation(std::string_view name);

// y[r, c] = act(gate_up[r, c]) * gate_up[r, columns(y) + c]: the gated MLP's middle.
// gate_up [rows, 2 * n], y [rows, n]; any n.
absl::Status GatedActivation(CpuBackend& cpu, Activation act, ConstMatrix gate_up, Matrix y);

}  // namespace canopy

#endif  // CANOPY_CORE_OPS_ACTIVATION_H_
