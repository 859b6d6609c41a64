#include "kernels/attention/generic.h"
#include "kernels/attention/table.h"

namespace sparse_ops::attention {

constexpr Kernel generic = make_kernel<4, 2, 12>(row::generic);

}  // namespace sparse_ops::attention
