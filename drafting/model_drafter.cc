// Drafts with a smaller language model. The tree grows level by level: one pass scores the nodes of
// a level for all sequences, and their children are chosen from the logits; the last level needs no
// pass.
//
// The draft model's state has the sequence as its prefix and the drafted nodes that were scored as
// its pending nodes. At the next call the text that has been added since is followed through them,
// and what it has in common with a path is committed instead of computed again.
//
// With children that are the best tokens, a level's form does not depend on the tokens of the one
// above. Where the context allows promised tokens, all passes are launched one behind the other,
// and Resolve brings the tokens once somebody has waited for them.

#include <algorithm>
#include <mutex>

#include "drafting/registry.h"
#include "verify/draw_children.h"

namespace canopy {
namespace {

class ModelDraftState final : public DraftState {
 public:
  explicit ModelDraftState(std::unique_ptr<DecodeState> s) : state(std::move(s)) {}
  void Reset() override {
    state->Reset();
    root_position = 0;
    promised = false;
  }

  std::unique_ptr<DecodeState> state;
  // Logits after the prefix: what the children of node 0 are chosen from. A copy, since the pass of
  // the next level overwrites them, and a round that is drawn again has no new token to compute
  // them with.
  std::vector<float> root_logits;  // [vocab]
  std::vector<TokenId> root_best;  // instead of them, where the model gives the best tokens alone
  int root_position = 0;           // the prefix length that they belong to
  TokenId last_token;              // of the prefix

  // Of the tree that is drawn, by node.
  std::vector<NodeId> shape_of;
  std::vector<NodeId> pending_of;  // kPrefix where the node was not scored
  uint32_t draws = 0;              // made in this round
  bool promised = false;           // tokens of this round, which are not resolved yet

  // Scratch.
  std::vector<NodeId> path;
  std::vector<TokenId> best;
  std::vector<Arrival> arrivals;
  Distribution warped;
};

// A node that needs a pass.
struct Row {
  int context;
  NodeId node;
};

class ModelDrafter final : public Drafter {
 public:
  ModelDrafter(const DrafterOptions& options, DraftMethod method, TreeShape shape,
               std::unique_ptr<Workspace> workspace)
      : model_(*options.model),
        method_(method),
        shape_(std::move(shape)),
        vocab_(options.vocab_size == 0 ? model_.info().vocab_size
                                       : std::min(options.vocab_size, model_.info().vocab_size)),
        max_positions_(options.max_positions),
        max_rows_(options.workspace_rows),
        workspace_(std::move(workspace)) {
    std::vector<int> scored(kMaxTreeHeight, 0);  // nodes of a level
    for (int i = 0; i < shape_.size(); ++i) {
      if (shape_.children(NodeId(i)) == 0) continue;
      ++inner_nodes_;
      ++scored[shape_.depth(NodeId(i))];
    }
    for (const int nodes : scored) passes_ += (nodes + max_rows_ - 1) / max_rows_;
    const ModelInfo& draft = model_.info();
    if (draft.prefers_top && vocab_ == draft.vocab_size && shape_.max_children() <= kMaxTop) {
      best_ = std::min(shape_.max_children(), vocab_);
    }
    pass_tokens_.reserve(max_rows_);
    pass_parents_.reserve(max_rows_);
  }

  DrafterInfo info() const override {
    return {.name = "model", .samples = method_ != DraftMethod::kTopK};
  }

  absl::StatusOr<std::unique_ptr<DraftState>> NewState() const override {
    // A draft that is longer than the model can read ends early, so a target with a higher limit is
    // no error yet.
    const int max_positions =
        max_positions_ == 0 ? 0 : std::min(max_positions_, model_.info().max_positions);
    ASSIGN_OR_RETURN(std::unique_ptr<DecodeState> decode_state,
                     model_.NewState({.max_positions = max_positions,
                                      .max_pending = std::max(1, inner_nodes_)}));
    auto state = std::make_unique<ModelDraftState>(std::move(decode_state));
    state->root_logits.resize(model_.info().vocab_size);
    state->shape_of.reserve(shape_.size());
    state->pending_of.reserve(shape_.size());
    state->path.reserve(kMaxTreeHeight);
    return state;
  }

