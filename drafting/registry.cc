#include "drafting/registry.h"

#include <mutex>

#include "absl/strings/str_join.h"

namespace canopy {
namespace {

struct Entry {
  std::string name;
  std::string help;
  DrafterFactory factory;
};

struct Registry {
  std::mutex mutex;
  // The drafters of this folder. A new one is a line here, or a call of RegisterDrafter from
  // outside.
  std::vector<Entry> entries = {
      {"none", "no draft: plain decoding, the baseline", MakeNoDrafter},
      {"model", "a draft model: chain, top-k tree, fixed tree or sampled tree", MakeModelDrafter},
      {"ngram", "prompt lookup: what followed earlier occurrences of the last tokens",
       MakeNgramDrafter},
  };
};

Registry& GlobalRegistry() {
  static Registry* registry = new Registry;
  return *registry;
}

constexpr std::pair<std::string_view, DraftMethod> kMethods[] = {
    {"topk", DraftMethod::kTopK},
    {"sampled", DraftMethod::kSampled},
    {"sampled_with_replacement", DraftMethod::kSampledWithReplacement},
};

}  // namespace

absl::StatusOr<DraftMethod> ParseDraftMethod(std::string_view text) {
  std::vector<std::string> known;
  for (const auto& [name, method] : kMethods) {
    if (name == text) return method;
    known.emplace_back(name);
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "draft method \"", std::string(text), "\"; expected one of ", absl::StrJoin(known, ", ")));
}

absl::StatusOr<TreeShape> ParseDraftShape(std::string_view text) {
  ASSIGN_OR_RETURN(TreeShape shape, TreeShape::Parse(text));
  if (shape.height() > kMaxTreeHeight) {
    return absl::InvalidArgumentError(
        absl::StrCat("tree shape \"", std::string(text), "\" drafts ", shape.height() - 1,
                     " levels; a tree has at most ", kMaxTreeHeight - 1, " below its root"));
  }
  return shape;
}

absl::Status RegisterDrafter(std::string_view name, std::string_view help, DrafterFactory factory) {
  if (name.empty() || factory == nullptr) {
    return absl::InvalidArgumentError("a drafter needs a name and a factory to be registered");
  }
  Registry& registry = GlobalRegistry();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  for (const Entry& entry : registry.entries) {
    if (entry.name == name) {
      return absl::AlreadyExistsError(
          absl::StrCat("drafter \"", entry.name, "\" is already registered; choose another name"));
    }
  }
  registry.entries.push_back({std::string(name), std::string(help), factory});
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Drafter>> MakeDrafter(std::string_view name,
                                                     const DrafterOptions& options) {
  DrafterFactory factory = nullptr;
  std::vector<std::string> known;
  {
    Registry& registry = GlobalRegistry();
    const std::lock_guard<std::mutex> lock(registry.mutex);
    for (const Entry& entry : registry.entries) {
      if (entry.name == name) factory = entry.factory;
      known.push_back(entry.name);
    }
  }
  if (factory == nullptr) {
    return absl::NotFoundError(absl::StrCat("no drafter \"", std::string(name), "\"; known are ",
                                            absl::StrJoin(known, ", ")));
  }
  absl::StatusOr<std::unique_ptr<Drafter>> drafter = factory(options);
  if (!drafter.ok()) {
    return Annotate(drafter.status(), absl::StrCat("drafter \"", std::string(name), "\""));
  }
  return drafter;
}

std::vector<std::pair<std::string, std::string>> ListDrafters() {
  Registry& registry = GlobalRegistry();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  std::vector<std::pair<std::string, std::string>> drafters;
  for (const Entry& entry : registry.entries) drafters.emplace_back(entry.name, entry.help);
  return drafters;
}

}  // namespace canopy
