// The entry point that ONNX Runtime looks for in a library of custom operators.

#include "c_api.h"
#include "ops/op_support.h"
#include "ops/operators.h"
#include "ort_status.h"

namespace sparse_ops {
namespace {

// Set in the options once the domain is there: a second registration would make every session fail.
constexpr const char* kRegistered = "sparse_onnx.registered";

void register_domain(const OrtApi& api, OrtSessionOptions* options) {
  int registered = 0;
  check_status(api.HasSessionConfigEntry(options, kRegistered, &registered));
  if (registered) return;
  // The runtime keeps the domain by pointer and never says when it is done with it: it is not freed, unless
  // this registration fails.
  Owned<OrtCustomOpDomain> domain(api.ReleaseCustomOpDomain);
  check_status(api.CreateCustomOpDomain(kDomain, domain.out()));
  for (Family* make_ops : kFamilies) {
    for (const OrtCustomOp* op : make_ops(api)) check_status(api.CustomOpDomain_Add(domain.get(), op));
  }
  check_status(api.AddSessionConfigEntry(options, kRegistered, "1"));
  check_status(api.AddCustomOpDomain(options, domain.get()));
  *domain.out() = nullptr;
}

}  // namespace
}  // namespace sparse_ops

extern "C" SPARSE_ONNX_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                           const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(sparse_ops::kOrtApiVersion);
  if (api == nullptr) {
    return base->GetApi(1)->CreateStatus(ORT_FAIL, "sparse_onnx: ONNX Runtime 1.17 or newer is needed");
  }
  return sparse_ops::guarded(*api, [&] { sparse_ops::register_domain(*api, options); });
}
