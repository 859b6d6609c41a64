#include "kernels/normalization/generic.h"
#include "kernels/normalization/table.h"

namespace sparse_ops::normalization {

constexpr Kernel generic = make_kernel<4>(row::generic);

}  // namespace sparse_ops::normalization
