#include "experiments/decode_loop.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <span>
#include <string>

namespace canopy {
namespace {

// Rows in which prompts are read: enough that reading the weights is cheap beside using them.
constexpr int kPrefillRows = 128;

using Clock = std::chrono::steady_clock;

// Adds the time since the last call, or since it was made, to a phase.
class PhaseTimer {
 public:
  PhaseTimer() : last_(Clock::now()) {}
  void Restart() { last_ = Clock::now(); }
  void AddTo(double* seconds) {
    const Clock::time_point now = Clock::now();
    *seconds += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

 private:
  Clock::time_point last_;
};

// Drafts are plug-ins: what they return is checked before the target works on it.
absl::Status CheckDraft(const DraftTree& draft, TokenId last, int max_nodes, int max_depth,
                        bool may_promise, const Drafter& drafter) {
  const auto error = [&](const std::string& message) {
    return absl::InvalidArgumentError(
        absl::StrCat("drafter '", std::string(drafter.info().name), "' ", message));
  };
  const TokenTree& tree = draft.tree;
  if (tree.empty() || tree.token(NodeId(0)) != last || tree.next_sibling(NodeId(0)) != kPrefix) {
    return error("returned a tree whose only root is not the last output token");
  }
  if (tree.size() > max_nodes) {
    return error(
        absl::StrCat("returned ", tree.size(), " nodes where ", max_nodes, " were allowed"));
  }
  if (tree.height() - 1 > max_depth) {
    return error(
        absl::StrCat("drafted ", tree.height() - 1, " levels where ", max_depth, " were allowed"));
  }
  if (draft.proposals.size() < static_cast<size_t>(tree.size())) {
    return error(absl::StrCat("returned ", draft.proposals.size(), " proposals for ", tree.size(),
                              " nodes"));
  }
  if (tree.promised() && !may_promise) {
    return error("returned promised tokens where it was not allowed to");
  }
  return absl::OkStatus();
}

}  // namespace

PhaseSeconds& PhaseSeconds::operator+=(const PhaseSeconds& other) {
  prefill += other.prefill;
  draft += other.draft;
  verify += other.verify;
  accept += other.accept;
  commit += other.commit;
  total += other.total;
  device += other.device;
  return *this;
}

NodeCounts& NodeCounts::operator+=(const NodeCounts& other) {
  rounds += other.rounds;
  proposed += other.proposed;
  accepted += other.accepted;
  return *this;
}

std::string_view Name(Finish finish) {
  switch (finish) {
    case Finish::kEndOfText:
      return "end_of_text";
    case Finish::kLimit:
      return "limit";
    case Finish::kPositions:
      return "positions";
    case Finish::kStopped:
      return "stopped";
  }
  return "?";
}

void Generation::Clear() {
  tokens.clear();
  accept_lengths.clear();
  finish = Finish::kLimit;
  seconds = PhaseSeconds();
  by_depth.fill(NodeCounts());
  by_rank.fill(NodeCounts());
  max_pending = 0;
}

absl::StatusOr<std::unique_ptr<DecodeLoop>> DecodeLoop::Create(const LanguageModel& target,
                                                               int max_nodes) {
  if (max_nodes < 1) return absl::InvalidArgumentError("a tree has at least one node");
  std::unique_ptr<DecodeLoop> loop(new DecodeLoop());
  loop->target_ = &target;
  loop->max_nodes_ = max_nodes;
  ASSIGN_OR_RETURN(loop->verifier_,
                   TreeVerifier::Create(target, std::max(max_nodes, kPrefillRows)));
  loop->draft_.tree.Reserve(max_nodes);
  loop->accepted_.path.reserve(kMaxTreeHeight);
  return loop;
}

absl::Status DecodeLoop::Reserve(int64_t positions) {
  positions = std::min<int64_t>(positions, target_->info().max_positions);
  if (state_ != nullptr && positions <= positions_) return absl::OkStatus();
  // The old state's memory is given back first: together they may not fit.
  state_.reset();
  positions_ = 0;
  StateOptions options;
  options.max_positions = static_cast<int>(positions);
  options.max_pending = max_nodes_;
  ASSIGN_OR_RETURN(state_, target_->NewState(options));
  positions_ = positions;
  return absl::OkStatus();
}

absl::Status DecodeLoop::Decode(std::span<const DecodeRequest> requests,
                                std::span<Generation> out) {
  CHECK(requests.size() == out.size());
  for (size_t i = 0; i < requests.size(); ++i) {
    RETURN_IF_ERROR(DecodeOne(requests[i], &out[i]));
  }
  return absl::OkStatus();
}

absl::Status DecodeLoop::DecodeOne(const DecodeRequest& request, Generation* out) {
  out->Clear();
  const int64_t limit = target_->info().max_positions;
  const int64_t prompt_size = static_cast<int64_t>(request.prompt.size());
  if (prompt_size == 0) return absl::InvalidArgumentError("the prompt has no tokens");
  if (prompt_size > limit) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the prompt has ", prompt_size, " tokens, and the model (", target_->info().path,
        ") has positions for ", limit, "; shorten it or take a model with a longer context"));
  }
  if (request.drafter == nullptr || request.rule == nullptr) {
    return absl::InvalidArgumentError(
        "a request names a drafter and an acceptance rule; plain decoding has the drafter "
        "\"none\"");
  }
  if (request.max_nodes > max_nodes_) {
    return absl::InvalidArgumentError(absl::StrCat(
        "trees of ", request.max_nodes, " nodes, where the loop was made for ", max_nodes_));
  }
  RETURN_IF_ERROR(Reserve(prompt_size + request.max_new_tokens));
  const size_t capacity = prompt_size + request.max_new_tokens + kMaxTreeHeight;
  tokens_.reserve(capacity);
  out->tokens.reserve(request.max_new_tokens);
  out->accept_lengths.reserve(request.max_new_tokens);

