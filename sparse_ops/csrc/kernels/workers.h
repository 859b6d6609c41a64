// Where the tasks of a kernel run.
#pragma once

#include <cstddef>

namespace sparse_ops {

// `run` calls task(context, i) once for every i in 0..total-1, in any order and on any thread, and returns
// when all are done; false means that it could not.
class Workers {
 public:
  virtual bool run(size_t total, void (*task)(void* context, size_t index), void* context) = 0;

 protected:
  ~Workers() = default;
};

}  // namespace sparse_ops
