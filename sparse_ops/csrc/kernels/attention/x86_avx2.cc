#include "kernels/attention/generic.h"
#include "kernels/attention/table.h"

namespace sparse_ops::attention {

constexpr Kernel avx2 = make_kernel<8, 2, 12>(row::avx2);

}  // namespace sparse_ops::attention
