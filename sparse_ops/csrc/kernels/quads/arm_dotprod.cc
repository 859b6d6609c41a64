#include "kernels/quads/generic.h"
#include "kernels/quads/table.h"

namespace sparse_ops::quads {

constexpr Kernel neon_dotprod_t32 = make_kernel<4, 8, 1>(row::neon_dotprod_t32);
constexpr Kernel neon_dotprod_t16 = make_kernel<4, 4, 2>(row::neon_dotprod_t16);
constexpr Kernel neon_dotprod_t8 = make_kernel<4, 2, 4>(row::neon_dotprod_t8);

}  // namespace sparse_ops::quads
