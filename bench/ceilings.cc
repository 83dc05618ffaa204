#include "bench/ceilings.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

#include "core/ops/simd.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "bench/ceilings.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace canopy {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

// Reads [begin, begin + count) words, a multiple of 64, and returns something that depends on all.
uint32_t ReadWords(const uint32_t* begin, size_t count) {
  const hn::CappedTag<uint32_t, 16> d;
  const size_t lanes = hn::Lanes(d);
  auto a = hn::Zero(d), b = a, c = a, e = a;
  for (size_t i = 0; i < count; i += 4 * lanes) {
    a = hn::Xor(a, hn::Load(d, begin + i));
    b = hn::Xor(b, hn::Load(d, begin + i + lanes));
    c = hn::Xor(c, hn::Load(d, begin + i + 2 * lanes));
    e = hn::Xor(e, hn::Load(d, begin + i + 3 * lanes));
  }
  return hn::GetLane(hn::Xor(hn::Xor(a, b), hn::Xor(c, e)));
}

// `count` rounds of twelve independent vector multiply-adds; returns how many f32 multiply-adds
// that was.
double MultiplyAdds(int64_t count, float* result) {
  const hn::CappedTag<float, 16> d;
  // Twelve: more than latency times throughput of any core so far. Each depends on itself alone.
  auto s0 = hn::Set(d, result[0]), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0;
  auto s6 = hn::Set(d, result[1]), s7 = s6, s8 = s6, s9 = s6, s10 = s6, s11 = s6;
  const auto x = hn::Set(d, result[2]), y = hn::Set(d, result[3]);
  for (int64_t i = 0; i < count; ++i) {
    s0 = hn::MulAdd(s0, x, y), s1 = hn::MulAdd(s1, x, y), s2 = hn::MulAdd(s2, x, y);
    s3 = hn::MulAdd(s3, x, y), s4 = hn::MulAdd(s4, x, y), s5 = hn::MulAdd(s5, x, y);
    s6 = hn::MulAdd(s6, x, y), s7 = hn::MulAdd(s7, x, y), s8 = hn::MulAdd(s8, x, y);
    s9 = hn::MulAdd(s9, x, y), s10 = hn::MulAdd(s10, x, y), s11 = hn::MulAdd(s11, x, y);
#if defined(__GNUC__) && defined(__x86_64__) && HWY_TARGET != HWY_SCALAR && HWY_TARGET != HWY_EMU128
    // The twelve hold equal values in two groups: keeps the compiler from computing two of them.
    asm volatile(""
                 : "+v"(s0.raw), "+v"(s1.raw), "+v"(s2.raw), "+v"(s3.raw), "+v"(s4.raw),
                   "+v"(s5.raw));
    asm volatile(""
                 : "+v"(s6.raw), "+v"(s7.raw), "+v"(s8.raw), "+v"(s9.raw), "+v"(s10.raw),
                   "+v"(s11.raw));
#endif
  }
  auto sum = hn::Add(hn::Add(hn::Add(s0, s1), hn::Add(s2, s3)), hn::Add(s4, s5));
  sum = hn::Add(sum, hn::Add(hn::Add(hn::Add(s6, s7), hn::Add(s8, s9)), hn::Add(s10, s11)));
  result[0] = hn::GetLane(sum);
  return 12.0 * count * hn::Lanes(d);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace canopy
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace canopy {
namespace {

HWY_EXPORT(ReadWords);
HWY_EXPORT(MultiplyAdds);

// Units of work a second: the median of `passes` calls of work(), which returns the units it did.
template <typename F>
double MedianRate(int passes, const F& work) {
  std::vector<double> rates;
  for (int i = 0; i < passes; ++i) {
    const auto start = std::chrono::steady_clock::now();
    const double units = work();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    rates.push_back(units / seconds.count());
  }
  std::nth_element(rates.begin(), rates.begin() + passes / 2, rates.end());
  return rates[passes / 2];
}

}  // namespace

double MeasureReadBandwidth(CpuBackend& cpu, size_t bytes) {
  const int threads = cpu.pool().threads();
  const size_t words = bytes / threads / 1024 * 256;  // a thread's part, in whole KiB
  absl::StatusOr<Buffer> buffer = cpu.Allocate(words * threads * sizeof(uint32_t));
  CHECK(buffer.ok());
  auto* data = buffer->as<uint32_t>();
  cpu.pool().Run(threads, [&](int i) { std::fill_n(data + i * words, words, 3u + i); });
  const auto read = HWY_DYNAMIC_DISPATCH(ReadWords);
  std::vector<uint32_t> sums(threads);
  // Small buffers several times a pass, so that starting the threads does not count.
  const int repeats = static_cast<int>(std::max<size_t>(1, (size_t{128} << 20) / bytes));
  return MedianRate(15, [&] {
    cpu.pool().Run(threads, [&](int i) {
      for (int r = 0; r < repeats; ++r) sums[i] ^= read(data + i * words, words);
      volatile uint32_t keep = sums[i];
      (void)keep;
    });
    return static_cast<double>(words) * threads * sizeof(uint32_t) * repeats;
  });
}

double MeasureMultiplyAddPeak(CpuBackend& cpu) {
  const int threads = cpu.pool().threads();
  const auto multiply_adds = HWY_DYNAMIC_DISPATCH(MultiplyAdds);
  return MedianRate(15, [&] {
    std::vector<double> done(threads);
    cpu.pool().Run(threads, [&](int i) {
      float values[4] = {0.5f, 0.25f, 0.999f, 0.001f};
      done[i] = multiply_adds(1000000, values);
      volatile float keep = values[0];
      (void)keep;
    });
    double total = 0.0;
    for (double d : done) total += d;
    return total;
  });
}

}  // namespace canopy
#endif  // HWY_ONCE
