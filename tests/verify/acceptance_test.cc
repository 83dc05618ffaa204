#include "verify/acceptance.h"

#include <cmath>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "verify/draw_children.h"

namespace canopy {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Target scores for a tree of at most `nodes` nodes.
struct Scores {
  Scores(int nodes, int vocab)
      : vocab(vocab), stride(PaddedColumns(vocab)), data(nodes * stride, 0.0f), nodes(nodes) {}
  float& at(int node, int token) { return data[node * stride + token]; }
  TargetScores view() const { return {{data.data(), nodes, vocab, stride}}; }

  int vocab;
  int64_t stride;
  std::vector<float> data;
  int nodes;
};

DraftTree Deterministic(const char* text) {
  const TokenTree tree = *TokenTree::Parse(text);
  DraftTree draft;
  for (int i = 0; i < tree.size(); ++i) {
    (void)*draft.AddNode(tree.parents()[i], tree.tokens()[i]);
  }
  return draft;
}

TEST(AcceptanceTest, GreedyFollowsTheArgmax) {
  const auto rule = *MakeAcceptanceRule("greedy");
  EXPECT_EQ(rule->name(), "greedy");
  EXPECT_TRUE(rule->lossless());
  const DraftTree draft = Deterministic("7(1(4),2(3(5)))");  // nodes 0:7 1:1 2:4 3:2 4:3 5:5
  Scores scores(6, 8);
  AcceptanceScratch scratch;
  Acceptance accepted;
  const NoiseStream noise(1, 1);
  scores.at(0, 2) = 1.0f;
  scores.at(3, 3) = 1.0f;
  scores.at(4, 6) = 1.0f;
  ASSERT_TRUE(rule->Accept(draft, scores.view(), {}, noise, 9, scratch, &accepted).ok());
  EXPECT_THAT(accepted.path, ElementsAre(NodeId(0), NodeId(3), NodeId(4)));
  EXPECT_EQ(accepted.next.value, 6);
  scores.at(4, 5) = 2.0f;
  scores.at(5, 0) = 2.0f;
  ASSERT_TRUE(rule->Accept(draft, scores.view(), {}, noise, 9, scratch, &accepted).ok());
  EXPECT_THAT(accepted.path, ElementsAre(NodeId(0), NodeId(3), NodeId(4), NodeId(5)));
  EXPECT_EQ(accepted.next.value, 0);
  scores.at(0, 0) = 3.0f;
  ASSERT_TRUE(rule->Accept(draft, scores.view(), {}, noise, 9, scratch, &accepted).ok());
  EXPECT_THAT(accepted.path, ElementsAre(NodeId(0)));
  EXPECT_EQ(accepted.next.value, 0);
  EXPECT_THAT(std::string(rule->Accept(draft, scores.view(), {.temperature = 1.0}, noise, 9,
                                       scratch, &accepted)
                              .message()),
              HasSubstr("needs temperature 0"));
}

// At temperature 0 all rules agree, whatever the noise.
TEST(AcceptanceTest, RulesAgreeAtTemperatureZero) {
  std::mt19937 random(4);
  AcceptanceScratch scratch;
  for (int trial = 0; trial < 300; ++trial) {
    DraftTree draft;
    (void)*draft.AddNode(kPrefix, TokenId(0));
    while (draft.tree.size() < 12) {
      (void)draft.AddNode(NodeId(static_cast<int>(random() % draft.tree.size())),
                          TokenId(static_cast<int>(random() % 5)));
    }
    Scores scores(12, 5);
    for (float& x : scores.data) x = static_cast<float>(random() % 1000);
    Acceptance greedy;
    ASSERT_TRUE((*MakeAcceptanceRule("greedy"))
                    ->Accept(draft, scores.view(), {}, NoiseStream(0, 0), 5, scratch, &greedy)
                    .ok());
    for (const char* name : {"recursive", "gumbel"}) {
      Acceptance other;
      ASSERT_TRUE((*MakeAcceptanceRule(name))
                      ->Accept(draft, scores.view(), {}, NoiseStream(trial, 7), 5, scratch, &other)
                      .ok());
      EXPECT_EQ(other.path, greedy.path) << name;
      EXPECT_EQ(other.next, greedy.next) << name;
    }
  }
}

TEST(AcceptanceTest, RefusesTreesThatDoNotFit) {
  const auto rule = *MakeAcceptanceRule("recursive");
  AcceptanceScratch scratch;
  Acceptance accepted;
  const auto message = [&](const DraftTree& draft, SamplingOptions sampling = {}, int nodes = 3) {
    const Scores scores(nodes, 8);
    const absl::Status status =
        rule->Accept(draft, scores.view(), sampling, NoiseStream(1, 1), 0, scratch, &accepted);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  EXPECT_THAT(message(DraftTree{}), HasSubstr("no nodes"));
  EXPECT_THAT(message(Deterministic("1,2")), HasSubstr("hangs under the prefix"));
  EXPECT_THAT(message(Deterministic("1(8)")), HasSubstr("vocabulary ends at 7"));
  EXPECT_THAT(message(Deterministic("1(2,3)"), {}, 2), HasSubstr("2 rows of target scores for 3"));
  EXPECT_THAT(message(Deterministic("1"), {.top_p = 7.0}), HasSubstr("top_p"));
  DraftTree draft = Deterministic("1(2,3)");
  draft.proposals[0].draws.pop_back();
  EXPECT_THAT(message(draft), HasSubstr("does not list its child 2"));
  draft = Deterministic("1(2,3)");
  std::swap(draft.proposals[0].draws[0], draft.proposals[0].draws[1]);
  EXPECT_THAT(message(draft), HasSubstr("node 0 lists node 2"));
  draft = Deterministic("1(2,3)");
  draft.proposals[0].draws.push_back(NodeId(1));
  EXPECT_THAT(message(draft), HasSubstr("node 0 lists node 1"));
  draft.proposals[0].method = DrawMethod::kWithReplacement;
  EXPECT_THAT(message(draft, {.temperature = 1.0}), HasSubstr("no probability in its draft_prob"));
  draft.proposals[0].draws.push_back(NodeId(99));
  EXPECT_THAT(message(draft), HasSubstr("lists node 99"));
  draft = Deterministic("1(2)");
  draft.proposals.resize(1);
  EXPECT_THAT(message(draft), HasSubstr("1 proposals for 2 nodes"));
}

TEST(AcceptanceTest, RulesAreListedAndFoundByName) {
  std::vector<std::string> names;
  for (const auto& [name, help] : ListAcceptanceRules()) {
    EXPECT_FALSE(help.empty());
    EXPECT_EQ((*MakeAcceptanceRule(name))->name(), name);
    names.emplace_back(name);
  }
  EXPECT_THAT(names, ElementsAre("greedy", "recursive", "gumbel"));
  const auto unknown = MakeAcceptanceRule("typical");
  EXPECT_EQ(unknown.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(unknown.status().message()), HasSubstr("greedy, recursive, gumbel"));
}

// A toy pair over 6 tokens whose logits depend on the last token.
class ToyLoop {
 public:
  static constexpr int kVocab = 6;

  ToyLoop() {
    std::mt19937 random(8);
    for (auto* table : {&target_, &draft_}) {
      for (auto& row : *table) {
        for (float& logit : row) logit = std::normal_distribution<float>(0.0f, 1.0f)(random);
      }
    }
  }

  const std::array<float, kVocab>& target(TokenId last) const { return target_[last.value]; }

  // Decodes `length` tokens after token 0. method -1: no draft.
  std::vector<TokenId> Decode(const char* rule_name, int method, int children, int length,
                              const NoiseStream& noise) const {
    const auto rule = *MakeAcceptanceRule(rule_name);
    const SamplingOptions sampling{.temperature = 1.0};
    std::vector<TokenId> text = {TokenId(0)};
    DraftTree draft;
    Distribution rest;
    AcceptanceScratch scratch;
    Acceptance accepted;
    while (static_cast<int>(text.size()) <= length) {
      const int64_t position = static_cast<int64_t>(text.size()) - 1;
      draft.Clear();
      (void)*draft.AddNode(kPrefix, text.back());
      uint32_t draws = 0;
      for (int i = 0; method >= 0 && i < draft.tree.size(); ++i) {
        const NodeId node(i);
        const int depth = draft.tree.depth(node);
        if (depth == 2) break;
        const auto& logits = draft_[draft.tree.token(node).value];
        if (method == 0) {
          std::vector<TokenId> best;
          TopK(logits, children, &best);
          for (const TokenId token : best) (void)*draft.AddNode(node, token);
          continue;
        }
        Warp(logits, sampling, &draft.proposals[i].draft_prob);
        const DrawOptions options{static_cast<DrawMethod>(method), children, 100};
        EXPECT_TRUE(DrawChildren(
                        node, options,
                        [&](const Distribution& from) {
                          return from.Sample(
                              noise.Uniform(position + depth + 1, Purpose::kDraft, draws++));
                        },
                        &rest, &draft)
                        .ok());
      }
      Scores scores(draft.tree.size(), kVocab);
      for (int i = 0; i < draft.tree.size(); ++i) {
        const auto& logits = target_[draft.tree.tokens()[i].value];
        std::copy(logits.begin(), logits.end(), &scores.at(i, 0));
      }
      EXPECT_TRUE(
          rule->Accept(draft, scores.view(), sampling, noise, position, scratch, &accepted).ok());
      for (size_t i = 1; i < accepted.path.size(); ++i) {
        text.push_back(draft.tree.token(accepted.path[i]));
      }
      text.push_back(accepted.next);
    }
    text.resize(length + 1);
    return text;
  }

 private:
  std::array<std::array<float, kVocab>, kVocab> target_;
  std::array<std::array<float, kVocab>, kVocab> draft_;
};

// Transitions of a long text against the target's transition probabilities: 6 tables with 5 degrees
// of freedom each, so 30 in all; 66.6 is exceeded with probability 1.4e-4. The seed is fixed.
double TransitionChiSquare(const ToyLoop& toy, const std::vector<TokenId>& text) {
  constexpr int kVocab = ToyLoop::kVocab;
  std::array<std::array<int, kVocab>, kVocab> counts{};
  for (size_t i = 1; i < text.size(); ++i) ++counts[text[i - 1].value][text[i].value];
  double chi_square = 0.0;
  for (int from = 0; from < kVocab; ++from) {
    int total = 0;
    for (const int count : counts[from]) total += count;
    double sum = 0.0;
    for (const float logit : toy.target(TokenId(from))) sum += std::exp(double{logit});
    for (int to = 0; to < kVocab; ++to) {
      const double expected = total * std::exp(double{toy.target(TokenId(from))[to]}) / sum;
      EXPECT_GT(expected, 5.0);
      chi_square += (counts[from][to] - expected) * (counts[from][to] - expected) / expected;
    }
  }
  return chi_square;
}

TEST(AcceptanceTest, NoiseSamplesTheTargetInLongTexts) {
  const ToyLoop toy;
  const NoiseStream noise(12, 1);
  for (const char* rule : {"recursive", "gumbel"}) {
    for (const int method : {-1, 0, 1, 2}) {
      for (const int children : {1, 3}) {
        const auto text = toy.Decode(rule, method, children, 30000, noise);
        EXPECT_LT(TransitionChiSquare(toy, text), 66.6)
            << rule << ", method " << method << ", " << children << " children";
      }
    }
  }
}

TEST(AcceptanceTest, GumbelTextDoesNotDependOnTheDraft) {
  const ToyLoop toy;
  for (uint64_t request = 0; request < 20; ++request) {
    const NoiseStream noise(5, request);
    const auto plain = toy.Decode("gumbel", -1, 0, 200, noise);
    for (const int method : {0, 1, 2}) {
      for (const int children : {1, 2, 4}) {
        EXPECT_EQ(toy.Decode("gumbel", method, children, 200, noise), plain);
      }
    }
  }
}

}  // namespace
}  // namespace canopy
