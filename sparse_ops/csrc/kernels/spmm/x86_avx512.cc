#include "kernels/spmm/generic.h"
#include "kernels/spmm/lookup.h"
#include "kernels/spmm/table.h"

namespace sparse_ops::spmm {

constexpr Kernel avx512_t128 = make_kernel<16, 8, 1>(row::avx512_t128);
constexpr Kernel avx512_t64 = make_kernel<16, 4, 2>(row::avx512_t64);
constexpr Kernel avx512_t48 = make_kernel<16, 3, 3>(row::avx512_t48);
constexpr Kernel avx512_t32 = make_kernel<16, 2, 4>(row::avx512_t32);
constexpr Kernel avx512_t16 = make_kernel<16, 1, 4>(row::avx512_t16);
constexpr Kernel avx512_t8 = make_kernel<8, 1, 4>(row::avx512_t8);
constexpr Kernel avx512_t4 = make_kernel<4, 1, 4>(row::avx512_t4);
constexpr Kernel avx512_t2 = lookup::make_kernel<2>(row::avx512_t2);
constexpr Kernel avx512_t1 = lookup::make_kernel<1>(row::avx512_t1);

}  // namespace sparse_ops::spmm
