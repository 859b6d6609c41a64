#include "kernels/spmm/generic.h"
#include "kernels/spmm/table.h"

namespace sparse_ops::spmm {

// Twice the sums of generic.cc: AArch64 has 32 vector registers.
constexpr Kernel neon_t64 = make_kernel<4, 16, 1>(row::neon_t64);
constexpr Kernel neon_t32 = make_kernel<4, 8, 2>(row::neon_t32);
constexpr Kernel neon_t16 = make_kernel<4, 4, 4>(row::neon_t16);
constexpr Kernel neon_t8 = make_kernel<4, 2, 4>(row::neon_t8);
constexpr Kernel neon_t4 = make_kernel<4, 1, 4>(row::neon_t4);

}  // namespace sparse_ops::spmm
