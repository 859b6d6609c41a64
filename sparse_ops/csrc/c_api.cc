#include "c_api.h"

#include <algorithm>
#include <cstring>
#include <ctime>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "formats/chunked_csc.h"
#include "kernels/peak/peak.h"
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
                         chunked_csc::CheckedWeight& result) {
  if (!chunked_csc::is_format(w.format)) return std::string("no format is named ") + w.format;
  std::vector<RawArray> parts(w.part_count);
  for (size_t i = 0; i < w.part_count; ++i) parts[i] = {w.parts[i].data, w.parts[i].count};
  const RawWeight raw = {{w.sizes, w.size_count},
                         parts,
                         {w.bias.data, w.bias.count},
                         {w.linears, w.linear_count}};
  return chunked_csc::check(raw, activation, result);
}

class ThisThread final : public Workers {
 public:
  bool run(size_t total, void (*task)(void*, size_t), void* context) override {
    for (size_t i = 0; i < total; ++i) task(context, i);
    return true;
  }
};

// The checked weight, and the plan for `tokens` tokens with the kernel `name` (nullptr: a session's choice).
std::string prepare(const SparseOnnxWeight& stored, int activation, const char* name, size_t tokens,
                    chunked_csc::CheckedWeight& checked, spmm::Plan& plan) {
  if (activation < SPARSE_ONNX_NONE || activation > SPARSE_ONNX_QUICK_GELU) return "unknown activation";
  const std::string problem = check_weight(stored, static_cast<spmm::Activation>(activation), checked);
  if (!problem.empty()) return problem;
  if (name == nullptr) {
    const FeatureChoice choice = active_features();
    if (choice.error != nullptr) return choice.error;
    plan = spmm::make_plan(checked.weight, tokens, choice.features);
  } else {
    const spmm::Kernel* kernel = spmm::find_kernel(name);
    if (kernel == nullptr) return std::string("no kernel is named ") + name;
    if (!runs_here(*kernel)) return std::string("this processor cannot run the kernel ") + name;
    if (!spmm::fits(*kernel, checked.weight)) {
      return std::string("the chunk or the block is too large for the kernel ") + name;
    }
    plan = spmm::make_plan(checked.weight, tokens, *kernel);
  }
  return {};
}

std::string run(const SparseOnnxWeight& stored, int activation, const char* name, const float* x,
                size_t tokens, float* y) {
  chunked_csc::CheckedWeight checked;
  spmm::Plan plan;
  const std::string problem = prepare(stored, activation, name, tokens, checked, plan);
  if (!problem.empty()) return problem;
  const std::unique_ptr<char[]> scratch(new char[plan.scratch_bytes]);
  ThisThread workers;
  spmm::run(plan, checked.weight, x, y, scratch.get(), workers);
  return {};
}

// Processor time of this thread: what other programs take does not count.
double processor_time() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

std::string time_calls(const SparseOnnxWeight& stored, const char* name, size_t tokens, double seconds,
                       double& result) {
  if (tokens == 0) return "there must be a token";
  chunked_csc::CheckedWeight checked;
  spmm::Plan plan;
  const std::string problem = prepare(stored, SPARSE_ONNX_NONE, name, tokens, checked, plan);
  if (!problem.empty()) return problem;
  const std::vector<float> x(tokens * checked.weight.K, 0.5f);
  std::vector<float> y(tokens * checked.weight.N);
  std::vector<char> scratch(plan.scratch_bytes);
  ThisThread workers;
  const auto call = [&] { spmm::run(plan, checked.weight, x.data(), y.data(), scratch.data(), workers); };
  call();
  std::vector<double> times;
  const double start = processor_time();
  while (times.size() < 7 || processor_time() - start < seconds) {
    const double before = processor_time();
    call();
    times.push_back(processor_time() - before);
  }
  const auto quartile = times.begin() + static_cast<std::ptrdiff_t>(times.size() / 4);
  std::nth_element(times.begin(), quartile, times.end());
  result = *quartile;
  return {};
}

// Operations per second of a limit, in vectors of the instruction set that a kernel needs; 0 if it cannot run
// here.
double measure_limit(const char* name, double (*peak::Kernel::*limit)(size_t), double seconds) {
  const spmm::Kernel* found = spmm::find_kernel(name);
  if (found == nullptr || !runs_here(*found)) return 0;
  return peak::measure(peak::select_kernel(found->needs).*limit, seconds);
}

}  // namespace
}  // namespace sparse_ops

using namespace sparse_ops;

extern "C" {

const char* sparse_onnx_version(void) { return SPARSE_ONNX_VERSION; }

const char* sparse_onnx_isa(char* message, size_t message_size) {
  const FeatureChoice choice = active_features();
  set_message(choice.error == nullptr ? "" : choice.error, message, message_size);
  return choice.error == nullptr ? instruction_set(choice.features).name : nullptr;
}

const char* sparse_onnx_feature_name(size_t index) {
  const FeatureChoice choice = active_features();
  if (choice.error != nullptr) return nullptr;
  for (const NamedFeatures& feature : kFeatureNames) {
    if (contains(choice.features, feature.features) && index-- == 0) return feature.name;
  }
  return nullptr;
}

const char* sparse_onnx_kernel_name(size_t index) {
  return index < spmm::kernels().size() ? spmm::kernels()[index]->name : nullptr;
}

int sparse_onnx_kernel_supported(const char* kernel) {
  const spmm::Kernel* found = spmm::find_kernel(kernel);
  return found != nullptr && runs_here(*found);
}

int sparse_onnx_check(const SparseOnnxWeight* weight, char* message, size_t message_size) {
  return guarded(message, message_size, [&] {
    chunked_csc::CheckedWeight result;
    return check_weight(*weight, spmm::Activation::none, result);
  });
}

int sparse_onnx_run(const SparseOnnxWeight* weight, int activation, const char* kernel, const float* x,
                    size_t tokens, float* y, char* message, size_t message_size) {
  return guarded(message, message_size, [&] { return run(*weight, activation, kernel, x, tokens, y); });
}

const char* sparse_onnx_select(const char* format, const int64_t* sizes, size_t size_count, size_t tokens) {
  const FeatureChoice choice = active_features();
  spmm::Weight weight{};
  if (choice.error != nullptr || !chunked_csc::is_format(format) ||
      !chunked_csc::check_sizes({sizes, size_count}, weight).empty()) {
    return nullptr;
  }
  return spmm::select_kernel(choice.features, weight, tokens).name;
}

double sparse_onnx_peak(const char* kernel, double seconds) {
  return measure_limit(kernel, &peak::Kernel::in_registers, seconds);
}

double sparse_onnx_load_peak(const char* kernel, double seconds) {
  return measure_limit(kernel, &peak::Kernel::with_loads, seconds);
}

double sparse_onnx_time(const SparseOnnxWeight* weight, const char* kernel, size_t tokens, double seconds,
                        char* message, size_t message_size) {
  double result = 0;
  const int failed =
      guarded(message, message_size, [&] { return time_calls(*weight, kernel, tokens, seconds, result); });
  return failed == 0 ? result : 0;
}

}  // extern "C"
