// What can be chosen here.
#pragma once

#include <cstring>
#include <vector>

#include "kernels/row.h"

namespace sparse_ops {

// All that is offered, and each lesser instruction set.
inline std::vector<Features> offered_sets() {
  std::vector<Features> sets = {offered_features()};
  for (const NamedFeatures& set : kInstructionSets) {
    if (contains(offered_features(), set.features) && &set != &instruction_set(offered_features())) {
      sets.push_back(set.features);
    }
  }
  return sets;
}

// Whether a kernel needs no more than `features`, is of their instruction set, and is named after it.
inline bool is_of_set(const KernelRow& kernel, Features features) {
  const NamedFeatures& set = instruction_set(features);
  return contains(features, kernel.needs) && &instruction_set(kernel.needs) == &set &&
         std::strncmp(kernel.name, set.name, std::strlen(set.name)) == 0;
}

}  // namespace sparse_ops
