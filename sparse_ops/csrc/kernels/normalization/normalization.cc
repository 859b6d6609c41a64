#include "kernels/normalization/normalization.h"

#include <algorithm>

#include "kernels/normalization/table.h"
#include "kernels/sizes.h"

namespace sparse_ops::normalization {
namespace {

// Channels of the rows of one task: some microseconds of work, so that waking a thread for it pays.
constexpr size_t kTaskChannels = 16384;

struct Tasks {
  const Kernel& kernel;
  const Arguments& arguments;
  size_t rows;  // of one task
};

void task(void* context, size_t index) {
  const Tasks& tasks = *static_cast<const Tasks*>(context);
  const size_t begin = index * tasks.rows;
  tasks.kernel.run(tasks.arguments, begin, std::min(begin + tasks.rows, tasks.arguments.rows));
}

}  // namespace

Table<Kernel> kernels() { return kKernels; }

const Kernel& select_kernel(Features features) { return select_permitted<Kernel>(kKernels, features); }

bool run(const Kernel& kernel, const Arguments& arguments, Workers& workers) {
  if (arguments.rows == 0 || arguments.channels == 0) return true;
  const size_t rows = divide_up(kTaskChannels, arguments.channels);
  if (rows >= arguments.rows) {
    kernel.run(arguments, 0, arguments.rows);
    return true;
  }
  Tasks tasks{kernel, arguments, rows};
  return workers.run(divide_up(arguments.rows, rows), task, &tasks);
}

}  // namespace sparse_ops::normalization
