#include "kernels/spconv/generic.h"
#include "kernels/spconv/table.h"

namespace sparse_ops::spconv {

constexpr Kernel avx2 = make_kernel<8>(row::avx2);

}  // namespace sparse_ops::spconv
