#include "kernels/recurrent/generic.h"
#include "kernels/recurrent/table.h"

namespace sparse_ops::recurrent {

constexpr Kernel avx512 = make_kernel<16>(row::avx512);

}  // namespace sparse_ops::recurrent
