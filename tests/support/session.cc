#include "tests/support/session.h"

#include <cstring>
#include <utility>

#include "gtest/gtest.h"

namespace canopy::testing {

Rows CopyRows(ConstMatrix logits) {
  Rows rows;
  for (int r = 0; r < logits.rows; ++r) {
    rows.emplace_back(logits.row(r), logits.row(r) + logits.columns);
  }
  return rows;
}

bool SameBits(const Row& a, const Row& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

Session::Session(const LanguageModel& model, const SessionOptions& options) : model_(model) {
  auto state =
      model.NewState({.max_positions = options.max_positions, .max_pending = options.max_pending});
  auto workspace = model.NewWorkspace(options.max_rows);
  EXPECT_TRUE(state.ok()) << state.status();
  EXPECT_TRUE(workspace.ok()) << workspace.status();
  state_ = *std::move(state);
  workspace_ = *std::move(workspace);
}

void Session::Prefill(std::span<const TokenId> tokens) {
  if (tokens.empty()) return;
  Run({.state = state_.get(), .tokens = tokens, .logits = LogitsOf::kNone, .commit_chain = true});
}

Rows Session::Score(std::span<const TokenId> tokens, std::span<const NodeId> parents) {
  return Run({.state = state_.get(), .tokens = tokens, .parents = parents});
}

Row Session::Step(TokenId token) {
  const NodeId parent = kPrefix;
  const Rows rows = Score({&token, 1}, {&parent, 1});
  const NodeId node(0);
  EXPECT_TRUE(state_->Commit({&node, 1}).ok());
  return rows.at(0);
}

Rows Session::Run(const ForwardItem& item) {
  auto result = model_.Forward({&item, 1}, *workspace_);
  EXPECT_TRUE(result.ok()) << result.status();
  return result.ok() ? CopyRows(result->logits) : Rows();
}

Rows TokenByToken(const LanguageModel& model, std::span<const TokenId> context,
                  const TokenTree& tree) {
  Session plain(model, {.max_rows = 8});
  for (TokenId token : context) plain.Step(token);
  Rows rows(tree.size());
  for (int i = 0; i < tree.size(); ++i) {
    // A leaf's path covers its ancestors, so only leaves are run.
    if (tree.first_child(NodeId(i)) != kPrefix) continue;
    auto fork = plain.state().Fork();
    EXPECT_TRUE(fork.ok()) << fork.status();
    for (NodeId node : tree.Path(NodeId(i))) {
      const TokenId token = tree.token(node);
      const NodeId parent = kPrefix;
      const ForwardItem item{.state = fork->get(), .tokens = {&token, 1}, .parents = {&parent, 1}};
      auto result = model.Forward({&item, 1}, plain.workspace());
      EXPECT_TRUE(result.ok()) << result.status();
      rows[node.value] = CopyRows(result->logits).at(0);
      const NodeId first(0);
      EXPECT_TRUE((*fork)->Commit({&first, 1}).ok());
    }
  }
  return rows;
}

}  // namespace canopy::testing