  PhaseTimer whole;
  PhaseTimer timer;
  state_->Reset();
  if (request.draft_state != nullptr) request.draft_state->Reset();
  tokens_.assign(request.prompt.begin(), request.prompt.end());
  RETURN_IF_ERROR(verifier_->Prefill(request.prompt.first(prompt_size - 1), *state_));
  timer.AddTo(&out->seconds.prefill);

  bool done = false;
  while (!done) {
    const int64_t remaining = request.max_new_tokens - static_cast<int64_t>(out->tokens.size());
    const int64_t room = limit - state_->position();
    if (remaining <= 0) {
      out->finish = Finish::kLimit;
      break;
    }
    if (room <= 0) {
      out->finish = Finish::kPositions;
      break;
    }
    // No deeper than can become output: a round adds at most one token more than its depth.
    const int max_depth =
        static_cast<int>(std::min<int64_t>({kMaxTreeHeight - 1, remaining - 1, room - 1}));
    RETURN_IF_ERROR(Round(request, max_depth, out, &done));
    if (!done && request.stop != nullptr && request.stop->load(std::memory_order_relaxed)) {
      out->finish = Finish::kStopped;
      break;
    }
  }
  whole.AddTo(&out->seconds.total);
  return absl::OkStatus();
}

absl::Status DecodeLoop::Round(const DecodeRequest& request, int max_depth, Generation* out,
                               bool* done) {
  PhaseTimer timer;
  const double device_before = target_->DeviceSeconds();
  const double drafted_before = out->seconds.draft;
  const bool greatest_only =
      request.scores == nullptr && request.rule->NeedsGreatestOnly(request.sampling);
  DraftContext context;
  if (request.max_nodes > 1 && max_depth > 0) {
    context.tokens = tokens_;
    context.state = request.draft_state;
    context.sampling = &request.sampling;
    context.noise = &request.noise;
    context.gumbel_coupled = request.rule->name() == "gumbel";
    context.max_nodes = request.max_nodes - 1;
    context.max_depth = max_depth;
    if (greatest_only && target_->info().prefers_top) context.promises = target_->promises();
    RETURN_IF_ERROR(request.drafter->Draft({&context, 1}, {&draft_, 1}));
    RETURN_IF_ERROR(CheckDraft(draft_, tokens_.back(), request.max_nodes, max_depth,
                               context.promises != nullptr, *request.drafter));
  } else {
    draft_.Clear();
    RETURN_IF_ERROR(draft_.AddNode(kPrefix, tokens_.back()).status());
  }
  const TokenTree& tree = draft_.tree;
  timer.AddTo(&out->seconds.draft);

  ASSIGN_OR_RETURN(const TargetScores scores, verifier_->Score(tree, *state_, greatest_only));
  double drafted_at = device_before;
  if (tree.promised()) {
    // The drafter's passes were before the target's, so there is nothing to wait for.
    ASSIGN_OR_RETURN(drafted_at, request.drafter->Resolve(context, &draft_));
    if (tree.promised()) {
      return absl::InternalError(absl::StrCat("drafter '",
                                              std::string(request.drafter->info().name),
                                              "' left promised tokens in its tree"));
    }
    RETURN_IF_ERROR(Validate(draft_, target_->info().vocab_size));
  }
  double verify = 0.0;
  timer.AddTo(&verify);
  const double late =
      std::clamp((drafted_at - device_before) - (out->seconds.draft - drafted_before), 0.0, verify);
  out->seconds.draft += late;
  out->seconds.verify += verify - late;
  if (request.scores != nullptr) request.scores->OnScores(tokens_, tree, scores);

  const int64_t position = static_cast<int64_t>(tokens_.size()) - 1;
  RETURN_IF_ERROR(request.rule->Accept(draft_, scores, request.sampling, request.noise, position,
                                       scratch_, &accepted_));
  for (const NodeId node : accepted_.path) {
    if (scores.HasNan(node)) {
      return absl::DataLossError(absl::StrCat(
          "the logits of ", target_->info().path, " at position ", position + tree.depth(node),
          " are not numbers; `canopy inspect --check` names weights that are not finite"));
    }
  }
  timer.AddTo(&out->seconds.accept);

  RETURN_IF_ERROR(state_->Commit(accepted_.path));
  timer.AddTo(&out->seconds.commit);
  out->seconds.device += target_->DeviceSeconds() - device_before;

  // The path below node 0 and the target's own token, up to the end of the text.
  const size_t first = tokens_.size();
  const std::vector<TokenId>& eos = target_->info().eos_tokens;
  const int drafted = static_cast<int>(accepted_.path.size()) - 1;
  int added = 0;
  for (int i = 0; i <= drafted && !*done; ++i) {
    const TokenId token = i < drafted ? tree.token(accepted_.path[i + 1]) : accepted_.next;
    tokens_.push_back(token);
    out->tokens.push_back(token);
    ++added;
    *done = std::find(eos.begin(), eos.end(), token) != eos.end();
  }
  if (*done) out->finish = Finish::kEndOfText;
  out->accept_lengths.push_back(added);
  out->max_pending = std::max(out->max_pending, tree.size());

  // Levels below an end-of-text token that was accepted as a drafted one are not counted.
  const int accepted_drafted = std::min(added, drafted);
  const int last_depth = *done ? added : kMaxTreeHeight;
  uint64_t depths_seen = 0;
  uint64_t ranks_seen = 0;
  static_assert(kMaxTreeHeight <= 64 && kMaxRank <= 64);
  for (int i = 1; i < tree.size(); ++i) {
    const NodeId node(i);
    const int depth = tree.depth(node);
    if (depth > last_depth) continue;
    const int rank = std::min(tree.sibling_rank(node), kMaxRank - 1);
    ++out->by_depth[depth].proposed;
    ++out->by_rank[rank].proposed;
    depths_seen |= uint64_t{1} << depth;
    ranks_seen |= uint64_t{1} << rank;
  }
  for (int i = 0; i < kMaxTreeHeight; ++i) out->by_depth[i].rounds += depths_seen >> i & 1;
  for (int i = 0; i < kMaxRank; ++i) out->by_rank[i].rounds += ranks_seen >> i & 1;
  for (int i = 1; i <= accepted_drafted; ++i) {
    const NodeId node = accepted_.path[i];
    ++out->by_depth[tree.depth(node)].accepted;
    ++out->by_rank[std::min(tree.sibling_rank(node), kMaxRank - 1)].accepted;
  }
  if (request.sink != nullptr) {
    request.sink->OnTokens(std::span<const TokenId>(tokens_).subspan(first), accepted_drafted);
  }
  return absl::OkStatus();
}

}  // namespace canopy
