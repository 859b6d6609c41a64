// The kernel's body with wide vectors, compiled for the baseline instruction set: the compiler emulates them,
// so that any machine tests what only some can run. The shapes are those of x86_avx2.cc and x86_avx512.cc.

#include "kernels/spmm/generic.h"
#include "spmm_checks.h"

namespace {

using namespace sparse_ops;
using namespace sparse_ops::spmm;

constexpr Kernel wide[] = {
    make_kernel<16, 8, 1>({"wide16_t128", kGeneric, float32, 16, 128}),
    make_kernel<16, 4, 2>({"wide16_t64", kGeneric, float32, 16, 64}),
    make_kernel<16, 2, 4>({"wide16_t32", kGeneric, float32, 16, 32}),
    make_kernel<16, 1, 4>({"wide16_t16", kGeneric, float32, 16, 16}),
    make_kernel<8, 8, 1>({"wide8_t64", kGeneric, float32, 8, 64}),
    make_kernel<8, 4, 2>({"wide8_t32", kGeneric, float32, 8, 32}),
    make_kernel<8, 2, 4>({"wide8_t16", kGeneric, float32, 8, 16}),
    make_kernel<8, 1, 4>({"wide8_t8", kGeneric, float32, 8, 8}),
};

}  // namespace

int main() {
  std::vector<const Kernel*> kernels;
  for (const Kernel& kernel : wide) kernels.push_back(&kernel);
  for_every_shape([&](const Weight& weight, size_t tokens, const std::vector<float>& x, const Exact& want) {
    for (const Kernel* kernel : kernels) {
      if (fits(*kernel, weight)) compare(make_plan(weight, tokens, *kernel), weight, x, want);
    }
  });
  check_special_values(kernels);
  return summary();
}
