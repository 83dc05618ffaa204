#include "core/random.h"

#include <cmath>

namespace canopy {
namespace {

// The multipliers and key increments of Philox4x32 (Salmon et al., SC 2011, section 3.3).
constexpr uint32_t kMultiplier0 = 0xD2511F53;
constexpr uint32_t kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9;
constexpr uint32_t kWeyl1 = 0xBB67AE85;

uint32_t Low(uint64_t x) { return static_cast<uint32_t>(x); }
uint32_t High(uint64_t x) { return static_cast<uint32_t>(x >> 32); }

}  // namespace

std::array<uint32_t, 4> Philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{kMultiplier0} * counter[0];
    const uint64_t product1 = uint64_t{kMultiplier1} * counter[2];
    counter = {High(product1) ^ counter[1] ^ key[0], Low(product1),
               High(product0) ^ counter[3] ^ key[1], Low(product0)};
    key[0] += kWeyl0;
    key[1] += kWeyl1;
  }
  return counter;
}

NoiseStream::NoiseStream(uint64_t seed, uint64_t request) {
  const auto block = Philox({Low(request), High(request), 0, 0}, {Low(seed), High(seed)});
  key_ = {block[0], block[1]};
}

double NoiseStream::Uniform(int64_t position, Purpose purpose, uint32_t index) const {
  const auto at = static_cast<uint64_t>(position);
  const auto block = Philox({Low(at), High(at), static_cast<uint32_t>(purpose), index}, key_);
  const uint64_t bits = (uint64_t{block[0]} << 32 | block[1]) >> 12;
  // The middle of one of 2^52 equal intervals: exact in double, and neither 0 nor 1.
  return (static_cast<double>(bits) + 0.5) * 0x1p-52;
}

double NoiseStream::Gumbel(int64_t position, uint32_t token) const {
  return -std::log(-std::log(Uniform(position, Purpose::kGumbel, token)));
}

}  // namespace canopy
