#include "kernels/spmm/generic.h"
#include "kernels/spmm/table.h"

namespace sparse_ops::spmm {

// Twice the sums of generic.cc: AArch64 has 32 vector registers.
constexpr Kernel neon_t64 = make_kernel<4, 16, 1>("neon_t64", Isa::neon);
constexpr Kernel neon_t32 = make_kernel<4, 8, 2>("neon_t32", Isa::neon);
constexpr Kernel neon_t16 = make_kernel<4, 4, 4>("neon_t16", Isa::neon);
constexpr Kernel neon_t8 = make_kernel<4, 2, 4>("neon_t8", Isa::neon);
constexpr Kernel neon_t4 = make_kernel<4, 1, 4>("neon_t4", Isa::neon);

}  // namespace sparse_ops::spmm
