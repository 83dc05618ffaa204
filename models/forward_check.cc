#include "models/forward_check.h"

namespace canopy {
namespace {

absl::Status CheckItem(const LanguageModel& model, const ForwardItem& item) {
  const ModelInfo& info = model.info();
  if (item.state == nullptr || &item.state->model() != &model) {
    return absl::InvalidArgumentError("forward: the state belongs to another model");
  }
  DecodeState& state = *item.state;
  const int rows = static_cast<int>(item.tokens.size());
  if (rows == 0) return absl::InvalidArgumentError("forward: an item without tokens");
  for (int i = 0; i < rows; ++i) {
    const int32_t token = item.tokens[i].value;
    if (IsPromised(item.tokens[i])) {
      if (model.promises() != nullptr) continue;  // it knows whether the promise holds
      return absl::InvalidArgumentError(
          absl::StrCat("forward: the token of node ", i, " is promised, but ", info.architecture,
                       " at ", info.path, " takes no promised tokens"));
    }
    if (token < 0 || token >= info.vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat("forward: token ", token, " of node ", i,
                                                     " is not in the vocabulary of ",
                                                     info.vocab_size));
    }
  }
  const int limit = state.options().max_positions;
  const bool chain = item.commit_chain || item.parents.empty();
  if (chain && state.pending() > 0) {
    return absl::InvalidArgumentError(absl::StrCat("forward: a chain under the prefix, but ",
                                                   state.pending(),
                                                   " nodes are pending; commit or drop them"));
  }
  if (item.commit_chain) {
    if (state.position() + rows > limit) {
      return absl::InvalidArgumentError(absl::StrCat(
          "forward: ", state.position(), " + ", rows, " positions, but the state holds ", limit,
          "; raise max_positions or shorten the prompt"));
    }
    return absl::OkStatus();
  }
  if (!item.parents.empty() && item.parents.size() != item.tokens.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("forward: ", rows, " tokens, but ", item.parents.size(), " parents"));
  }
  if (state.pending() + rows > state.options().max_pending) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "forward: ", state.pending(), " + ", rows, " pending nodes, but the state holds ",
        state.options().max_pending, "; raise max_pending"));
  }
  // Depths are found by adding the nodes; undone below where they do not fit.
  const int before = state.pending();
  absl::Status status = absl::OkStatus();
  for (int i = 0; i < rows && status.ok(); ++i) {
    const NodeId parent = chain ? NodeId(before + i - 1) : item.parents[i];
    if (chain && i == 0) {
      state.AddPending(item.tokens[i], kPrefix);
    } else if (parent.value < -1 || parent.value >= before + i) {
      status = absl::InvalidArgumentError(absl::StrCat("forward: node ", before + i, " has parent ",
                                                       parent.value, "; expected -1 to ",
                                                       before + i - 1));
      break;
    } else {
      state.AddPending(item.tokens[i], parent);
    }
    const int depth = state.depth(NodeId(before + i));
    if (depth >= kMaxTreeHeight) {
      status = absl::InvalidArgumentError(absl::StrCat(
          "forward: node ", before + i, " is on level ", depth + 1, "; a tree has at most ",
          kMaxTreeHeight, " levels (commit a path first, or draft less deep)"));
    } else if (state.position() + depth >= limit) {
      status = absl::InvalidArgumentError(absl::StrCat("forward: node ", before + i,
                                                       " is at position ", state.position() + depth,
                                                       ", but the state holds ", limit));
    }
  }
  state.DropPendingFrom(before);
  return status;
}

}  // namespace

absl::Status CheckForward(const LanguageModel& model, std::span<const ForwardItem> items,
                          int max_rows) {
  if (items.empty()) return absl::InvalidArgumentError("forward: no items");
  for (const ForwardItem& item : items) {
    if (item.top < 0 || item.top > kMaxTop || item.top != items[0].top) {
      return absl::InvalidArgumentError(
          absl::StrCat("forward: top is ", item.top, " for an item and ", items[0].top,
                       " for the first; expected the same for all, 0 to ", kMaxTop));
    }
    if (item.promise != items[0].promise ||
        (item.promise && (item.top == 0 || model.promises() == nullptr))) {
      return absl::InvalidArgumentError(
          "forward: promise is set for some items, without top, or for a model that has no "
          "promises");
    }
    if (item.top > 0 && !model.info().prefers_top) {
      return absl::InvalidArgumentError("forward: top is set, but this model gives logits");
    }
  }
  int rows = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    RETURN_IF_ERROR(CheckItem(model, items[i]));
    for (size_t j = 0; j < i; ++j) {
      if (items[j].state == items[i].state) {
        return absl::InvalidArgumentError("forward: two items share a state");
      }
    }
    const bool cut = items[i].commit_chain && items[i].logits != LogitsOf::kAll;
    rows += cut ? 1 : static_cast<int>(items[i].tokens.size());
  }
  if (rows > max_rows) {
    return absl::InvalidArgumentError(
        absl::StrCat("forward: ", rows, " rows, but the workspace is for ", max_rows));
  }
  return absl::OkStatus();
}

absl::StatusOr<StateOptions> CheckStateOptions(const ModelInfo& info,
                                               const StateOptions& requested) {
  StateOptions options = requested;
  if (options.max_positions == 0) options.max_positions = info.max_positions;
  if (options.max_positions < 1 || options.max_pending < 1) {
    return absl::InvalidArgumentError(absl::StrCat("a state of ", options.max_positions,
                                                   " positions and ", options.max_pending,
                                                   " pending nodes; both must be at least 1"));
  }
  if (options.max_positions > info.max_positions) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a state of ", options.max_positions, " positions; ", info.architecture, " at ", info.path,
        " has at most ", info.max_positions, " (max_position_embeddings)"));
  }
  if (options.max_pending > info.max_nodes) {
    return absl::InvalidArgumentError(absl::StrCat("a state of ", options.max_pending,
                                                   " pending nodes; the device of ", info.path,
                                                   " has at most ", info.max_nodes));
  }
  return options;
}

}  // namespace canopy
