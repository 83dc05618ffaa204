#include "core/ops/simd.h"

#include "hwy/highway.h"
#include "hwy/targets.h"

namespace canopy {

std::string SimdTargetName() {
  const int64_t targets = hwy::SupportedTargets() & HWY_TARGETS;
  return hwy::TargetName(targets == 0 ? HWY_STATIC_TARGET : (targets & -targets));
}

std::vector<int64_t> RunnableSimdTargets() { return hwy::SupportedAndGeneratedTargets(); }

void UseSimdTarget(int64_t target) {
  hwy::SetSupportedTargetsForTest(target);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

}  // namespace canopy
