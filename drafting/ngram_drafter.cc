// Prompt lookup (github.com/apoorvumang/prompt-lookup-decoding): what followed the last tokens
// where they occurred before is proposed to follow them again.
//
// The longest suffix, from ngram_max down to ngram_min tokens, is looked up first, and of its
// earlier occurrences the latest first; each is followed by the rest of the text. A continuation
// runs down the tree through the nodes that earlier ones have put there, and where it departs from
// them becomes a branch, if the shape has a child left there. With a chain the first continuation
// is the draft, and later ones can only lengthen it where it reached the end of the text.

#include <algorithm>
#include <bit>

#include "drafting/registry.h"

namespace canopy {
namespace {

constexpr int kLongestNgram = 16;

// Where n-grams of one length ended, by hash: the latest end first in each bucket.
class NgramIndex {
 public:
  // Room for a text of that many tokens without another allocation.
  NgramIndex(int n, int tokens) : n_(n) {
    previous_.reserve(tokens + 1);
    latest_.assign(std::bit_ceil(static_cast<size_t>(std::max(tokens, 1024))), kNone);
    Clear();
  }

  void Clear() {
    std::ranges::fill(latest_, kNone);
    previous_.assign(n_, kNone);  // no n-gram ends before position n
  }

  // Adds the n-grams that end before tokens[end], for every end up to `last_end`.
  void Extend(std::span<const TokenId> tokens, int last_end) {
    if (static_cast<size_t>(last_end) > latest_.size()) {
      latest_.assign(std::bit_ceil(static_cast<size_t>(last_end)), kNone);
      previous_.resize(n_);
    }
    for (int end = static_cast<int>(previous_.size()); end <= last_end; ++end) {
      int32_t& latest = latest_[Bucket(tokens, end)];
      previous_.push_back(latest);
      latest = end;
    }
  }

  // Calls use(end) for the earlier ends of the n-gram that `tokens` ends with, the latest first,
  // until it returns false.
  template <typename Use>
  void ForEachMatch(std::span<const TokenId> tokens, Use&& use) const {
    const int size = static_cast<int>(tokens.size());
    if (size < n_) return;
    for (int end = latest_[Bucket(tokens, size)]; end != kNone; end = previous_[end]) {
      const auto suffix = tokens.last(n_);
      if (std::ranges::equal(suffix, tokens.subspan(end - n_, n_)) && !use(end)) return;
    }
  }

  size_t bytes() const { return (latest_.capacity() + previous_.capacity()) * sizeof(int32_t); }

 private:
  static constexpr int32_t kNone = -1;

  size_t Bucket(std::span<const TokenId> tokens, int end) const {
    uint64_t hash = 0;
    for (int i = end - n_; i < end; ++i) {
      // The 64-bit golden ratio spreads neighbouring ids over the high bits.
      hash = (hash ^ static_cast<uint32_t>(tokens[i].value)) * 0x9E3779B97F4A7C15;
      hash ^= hash >> 29;
    }
    return hash & (latest_.size() - 1);
  }

  int n_;
  std::vector<int32_t> latest_;    // by bucket; a power of two of them
  std::vector<int32_t> previous_;  // by end: the end before it in its bucket
};

class NgramState final : public DraftState {
 public:
  NgramState(int ngram_min, int ngram_max, int tokens) {
    for (int n = ngram_min; n <= ngram_max; ++n) indices.emplace_back(n, tokens);
  }
  void Reset() override {
    for (NgramIndex& index : indices) index.Clear();
    seen = 0;
  }

  std::vector<NgramIndex> indices;  // shortest n-grams first
  std::vector<NodeId> shape_of;     // by tree node
  size_t seen = 0;                  // length of the text at the last call
};

class NgramDrafter final : public Drafter {
 public:
  NgramDrafter(const DrafterOptions& options, TreeShape shape)
      : options_(options), shape_(std::move(shape)) {}

  DrafterInfo info() const override { return {.name = "ngram", .samples = false}; }

