#include "kernels/attention/generic.h"
#include "kernels/attention/table.h"

namespace sparse_ops::attention {

constexpr Kernel avx512 = make_kernel<16, 4, 24>(row::avx512);

}  // namespace sparse_ops::attention
