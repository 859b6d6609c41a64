#include "kernels/quads/generic.h"
#include "kernels/quads/table.h"

namespace sparse_ops::quads {

constexpr Kernel generic_t16 = make_kernel<4, 4, 1>(row::generic_t16);
constexpr Kernel generic_t4 = make_kernel<4, 1, 1>(row::generic_t4);

}  // namespace sparse_ops::quads
