#include "kernels/quads/generic.h"
#include "kernels/quads/table.h"

namespace sparse_ops::quads {

constexpr Kernel avx512vnni_t128 = make_kernel<16, 8, 1>(row::avx512vnni_t128);
// Sides of maps are multiples of 7 more often than not.
constexpr Kernel avx512vnni_t112 = make_kernel<16, 7, 1>(row::avx512vnni_t112);
constexpr Kernel avx512vnni_t64 = make_kernel<16, 4, 2>(row::avx512vnni_t64);
constexpr Kernel avx512vnni_t32 = make_kernel<16, 2, 4>(row::avx512vnni_t32);
constexpr Kernel avx512vnni_t16 = make_kernel<16, 1, 4>(row::avx512vnni_t16);

}  // namespace sparse_ops::quads
