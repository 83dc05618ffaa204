#include "verify/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace canopy {
namespace {

double Sum(std::span<const double> values) {
  // Four sums side by side: one would wait for each of its additions.
  double sums[4] = {};
  size_t i = 0;
  for (; i + 4 <= values.size(); i += 4) {
    for (int lane = 0; lane < 4; ++lane) sums[lane] += values[i + lane];
  }
  for (; i < values.size(); ++i) sums[0] += values[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

constexpr float kLowest = -std::numeric_limits<float>::infinity();

float OrLowest(float logit) { return std::isnan(logit) ? kLowest : logit; }

// A strict order of tokens by falling logit, then rising id.
struct Better {
  std::span<const float> logits;
  bool operator()(TokenId a, TokenId b) const {
    const float x = OrLowest(logits[a.value]);
    const float y = OrLowest(logits[b.value]);
    return x != y ? x > y : a < b;
  }
};

void PointMass(TokenId token, Distribution* out) {
  out->tokens.assign(1, token);
  out->probs.assign(1, 1.0);
}

// Scales to sum 1; a single probability becomes 1 exactly.
void Normalize(std::vector<double>* probs) {
  const double sum = Sum(*probs);
  for (double& prob : *probs) prob /= sum;
}

}  // namespace

absl::Status Validate(const SamplingOptions& options) {
  if (!(options.temperature >= 0.0) || std::isinf(options.temperature)) {
    return absl::InvalidArgumentError(absl::StrCat("sampling temperature is ", options.temperature,
                                                   "; expected 0 (greedy) or more"));
  }
  if (options.top_k < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("sampling top_k is ", options.top_k, "; expected 0 (all tokens) or more"));
  }
  if (!(options.top_p > 0.0 && options.top_p <= 1.0)) {
    return absl::InvalidArgumentError(
        absl::StrCat("sampling top_p is ", options.top_p, "; expected above 0 and at most 1"));
  }
  return absl::OkStatus();
}

double Distribution::Probability(TokenId token) const {
  const auto it = std::lower_bound(tokens.begin(), tokens.end(), token);
  return it == tokens.end() || *it != token ? 0.0 : probs[it - tokens.begin()];
}

TokenId Distribution::Sample(double uniform) const {
  double cumulative = 0.0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    cumulative += probs[i];
    if (uniform < cumulative) return tokens[i];
  }
  return tokens.back();  // the sum may round to just below 1
}

bool Subtract(const Distribution& other, Distribution* residual) {
  std::vector<TokenId>& tokens = residual->tokens;
  std::vector<double>& probs = residual->probs;
  const size_t size = tokens.size();
  if (other.tokens.size() == size && std::ranges::equal(other.tokens, tokens)) {
    for (size_t i = 0; i < size; ++i) probs[i] = std::max(probs[i] - other.probs[i], 0.0);
  } else {
    size_t j = 0;
    for (size_t i = 0; i < size; ++i) {
      while (j < other.tokens.size() && other.tokens[j] < tokens[i]) ++j;
      if (j == other.tokens.size()) break;
      if (other.tokens[j] == tokens[i]) probs[i] = std::max(probs[i] - other.probs[j], 0.0);
    }
  }
  const double mass = Sum(probs);
  size_t kept = 0;
  for (size_t i = 0; i < size; ++i) {
    const double rest = probs[i];
    tokens[kept] = tokens[i];
    probs[kept] = rest / mass;
    kept += rest > 0.0;
  }
  tokens.resize(kept);
  probs.resize(kept);
  return kept > 0;
}

void Exclude(TokenId token, Distribution* distribution) {
  const auto it = std::lower_bound(distribution->tokens.begin(), distribution->tokens.end(), token);
  if (it == distribution->tokens.end() || *it != token) return;
  distribution->probs.erase(distribution->probs.begin() + (it - distribution->tokens.begin()));
  distribution->tokens.erase(it);
  Normalize(&distribution->probs);
}

TokenId Argmax(std::span<const float> logits) {
  // NaN never compares greater; if all are NaN or -infinity, token 0 is as good as any.
  int best = 0;
  float best_logit = OrLowest(logits[0]);
  for (size_t i = 1; i < logits.size(); ++i) {
    if (logits[i] > best_logit) {
      best = static_cast<int>(i);
      best_logit = logits[i];
    }
  }
  return TokenId(best);
}

void TopK(std::span<const float> logits, int k, std::vector<TokenId>* tokens) {
  const Better better{logits};
  const int vocab = static_cast<int>(logits.size());
  k = std::min(k, vocab);
  tokens->clear();
  if (k <= 0) return;
  // A heap with the worst of the best so far on top.
  for (int i = 0; i < k; ++i) tokens->push_back(TokenId(i));
  std::make_heap(tokens->begin(), tokens->end(), better);
  for (int i = k; i < vocab; ++i) {
    if (!(logits[i] > OrLowest(logits[tokens->front().value]))) continue;
    std::pop_heap(tokens->begin(), tokens->end(), better);
    tokens->back() = TokenId(i);
    std::push_heap(tokens->begin(), tokens->end(), better);
  }
  std::sort_heap(tokens->begin(), tokens->end(), better);
}

