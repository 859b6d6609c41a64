#include "kernels/recurrent/generic.h"
#include "kernels/recurrent/table.h"

namespace sparse_ops::recurrent {

constexpr Kernel neon = make_kernel<4>(row::neon);

}  // namespace sparse_ops::recurrent
