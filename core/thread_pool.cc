#include "core/thread_pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace canopy {
namespace {

using Clock = std::chrono::steady_clock;

// A decode step is a hundred loops with little between them, so a worker that waits longer than
// this is between steps or done, and should leave its core to others.
constexpr std::chrono::microseconds kSpin(60);
// From here on a waiting thread lets others run between looks: with fewer free cores than threads
// the one it waits for may need this core.
constexpr std::chrono::microseconds kSpinWithoutYield(20);

inline void Pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until ready() or until `limit` has passed; returns ready().
template <typename Ready>
bool SpinUntil(const Ready& ready, Clock::duration limit) {
  for (int i = 0; i < 32; ++i) {
    if (ready()) return true;
    Pause();
  }
  const Clock::time_point start = Clock::now();
  while (true) {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      Pause();
    }
    const Clock::duration waited = Clock::now() - start;
    if (waited > limit) return ready();
    if (waited > kSpinWithoutYield) std::this_thread::yield();
  }
}

}  // namespace

// `ticket` holds the number of the current loop in its high half and the number of tasks that
// nobody has taken in its low half. A thread takes a task by counting it down in one
// compare-and-swap, so a worker that comes late finds either no task or one of the current loop,
// and the caller need not wait for workers that took none. The other fields of the loop change only
// while no task is out.
struct ThreadPool::Impl {
  alignas(64) std::atomic<uint64_t> ticket{0};
  void (*call)(const void*, int) = nullptr;
  const void* task = nullptr;
  int tasks = 0;
  alignas(64) std::atomic<int> finished{0};
  alignas(64) std::atomic<int> sleepers{0};
  std::atomic<bool> stop{false};
  std::mutex mutex;
  std::condition_variable wake;
  std::vector<std::thread> workers;

  bool HasWork() const { return static_cast<uint32_t>(ticket.load()) != 0; }

  void TakeTasks() {
    int done = 0;
    uint64_t seen = ticket.load(std::memory_order_acquire);
    while (static_cast<uint32_t>(seen) != 0) {
      if (!ticket.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel,
                                        std::memory_order_acquire)) {
        continue;
      }
      call(task, tasks - static_cast<int>(static_cast<uint32_t>(seen)));
      ++done;
      seen = ticket.load(std::memory_order_acquire);
    }
    if (done > 0) finished.fetch_add(done, std::memory_order_release);
  }

  void Work() {
    while (!stop.load()) {
      if (SpinUntil([this] { return HasWork() || stop.load(std::memory_order_relaxed); }, kSpin)) {
        TakeTasks();
        continue;
      }
      std::unique_lock<std::mutex> lock(mutex);
      sleepers.fetch_add(1);
      wake.wait(lock, [this] { return HasWork() || stop.load(); });
      sleepers.fetch_sub(1);
    }
  }

  void Stop() {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      stop.store(true);
    }
    wake.notify_all();
    for (std::thread& worker : workers) worker.join();
  }
};

ThreadPool::ThreadPool(int threads) : impl_(std::make_unique<Impl>()) {
  impl_->workers.reserve(threads > 1 ? threads - 1 : 0);
  try {
    for (int i = 1; i < threads; ++i) {
      impl_->workers.emplace_back([impl = impl_.get()] { impl->Work(); });
    }
  } catch (
      ...) {  // the system gave fewer threads: end those that run before the caller learns of it
    impl_->Stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { impl_->Stop(); }

int ThreadPool::threads() const { return static_cast<int>(impl_->workers.size()) + 1; }

void ThreadPool::RunErased(int tasks, void (*call)(const void*, int), const void* task) {
  Impl& pool = *impl_;
  if (pool.workers.empty() || tasks <= 1) {
    for (int i = 0; i < tasks; ++i) call(task, i);
    return;
  }
  pool.call = call;
  pool.task = task;
  pool.tasks = tasks;
  pool.finished.store(0, std::memory_order_relaxed);
  const uint64_t loop = (pool.ticket.load(std::memory_order_relaxed) >> 32) + 1;
  // Sequentially consistent with `sleepers`: a worker that goes to sleep either sees these tasks or
  // is seen here.
  pool.ticket.store((loop << 32) | static_cast<uint32_t>(tasks));
  if (pool.sleepers.load() > 0) {
    { const std::lock_guard<std::mutex> lock(pool.mutex); }
    pool.wake.notify_all();
  }
  pool.TakeTasks();
  while (
      !SpinUntil([&] { return pool.finished.load(std::memory_order_acquire) == tasks; }, kSpin)) {
  }
}

}  // namespace canopy
