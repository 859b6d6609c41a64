#include "kernels/quads/generic.h"
#include "kernels/quads/table.h"

namespace sparse_ops::quads {

constexpr Kernel avx2_t64 = make_kernel<8, 8, 1>(row::avx2_t64);
constexpr Kernel avx2_t32 = make_kernel<8, 4, 1>(row::avx2_t32);
constexpr Kernel avx2_t16 = make_kernel<8, 2, 2>(row::avx2_t16);
constexpr Kernel avx2_t8 = make_kernel<8, 1, 4>(row::avx2_t8);

}  // namespace sparse_ops::quads
