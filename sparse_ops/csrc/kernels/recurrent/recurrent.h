// The recurrence of an LSTM or a GRU with a sparse recurrent weight, over all steps of a batch.
#pragma once

#include <cstddef>
#include <cstdint>
#include "kernels/dispatch.h"
#include "kernels/recurrent/kernel.h"
#include "kernels/spmm/spmm.h"
#include "kernels/workers.h"

namespace sparse_ops::recurrent {

// `gru_reset_first` multiplies r h with the weight; `gru` multiplies the product with r.
enum class Cell { lstm, gru, gru_reset_first };

inline size_t gates(Cell cell) { return cell == Cell::lstm ? 4 : 3; }

// Every kernel that was compiled, best first.
Table<Kernel> kernels();

// The best kernel that needs none but `features`.
const Kernel& select_kernel(Features features);

// All arrays are row-major. Direction 0 goes backwards in time if `reverse`, direction 1 always does.
struct Problem {
  Cell cell;
  bool reverse;
  size_t steps, batch, directions, hidden;
  const spmm::Weight* weight;  // [hidden, directions * gates * hidden], with the bias of the recurrence
  const float* x;              // [steps, batch, directions, gates, hidden]: X . W + bias
  const int32_t* lengths;      // [batch] steps of each row, 0..steps; or nullptr: all steps
  float* y;                    // [steps, directions, batch, hidden]: every h; 0 behind the end of a row
  float* h;  // [directions, batch, hidden]: the state before the first step, then behind the last one
  float* c;  // as h; of an LSTM
};

struct Plan {
  const Kernel* gates;
  const spmm::Kernel* full;  // rows of a batch, in tiles; the last, partial one may have a smaller kernel
  const spmm::Kernel* last;
  bool steps_are_split;  // among workers, one step after the other; else each tile is one task
  size_t scratch_bytes;  // memory that run() needs, any alignment
};
// For as many `threads` as the caller's workers have.
Plan make_plan(const Problem& problem, Features features, size_t threads);
Plan make_plan(const Problem& problem, const Kernel& gates, const spmm::Kernel& kernel, bool steps_are_split);

// False only if `workers` failed. A row without steps ends in a state of zeros, as in ONNX Runtime.
bool run(const Plan& plan, const Problem& problem, void* scratch, Workers& workers);

}  // namespace sparse_ops::recurrent
