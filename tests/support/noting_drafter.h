// A drafter around another one that notes its trees.

#ifndef CANOPY_TESTS_SUPPORT_NOTING_DRAFTER_H_
#define CANOPY_TESTS_SUPPORT_NOTING_DRAFTER_H_

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "drafting/drafter.h"

namespace canopy::testing {

class NotingDrafter final : public Drafter {
 public:
  // may_promise: whether the base may promise where the loop lets it.
  explicit NotingDrafter(const Drafter& base, bool may_promise = true)
      : base_(base), may_promise_(may_promise) {}

  // As the acceptance rule sees them.
  mutable std::vector<std::string> trees;
  mutable int resolved = 0;  // how many of them were promised at first

  DrafterInfo info() const override { return base_.info(); }
  absl::StatusOr<std::unique_ptr<DraftState>> NewState() const override { return base_.NewState(); }
  absl::Status Draft(std::span<const DraftContext> contexts,
                     std::span<DraftTree> out) const override {
    for (size_t i = 0; i < contexts.size(); ++i) {
      DraftContext context = contexts[i];
      if (!may_promise_) context.promises = nullptr;
      RETURN_IF_ERROR(base_.Draft({&context, 1}, {&out[i], 1}));
      if (!out[i].tree.promised()) trees.push_back(out[i].tree.ToString());
    }
    return absl::OkStatus();
  }
  absl::StatusOr<double> Resolve(const DraftContext& context, DraftTree* out) const override {
    ASSIGN_OR_RETURN(const double seconds, base_.Resolve(context, out));
    trees.push_back(out->tree.ToString());
    ++resolved;
    return seconds;
  }
  size_t MemoryBytes(const DraftState& state) const override { return base_.MemoryBytes(state); }

 private:
  const Drafter& base_;
  const bool may_promise_;
};

}  // namespace canopy::testing

#endif  // CANOPY_TESTS_SUPPORT_NOTING_DRAFTER_H_
