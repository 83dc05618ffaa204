// The plug-in interface of drafters.

#ifndef CANOPY_DRAFTING_DRAFTER_H_
#define CANOPY_DRAFTING_DRAFTER_H_

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "core/backend.h"
#include "core/random.h"
#include "core/status.h"
#include "verify/draft_tree.h"
#include "verify/sampling.h"

namespace canopy {

// What a drafter keeps of one sequence (a draft model's DecodeState, an n-gram index). Derive from
// it.
class DraftState {
 public:
  virtual ~DraftState() = default;
  // Forgets the sequence, keeps the memory.
  virtual void Reset() = 0;
};

struct DraftContext {
  // Prompt and output so far; the last token becomes node 0 of the tree. Grows from call to call
  // with the same state; what was there before never changes until Reset.
  std::span<const TokenId> tokens;
  DraftState* state = nullptr;  // from the same drafter's NewState
  const SamplingOptions* sampling = nullptr;
  const NoiseStream* noise = nullptr;
  // The rule shares position-keyed noise: children are best chosen by argmax of
  // log draft_prob + gumbel(position, token).
  bool gumbel_coupled = false;
  // Limits of this round: drafted nodes (node 0 not counted) and levels below node 0. A drafter
  // stays within both.
  int max_nodes = 63;
  int max_depth = 31;
  // The tree may hold promised tokens of this backend's passes (LanguageModel::promises); null: it
  // may not. Such a tree goes to Drafter::Resolve once the target's pass over it is done.
  const Backend* promises = nullptr;
};

// Clears `out` and gives it node 0, the last of context.tokens: how every Draft begins.
// InvalidArgument if there are no tokens or the limits are negative.
inline absl::Status BeginDraft(const DraftContext& context, DraftTree* out) {
  if (context.tokens.empty() || context.max_nodes < 0 || context.max_depth < 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "draft: ", context.tokens.size(), " tokens, max_nodes ", context.max_nodes, ", max_depth ",
        context.max_depth, "; expected at least one token and limits of 0 or more"));
  }
  out->Clear();
  return out->AddNode(kPrefix, context.tokens.back()).status();
}

struct DrafterInfo {
  std::string_view name;
  bool samples = false;  // its proposals can carry draft probabilities
};

// Const after construction; several sequences may be drafted with one drafter, each with its own
// state.
class Drafter {
 public:
  virtual ~Drafter() = default;
  virtual DrafterInfo info() const = 0;
  virtual absl::StatusOr<std::unique_ptr<DraftState>> NewState() const = 0;
  // Draws a tree for each context into out[i], overwriting it. tokens must not be empty.
  virtual absl::Status Draft(std::span<const DraftContext> contexts,
                             std::span<DraftTree> out) const = 0;
  // Puts tokens in the place of those that Draft promised for this context, in `out` and in
  // whatever the drafter keeps; the next Draft needs it. Gives LanguageModel::DeviceSeconds as it
  // was when the last of their passes was done. For drafters that promise.
  virtual absl::StatusOr<double> Resolve(const DraftContext& context, DraftTree* out) const;
  // Bytes of everything the drafter and `state` hold, weights included.
  virtual size_t MemoryBytes(const DraftState& state) const = 0;
};

inline absl::StatusOr<double> Drafter::Resolve(const DraftContext&, DraftTree*) const {
  return absl::UnimplementedError(
      absl::StrCat("drafter '", std::string(info().name), "' does not resolve promised tokens"));
}

}  // namespace canopy

#endif  // CANOPY_DRAFTING_DRAFTER_H_