  size_t MemoryBytes(const DraftState& state) const override {
    const auto& own = static_cast<const ModelDraftState&>(state);
    const std::lock_guard<std::mutex> lock(mutex_);
    return model_.info().weight_bytes + own.state->memory().total_bytes +
           own.root_logits.size() * sizeof(float) + workspace_->bytes();
  }

  absl::Status Draft(std::span<const DraftContext> contexts,
                     std::span<DraftTree> out) const override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = 0; i < contexts.size(); ++i) RETURN_IF_ERROR(Begin(contexts[i], &out[i]));
    top_ = std::all_of(contexts.begin(), contexts.end(),
                       [this](const DraftContext& context) { return Ranked(context); })
               ? best_
               : 0;
    // One sequence that gets a node at least: its promises are of this round's last passes, and
    // they stand in the tree.
    promise_ = top_ > 0 && contexts.size() == 1 && contexts[0].promises != nullptr &&
               contexts[0].promises == model_.promises() && contexts[0].max_nodes > 0 &&
               contexts[0].max_depth > 0 && passes_ < kPromisePasses;
    RETURN_IF_ERROR(ReadNewTokens(contexts));
    level_.clear();
    for (size_t i = 0; i < contexts.size(); ++i) {
      const ModelDraftState& own = StateOf(contexts[i]);
      RETURN_IF_ERROR(
          ChooseChildren(contexts[i], NodeId(0), own.root_logits, own.root_best, &out[i]));
      AddLevel(contexts[i], static_cast<int>(i), 1, out[i]);
    }
    // Each turn scores the nodes of one level and gives them their children, which are the next.
    for (size_t begin = 0; begin < level_.size();) {
      const size_t end = level_.size();
      RETURN_IF_ERROR(ScoreLevel(contexts, begin, end, out));
      for (size_t i = begin; i < end; ++i) {
        const bool last_of_context = i + 1 == end || level_[i + 1].context != level_[i].context;
        if (!last_of_context) continue;
        const int context = level_[i].context;
        const TokenTree& tree = out[context].tree;
        const int first = FirstOfNextLevel(tree, level_[i].node);
        if (first < tree.size()) AddLevel(contexts[context], context, first, out[context]);
      }
      begin = end;
    }
    return absl::OkStatus();
  }

  absl::StatusOr<double> Resolve(const DraftContext& context, DraftTree* out) const override {
    const std::lock_guard<std::mutex> lock(mutex_);
    ModelDraftState& own = StateOf(context);
    const std::span<const TokenId> tokens = out->tree.tokens();
    pass_tokens_.assign(tokens.begin(), tokens.end());
    ASSIGN_OR_RETURN(const double seconds, model_.Resolve(pass_tokens_));
    for (const TokenId token : pass_tokens_) RETURN_IF_ERROR(CheckBest(token));
    RETURN_IF_ERROR(out->tree.Resolve(pass_tokens_));
    RETURN_IF_ERROR(own.state->ResolvePending());
    RETURN_IF_ERROR(model_.Resolve(own.root_best).status());
    own.promised = false;
    return seconds;
  }

 private:
  static ModelDraftState& StateOf(const DraftContext& context) {
    return static_cast<ModelDraftState&>(*context.state);
  }

  // Whether children are drawn at random, not chosen. Draws from a point mass would be a chain, so
  // at temperature 0 the top-ranked tokens are taken.
  bool Samples(const DraftContext& context) const {
    return method_ != DraftMethod::kTopK && !context.gumbel_coupled &&
           context.sampling->temperature > 0.0;
  }

  // Whether children are the tokens of the greatest logits, best first.
  bool Ranked(const DraftContext& context) const {
    return !Samples(context) && !(context.gumbel_coupled && context.sampling->temperature > 0.0);
  }

