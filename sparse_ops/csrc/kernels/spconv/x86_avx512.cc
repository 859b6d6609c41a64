#include "kernels/spconv/generic.h"
#include "kernels/spconv/table.h"

namespace sparse_ops::spconv {

constexpr Kernel avx512 = make_kernel<16>(row::avx512);

}  // namespace sparse_ops::spconv
