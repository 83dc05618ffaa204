#include "core/thread_pool.h"

#include <chrono>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace canopy {
namespace {

class ThreadPoolTest : public testing::TestWithParam<int> {};

TEST_P(ThreadPoolTest, RunsEveryTaskOnce) {
  ThreadPool pool(GetParam());
  EXPECT_EQ(pool.threads(), GetParam());
  for (int tasks : {0, 1, 2, 3, 7, 64, 1000}) {
    std::vector<int> calls(tasks, 0);  // plain: each is written by one task, which tsan checks
    pool.Run(tasks, [&](int i) { ++calls[i]; });
    EXPECT_EQ(calls, std::vector<int>(tasks, 1)) << tasks << " tasks";
  }
}

// Loops back to back, so that workers arrive late, early and in the middle of a loop.
TEST_P(ThreadPoolTest, LoopsSeeTheResultsOfTheLoopBefore) {
  ThreadPool pool(GetParam());
  std::vector<int> values(13, 0);
  for (int round = 0; round < 5000; ++round) {
    const int tasks = 1 + round % 13;
    std::vector<int> before = values;
    pool.Run(tasks, [&](int i) { values[i] = before[(i + 1) % 13] + i; });
    for (int i = 0; i < 13; ++i) {
      ASSERT_EQ(values[i], i < tasks ? before[(i + 1) % 13] + i : before[i]) << "round " << round;
    }
  }
}

TEST_P(ThreadPoolTest, WakesSleepingWorkers) {
  ThreadPool pool(GetParam());
  for (int round = 0; round < 20; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(round % 3));
    std::vector<int> calls(50, 0);
    pool.Run(50, [&](int i) { ++calls[i]; });
    ASSERT_EQ(calls, std::vector<int>(50, 1));
  }
}

TEST_P(ThreadPoolTest, LongAndShortTasksMix) {
  ThreadPool pool(GetParam());
  std::vector<int> calls(8, 0);
  for (int round = 0; round < 10; ++round) {
    pool.Run(8, [&](int i) {
      if (i == round % 8) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      ++calls[i];
    });
  }
  EXPECT_EQ(calls, std::vector<int>(8, 10));
}

// More threads than any small machine has cores: still finishes.
INSTANTIATE_TEST_SUITE_P(Threads, ThreadPoolTest, testing::Values(1, 2, 3, 5, 16));

TEST(ThreadPoolDeathlessTest, StartsAndEndsWithoutWork) {
  for (int i = 0; i < 50; ++i) ThreadPool pool(4);
}

}  // namespace
}  // namespace canopy
