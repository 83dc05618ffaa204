// Proves by exact enumeration that the recursive rule is lossless: every outcome of the draft's
// draws and of the rule's decisions is walked through with its probability, in the code that ships,
// and the distribution of the output is compared with the target's.

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "trees/tree_shape.h"
#include "verify/acceptance.h"
#include "verify/draw_children.h"
#include "verify/recursive_rejection.h"

namespace canopy {
namespace {

// Runs a function once for every sequence of outcomes of its random decisions.
class Enumeration {
 public:
  // `run(weight)` is called with a function that gives the probability of the decisions made so
  // far.
  void ForEachOutcome(const std::function<void()>& run) {
    script_.clear();
    do {
      next_ = 0;
      weight_ = 1.0;
      run();
    } while (Advance());
  }
  double weight() const { return weight_; }

  // One of the indices with a positive probability.
  int Choose(const std::vector<double>& probs) {
    std::vector<int>& possible = possible_;
    possible.clear();
    for (size_t i = 0; i < probs.size(); ++i) {
      if (probs[i] > 0.0) possible.push_back(static_cast<int>(i));
    }
    if (next_ == script_.size()) script_.push_back({0, static_cast<int>(possible.size())});
    const int chosen = possible[script_[next_++].branch];
    weight_ *= probs[chosen];
    return chosen;
  }

  bool Accept(double probability, uint32_t) {
    const double accept = std::min(probability, 1.0);
    return Choose({1.0 - accept, accept}) == 1;
  }
  TokenId Sample(const Distribution& distribution) {
    return distribution.tokens[Choose(distribution.probs)];
  }

 private:
  struct Step {
    int branch;
    int branches;
  };

  bool Advance() {
    while (!script_.empty() && script_.back().branch + 1 == script_.back().branches) {
      script_.pop_back();
    }
    if (script_.empty()) return false;
    ++script_.back().branch;
    return true;
  }

