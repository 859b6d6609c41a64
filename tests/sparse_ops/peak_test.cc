// What the loops that measure the machine count, and that they take time.

#include "kernels/peak/peak.h"

#include <string>

#include "expect.h"

namespace {

using namespace sparse_ops;
using namespace sparse_ops::peak;

void test_counts() {
  for (const Kernel* kernel : kernels()) {
    if (!runs_here(*kernel)) continue;
    for (const auto limit : {kernel->in_registers, kernel->with_loads}) {
      expect(limit(0) == 0, std::string(kernel->name) + " counts what it does not do");
      const double one = limit(1), lanes = static_cast<double>(kernel->lanes);
      expect(one >= 2 * lanes, std::string(kernel->name) + " does less than one multiply-add");
      for (size_t steps : {2, 7, 1000}) {
        expect(limit(steps) == one * static_cast<double>(steps),
               std::string(kernel->name) + " counts wrongly");
      }
    }
  }
}

void test_measure() {
  // No claims about speed but that a processor makes between a million and 10^13 operations per second.
  for (const Kernel* kernel : kernels()) {
    if (!runs_here(*kernel)) continue;
    for (const auto limit : {kernel->in_registers, kernel->with_loads}) {
      const double speed = measure(limit, 0.001);
      expect(speed > 1e6 && speed < 1e13, std::string(kernel->name) + " was measured wrongly");
    }
  }
}

}  // namespace

int main() {
  test_counts();
  test_measure();
  return summary();
}
