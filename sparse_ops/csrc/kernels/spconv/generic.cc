#include "kernels/spconv/generic.h"
#include "kernels/spconv/table.h"

namespace sparse_ops::spconv {

constexpr Kernel generic = make_kernel<4>(row::generic);

}  // namespace sparse_ops::spconv
