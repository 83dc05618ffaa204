// Driving a model in property tests: one sequence, and logits as bits.

#ifndef CANOPY_TESTS_SUPPORT_SESSION_H_
#define CANOPY_TESTS_SUPPORT_SESSION_H_

#include <memory>
#include <span>
#include <vector>

#include "core/language_model.h"
#include "trees/token_tree.h"

namespace canopy::testing {

using Row = std::vector<float>;
using Rows = std::vector<Row>;

Rows CopyRows(ConstMatrix logits);
bool SameBits(const Row& a, const Row& b);

struct SessionOptions {
  int max_rows = 64;  // of the workspace
  int max_pending = 64;
  int max_positions = 512;
};

// A model's state and workspace. An error fails the test and gives no rows.
class Session {
 public:
  explicit Session(const LanguageModel& model, const SessionOptions& options = {});

  DecodeState& state() { return *state_; }
  Workspace& workspace() { return *workspace_; }

  void Prefill(std::span<const TokenId> tokens);
  Rows Score(std::span<const TokenId> tokens, std::span<const NodeId> parents);
  Rows Score(const TokenTree& tree) { return Score(tree.tokens(), tree.parents()); }
  // One token behind the prefix, committed: plain decoding.
  Row Step(TokenId token);

 private:
  Rows Run(const ForwardItem& item);

  const LanguageModel& model_;
  std::unique_ptr<DecodeState> state_;
  std::unique_ptr<Workspace> workspace_;
};

// The logits after context + the path to each node, token by token from an empty state.
Rows TokenByToken(const LanguageModel& model, std::span<const TokenId> context,
                  const TokenTree& tree);

}  // namespace canopy::testing

#endif  // CANOPY_TESTS_SUPPORT_SESSION_H_
