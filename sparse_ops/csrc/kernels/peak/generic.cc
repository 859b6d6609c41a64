#include "kernels/peak/generic.h"
#include "kernels/peak/table.h"

namespace sparse_ops::peak {

constexpr Kernel generic = make_kernel<4>(row::generic);

}  // namespace sparse_ops::peak
