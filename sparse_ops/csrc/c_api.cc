#include "c_api.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>

#include "cpu_features.h"
#include "kernels/spmm/check.h"
#include "kernels/spmm/spmm.h"

namespace sparse_ops {
namespace {

void set_message(const char* text, char* message, size_t size) noexcept {
  if (message == nullptr || size == 0) return;
  const size_t length = std::min(std::strlen(text), size - 1);
  std::memcpy(message, text, length);
  message[length] = '\0';
}

// Run `function`, which returns what is wrong or an empty string.
template <class Function>
int guarded(char* message, size_t size, Function&& function) noexcept {
  try {
    const std::string problem = function();
    set_message(problem.c_str(), message, size);
    return problem.empty() ? 0 : 1;
  } catch (const std::exception& error) {
    set_message(error.what(), message, size);
    return 1;
  }
}

std::string check_weight(const SparseOnnxWeight& w, spmm::Activation activation,
                         spmm::CheckedWeight& result) {
  const spmm::StoredWeight stored = {w.K,      w.N,           w.chunk,     w.block,        w.width,
                                     w.values, w.value_count, w.offsets,   w.offset_count, w.counts,
                                     w.count_count, w.rows,   w.row_count, w.bias,         w.bias_count};
  return spmm::check(stored, activation, result);
}

class ThisThread final : public Workers {
 public:
  bool run(size_t total, void (*task)(void*, size_t), void* context) override {
    for (size_t i = 0; i < total; ++i) task(context, i);
    return true;
  }
};

std::string run(const SparseOnnxWeight& stored, int activation, const char* name, const float* x,
                size_t tokens, float* y) {
  if (activation < SPARSE_ONNX_NONE || activation > SPARSE_ONNX_SILU) return "unknown activation";
  spmm::CheckedWeight checked;
  const std::string problem = check_weight(stored, static_cast<spmm::Activation>(activation), checked);
  if (!problem.empty()) return problem;
  spmm::Plan plan;
  if (name == nullptr) {
    const IsaChoice choice = active_isa();
    if (choice.error != nullptr) return choice.error;
    plan = spmm::make_plan(checked.weight, tokens, choice.isa);
  } else {
    const spmm::Kernel* kernel = spmm::find_kernel(name);
    if (kernel == nullptr) return std::string("no kernel is named ") + name;
    if (!isa_supported(kernel->isa)) return std::string("this processor cannot run the kernel ") + name;
    if (!spmm::fits(*kernel, checked.weight)) {
      return std::string("the chunk or the block is too large for the kernel ") + name;
    }
    plan = spmm::make_plan(checked.weight, tokens, *kernel);
  }
  const std::unique_ptr<char[]> scratch(new char[plan.scratch_bytes]);
  ThisThread workers;
  spmm::run(plan, checked.weight, x, y, scratch.get(), workers);
  return {};
}

}  // namespace
}  // namespace sparse_ops

using namespace sparse_ops;

extern "C" {

const char* sparse_onnx_version(void) { return SPARSE_ONNX_VERSION; }

const char* sparse_onnx_isa(char* message, size_t message_size) {
  const IsaChoice choice = active_isa();
  set_message(choice.error == nullptr ? "" : choice.error, message, message_size);
  return choice.error == nullptr ? isa_name(choice.isa) : nullptr;
}

const char* sparse_onnx_kernel_name(size_t index) {
  return index < spmm::kernels().size() ? spmm::kernels()[index]->name : nullptr;
}

int sparse_onnx_kernel_supported(const char* kernel) {
  const spmm::Kernel* found = spmm::find_kernel(kernel);
  return found != nullptr && isa_supported(found->isa);
}

int sparse_onnx_check(const SparseOnnxWeight* weight, char* message, size_t message_size) {
  return guarded(message, message_size, [&] {
    spmm::CheckedWeight result;
    return check_weight(*weight, spmm::Activation::none, result);
  });
}

int sparse_onnx_run(const SparseOnnxWeight* weight, int activation, const char* kernel, const float* x,
                    size_t tokens, float* y, char* message, size_t message_size) {
  return guarded(message, message_size, [&] { return run(*weight, activation, kernel, x, tokens, y); });
}

const char* sparse_onnx_select(int64_t chunk, int64_t block, int64_t width, size_t tokens) {
  const IsaChoice choice = active_isa();
  if (choice.error != nullptr || chunk < 1 || chunk > 255 || block < 1 || block > 256 || width < 1) {
    return nullptr;
  }
  spmm::Weight weight{};
  weight.chunk = static_cast<size_t>(chunk);
  weight.block = static_cast<size_t>(block);
  weight.width = static_cast<size_t>(width);
  return spmm::select_kernel(choice.isa, weight, tokens).name;
}

double sparse_onnx_peak(const char* kernel, double seconds) {
  using Clock = std::chrono::steady_clock;
  const spmm::Kernel* found = spmm::find_kernel(kernel);
  if (found == nullptr || !isa_supported(found->isa)) return 0;
  constexpr size_t kSteps = 100000;  // well below a millisecond, so that the best of them ran undisturbed
  double best = 0;
  const Clock::time_point start = Clock::now();
  do {
    const Clock::time_point before = Clock::now();
    const double operations = found->peak(kSteps);
    best = std::max(best, operations / std::chrono::duration<double>(Clock::now() - before).count());
  } while (std::chrono::duration<double>(Clock::now() - start).count() < seconds);
  return best;
}

}  // extern "C"
