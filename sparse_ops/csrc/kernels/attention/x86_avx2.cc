#include "kernels/attention/generic.h"
#include "kernels/attention/table.h"

namespace sparse_ops::attention {

constexpr Kernel avx2 = {"avx2", Isa::avx2, 8, 8 * 8, run_tile<8, 2, 12>, lay_mask_of_tile<8, 2>};

}  // namespace sparse_ops::attention
