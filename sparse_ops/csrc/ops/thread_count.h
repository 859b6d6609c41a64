// How many threads a session lends an operator: the runtime does not tell, so it is learned from who takes part.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>

namespace sparse_ops {

// The threads that take part in one call of an operator, each counted once.
class Attendance {
 public:
  void here() {
    thread_local uint64_t last = 0;
    if (last == call_) return;
    last = call_;
    threads_.fetch_add(1, std::memory_order_relaxed);
  }
  size_t threads() const { return threads_.load(std::memory_order_relaxed); }

 private:
  static uint64_t next() {
    static std::atomic<uint64_t> calls{0};
    return calls.fetch_add(1, std::memory_order_relaxed) + 1;
  }
  const uint64_t call_ = next();
  std::atomic<size_t> threads_{0};
};

// What all calls of one operator have seen. Calls may come at once.
class ThreadCount {
 public:
  // The threads to cut the tasks of the next call for: the most that were seen together. The first calls, and
  // every eighth later one, are cut for as many as could be there, so that each finds a task and is seen. On a
  // busy machine a thread may come too late for many calls; to take it for absent costs its whole share of the
  // work, to wait for one that does not exist next to nothing: so the first calls are many.
  size_t expected() {
    const size_t call = calls_.fetch_add(1, std::memory_order_relaxed);
    const size_t seen = seen_.load(std::memory_order_relaxed);
    return call < kFirst || call % kAgain == 0 ? std::max(seen, processors()) : seen;
  }
  void saw(size_t threads) {
    size_t seen = seen_.load(std::memory_order_relaxed);
    while (threads > seen && !seen_.compare_exchange_weak(seen, threads, std::memory_order_relaxed)) {
    }
  }

  static size_t processors() {
    static const size_t count = std::max(1u, std::thread::hardware_concurrency());
    return count;
  }
  static constexpr size_t kFirst = 64, kAgain = 8;

 private:
  std::atomic<size_t> calls_{0}, seen_{1};
};

}  // namespace sparse_ops
