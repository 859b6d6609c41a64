// Every family of operators, each defined in the source of its name; their contracts are in sparse_ops/ops/.
#pragma once

#include <vector>

#include "ort_abi.h"

namespace sparse_ops {

// Descriptions of the operators of a family for the runtime that `api` belongs to. They live as long as the
// library is loaded.
using Family = std::vector<const OrtCustomOp*>(const OrtApi& api);

Family sparse_matmul_ops;
Family sparse_matmul_nbits_ops;
Family sparse_feed_forward_ops;
Family sparse_conv_ops;
Family sparse_conv_depthwise_ops;
Family sparse_recurrent_ops;
Family int8_matmul_ops;
Family int8_feed_forward_ops;
Family int8_conv_ops;
Family attention_ops;
Family skip_layer_norm_ops;

constexpr Family* kFamilies[] = {sparse_matmul_ops, sparse_matmul_nbits_ops,   sparse_feed_forward_ops,
                                 sparse_conv_ops,   sparse_conv_depthwise_ops, sparse_recurrent_ops,
                                 int8_matmul_ops,   int8_feed_forward_ops,     int8_conv_ops,
                                 attention_ops,     skip_layer_norm_ops};

}  // namespace sparse_ops
