// Threads that share one step's work: they spin between two steps that follow closely, and sleep when idle.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "relax.h"

namespace maestrale {

class Pool {
 public:
  // std::system_error where the system starts no more threads; those that it has started end first.
  explicit Pool(int size) : size_(size) {
    try {
      for (int thread = 1; thread < size; ++thread) workers_.emplace_back([this, thread] { serve(thread); });
    } catch (...) {
      close();
      throw;
    }
  }

  ~Pool() { close(); }

  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return size_; }

  // Calls work(thread) on every thread, the caller being thread 0; returns when all have ended. `work` must not throw.
  void run(const std::function<void(int)>& work) {
    if (size_ > 1) {
      work_ = &work;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        round_.fetch_add(1, std::memory_order_release);
      }
      wake_.notify_all();
    }
    work(0);
    barrier();
  }

  // Called by every thread inside `run`: none goes on before all have come.
  void barrier() {
    if (size_ == 1) return;
    const unsigned phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spin = 0; phase_.load(std::memory_order_acquire) == phase; ++spin) relax(spin);
  }

 private:
  void close() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
      round_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  void serve(int thread) {
    for (unsigned seen = 0;;) {
      await(seen);
      seen = round_.load(std::memory_order_acquire);
      if (closing_) return;
      (*work_)(thread);
      barrier();
    }
  }

  // Until a round other than `seen` begins.
  void await(unsigned seen) {
    const auto patience = std::chrono::steady_clock::now() + std::chrono::milliseconds(1);
    for (int spin = 0; round_.load(std::memory_order_acquire) == seen; ++spin) {
      if (spin % 64 == 63 && std::chrono::steady_clock::now() > patience) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen; });
        return;
      }
      relax(0);
    }
  }

  const int size_;
  std::vector<std::thread> workers_;
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<unsigned> round_{0}, phase_{0};
  std::atomic<int> arrived_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  bool closing_ = false;
};

}  // namespace maestrale
