#include "core/cpu_backend.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <string>
#include <vector>

#include "core/ops/simd.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/matrices.h"

namespace canopy {
namespace {

using testing::HasSubstr;

TEST(CpuBackendTest, ThreadCount) {
  EXPECT_EQ((*CpuBackend::Create(3))->pool().threads(), 3);
  cpu_set_t cores;
  ASSERT_EQ(sched_getaffinity(0, sizeof(cores), &cores), 0);
  EXPECT_EQ((*CpuBackend::Create())->pool().threads(), CPU_COUNT(&cores));
  for (int threads : {-1, 1025}) {
    const absl::Status status = CpuBackend::Create(threads).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(std::to_string(threads)));
  }
}

TEST(CpuBackendTest, Description) {
  EXPECT_EQ((*CpuBackend::Create(1))->Description(), "cpu (" + SimdTargetName() + ", 1 thread)");
  EXPECT_EQ((*CpuBackend::Create(2))->Description(), "cpu (" + SimdTargetName() + ", 2 threads)");
}

// From a byte to beyond a huge page, and around its bounds.
TEST(CpuBackendTest, BuffersAreAlignedAndZeroedAndWritable) {
  const auto cpu = *CpuBackend::Create(1);
  constexpr size_t kHuge = size_t{2} << 20;
  for (int round = 0; round < 2; ++round) {  // again, in memory that was written to before
    for (size_t bytes : {size_t{1}, size_t{63}, size_t{64}, size_t{4097}, kHuge - 1, kHuge,
                         kHuge + 1, 3 * kHuge + 12345}) {
      absl::StatusOr<Buffer> buffer = cpu->Allocate(bytes);
      ASSERT_TRUE(buffer.ok()) << buffer.status();
      EXPECT_EQ(buffer->bytes(), bytes);
      EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer->data()) % 64, 0u);
      auto* data = buffer->as<unsigned char>();
      EXPECT_TRUE(std::all_of(data, data + bytes, [](unsigned char c) { return c == 0; })) << bytes;
      std::fill_n(data, bytes, 0xa5);
    }
  }
}

TEST(CpuBackendTest, CountsMemory) {
  const auto cpu = *CpuBackend::Create(1);
  EXPECT_EQ(cpu->memory().bytes_in_use, 0u);
  EXPECT_EQ(cpu->memory().allocations, 0u);
  {
    Buffer small = *cpu->Allocate(1000);
    Buffer large = *cpu->Allocate(5 << 20);
    EXPECT_EQ(cpu->memory().bytes_in_use, 1000u + (5u << 20));
    Buffer moved = std::move(large);
    EXPECT_EQ(cpu->memory().bytes_in_use, 1000u + (5u << 20));
    moved = Buffer();
    EXPECT_EQ(cpu->memory().bytes_in_use, 1000u);
    small = *cpu->Allocate(10);  // frees the 1000 bytes after the 10 were taken
    EXPECT_EQ(cpu->memory().bytes_in_use, 10u);
  }
  EXPECT_EQ(cpu->memory().bytes_in_use, 0u);
  EXPECT_EQ(cpu->memory().peak_bytes, 1000u + (5u << 20));
  EXPECT_EQ(cpu->memory().allocations, 3u);
}

// Random sizes taken and given back in random order: buffers never overlap, come zeroed, and all of
// it is counted. Sizes straddle the bound between heap and arena, and what a chunk of the arena
// holds.
TEST(CpuBackendTest, BuffersDoNotOverlapUnderChurn) {
  const auto cpu = *CpuBackend::Create(1);
  TestRandom random(1);
  struct Held {
    Buffer buffer;
    unsigned char mark;
  };
  std::vector<Held> held;
  size_t in_use = 0;
  const auto intact = [](const Held& h) {
    const auto* data = h.buffer.as<const unsigned char>();
    return std::all_of(data, data + h.buffer.bytes(), [&](unsigned char c) { return c == h.mark; });
  };
  for (int step = 0; step < 600; ++step) {
    if (held.size() < 4 || (held.size() < 40 && random.Bits() % 2 == 0)) {
      const size_t bytes = 1 + random.Bits() % (random.Bits() % 8 == 0 ? 30u << 20 : 200u << 10);
      Held h{*cpu->Allocate(bytes), static_cast<unsigned char>(1 + step % 255)};
      auto* data = h.buffer.as<unsigned char>();
      ASSERT_EQ(reinterpret_cast<uintptr_t>(data) % 64, 0u);
      ASSERT_TRUE(std::all_of(data, data + bytes, [](unsigned char c) { return c == 0; }));
      std::fill_n(data, bytes, h.mark);
      in_use += bytes;
      held.push_back(std::move(h));
    } else {
      const size_t victim = random.Bits() % held.size();
      ASSERT_TRUE(intact(held[victim]));
      in_use -= held[victim].buffer.bytes();
      std::swap(held[victim], held.back());
      held.pop_back();
    }
    ASSERT_EQ(cpu->memory().bytes_in_use, in_use);
  }
  for (const Held& h : held) EXPECT_TRUE(intact(h));
  held.clear();
  EXPECT_EQ(cpu->memory().bytes_in_use, 0u);
}

// What is mapped by the process, in bytes.
size_t MappedBytes() {
  std::ifstream statm("/proc/self/statm");
  size_t pages = 0;
  statm >> pages;
  return pages * sysconf(_SC_PAGESIZE);
}

TEST(CpuBackendTest, GivesMemoryBackToTheSystem) {
  const auto cpu = *CpuBackend::Create(1);
  const size_t before = MappedBytes();
  if (before == 0) GTEST_SKIP() << "/proc/self/statm is not readable here";
  // Large enough not to come from the heap under the address sanitizer either, which keeps what was
  // freed. Address space only: nothing touches the pages.
  constexpr size_t kBytes = size_t{300} << 20;
  {
    std::vector<Buffer> buffers;
    for (int i = 0; i < 8; ++i) buffers.push_back(*cpu->Allocate(kBytes));
    EXPECT_GE(MappedBytes(), before + 8 * kBytes);
  }
  EXPECT_LT(MappedBytes(), before + kBytes);
}

TEST(CpuBackendTest, NothingIsABufferOfNoBytes) {
  const auto cpu = *CpuBackend::Create(1);
  const Buffer buffer = *cpu->Allocate(0);
  EXPECT_EQ(buffer.bytes(), 0u);
  EXPECT_EQ(cpu->memory().allocations, 0u);
}

TEST(CpuBackendTest, RefusesWhatDoesNotFit) {
  const auto cpu = *CpuBackend::Create(1);
  const Buffer held = *cpu->Allocate(4096);
  for (size_t bytes : {SIZE_MAX, SIZE_MAX - 100, SIZE_MAX / 2, size_t{1} << 60}) {
    const absl::Status status = cpu->Allocate(bytes).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_THAT(std::string(status.message()), HasSubstr(std::to_string(bytes)));
    EXPECT_THAT(std::string(status.message()), HasSubstr("4096 bytes are in use"));
  }
  EXPECT_EQ(cpu->memory().bytes_in_use, 4096u);
  EXPECT_EQ(cpu->memory().allocations, 1u);
}

}  // namespace
}  // namespace canopy
