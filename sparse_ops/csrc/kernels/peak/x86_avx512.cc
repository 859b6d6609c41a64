#include "kernels/peak/generic.h"
#include "kernels/peak/table.h"

namespace sparse_ops::peak {

constexpr Kernel avx512 = make_kernel<16>(row::avx512);

}  // namespace sparse_ops::peak
