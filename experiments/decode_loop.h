// The decode loop: draft, verify, accept, commit, until an end-of-text token or a limit.
//
// Where a rule needs the greatest tokens alone and a drafter's model runs on the target's device,
// the loop lets the drafter promise its tokens (LanguageModel::promises), so that the target's pass
// is launched right behind the drafter's, and waits for the device once a round.
//
// Counting (docs/results.md): a round is one verify pass; its accept length is the number of tokens
// that it adds to the output, so the accept lengths of a generation sum to its tokens. An
// end-of-text token is output; what the tree held after it is neither output nor counted.

#ifndef CANOPY_EXPERIMENTS_DECODE_LOOP_H_
#define CANOPY_EXPERIMENTS_DECODE_LOOP_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "core/decode_state.h"
#include "core/language_model.h"
#include "core/random.h"
#include "core/status.h"
#include "drafting/drafter.h"
#include "verify/acceptance.h"
#include "verify/draft_tree.h"
#include "verify/tree_verifier.h"

namespace canopy {

// Seconds of a monotonic clock.
struct PhaseSeconds {
  double prefill = 0;  // the target reading the prompt, its last token excepted
  // The draft model reading the prompt included. Of passes that nobody waits for before the
  // target's is launched, as long as they took by the device's clock where that is longer than
  // launching them.
  double draft = 0;
  double verify = 0;  // without what of such passes has gone to draft
  double accept = 0;
  double commit = 0;
  double total = 0;  // of the whole call: the phases and what lies between them
  // Of draft, verify, accept and commit: that a device of its own worked on passes, by its clock.
  double device = 0;

  double rounds() const { return draft + verify + accept + commit; }

  PhaseSeconds& operator+=(const PhaseSeconds& other);
};

// Drafted nodes at one depth (1: children of node 0) or of one sibling rank (0: drawn first).
struct NodeCounts {
  int64_t rounds = 0;    // rounds whose tree has such a node
  int64_t proposed = 0;  // nodes
  int64_t accepted = 0;  // nodes that became output

  NodeCounts& operator+=(const NodeCounts& other);
};

enum class Finish {
  kEndOfText,
  kLimit,      // max_new_tokens
  kPositions,  // the model has no position left
  kStopped,    // the caller's stop flag: what is there is a beginning
};
std::string_view Name(Finish finish);

// Sibling ranks from here on are counted together.
inline constexpr int kMaxRank = 32;

// What one call generated. Reused from call to call without allocation once it is large enough.
struct Generation {
  std::vector<TokenId> tokens;
  std::vector<int32_t> accept_lengths;  // one a round
  Finish finish = Finish::kLimit;
  PhaseSeconds seconds;
  std::array<NodeCounts, kMaxTreeHeight> by_depth;  // [0] is unused: node 0 is not drafted
  std::array<NodeCounts, kMaxRank> by_rank;
  int max_pending = 0;  // most nodes of a tree

  void Clear();
};

// Told of the output while it grows.
class TokenSink {
 public:
  virtual ~TokenSink() = default;
  // The tokens that a round adds; the first `drafted` of them were proposed by the drafter.
  virtual void OnTokens(std::span<const TokenId> tokens, int drafted) = 0;
};

// Told of the target's logits at every node of every tree, drafted nodes that are not accepted
// included.
class ScoreSink {
 public:
  virtual ~ScoreSink() = default;
  // `tokens`: prompt and output so far; node 0 of the tree is the last of them. Row i of the
  // scores' logits is node i's.
  virtual void OnScores(std::span<const TokenId> tokens, const TokenTree& tree,
                        const TargetScores& scores) = 0;
};

struct DecodeRequest {
  std::span<const TokenId> prompt;
  const Drafter* drafter = nullptr;   // plain decoding has the drafter "none"
  DraftState* draft_state = nullptr;  // from the drafter; Reset by the loop
  const AcceptanceRule* rule = nullptr;
  SamplingOptions sampling;
  NoiseStream noise{0, 0};
  int max_new_tokens = 1024;
  int max_nodes = 64;                       // of a tree, node 0 included
  TokenSink* sink = nullptr;                // may be null
  ScoreSink* scores = nullptr;              // may be null; with it, all logits come to the host
  const std::atomic<bool>* stop = nullptr;  // looked at after every round; may be null
};

// Owns the target's state and workspace. Not thread-safe. The target must outlive it.
class DecodeLoop {
 public:
  // max_nodes: of the largest tree of any request. ResourceExhausted if there is no memory.
  static absl::StatusOr<std::unique_ptr<DecodeLoop>> Create(const LanguageModel& target,
                                                            int max_nodes);

  // Makes room for that many positions, or the model's own limit if that is lower, so that calls
  // within it do not allocate. Decode does so itself where it is missing.
  absl::Status Reserve(int64_t positions);

  // Runs the requests one after the other; out[i] is overwritten. The interface takes a batch so
  // that drafters and models that batch can be put to use behind it. InvalidArgument for an empty
  // prompt, a prompt that leaves the model no position for a token, or a drafter that broke its
  // limits.
  absl::Status Decode(std::span<const DecodeRequest> requests, std::span<Generation> out);

  const LanguageModel& target() const { return *target_; }
  // After the first Reserve or Decode that succeeded.
  bool has_state() const { return state_ != nullptr; }
  const DecodeState& state() const { return *state_; }

 private:
  DecodeLoop() = default;
  absl::Status DecodeOne(const DecodeRequest& request, Generation* out);
  // Draft, verify, accept and commit once; *done is set at the end of the text.
  absl::Status Round(const DecodeRequest& request, int max_depth, Generation* out, bool* done);

  const LanguageModel* target_ = nullptr;
  int max_nodes_ = 0;
  int64_t positions_ = 0;  // that state_ holds
  std::unique_ptr<TreeVerifier> verifier_;
  std::unique_ptr<DecodeState> state_;
  // Reused from round to round.
  std::vector<TokenId> tokens_;  // prompt and output
  DraftTree draft_;
  Acceptance accepted_;
  AcceptanceScratch scratch_;
};

}  // namespace canopy

#endif  // CANOPY_EXPERIMENTS_DECODE_LOOP_H_
