#include "kernels/recurrent/generic.h"
#include "kernels/recurrent/table.h"

namespace sparse_ops::recurrent {

constexpr Kernel generic = make_kernel<4>(row::generic);

}  // namespace sparse_ops::recurrent
