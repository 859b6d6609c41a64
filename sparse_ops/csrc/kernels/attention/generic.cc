#include "kernels/attention/generic.h"
#include "kernels/attention/table.h"

namespace sparse_ops::attention {

constexpr Kernel generic = {"generic", Isa::generic, 4, 8 * 4, run_tile<4, 2, 12>, lay_mask_of_tile<4, 2>};

}  // namespace sparse_ops::attention
