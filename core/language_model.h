// The one interface of a language model: it scores token trees over committed prefixes.

#ifndef CANOPY_CORE_LANGUAGE_MODEL_H_
#define CANOPY_CORE_LANGUAGE_MODEL_H_

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/decode_state.h"
#include "core/dtype.h"
#include "core/status.h"
#include "core/tensor.h"
#include "trees/ids.h"

namespace canopy {

struct ModelInfo {
  std::string architecture;     // config.json's model_type
  std::string path;             // where it was loaded from
  std::string checkpoint_hash;  // of the weight files' bytes, hex; see core/safetensors.h
  DType dtype = DType::kF32;    // of the weights
  int layers = 0;
  int hidden_size = 0;
  int vocab_size = 0;
  int max_positions = 0;  // config.json's limit; INT32_MAX for recurrent models without one
  int64_t parameters = 0;
  int64_t layer_parameters = 0;  // of the layers' matrices: without embedding, head and vectors
  size_t weight_bytes = 0;       // on the backend, padding included
  std::vector<std::string> layer_kinds;  // "ssd", "attention", ... one a layer
  std::vector<TokenId> eos_tokens;       // generation_config.json's, else config.json's
  // Logits are far from the host: where a few greatest tokens will do, ask for `top` instead.
  bool prefers_top = false;
  int max_nodes = INT32_MAX;  // pending in a state
};

inline constexpr int kMaxTop = 32;
// Promised tokens hold until that many further passes of the backend have been launched, of
// whatever model: the pass that is the kPromisePasses-th after theirs may still read them.
inline constexpr int kPromisePasses = 64;

enum class LogitsOf { kNone, kLast, kAll };

// New nodes of one sequence. tokens[i] hangs under parents[i]: kPrefix, a pending node of the
// state, or a new node numbered state->pending() + j with j < i. An empty `parents` means a chain
// under the prefix (or, with pending nodes, an error).
struct ForwardItem {
  DecodeState* state = nullptr;
  // Also promised ones, of passes on the backend that the model's promises() names.
  std::span<const TokenId> tokens;
  std::span<const NodeId> parents;
  LogitsOf logits = LogitsOf::kAll;
  // The nodes are a chain under the prefix that is committed as it is computed: how a prompt is
  // read. Any length that fits the state; the state must have no pending nodes.
  bool commit_chain = false;
  // Above 0 (at most kMaxTop): instead of the logits, the tokens of the `top` greatest, best first;
  // of equals the lower id. The same for all items of a call. For models with prefers_top.
  int top = 0;
  // With `top`, for models with promises(): the call does not wait for the device, and result.top
  // holds promised tokens. The same for all items of a call.
  bool promise = false;
};

// Scratch memory of passes, made by the model for a number of rows. Reused from pass to pass, so
// the decode loop allocates nothing. One pass at a time.
class Workspace {
 public:
  virtual ~Workspace() = default;
  virtual size_t bytes() const = 0;
};

struct ForwardResult {
  // [rows asked for, vocab] f32, items in order; valid until the next pass in the workspace.
  ConstMatrix logits;
  // First row of each item: valid as long as logits.
  std::span<const int> first_row;
  // [rows asked for, top], with `top` set; -1 where a row has logits that are not numbers, which of
  // promised tokens Resolve tells.
  std::span<const TokenId> top;
};

// Const after loading and safe from several threads with a workspace and states of their own,
// except that a CPU backend runs one pass at a time, and that the models of a CUDA backend are
// called from one thread at a time, as it is.
class LanguageModel {
 public:
  virtual ~LanguageModel() = default;

  virtual const ModelInfo& info() const = 0;
  virtual absl::StatusOr<std::unique_ptr<DecodeState>> NewState(
      const StateOptions& options) const = 0;
  // For passes of at most max_rows new nodes in all (longer commit_chain items are cut into such
  // passes).
  virtual absl::StatusOr<std::unique_ptr<Workspace>> NewWorkspace(int max_rows) const = 0;
  // Scores the new nodes of all items in one pass and leaves them pending.
  // InvalidArgument, with every state as it was, for a token outside the vocabulary or a promise
  // that does not hold, a parent that does not exist, a tree of more than kMaxTreeHeight levels, or
  // more nodes or positions than state or workspace hold. A promised token that turns out to be
  // outside the vocabulary, or -1, is scored as if it were another one.
  virtual absl::StatusOr<ForwardResult> Forward(std::span<const ForwardItem> items,
                                                Workspace& workspace) const = 0;
  // Seconds that the model's device has worked on passes so far, by its own clock, with those of
  // other models on it; 0 where it is the host.
  virtual double DeviceSeconds() const { return 0.0; }
  // The backend whose passes' promised tokens this model takes and gives; null: it has none. A
  // draft model and a target that name the same one can be run one behind the other without a wait.
  virtual const Backend* promises() const { return nullptr; }
  // Puts tokens in the place of promised ones, after waiting for their passes where those are not
  // done; others stay. -1 where the row's logits are not numbers. Gives DeviceSeconds as it was
  // when the last of those passes was done, 0 where nothing was promised. FailedPrecondition, with
  // tokens as they were, for a promise that no longer holds or that is not of promises().
  virtual absl::StatusOr<double> Resolve(std::span<TokenId> tokens) const;

 private:
  friend class DecodeState;
  // Moves the rows of a path that DecodeState has checked behind the prefix, and folds.
  virtual absl::Status CommitRows(DecodeState& state, std::span<const NodeId> path) const = 0;
};

inline absl::StatusOr<double> LanguageModel::Resolve(std::span<TokenId> tokens) const {
  for (const TokenId token : tokens) {
    if (IsPromised(token)) {
      return absl::FailedPreconditionError(absl::StrCat(
          "promised tokens, but ", info().architecture, " at ", info().path, " has none"));
    }
  }
  return 0.0;
}

}  // namespace canopy

#endif  // CANOPY_CORE_LANGUAGE_MODEL_H_
