#include "kernels/spmm/generic.h"
#include "kernels/spmm/table.h"

namespace sparse_ops::spmm {

constexpr Kernel generic_t32 = make_kernel<4, 8, 1>("generic_t32", Isa::generic);
constexpr Kernel generic_t16 = make_kernel<4, 4, 2>("generic_t16", Isa::generic);
constexpr Kernel generic_t8 = make_kernel<4, 2, 4>("generic_t8", Isa::generic);
constexpr Kernel generic_t4 = make_kernel<4, 1, 4>("generic_t4", Isa::generic);

}  // namespace sparse_ops::spmm