  absl::StatusOr<std::unique_ptr<DraftState>> NewState() const override {
    auto state = std::make_unique<NgramState>(options_.ngram_min, options_.ngram_max,
                                              options_.max_positions);
    state->shape_of.reserve(shape_.size());
    return state;
  }

  absl::Status Draft(std::span<const DraftContext> contexts,
                     std::span<DraftTree> out) const override {
    for (size_t i = 0; i < contexts.size(); ++i) {
      RETURN_IF_ERROR(DraftOne(contexts[i], &out[i]));
    }
    return absl::OkStatus();
  }

  size_t MemoryBytes(const DraftState& state) const override {
    size_t bytes = 0;
    for (const NgramIndex& index : static_cast<const NgramState&>(state).indices) {
      bytes += index.bytes();
    }
    return bytes;
  }

 private:
  absl::Status DraftOne(const DraftContext& context, DraftTree* out) const {
    out->Reserve(shape_.size(), shape_.max_children());
    RETURN_IF_ERROR(BeginDraft(context, out));
    auto& state = static_cast<NgramState&>(*context.state);
    if (context.tokens.size() < state.seen) {
      return absl::InvalidArgumentError(
          absl::StrCat("ngram draft: the sequence has shrunk from ", state.seen, " to ",
                       context.tokens.size(), " tokens; reset the state for a new sequence"));
    }
    state.seen = context.tokens.size();
    state.shape_of.assign(1, NodeId(0));
    // The suffix itself is not indexed: nothing follows it yet.
    const int last_end = static_cast<int>(context.tokens.size()) - 1;
    for (NgramIndex& index : state.indices) index.Extend(context.tokens, last_end);
    absl::Status status;
    for (size_t i = state.indices.size(); i-- > 0 && status.ok() && !Full(context, *out);) {
      int matches = 0;
      state.indices[i].ForEachMatch(context.tokens, [&](int end) {
        status = AddContinuation(context, context.tokens.subspan(end), state.shape_of, out);
        return status.ok() && ++matches < options_.ngram_matches && !Full(context, *out);
      });
    }
    return status;
  }

  bool Full(const DraftContext& context, const DraftTree& draft) const {
    return draft.tree.size() > context.max_nodes || draft.tree.size() == shape_.size();
  }

  absl::Status AddContinuation(const DraftContext& context, std::span<const TokenId> continuation,
                               std::vector<NodeId>& shape_of, DraftTree* out) const {
    NodeId node(0);
    for (const TokenId token : continuation) {
      if (out->tree.depth(node) == context.max_depth) break;
      if (options_.vocab_size > 0 && token.value >= options_.vocab_size) break;
      NodeId child = out->tree.FindChild(node, token);
      if (child == kPrefix) {
        const NodeId shape_node = shape_of[node.value];
        const int rank = static_cast<int>(out->proposals[node.value].draws.size());
        if (rank == shape_.children(shape_node) || Full(context, *out)) break;
        ASSIGN_OR_RETURN(child, out->AddNode(node, token));
        shape_of.push_back(shape_.child(shape_node, rank));
      }
      node = child;
    }
    return absl::OkStatus();
  }

  DrafterOptions options_;
  TreeShape shape_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Drafter>> MakeNgramDrafter(const DrafterOptions& options) {
  if (options.ngram_min < 1 || options.ngram_max > kLongestNgram ||
      options.ngram_min > options.ngram_max) {
    return absl::InvalidArgumentError(
        absl::StrCat("ngram_min is ", options.ngram_min, " and ngram_max ", options.ngram_max,
                     "; expected 1 <= ngram_min <= ngram_max <= ", kLongestNgram));
  }
  if (options.ngram_matches < 1 || options.max_positions < 0) {
    return absl::InvalidArgumentError(absl::StrCat("ngram_matches is ", options.ngram_matches,
                                                   " and max_positions ", options.max_positions,
                                                   "; expected at least 1 and at least 0"));
  }
  ASSIGN_OR_RETURN(TreeShape shape, ParseDraftShape(options.shape));
  return std::make_unique<NgramDrafter>(options, std::move(shape));
}

}  // namespace canopy
