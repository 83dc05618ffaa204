// From logits to the distribution that is sampled: temperature, top-k and top-p, the same for
// target and draft.

#ifndef CANOPY_VERIFY_SAMPLING_H_
#define CANOPY_VERIFY_SAMPLING_H_

#include <cstdint>
#include <span>
#include <vector>

#include "core/random.h"
#include "core/status.h"
#include "trees/ids.h"

namespace canopy {

struct SamplingOptions {
  double temperature = 0.0;  // 0: greedy
  int top_k = 0;             // keep the k most probable tokens; 0: all
  double top_p = 1.0;        // then keep the fewest most probable tokens whose mass reaches top_p
};

// InvalidArgument names the option that is out of range.
absl::Status Validate(const SamplingOptions& options);

// A distribution over tokens, as its support in ascending token order. probs sum to 1 and are
// positive. Two distributions are combined by token, never by index.
struct Distribution {
  std::vector<TokenId> tokens;
  std::vector<double> probs;

  double Probability(TokenId token) const;  // 0 off the support; binary search
  // The token at which the cumulative probability first exceeds `uniform` in (0, 1).
  TokenId Sample(double uniform) const;
};

// Takes `token` out of the distribution and scales the rest to 1. The rest is empty, and stays so,
// if `token` was all there was.
void Exclude(TokenId token, Distribution* distribution);

// residual <- max(residual - other, 0), scaled to 1, by token. False, and an empty residual, if
// nothing is left: then the two agree up to rounding.
bool Subtract(const Distribution& other, Distribution* residual);

// The token with the greatest logit; of equals, the lowest id.
TokenId Argmax(std::span<const float> logits);
// The k tokens with the greatest logits (all, where there are fewer), best first; equal logits by
// ascending id.
void TopK(std::span<const float> logits, int k, std::vector<TokenId>* tokens);

// Softmax of logits / temperature in double, then top-k, then top-p, renormalised. Ties at a cut go
// to the lower id. Temperature 0 gives the argmax with probability 1. A NaN logit counts as
// -infinity. `out` is reused without allocation once it has grown to the vocabulary.
void Warp(std::span<const float> logits, const SamplingOptions& options, Distribution* out);

// A token and its time in the exponential race -log(uniform(position, token)) / prob. The first to
// arrive is the argmax of log prob + gumbel(position, token), the order is that of falling sums.
struct Arrival {
  double time = 0.0;
  TokenId token;
};

// The k first tokens (all, where the support is smaller) in order of arrival. k is at least 1.
void GumbelTopK(const Distribution& distribution, const NoiseStream& noise, int64_t position, int k,
                std::vector<Arrival>* arrivals);
// The first of them.
TokenId GumbelArgmax(const Distribution& distribution, const NoiseStream& noise, int64_t position);

}  // namespace canopy

#endif  // CANOPY_VERIFY_SAMPLING_H_
