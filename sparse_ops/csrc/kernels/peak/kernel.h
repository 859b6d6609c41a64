// What the processor could reach at most: plain data, so that sources compiled for wide vectors may include
// it.
#pragma once

#include <cstddef>

#include "kernels/row.h"

namespace sparse_ops::peak {

struct Kernel : KernelRow {
  // `steps` times some independent multiply-adds in registers, of `lanes`; returns how many
  // floating-point operations that was. Timing it gives what the machine could reach at most.
  double (*in_registers)(size_t steps);

  // The same with one factor of every multiply-add loaded from the first-level cache, as the product with a
  // sparse weight has to: the limit of a kernel that uses each activation that it loads once.
  double (*with_loads)(size_t steps);
};

}  // namespace sparse_ops::peak
