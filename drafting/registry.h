// Drafters by name.
//
//   ASSIGN_OR_RETURN(auto drafter, MakeDrafter("model", {.model = draft.get(), .shape =
//   "topk:4,2,1"}));
//
// docs/add-a-drafter.md shows how to add one.

#ifndef CANOPY_DRAFTING_REGISTRY_H_
#define CANOPY_DRAFTING_REGISTRY_H_

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/language_model.h"
#include "core/status.h"
#include "drafting/drafter.h"
#include "trees/tree_shape.h"

namespace canopy {

// How a draft model chooses the children of a node.
enum class DraftMethod {
  kTopK,                    // its most probable tokens
  kSampled,                 // drawn without replacement
  kSampledWithReplacement,  // drawn independently; a token that is drawn again adds no node
};

// "topk", "sampled", "sampled_with_replacement". InvalidArgument lists them.
absl::StatusOr<DraftMethod> ParseDraftMethod(std::string_view text);

// What drafters are made of. Each takes what it needs.
struct DrafterOptions {
  // The draft model, for drafters that have one. Must outlive the drafter.
  const LanguageModel* model = nullptr;
  // Shape of the trees, see trees/tree_shape.h; at most kMaxTreeHeight levels. A sampled tree draws
  // as many times at a node as the shape has children there.
  std::string shape = "chain:4";
  std::string method = "topk";
  // Longest and shortest suffix that an n-gram drafter looks up: 1 to 16 tokens. Three and one are
  // the values of github.com/apoorvumang/prompt-lookup-decoding.
  int ngram_max = 3;
  int ngram_min = 1;
  // Earlier matches of one suffix that an n-gram drafter looks at, the latest first.
  int ngram_matches = 32;
  // The target's vocabulary: no greater token is drafted. 0: the draft model's own.
  int vocab_size = 0;
  // The longest sequence, prompt and output together: what states have room for. 0: the draft
  // model's own limit.
  int max_positions = 0;
  // Rows of the draft model's passes, over all sequences of a batch: longer prompts and wider
  // levels are cut.
  int workspace_rows = 128;
  // Free text for drafters of your own.
  std::string extra = "";
};

using DrafterFactory = absl::StatusOr<std::unique_ptr<Drafter>> (*)(const DrafterOptions& options);

// Adds a drafter under a name. `help` is one line for `canopy list`. AlreadyExists if the name is
// taken, InvalidArgument if it is empty. Thread-safe, as all here.
absl::Status RegisterDrafter(std::string_view name, std::string_view help, DrafterFactory factory);

// NotFound lists the known names. Errors of a factory name the drafter.
absl::StatusOr<std::unique_ptr<Drafter>> MakeDrafter(std::string_view name,
                                                     const DrafterOptions& options);

// Names with a line of help each, in the order in which they were registered.
std::vector<std::pair<std::string, std::string>> ListDrafters();

// The built-in ones: "none", "model", "ngram".
absl::StatusOr<std::unique_ptr<Drafter>> MakeNoDrafter(const DrafterOptions& options);
absl::StatusOr<std::unique_ptr<Drafter>> MakeModelDrafter(const DrafterOptions& options);
absl::StatusOr<std::unique_ptr<Drafter>> MakeNgramDrafter(const DrafterOptions& options);

// For drafters: the shape, checked for its height.
absl::StatusOr<TreeShape> ParseDraftShape(std::string_view text);

}  // namespace canopy

#endif  // CANOPY_DRAFTING_REGISTRY_H_
