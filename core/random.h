// Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011), keyed by what the number is
// for, so that it is the same whatever was drawn before it, on host and device.

#ifndef CANOPY_CORE_RANDOM_H_
#define CANOPY_CORE_RANDOM_H_

#include <array>
#include <cstdint>

namespace canopy {

// One block of Philox4x32-10.
std::array<uint32_t, 4> Philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

enum class Purpose : uint32_t {
  kDraft = 1,     // drawing a draft's siblings
  kAccept = 2,    // accepting or rejecting a sibling
  kResidual = 3,  // the target's own token
  kGumbel = 4,    // position-keyed noise shared by draft and target, one value a token
};

// The noise of one request. A value; cheap to copy; const calls are safe from several threads.
//
// Keyed by absolute position, not by round: a position that several rounds draft is decided in one
// of them only, and a round decides the children of one node a position, so no number serves two
// decisions.
class NoiseStream {
 public:
  // The key of the request's numbers is the block of counter `request` under the key `seed`.
  NoiseStream(uint64_t seed, uint64_t request);

  // Uniform in (0, 1), never 0 or 1, with 52 random bits. `position` is the absolute position, in
  // prompt plus output, of the token that the number helps to choose; `index` tells several numbers
  // for one position and purpose apart.
  double Uniform(int64_t position, Purpose purpose, uint32_t index = 0) const;

  // -log(-log(Uniform(position, kGumbel, token))): the noise of a token at a position.
  double Gumbel(int64_t position, uint32_t token) const;

 private:
  std::array<uint32_t, 2> key_;
};

}  // namespace canopy

#endif  // CANOPY_CORE_RANDOM_H_
