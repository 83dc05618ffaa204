// Random matrices for tests.

#ifndef CANOPY_TESTS_SUPPORT_MATRICES_H_
#define CANOPY_TESTS_SUPPORT_MATRICES_H_

#include <cstdint>
#include <vector>

#include "core/backend.h"
#include "core/dtype.h"
#include "core/ops/packed_matrix.h"
#include "core/tensor.h"

namespace canopy {

// Uniform in [-1, 1), in 2^-23 steps: the same numbers on every machine.
class TestRandom {
 public:
  explicit TestRandom(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ull + 1) {}
  uint32_t Bits();
  float Uniform();

 private:
  uint64_t state_;
};

// [rows, columns] of uniform numbers; what lies past the last column of a row is NaN-free junk.
Tensor RandomTensor(Backend& backend, int rows, int columns, TestRandom& random);

// A weight matrix and its values in double, [out, in].
struct TestWeights {
  std::vector<unsigned char> stored;  // as in a checkpoint
  std::vector<double> values;
  PackedMatrix packed;
};
TestWeights RandomWeights(Backend& backend, DType dtype, int out, int in, TestRandom& random);

}  // namespace canopy

#endif  // CANOPY_TESTS_SUPPORT_MATRICES_H_
