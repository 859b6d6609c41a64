// What the gates of one step of an LSTM or a GRU are: plain data, so that sources compiled for wide vectors
// may include it. The products with the weights are done before, by the kernels of spmm.
//
// Of one row of a batch, x is its X · W + bias at this step and p its h · R + bias, both [gates, hidden].
// With s the logistic function and gates in the order of the ONNX standard:
//   LSTM (i, o, f, c)   c = s(xf + pf) c + s(xi + pi) tanh(xc + pc)      h = s(xo + po) tanh(c)
//   GRU (z, r, h)       h = (1 - z) n + z h, z = s(xz + pz), r = s(xr + pr), and
//     n = tanh(xh + r ph)    or    n = tanh(xh + ph) where ph is of r h in the place of h
#pragma once

#include <cstddef>

#include "kernels/row.h"

namespace sparse_ops::recurrent {

struct Row {
  const float* x;  // [gates, hidden]
  float* p;        // [gates, hidden]; may be overwritten
  size_t hidden;
  float* h;      // [hidden], in and out
  float* c;      // [hidden], in and out; of an LSTM
  float* reset;  // [hidden], out: r h; of a GRU whose reset gate goes before the product
};

// Elements begin..end-1 of a row; they do not depend on each other.
using Gates = void (*)(const Row& row, size_t begin, size_t end);

struct Kernel : KernelRow {
  Gates lstm;
  Gates gru;
  Gates gru_reset;   // z to where pz was, and r h to `reset`
  Gates gru_update;  // behind gru_reset and the product of `reset`, which is in ph
};

}  // namespace sparse_ops::recurrent
