#include "kernels/spmm/generic.h"
#include "kernels/spmm/table.h"

namespace sparse_ops::spmm {

constexpr Kernel avx2_t64 = make_kernel<8, 8, 1>(row::avx2_t64);
constexpr Kernel avx2_t48 = make_kernel<8, 6, 2>(row::avx2_t48);
constexpr Kernel avx2_t32 = make_kernel<8, 4, 2>(row::avx2_t32);
constexpr Kernel avx2_t24 = make_kernel<8, 3, 3>(row::avx2_t24);
constexpr Kernel avx2_t16 = make_kernel<8, 2, 4>(row::avx2_t16);
constexpr Kernel avx2_t8 = make_kernel<8, 1, 4>(row::avx2_t8);
constexpr Kernel avx2_t4 = make_kernel<4, 1, 4>(row::avx2_t4);

}  // namespace sparse_ops::spmm