void Warp(std::span<const float> logits, const SamplingOptions& options, Distribution* out) {
  const TokenId best = Argmax(logits);
  const double max_logit = OrLowest(logits[best.value]);
  // An infinite maximum leaves nothing to compare by size.
  if (options.temperature == 0.0 || std::isinf(max_logit)) return PointMass(best, out);

  const int vocab = static_cast<int>(logits.size());
  std::vector<TokenId>& tokens = out->tokens;
  std::vector<double>& probs = out->probs;
  if (options.top_k > 0 && options.top_k < vocab) {
    TopK(logits, options.top_k, &tokens);
    std::sort(tokens.begin(), tokens.end());
  } else {
    tokens.resize(vocab);
    for (int i = 0; i < vocab; ++i) tokens[i] = TokenId(i);
  }
  // Compacted as it goes: probabilities that underflow are not part of the support.
  probs.resize(tokens.size());
  size_t support = 0;
  for (const TokenId token : tokens) {
    // The difference first: divided, a large logit over a small temperature would overflow.
    const double prob = std::exp((OrLowest(logits[token.value]) - max_logit) / options.temperature);
    if (!(prob > 0.0)) continue;
    tokens[support] = token;
    probs[support] = prob;
    ++support;
  }
  tokens.resize(support);
  probs.resize(support);
  Normalize(&probs);
  if (options.top_p >= 1.0) return;

  // A heap of the probabilities alone, in spare room behind them, gives the cut: the least
  // probability that is kept, and how many tokens of just that probability are.
  probs.resize(2 * support);
  const auto heap = probs.begin() + static_cast<int64_t>(support);
  std::copy(probs.begin(), heap, heap);
  auto heap_end = probs.end();
  std::make_heap(heap, heap_end);
  double mass = 0.0;
  double cut = 0.0;
  size_t at_cut = 0;
  while (heap != heap_end && mass < options.top_p) {
    std::pop_heap(heap, heap_end--);
    at_cut = *heap_end == cut ? at_cut + 1 : 1;
    cut = *heap_end;
    mass += cut;
  }
  size_t kept = 0;
  for (size_t i = 0; i < support; ++i) {
    if (probs[i] < cut || (probs[i] == cut && at_cut == 0)) continue;
    if (probs[i] == cut) --at_cut;
    tokens[kept] = tokens[i];
    probs[kept] = probs[i];
    ++kept;
  }
  tokens.resize(kept);
  probs.resize(kept);
  Normalize(&probs);
}

void GumbelTopK(const Distribution& distribution, const NoiseStream& noise, int64_t position, int k,
                std::vector<Arrival>* arrivals) {
  // Equal times (which 52 bits make all but impossible) go to the lower id.
  const auto earlier = [](const Arrival& a, const Arrival& b) {
    return a.time != b.time ? a.time < b.time : a.token < b.token;
  };
  const size_t wanted = std::min<size_t>(k, distribution.tokens.size());
  arrivals->clear();
  for (size_t i = 0; i < distribution.tokens.size(); ++i) {
    const TokenId token = distribution.tokens[i];
    const double uniform =
        noise.Uniform(position, Purpose::kGumbel, static_cast<uint32_t>(token.value));
    const double prob = distribution.probs[i];
    const bool full = arrivals->size() == wanted;
    // -log(u) >= 1 - u: most tokens are told to be late without a logarithm.
    if (full && (1.0 - uniform) / prob > arrivals->front().time) continue;
    const Arrival arrival{-std::log(uniform) / prob, token};
    if (full) {
      if (!earlier(arrival, arrivals->front())) continue;
      std::pop_heap(arrivals->begin(), arrivals->end(), earlier);
      arrivals->back() = arrival;
    } else {
      arrivals->push_back(arrival);
    }
    std::push_heap(arrivals->begin(), arrivals->end(), earlier);
  }
  std::sort_heap(arrivals->begin(), arrivals->end(), earlier);
}

TokenId GumbelArgmax(const Distribution& distribution, const NoiseStream& noise, int64_t position) {
  double best_time = std::numeric_limits<double>::infinity();
  TokenId best = distribution.tokens.front();
  for (size_t i = 0; i < distribution.tokens.size(); ++i) {
    const TokenId token = distribution.tokens[i];
    const double uniform =
        noise.Uniform(position, Purpose::kGumbel, static_cast<uint32_t>(token.value));
    // -log(u) >= 1 - u: most tokens are told to be late without a logarithm.
    if ((1.0 - uniform) / distribution.probs[i] > best_time) continue;
    const double time = -std::log(uniform) / distribution.probs[i];
    if (time < best_time) {
      best_time = time;
      best = token;
    }
  }
  return best;
}

}  // namespace canopy
