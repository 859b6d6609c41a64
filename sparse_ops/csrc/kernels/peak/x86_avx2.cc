#include "kernels/peak/generic.h"
#include "kernels/peak/table.h"

namespace sparse_ops::peak {

constexpr Kernel avx2 = make_kernel<8>(row::avx2);

}  // namespace sparse_ops::peak
