#include "kernels/normalization/generic.h"
#include "kernels/normalization/table.h"

namespace sparse_ops::normalization {

constexpr Kernel avx2 = make_kernel<8>(row::avx2);

}  // namespace sparse_ops::normalization
