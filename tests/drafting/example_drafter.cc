// A drafter that remembers which token followed each token last time, and drafts the chain of
// those.

#include <algorithm>
#include <unordered_map>

#include "drafting/registry.h"

namespace canopy {
namespace {

// What is kept of one sequence.
class SuccessorState final : public DraftState {
 public:
  void Reset() override {
    successor.clear();
    seen = 0;
  }

  std::unordered_map<TokenId, TokenId> successor;
  size_t seen = 0;  // tokens of the sequence that have been learnt from
};

class SuccessorDrafter final : public Drafter {
 public:
  explicit SuccessorDrafter(const DrafterOptions& options) : vocab_size_(options.vocab_size) {}

  // samples = false: the tokens are chosen, not drawn at random, so proposals carry no
  // probabilities.
  DrafterInfo info() const override { return {.name = "successor", .samples = false}; }

  absl::StatusOr<std::unique_ptr<DraftState>> NewState() const override {
    return std::make_unique<SuccessorState>();
  }

  absl::Status Draft(std::span<const DraftContext> contexts,
                     std::span<DraftTree> out) const override {
    for (size_t i = 0; i < contexts.size(); ++i) {
      RETURN_IF_ERROR(DraftOne(contexts[i], &out[i]));
    }
    return absl::OkStatus();
  }

  size_t MemoryBytes(const DraftState& state) const override {
    return static_cast<const SuccessorState&>(state).successor.size() * 2 * sizeof(TokenId);
  }

 private:
  absl::Status DraftOne(const DraftContext& context, DraftTree* out) const {
    auto& state = static_cast<SuccessorState&>(*context.state);
    // The sequence has grown since the last call: learn from what is new.
    for (size_t i = std::max<size_t>(state.seen, 1); i < context.tokens.size(); ++i) {
      state.successor[context.tokens[i - 1]] = context.tokens[i];
    }
    state.seen = context.tokens.size();

    RETURN_IF_ERROR(BeginDraft(context, out));  // clears the tree and adds node 0
    NodeId node(0);
    const int depth = std::min(context.max_nodes, context.max_depth);
    for (int i = 0; i < depth; ++i) {
      const auto next = state.successor.find(out->tree.token(node));
      if (next == state.successor.end()) break;
      if (vocab_size_ > 0 && next->second.value >= vocab_size_) break;
      ASSIGN_OR_RETURN(node, out->AddNode(node, next->second));
    }
    return absl::OkStatus();
  }

  int vocab_size_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Drafter>> MakeSuccessorDrafter(const DrafterOptions& options) {
  return std::make_unique<SuccessorDrafter>(options);
}

}  // namespace canopy
