#include "tests/support/matrices.h"

#include <cmath>
#include <cstring>

namespace canopy {

uint32_t TestRandom::Bits() {
  state_ ^= state_ << 13;
  state_ ^= state_ >> 7;
  state_ ^= state_ << 17;
  return static_cast<uint32_t>(state_ >> 32);
}

float TestRandom::Uniform() {
  return static_cast<float>(static_cast<int32_t>(Bits() >> 8) - (1 << 23)) * 0x1p-23f;
}

Tensor RandomTensor(Backend& backend, int rows, int columns, TestRandom& random) {
  absl::StatusOr<Tensor> tensor = Tensor::Allocate(backend, rows, columns);
  CHECK(tensor.ok());
  const Matrix view = tensor->view();
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) view.row(r)[c] = random.Uniform();
    for (int c = columns; c < view.stride; ++c) view.row(r)[c] = 1e30f;
  }
  return *std::move(tensor);
}

TestWeights RandomWeights(Backend& backend, DType dtype, int out, int in, TestRandom& random) {
  TestWeights weights;
  const size_t count = static_cast<size_t>(out) * in;
  weights.stored.resize(count * SizeOf(dtype));
  weights.values.resize(count);
  for (size_t i = 0; i < count; ++i) {
    const float value = random.Uniform();
    if (dtype == DType::kF32) {
      std::memcpy(&weights.stored[4 * i], &value, 4);
      weights.values[i] = value;
      continue;
    }
    uint16_t bits = F32ToBF16(value);
    weights.values[i] = BF16ToF32(bits);
    if (dtype == DType::kF16) {
      // A sign, an exponent from 2^-9 to 2^0 and any mantissa.
      const uint32_t draw = random.Bits();
      const int exponent = static_cast<int>(draw % 10) - 9;
      const int mantissa = static_cast<int>(draw >> 8 & 0x3ff);
      bits = static_cast<uint16_t>((draw >> 31 << 15) | (exponent + 15) << 10 | mantissa);
      weights.values[i] = std::ldexp(1.0 + mantissa / 1024.0, exponent) * (draw >> 31 ? -1 : 1);
    }
    std::memcpy(&weights.stored[2 * i], &bits, 2);
  }
  const PackedMatrix::Source source{weights.stored.data(), out};
  absl::StatusOr<PackedMatrix> packed = PackedMatrix::Pack(backend, dtype, in, {&source, 1});
  CHECK(packed.ok());
  weights.packed = *std::move(packed);
  return weights;
}

}  // namespace canopy
