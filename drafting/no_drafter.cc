// Plain decoding as a drafter: node 0 and nothing below it.

#include "drafting/registry.h"

namespace canopy {
namespace {

class NoState final : public DraftState {
 public:
  void Reset() override {}
};

class NoDrafter final : public Drafter {
 public:
  DrafterInfo info() const override { return {.name = "none", .samples = false}; }

  absl::StatusOr<std::unique_ptr<DraftState>> NewState() const override {
    return std::make_unique<NoState>();
  }

  absl::Status Draft(std::span<const DraftContext> contexts,
                     std::span<DraftTree> out) const override {
    for (size_t i = 0; i < contexts.size(); ++i) {
      RETURN_IF_ERROR(BeginDraft(contexts[i], &out[i]));
    }
    return absl::OkStatus();
  }

  size_t MemoryBytes(const DraftState&) const override { return 0; }
};

}  // namespace

absl::StatusOr<std::unique_ptr<Drafter>> MakeNoDrafter(const DrafterOptions&) {
  return std::make_unique<NoDrafter>();
}

}  // namespace canopy
