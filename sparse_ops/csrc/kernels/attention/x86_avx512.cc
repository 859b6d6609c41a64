#include "kernels/attention/generic.h"
#include "kernels/attention/table.h"

namespace sparse_ops::attention {

constexpr Kernel avx512 = {"avx512", Isa::avx512, 16, 4 * 16, run_tile<16, 4, 24>, lay_mask_of_tile<16, 4>};

}  // namespace sparse_ops::attention
