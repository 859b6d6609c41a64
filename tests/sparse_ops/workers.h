// Where the tasks of the tests run.
#pragma once

#include <cstddef>

#include "kernels/workers.h"

namespace sparse_ops {

// Runs the last task first: tasks must not depend on their order.
class Backwards final : public Workers {
 public:
  bool run(size_t total, void (*task)(void*, size_t), void* context) override {
    tasks += total;
    for (size_t i = total; i-- > 0;) task(context, i);
    return true;
  }
  size_t tasks = 0;
};

// Fails at the call after `calls` that succeed.
class Failing final : public Workers {
 public:
  explicit Failing(int calls = 0) : calls_(calls) {}
  bool run(size_t total, void (*task)(void*, size_t), void* context) override {
    if (calls_-- == 0) return false;
    for (size_t i = 0; i < total; ++i) task(context, i);
    return true;
  }

 private:
  int calls_;
};

}  // namespace sparse_ops