  // Starts the tree and commits what the text shares with the pending nodes.
  absl::Status Begin(const DraftContext& context, DraftTree* out) const {
    out->Reserve(shape_.size(), shape_.max_children());
    RETURN_IF_ERROR(BeginDraft(context, out));
    if (context.sampling == nullptr || context.state == nullptr) {
      return absl::InvalidArgumentError("model draft: the context has no state or no sampling");
    }
    RETURN_IF_ERROR(Validate(*context.sampling));
    if (context.noise == nullptr && context.sampling->temperature > 0.0 &&
        (Samples(context) || context.gumbel_coupled)) {
      return absl::InvalidArgumentError("model draft: drawing children needs the context's noise");
    }
    ModelDraftState& own = StateOf(context);
    if (own.promised) {
      return absl::FailedPreconditionError(
          "model draft: the tokens of the last draft are promised still; resolve it, or reset the "
          "state");
    }
    DecodeState& state = *own.state;
    const int size = static_cast<int>(context.tokens.size());
    if (size > state.options().max_positions) {
      return absl::InvalidArgumentError(absl::StrCat(
          "model draft: the sequence has ", size, " tokens, but ", model_.info().architecture,
          " at ", model_.info().path, " drafts at most ", state.options().max_positions,
          "; shorten prompt or output, or choose a draft model with a higher limit"));
    }
    const int position = state.position();
    if (size < position || (position > 0 && context.tokens[position - 1] != own.last_token)) {
      return absl::InvalidArgumentError(
          absl::StrCat("model draft: a sequence of ", size, " tokens does not continue the ",
                       position, " that were drafted from; reset the state for a new sequence"));
    }
    // All but the last token, which is read in any case: its logits are needed.
    own.path.clear();
    NodeId node = kPrefix;
    for (int i = position; i < size - 1; ++i) {
      node = PendingChild(state, node, context.tokens[i]);
      if (node == kPrefix) break;
      own.path.push_back(node);
    }
    RETURN_IF_ERROR(state.Commit(own.path));
    if (state.position() > 0) own.last_token = context.tokens[state.position() - 1];
    own.shape_of.assign(1, NodeId(0));
    own.pending_of.assign(1, kPrefix);
    own.draws = 0;
    return absl::OkStatus();
  }

  static NodeId PendingChild(const DecodeState& state, NodeId parent, TokenId token) {
    for (int i = parent.value + 1; i < state.pending(); ++i) {
      if (state.parent(NodeId(i)) == parent && state.token(NodeId(i)) == token) return NodeId(i);
    }
    return kPrefix;
  }

  // Makes all of the text the prefix, and keeps the logits after it.
  absl::Status ReadNewTokens(std::span<const DraftContext> contexts) const {
    for (size_t begin = 0; begin < contexts.size();) {
      // As many sequences in a pass as its rows allow, one at least.
      items_.clear();
      size_t rows = 0;
      size_t end = begin;
      for (; end < contexts.size(); ++end) {
        DecodeState& state = *StateOf(contexts[end]).state;
        const auto rest = contexts[end].tokens.subspan(state.position());
        if (!items_.empty() && rows + rest.size() > static_cast<size_t>(max_rows_)) break;
        rows += rest.size();
        if (rest.empty()) continue;  // the same text again: the logits are still there
        items_.push_back({.state = &state,
                          .tokens = rest,
                          .parents = {},
                          .logits = LogitsOf::kLast,
                          .commit_chain = true,
                          .top = top_,
                          .promise = promise_});
      }
      if (!items_.empty()) {
        ASSIGN_OR_RETURN(const ForwardResult result, model_.Forward(items_, *workspace_));
        size_t item = 0;
        for (size_t i = begin; i < end; ++i) {
          ModelDraftState& own = StateOf(contexts[i]);
          if (item == items_.size() || items_[item].state != own.state.get()) continue;
          const int row = result.first_row[item++];
          if (top_ > 0) {
            const auto best = result.top.subspan(static_cast<size_t>(row) * top_, top_);
            own.root_best.assign(best.begin(), best.end());
            own.promised |= promise_;
          } else {
            const float* logits = result.logits.row(row);
            std::copy(logits, logits + own.root_logits.size(), own.root_logits.begin());
            own.root_best.clear();
          }
          own.root_position = own.state->position();
          own.last_token = contexts[i].tokens.back();
        }
      }
      begin = end;
    }
    for (const DraftContext& context : contexts) {
      const ModelDraftState& own = StateOf(context);
      if (own.root_position != own.state->position()) {
        return absl::InternalError(
            "model draft: an earlier pass of this state has failed; reset the state");
      }
      if (own.root_best.empty() != (top_ == 0)) {
        return absl::InvalidArgumentError(
            "model draft: the sampling options changed within a sequence; reset the state");
      }
    }
    return absl::OkStatus();
  }

