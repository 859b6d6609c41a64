#include "kernels/spconv/generic.h"
#include "kernels/spconv/table.h"

namespace sparse_ops::spconv {

constexpr Kernel neon = make_kernel<4>(row::neon);

}  // namespace sparse_ops::spconv
