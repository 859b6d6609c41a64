#include "kernels/quads/generic.h"
#include "kernels/quads/table.h"

namespace sparse_ops::quads {

constexpr Kernel avx512_t64 = make_kernel<16, 4, 1>(row::avx512_t64);
constexpr Kernel avx512_t32 = make_kernel<16, 2, 2>(row::avx512_t32);
constexpr Kernel avx512_t16 = make_kernel<16, 1, 4>(row::avx512_t16);

}  // namespace sparse_ops::quads