  // The first node of the level after `node`'s, where `node` is on the last but one.
  static int FirstOfNextLevel(const TokenTree& tree, NodeId node) {
    int first = tree.size();
    while (first > 0 && tree.depth(NodeId(first - 1)) > tree.depth(node)) --first;
    return first;
  }

  // Adds the nodes from `first` on, one level, to those to be scored, as far as they may have
  // children.
  void AddLevel(const DraftContext& context, int index, int first, const DraftTree& draft) const {
    const ModelDraftState& own = StateOf(context);
    const TokenTree& tree = draft.tree;
    if (first >= tree.size()) return;
    const int depth = tree.depth(NodeId(first));
    if (depth >= context.max_depth) return;
    // The nodes' position must fit the state.
    if (own.state->position() + depth > own.state->options().max_positions) return;
    const bool ranked = Ranked(context);
    int room = 1 + context.max_nodes - tree.size();
    for (int i = first; i < tree.size() && room > 0; ++i) {
      const int children = std::min(shape_.children(own.shape_of[i]), vocab_);
      if (children == 0) continue;
      level_.push_back({index, NodeId(i)});
      // Draws may repeat, and a warped support may be small: one child is all that is sure.
      room -= ranked ? children : 1;
    }
  }

  // Scores level_[begin, end) and chooses the nodes' children.
  absl::Status ScoreLevel(std::span<const DraftContext> contexts, size_t begin, size_t end,
                          std::span<DraftTree> out) const {
    while (begin < end) {
      const size_t pass_end = std::min(end, begin + static_cast<size_t>(max_rows_));
      items_.clear();
      pass_tokens_.clear();
      pass_parents_.clear();
      for (size_t i = begin; i < pass_end; ++i) {
        const Row row = level_[i];
        ModelDraftState& own = StateOf(contexts[row.context]);
        const TokenTree& tree = out[row.context].tree;
        const bool new_item = i == begin || row.context != level_[i - 1].context;
        if (new_item) {
          items_.push_back({.state = own.state.get(),
                            .tokens = {pass_tokens_.data() + pass_tokens_.size(), 0},
                            .parents = {pass_parents_.data() + pass_parents_.size(), 0},
                            .logits = LogitsOf::kAll,
                            .commit_chain = false,
                            .top = top_,
                            .promise = promise_});
        }
        ForwardItem& item = items_.back();
        pass_tokens_.push_back(tree.token(row.node));
        pass_parents_.push_back(own.pending_of[tree.parent(row.node).value]);
        item.tokens = {item.tokens.data(), item.tokens.size() + 1};
        item.parents = {item.parents.data(), item.parents.size() + 1};
        own.pending_of[row.node.value] =
            NodeId(own.state->pending() + static_cast<int>(item.tokens.size()) - 1);
      }
      ASSIGN_OR_RETURN(const ForwardResult result, model_.Forward(items_, *workspace_));
      for (size_t i = begin; i < pass_end; ++i) {
        const Row row = level_[i];
        StateOf(contexts[row.context]).promised |= promise_;
        const int at = static_cast<int>(i - begin);
        std::span<const float> logits;
        std::span<const TokenId> best;
        if (top_ > 0) {
          best = result.top.subspan(static_cast<size_t>(at) * top_, top_);
        } else {
          logits = {result.logits.row(at), static_cast<size_t>(result.logits.columns)};
        }
        RETURN_IF_ERROR(
            ChooseChildren(contexts[row.context], row.node, logits, best, &out[row.context]));
      }
      begin = pass_end;
    }
    return absl::OkStatus();
  }

