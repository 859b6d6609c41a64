#include "kernels/attention/generic.h"
#include "kernels/attention/table.h"

namespace sparse_ops::attention {

constexpr Kernel neon = {"neon", Isa::neon, 4, 4 * 4, run_tile<4, 4, 24>, lay_mask_of_tile<4, 4>};

}  // namespace sparse_ops::attention
