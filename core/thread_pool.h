// A pool of threads for loops of a few microseconds: workers spin briefly before they sleep.

#ifndef CANOPY_CORE_THREAD_POOL_H_
#define CANOPY_CORE_THREAD_POOL_H_

#include <cstdint>
#include <memory>
#include <type_traits>

namespace canopy {

// Not reentrant: Run must not be called from inside a task, nor from two threads at once.
class ThreadPool {
 public:
  explicit ThreadPool(int threads);  // the caller's thread counts as one; at least 1
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const;

  // Calls task(i) once for every i in [0, tasks), on the caller and the workers, and returns when
  // all have finished. Tasks are handed out dynamically, so a result must not depend on which
  // thread runs a task. No allocation. With one thread or one task, runs in place.
  template <typename F>
  void Run(int tasks, const F& task) {
    RunErased(
        tasks, [](const void* f, int i) { (*static_cast<const F*>(f))(i); }, &task);
  }

 private:
  void RunErased(int tasks, void (*call)(const void*, int), const void* task);

  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace canopy

#endif  // CANOPY_CORE_THREAD_POOL_H_