  // From the node's logits, or from its best tokens where those are all that came.
  absl::Status ChooseChildren(const DraftContext& context, NodeId node,
                              std::span<const float> logits, std::span<const TokenId> best,
                              DraftTree* out) const {
    ModelDraftState& own = StateOf(context);
    if (out->tree.depth(node) >= context.max_depth) return absl::OkStatus();
    const int children = shape_.children(own.shape_of[node.value]);
    const int max_tree_size = 1 + context.max_nodes;
    const int room = std::min(children, max_tree_size - out->tree.size());
    if (room <= 0) return absl::OkStatus();
    if (best.empty()) logits = logits.first(vocab_);
    const SamplingOptions& sampling = *context.sampling;
    const int64_t position =
        static_cast<int64_t>(context.tokens.size()) + out->tree.depth(node);  // the children's
    const int before = out->tree.size();
    if (Samples(context)) {
      Warp(logits, sampling, &out->proposals[node.value].draft_prob);
      const DrawOptions options{.method = method_ == DraftMethod::kSampled
                                              ? DrawMethod::kWithoutReplacement
                                              : DrawMethod::kWithReplacement,
                                .draws = children,
                                .max_tree_size = max_tree_size};
      RETURN_IF_ERROR(DrawChildren(
          node, options,
          [&](const Distribution& from) {
            return from.Sample(context.noise->Uniform(position, Purpose::kDraft, own.draws++));
          },
          &own.warped, out));
    } else if (context.gumbel_coupled && sampling.temperature > 0.0) {
      Warp(logits, sampling, &own.warped);
      GumbelTopK(own.warped, *context.noise, position, room, &own.arrivals);
      for (const Arrival& arrival : own.arrivals) {
        RETURN_IF_ERROR(out->AddNode(node, arrival.token).status());
      }
    } else {
      if (best.empty()) {
        TopK(logits, room, &own.best);
      } else {
        own.best.assign(best.begin(), best.begin() + std::min<size_t>(room, best.size()));
      }
      for (const TokenId token : own.best) {
        if (IsPromised(token)) {
          RETURN_IF_ERROR(out->AddPromised(node, token).status());
          continue;
        }
        RETURN_IF_ERROR(CheckBest(token));
        RETURN_IF_ERROR(out->AddNode(node, token).status());
      }
    }
    for (int i = before; i < out->tree.size(); ++i) {
      own.shape_of.push_back(
          shape_.child(own.shape_of[node.value], out->tree.sibling_rank(NodeId(i))));
      own.pending_of.push_back(kPrefix);
    }
    return absl::OkStatus();
  }

  // Of a model's best tokens, -1 says that there are none.
  absl::Status CheckBest(TokenId token) const {
    if (token.value >= 0) return absl::OkStatus();
    return absl::DataLossError(
        absl::StrCat("the logits of the draft model ", model_.info().path, " are not numbers"));
  }

  const LanguageModel& model_;
  const DraftMethod method_;
  const TreeShape shape_;
  const int vocab_;
  const int max_positions_;
  const int max_rows_;
  int best_ = 0;         // tokens to ask a model with prefers_top for; 0: its logits are needed
  int inner_nodes_ = 0;  // of the shape, node 0 included: more than ever are pending
  int passes_ = 0;       // of a round, but for those that read the text before its last part

  // One round at a time; what it needs is kept from round to round.
  mutable std::mutex mutex_;
  std::unique_ptr<Workspace> workspace_;
  mutable int top_ = 0;           // of this round's passes
  mutable bool promise_ = false;  // the same
  mutable std::vector<Row> level_;
  mutable std::vector<ForwardItem> items_;
  mutable std::vector<TokenId> pass_tokens_;
  mutable std::vector<NodeId> pass_parents_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Drafter>> MakeModelDrafter(const DrafterOptions& options) {
  if (options.model == nullptr) {
    return absl::InvalidArgumentError("no draft model is given; name its folder");
  }
  if (options.workspace_rows < 1 || options.vocab_size < 0 || options.max_positions < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("workspace_rows is ", options.workspace_rows, ", vocab_size ",
                     options.vocab_size, " and max_positions ", options.max_positions,
                     "; expected at least 1, at least 0 and at least 0"));
  }
  ASSIGN_OR_RETURN(const DraftMethod method, ParseDraftMethod(options.method));
  ASSIGN_OR_RETURN(TreeShape shape, ParseDraftShape(options.shape));
  ASSIGN_OR_RETURN(std::unique_ptr<Workspace> workspace,
                   options.model->NewWorkspace(options.workspace_rows));
  return std::make_unique<ModelDrafter>(options, method, std::move(shape), std::move(workspace));
}

}  // namespace canopy
