#include <cstring>

#include "verify/tree_conv.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "verify/tree_conv_cpu.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h:
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace canopy {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// One node: taps[k] is the input under weight row k, or null before position 0.
void ConvSiluRow(const float* const* taps, int kernel, int channels, ConstMatrix weight,
                 const float* bias, float* out) {
  const hn::CappedTag<float, kRowAlign> d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  const auto one = hn::Set(d, 1.0f);
  for (int c = 0; c < channels; c += lanes) {
    auto sum = hn::LoadU(d, bias + c);
    for (int k = 0; k < kernel; ++k) {
      if (taps[k] != nullptr) {
        sum = hn::MulAdd(hn::LoadU(d, weight.row(k) + c), hn::LoadU(d, taps[k] + c), sum);
      }
    }
    hn::StoreU(hn::Div(sum, hn::Add(one, hn::Exp(d, hn::Neg(sum)))), d, out + c);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace canopy
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace canopy {
namespace {

HWY_EXPORT(ConvSiluRow);

constexpr int kMaxKernel = 16;

}  // namespace

absl::Status TreeConvSilu(CpuBackend& cpu, const TreePlan& plan, ConstMatrix in, ConstMatrix weight,
                          ConstMatrix bias, ConvState& state, Matrix out) {
  const int kernel = weight.rows;
  const int channels = weight.columns;
  if (kernel < 2 || kernel > kMaxKernel || in.columns != channels || out.columns != channels ||
      bias.columns != channels) {
    return absl::InvalidArgumentError(absl::StrCat("tree convolution: kernel ", kernel, " (2 to ",
                                                   kMaxKernel, "), channels ", in.columns, " in, ",
                                                   channels, " weights, ", out.columns, " out"));
  }
  const Matrix store = state.rows.view();
  const size_t bytes = sizeof(float) * channels;
  // A node is a few microseconds of work at most; a task takes several so that waking threads pays.
  constexpr int kNodesPerTask = 4;
  cpu.pool().Run((plan.rows() + kNodesPerTask - 1) / kNodesPerTask, [&](int task) {
    const int end = std::min(plan.rows(), (task + 1) * kNodesPerTask);
    for (int i = task * kNodesPerTask; i < end; ++i) {
      const float* taps[kMaxKernel];
      for (int k = 0; k < kernel; ++k) {
        const TreePlan::Tap tap = plan.ConvTap(i, kernel - 1 - k);
        switch (tap.kind) {
          case TreePlan::Tap::kNone:
            taps[k] = nullptr;
            break;
          case TreePlan::Tap::kFromPass:
            taps[k] = in.row(tap.index);
            break;
          case TreePlan::Tap::kFromPrefix:
            taps[k] = store.row(tap.index % (kernel - 1));
            break;
          case TreePlan::Tap::kFromPending:
            taps[k] = store.row(kernel - 1 + tap.index);
            break;
        }
      }
      HWY_DYNAMIC_DISPATCH(ConvSiluRow)
      (taps, kernel, channels, weight, bias.data, out.row(plan.first_row() + i));
      // Nobody reads the row of a new node in this pass.
      if (!plan.chain()) {
        std::memcpy(store.row(kernel - 1 + plan.first_pending() + i), in.row(plan.first_row() + i),
                    bytes);
      }
    }
  });
  // A chain's rows take the place of rows that its first nodes have read.
  const int first_kept = plan.chain() ? std::max(0, plan.rows() - (kernel - 1)) : plan.rows();
  for (int i = first_kept; i < plan.rows(); ++i) {
    std::memcpy(store.row(plan.position(i) % (kernel - 1)), in.row(plan.first_row() + i), bytes);
  }
  return absl::OkStatus();
}

void CommitConv(const DecodeState& state, std::span<const NodeId> path, int kernel,
                ConvState& conv) {
  const Matrix store = conv.rows.view();
  const int tail = kernel - 1;
  const int length = static_cast<int>(path.size());
  for (int i = std::max(0, length - tail); i < length; ++i) {
    std::memcpy(store.row((state.position() + i) % tail), store.row(tail + path[i].value),
                sizeof(float) * store.columns);
  }
}

}  // namespace canopy
#endif  // HWY_ONCE
