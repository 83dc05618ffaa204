#include "verify/acceptance.h"

#include <cmath>

#include "absl/strings/str_join.h"
#include "verify/recursive_rejection.h"

namespace canopy {
namespace {

absl::Status CheckInput(const DraftTree& draft, const TargetScores& scores,
                        const SamplingOptions& sampling) {
  RETURN_IF_ERROR(Validate(sampling));
  const int columns = scores.greatest.empty() ? scores.logits.columns : INT32_MAX;
  const int rows =
      scores.greatest.empty() ? scores.logits.rows : static_cast<int>(scores.greatest.size());
  RETURN_IF_ERROR(Validate(draft, columns));
  if (rows < draft.tree.size()) {
    return absl::InvalidArgumentError(absl::StrCat("acceptance: ", rows,
                                                   " rows of target scores for ", draft.tree.size(),
                                                   " nodes; expected one a node"));
  }
  return absl::OkStatus();
}

// Follows the child that carries the token `choose(node, position)`, as long as there is one.
template <typename Choose>
void FollowTokens(const TokenTree& tree, int64_t position, Choose&& choose, Acceptance* out) {
  out->path.clear();
  for (NodeId node(0); node != kPrefix; node = tree.FindChild(node, out->next)) {
    out->path.push_back(node);
    out->next = choose(node, ++position);
  }
}

class GreedyRule final : public AcceptanceRule {
 public:
  std::string_view name() const override { return "greedy"; }
  bool NeedsGreatestOnly(const SamplingOptions&) const override { return true; }
  bool lossless() const override { return true; }

  absl::Status Accept(const DraftTree& draft, const TargetScores& scores,
                      const SamplingOptions& sampling, const NoiseStream&, int64_t position,
                      AcceptanceScratch&, Acceptance* out) const override {
    RETURN_IF_ERROR(CheckInput(draft, scores, sampling));
    if (sampling.temperature != 0.0) {
      return absl::InvalidArgumentError(
          absl::StrCat("acceptance rule \"greedy\" needs temperature 0, but it is ",
                       sampling.temperature, "; use \"recursive\" or \"gumbel\" to sample"));
    }
    FollowTokens(
        draft.tree, position, [&](NodeId node, int64_t) { return scores.Greatest(node); }, out);
    return absl::OkStatus();
  }
};

class RecursiveRule final : public AcceptanceRule {
 public:
  std::string_view name() const override { return "recursive"; }
  bool NeedsGreatestOnly(const SamplingOptions&) const override { return false; }
  bool lossless() const override { return true; }

  absl::Status Accept(const DraftTree& draft, const TargetScores& scores,
                      const SamplingOptions& sampling, const NoiseStream& noise, int64_t position,
                      AcceptanceScratch& scratch, Acceptance* out) const override {
    RETURN_IF_ERROR(CheckInput(draft, scores, sampling));
    return AcceptRecursively(
        draft, scores, sampling, position,
        [&](int64_t at) {
          return NoiseDecider{noise, at};
        },
        scratch, out);
  }
};

class GumbelRule final : public AcceptanceRule {
 public:
  std::string_view name() const override { return "gumbel"; }
  bool NeedsGreatestOnly(const SamplingOptions& sampling) const override {
    return sampling.temperature == 0.0;
  }
  bool lossless() const override { return true; }

  absl::Status Accept(const DraftTree& draft, const TargetScores& scores,
                      const SamplingOptions& sampling, const NoiseStream& noise, int64_t position,
                      AcceptanceScratch& scratch, Acceptance* out) const override {
    RETURN_IF_ERROR(CheckInput(draft, scores, sampling));
    FollowTokens(
        draft.tree, position,
        [&](NodeId node, int64_t at) {
          if (sampling.temperature == 0.0) return scores.Greatest(node);
          Warp(scores.row(node), sampling, &scratch.residual);
          return GumbelArgmax(scratch.residual, noise, at);
        },
        out);
    return absl::OkStatus();
  }
};

struct RuleEntry {
  std::string_view name;
  std::string_view help;
  std::unique_ptr<AcceptanceRule> (*make)();
};

template <typename Rule>
std::unique_ptr<AcceptanceRule> Make() {
  return std::make_unique<Rule>();
}

constexpr RuleEntry kRules[] = {
    {"greedy", "follows the target's most probable token; temperature 0 only", Make<GreedyRule>},
    {"recursive", "multi-draft recursive rejection in draw order (chain rejection for one branch)",
     Make<RecursiveRule>},
    {"gumbel", "position-keyed Gumbel coupling: the text does not depend on the drafter",
     Make<GumbelRule>},
};

}  // namespace

bool TargetScores::HasNan(NodeId node) const {
  if (!greatest.empty()) return greatest[node.value].value < 0;
  bool nan = false;
  for (const float logit : row(node)) nan |= std::isnan(logit);
  return nan;
}

absl::StatusOr<std::unique_ptr<AcceptanceRule>> MakeAcceptanceRule(std::string_view name) {
  std::vector<std::string> known;
  for (const RuleEntry& rule : kRules) {
    if (rule.name == name) return rule.make();
    known.emplace_back(rule.name);
  }
  return absl::NotFoundError(absl::StrCat("no acceptance rule \"", std::string(name),
                                          "\"; known are ", absl::StrJoin(known, ", ")));
}

std::vector<std::pair<std::string_view, std::string_view>> ListAcceptanceRules() {
  std::vector<std::pair<std::string_view, std::string_view>> rules;
  for (const RuleEntry& rule : kRules) rules.emplace_back(rule.name, rule.help);
  return rules;
}

}  // namespace canopy
