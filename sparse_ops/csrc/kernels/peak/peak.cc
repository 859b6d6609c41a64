#include "kernels/peak/peak.h"

#include <algorithm>
#include <chrono>

#include "kernels/peak/table.h"

namespace sparse_ops::peak {

Table<Kernel> kernels() { return kKernels; }

const Kernel& select_kernel(Features features) { return select_permitted<Kernel>(kKernels, features); }

double measure(double (*limit)(size_t), double seconds) {
  using Clock = std::chrono::steady_clock;
  constexpr size_t kSteps = 100000;  // well below a millisecond, so that the best of them ran undisturbed
  double best = 0;
  const Clock::time_point start = Clock::now();
  do {
    const Clock::time_point before = Clock::now();
    const double operations = limit(kSteps);
    best = std::max(best, operations / std::chrono::duration<double>(Clock::now() - before).count());
  } while (std::chrono::duration<double>(Clock::now() - start).count() < seconds);
  return best;
}

}  // namespace sparse_ops::peak
