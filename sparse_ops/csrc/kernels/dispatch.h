// Choosing among the rows of a table. Not for sources that are compiled for wide vectors.
#pragma once

#include <span>

#include "kernels/row.h"

namespace sparse_ops {

template <class Kernel>
using Table = std::span<const Kernel* const>;

// The rows that can be chosen: all but the last, the plain loops of the tests. The one before needs no
// feature.
template <class Kernel>
constexpr Table<Kernel> without_reference(Table<Kernel> table) {
  return table.first(table.size() - 1);
}

// Whether this processor and operating system run a kernel.
inline bool runs_here(const KernelRow& row) {
  return contains(offered_features(), row.needs) && permitted(row.needs);
}

inline bool is_there(const KernelRow& row, Features features, ValueType values = float32) {
  return contains(features, row.needs) && row.values == values;
}

// The first row for `values` whose features are all there, or nullptr.
template <class Kernel>
const Kernel* select(Table<Kernel> table, Features features, ValueType values = float32) {
  for (const Kernel* kernel : table) {
    if (is_there(*kernel, features, values)) return kernel;
  }
  return nullptr;
}

// choose(features), a row of a table; where the operating system refuses that one its registers, what is
// chosen without them.
template <class Choose>
const auto& choose_permitted(Features features, Choose choose) {
  const auto* kernel = choose(features);
  return permitted(kernel->needs) ? *kernel : *choose(without(features, kAmx));
}

// select() for a table that ends in the reference.
template <class Kernel>
const Kernel& select_permitted(Table<Kernel> table, Features features) {
  return choose_permitted(features, [&](Features f) { return select(without_reference(table), f); });
}

}  // namespace sparse_ops
