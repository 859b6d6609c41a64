#include "kernels/normalization/generic.h"
#include "kernels/normalization/table.h"

namespace sparse_ops::normalization {

constexpr Kernel neon = make_kernel<4>(row::neon);

}  // namespace sparse_ops::normalization
