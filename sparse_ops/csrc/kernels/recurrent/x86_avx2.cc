#include "kernels/recurrent/generic.h"
#include "kernels/recurrent/table.h"

namespace sparse_ops::recurrent {

constexpr Kernel avx2 = make_kernel<8>(row::avx2);

}  // namespace sparse_ops::recurrent
