#include "kernels/spmm/generic.h"
#include "kernels/spmm/table.h"

namespace sparse_ops::spmm {

constexpr Kernel generic_t32 = make_kernel<4, 8, 1>(row::generic_t32);
constexpr Kernel generic_t16 = make_kernel<4, 4, 2>(row::generic_t16);
constexpr Kernel generic_t8 = make_kernel<4, 2, 4>(row::generic_t8);
constexpr Kernel generic_t4 = make_kernel<4, 1, 4>(row::generic_t4);

}  // namespace sparse_ops::spmm
