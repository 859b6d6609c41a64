#include "kernels/attention/generic.h"
#include "kernels/attention/table.h"

namespace sparse_ops::attention {

constexpr Kernel neon = make_kernel<4, 4, 24>(row::neon);

}  // namespace sparse_ops::attention
