// Errors towards ONNX Runtime: thrown inside the library, turned into a status at its border.
#pragma once

#include <exception>
#include <string>
#include <utility>

#include "ort_abi.h"

namespace sparse_ops {

// A status that a function of the runtime returned; guarded() hands it on as it is.
struct StatusError {
  OrtStatus* status;
};

// Something that this library found wrong.
struct InvalidError {
  std::string message;
};

inline void check_status(OrtStatus* status) {
  if (status != nullptr) throw StatusError{status};
}

// Run `function` so that no exception crosses the C border.
template <class Function>
OrtStatus* guarded(const OrtApi& api, Function&& function) noexcept {
  try {
    std::forward<Function>(function)();
    return nullptr;
  } catch (const StatusError& error) {
    return error.status;
  } catch (const InvalidError& error) {
    return api.CreateStatus(ORT_INVALID_ARGUMENT, error.message.c_str());
  } catch (const std::exception& error) {
    return api.CreateStatus(ORT_RUNTIME_EXCEPTION, error.what());
  } catch (...) {
    return api.CreateStatus(ORT_FAIL, "sparse_onnx: unknown error");
  }
}

// Owns what a function of the runtime returned.
template <class T>
class Owned {
 public:
  explicit Owned(void (*release)(T*)) : release_(release) {}
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() {
    if (value_ != nullptr) release_(value_);
  }
  T** out() { return &value_; }
  T* get() const { return value_; }

 private:
  T* value_ = nullptr;
  void (*release_)(T*);
};

}  // namespace sparse_ops
