#include "kernels/normalization/generic.h"
#include "kernels/normalization/table.h"

namespace sparse_ops::normalization {

constexpr Kernel avx512 = make_kernel<16>(row::avx512);

}  // namespace sparse_ops::normalization