  std::vector<Step> script_;
  size_t next_ = 0;
  double weight_ = 1.0;
  std::vector<int> possible_;
};

using Text = std::vector<int>;

// Softmax with temperature, top-k and top-p, from their definitions.
std::vector<double> NaiveWarp(const std::vector<float>& logits, const SamplingOptions& options) {
  const int vocab = static_cast<int>(logits.size());
  std::vector<int> order(vocab);
  for (int i = 0; i < vocab; ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
  std::vector<double> probs(vocab, 0.0);
  if (options.temperature == 0.0) {
    probs[order[0]] = 1.0;
    return probs;
  }
  const auto scale = [&probs] {
    double sum = 0.0;
    for (double p : probs) sum += p;
    for (double& p : probs) p /= sum;
  };
  for (int rank = 0; rank < vocab; ++rank) {
    if (options.top_k > 0 && rank >= options.top_k) break;
    probs[order[rank]] =
        std::exp((double{logits[order[rank]]} - logits[order[0]]) / options.temperature);
  }
  scale();
  double before = 0.0;
  for (int rank = 0; rank < vocab; ++rank) {
    const double p = probs[order[rank]];
    if (before >= options.top_p) probs[order[rank]] = 0.0;
    before += p;
  }
  scale();
  return probs;
}

// Logits that depend on the text so far: random, some tokens impossible.
class RandomModel {
 public:
  RandomModel(int vocab, uint64_t seed) : vocab_(vocab), seed_(seed) {}

  const std::vector<float>& Logits(const Text& text) {
    std::vector<float>& logits = logits_[text];
    if (!logits.empty()) return logits;
    uint64_t hash = seed_;
    for (const int token : text) hash = hash * 1000003 + token + 1;
    std::mt19937_64 random(hash);
    logits.resize(vocab_);
    for (float& logit : logits) {
      logit = std::normal_distribution<float>(0.0f, 1.5f)(random);
      if (random() % 6 == 0) logit = -INFINITY;
    }
    logits[random() % vocab_] = 0.5f;  // at least one is possible
    return logits;
  }

 private:
  int vocab_;
  uint64_t seed_;
  std::map<Text, std::vector<float>> logits_;
};

Text TextAt(const TokenTree& tree, NodeId node) {
  Text text;
  for (const NodeId n : tree.Path(node)) text.push_back(tree.token(n).value);
  return text;
}

struct Setting {
  int vocab = 4;
  std::string shape;
  DrawMethod method = DrawMethod::kDeterministic;
  SamplingOptions sampling;
  uint64_t seed = 0;
};

constexpr int kOutput = 3;  // tokens whose joint distribution is compared

// How a test may tamper with a drawn tree before the rule sees it.
using Tamper = std::function<void(DraftTree*)>;

// The distribution of the next kOutput tokens after one speculative round, the rest by the target
// itself. Sets *runs to the number of outcomes.
std::map<Text, double> OutputDistribution(const Setting& setting, RandomModel& target,
                                          RandomModel& drafter, const Tamper& tamper = nullptr,
                                          int* runs = nullptr) {
  const TreeShape shape = *TreeShape::Parse(setting.shape);
  std::map<Text, double> output;
  std::map<Text, std::vector<double>> target_probs;
  Enumeration enumeration;
  DraftTree draft;
  Distribution rest;
  AcceptanceScratch scratch;
  Acceptance accepted;
  std::mt19937_64 token_order(setting.seed);
  std::vector<TokenId> arbitrary;
  for (int i = 0; i < setting.vocab; ++i) arbitrary.push_back(TokenId(i));
  std::shuffle(arbitrary.begin(), arbitrary.end(), token_order);
  const int64_t stride = PaddedColumns(setting.vocab);
  std::vector<float> rows;
  int outcomes = 0;
  enumeration.ForEachOutcome([&] {
    ++outcomes;
    draft.Clear();
    (void)*draft.AddNode(kPrefix, TokenId(0));
    std::vector<NodeId> shape_of = {NodeId(0)};
    for (int i = 0; i < draft.tree.size(); ++i) {
      const NodeId node(i);
      const int children = shape.children(shape_of[i]);
      if (children == 0) continue;
      if (setting.method == DrawMethod::kDeterministic) {
        // Any tokens will do, also such as the target cannot produce.
        for (int rank = 0; rank < children; ++rank) {
          (void)*draft.AddNode(node, arbitrary[(i + rank) % setting.vocab]);
        }
      } else {
        Warp(drafter.Logits(TextAt(draft.tree, node)), setting.sampling,
             &draft.proposals[i].draft_prob);
        const DrawOptions options{setting.method, children, 1000};
        ASSERT_TRUE(DrawChildren(
                        node, options,
                        [&](const Distribution& from) { return enumeration.Sample(from); }, &rest,
                        &draft)
                        .ok());
      }
      for (NodeId child = draft.tree.first_child(node); child != kPrefix;
           child = draft.tree.next_sibling(child)) {
        shape_of.push_back(shape.child(shape_of[i], draft.tree.sibling_rank(child)));
      }
    }
    ASSERT_TRUE(Validate(draft, setting.vocab).ok()) << Validate(draft, setting.vocab);
    if (tamper) tamper(&draft);
    rows.assign(draft.tree.size() * stride, 0.0f);
    for (int i = 0; i < draft.tree.size(); ++i) {
      std::ranges::copy(target.Logits(TextAt(draft.tree, NodeId(i))), rows.begin() + i * stride);
    }
    const TargetScores scores{{rows.data(), draft.tree.size(), setting.vocab, stride}};
    const absl::Status status = AcceptRecursively(
        draft, scores, setting.sampling, 0, [&](int64_t) -> Enumeration& { return enumeration; },
        scratch, &accepted);
    ASSERT_TRUE(status.ok()) << status;

    Text text = TextAt(draft.tree, accepted.path.back());
    ASSERT_EQ(text.size(), accepted.path.size());
    text.push_back(accepted.next.value);
    const std::function<void(double)> continue_text = [&](double weight) {
      if (static_cast<int>(text.size()) == 1 + kOutput) {
        output[text] += weight;
        return;
      }
      std::vector<double>& probs = target_probs[text];
      if (probs.empty()) probs = NaiveWarp(target.Logits(text), setting.sampling);
      for (int token = 0; token < setting.vocab; ++token) {
        if (probs[token] == 0.0) continue;
        text.push_back(token);
        continue_text(weight * probs[token]);
        text.pop_back();
      }
    };
    ASSERT_LE(static_cast<int>(text.size()), 1 + kOutput);
    continue_text(enumeration.weight());
  });
  if (runs != nullptr) *runs = outcomes;
  return output;
}

double MaxDifference(const Setting& setting, RandomModel& target,
                     const std::map<Text, double>& output) {
  double difference = 0.0;
  double total = 0.0;
  size_t seen = 0;
  Text text = {0};
  const std::function<void(double)> walk = [&](double prob) {
    if (static_cast<int>(text.size()) == 1 + kOutput) {
      const auto it = output.find(text);
      const double found = it == output.end() ? 0.0 : it->second;
      seen += it != output.end();
      total += found;
      difference = std::max(difference, std::abs(found - prob));
      return;
    }
    const std::vector<double> probs = NaiveWarp(target.Logits(text), setting.sampling);
    for (int token = 0; token < setting.vocab; ++token) {
      text.push_back(token);
      walk(prob * probs[token]);
      text.pop_back();
    }
  };
  walk(1.0);
  EXPECT_EQ(seen, output.size());
  EXPECT_NEAR(total, 1.0, 1e-12);
  return difference;
}

const SamplingOptions kSamplings[] = {
    {.temperature = 1.0},
    {.temperature = 0.7, .top_k = 3},
    {.temperature = 1.3, .top_p = 0.8},
    {.temperature = 1.0, .top_k = 4, .top_p = 0.6},
    {.temperature = 0.0},
};

class LosslessTest : public testing::TestWithParam<DrawMethod> {};

TEST_P(LosslessTest, OutputHasTheTargetsDistribution) {
  struct Case {
    int vocab;
    const char* shape;
  };
  // Chains, siblings on both levels, uneven subtrees, more siblings than tokens that can be drawn.
  const Case cases[] = {
      {4, "chain:1"}, {5, "chain:2"},   {4, "topk:2,2"}, {5, "topk:2,2"},     {6, "((()),(()),())"},
      {6, "topk:3"},  {4, "((()),())"}, {4, "topk:4"},   {5, "((),((),()))"},
  };
  int outcomes = 0;
  for (const Case& c : cases) {
    for (const SamplingOptions& sampling : kSamplings) {
      for (uint64_t seed = 0; seed < 6; ++seed) {
        const Setting setting{c.vocab, c.shape, GetParam(), sampling, seed};
        RandomModel target(c.vocab, 100 + seed);
        RandomModel drafter(c.vocab, 200 + seed);
        int runs = 0;
        const auto output = OutputDistribution(setting, target, drafter, nullptr, &runs);
        outcomes += runs;
        EXPECT_LE(MaxDifference(setting, target, output), 1e-12)
            << "vocabulary " << c.vocab << ", shape " << c.shape << ", temperature "
            << sampling.temperature << ", top_k " << sampling.top_k << ", top_p " << sampling.top_p
            << ", seed " << seed;
        if (HasFatalFailure()) return;
      }
    }
  }
  // A guard against an enumeration that stops early: far fewer would not cover these trees.
  EXPECT_GT(outcomes, GetParam() == DrawMethod::kDeterministic ? 1000 : 50000);
}

// A draft that is the target itself: the residual is empty up to rounding.
TEST_P(LosslessTest, DraftThatEqualsTheTarget) {
  for (const SamplingOptions& sampling : kSamplings) {
    for (const char* shape : {"topk:2,2", "topk:3"}) {
      const Setting setting{4, shape, GetParam(), sampling, 1};
      RandomModel target(4, 7);
      RandomModel drafter(4, 7);
      const auto output = OutputDistribution(setting, target, drafter);
      EXPECT_LE(MaxDifference(setting, target, output), 1e-12) << shape;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Methods, LosslessTest,
                         testing::Values(DrawMethod::kDeterministic, DrawMethod::kWithReplacement,
                                         DrawMethod::kWithoutReplacement),
                         [](const auto& info) {
                           return info.param == DrawMethod::kDeterministic ? "Deterministic"
                                  : info.param == DrawMethod::kWithReplacement
                                      ? "WithReplacement"
                                      : "WithoutReplacement";
                         });

// The check can fail. Siblings sorted by draft probability before they are offered: the mistake of
// a published system, whose output distribution for these p and q is known.
TEST(LosslessCheckTest, CatchesSortedSiblings) {
  const double target_prob[] = {0.1, 0.2, 0.3, 0.4};
  const double draft_prob[] = {0.5, 0.3, 0.15, 0.05};
  const double known_wrong[] = {0.166, 0.103, 0.246, 0.485};
  for (const bool sorted : {false, true}) {
    Enumeration enumeration;
    std::vector<double> output(4, 0.0);
    enumeration.ForEachOutcome([&] {
      DraftTree draft;
      (void)*draft.AddNode(kPrefix, TokenId(0));
      Distribution& drawn_from = draft.proposals[0].draft_prob;
      Distribution residual;
      for (int token = 0; token < 4; ++token) {
        drawn_from.tokens.push_back(TokenId(token));
        drawn_from.probs.push_back(draft_prob[token]);
        residual.tokens.push_back(TokenId(token));
        residual.probs.push_back(target_prob[token]);
      }
      Distribution rest;
      ASSERT_TRUE(DrawChildren(
                      NodeId(0), {DrawMethod::kWithoutReplacement, 2, 10},
                      [&](const Distribution& from) { return enumeration.Sample(from); }, &rest,
                      &draft)
                      .ok());
      if (sorted) {
        std::ranges::sort(draft.proposals[0].draws, {},
                          [&](NodeId child) { return -draft_prob[draft.tree.token(child).value]; });
      }
      Distribution scratch;
      const auto outcome = DecideNode(draft, NodeId(0), enumeration, residual, scratch);
      ASSERT_TRUE(outcome.ok());
      output[outcome->token.value] += enumeration.weight();
    });
    double difference = 0.0;
    for (int token = 0; token < 4; ++token) {
      difference = std::max(difference, std::abs(output[token] - target_prob[token]));
      if (sorted) {
        EXPECT_NEAR(output[token], known_wrong[token], 5e-4);
      }
    }
    if (sorted) {
      EXPECT_GT(difference, 0.05);
    } else {
      EXPECT_LE(difference, 1e-12);
    }
  }
}

// The same mistake in whole trees, and another: proposals that claim a wrong draw method.
TEST(LosslessCheckTest, CatchesTamperedTrees) {
  const auto difference = [](DrawMethod drawn, const Tamper& tamper) {
    const Setting setting{4, "topk:2,2", drawn, {.temperature = 1.0}, 1};
    RandomModel target(4, 101);
    RandomModel drafter(4, 201);
    return MaxDifference(setting, target, OutputDistribution(setting, target, drafter, tamper));
  };
  EXPECT_LE(difference(DrawMethod::kWithoutReplacement, nullptr), 1e-12);
  EXPECT_GT(difference(DrawMethod::kWithoutReplacement,
                       [](DraftTree* draft) {
                         for (int i = 0; i < draft->tree.size(); ++i) {
                           Proposal& proposal = draft->proposals[i];
                           std::ranges::sort(proposal.draws, {}, [&](NodeId child) {
                             return -proposal.draft_prob.Probability(draft->tree.token(child));
                           });
                         }
                       }),
            1e-3);
  const auto claim = [](DrawMethod method) {
    return [method](DraftTree* draft) {
      for (int i = 0; i < draft->tree.size(); ++i) draft->proposals[i].method = method;
    };
  };
  EXPECT_GT(difference(DrawMethod::kWithoutReplacement, claim(DrawMethod::kWithReplacement)), 1e-3);
  // Draws that are offered as chosen tokens cost acceptance, but no exactness.
  EXPECT_LE(difference(DrawMethod::kWithoutReplacement, claim(DrawMethod::kDeterministic)), 1e-12);
}

}  // namespace
}  // namespace canopy
