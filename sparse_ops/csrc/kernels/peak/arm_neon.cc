#include "kernels/peak/generic.h"
#include "kernels/peak/table.h"

namespace sparse_ops::peak {

constexpr Kernel neon = make_kernel<4>(row::neon);

}  // namespace sparse_ops::peak
