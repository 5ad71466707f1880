// The recurrent ops: schemas once, implementations per backend. A file beside library.cpp, so that
// CMakeLists.txt can leave it out of the libraries whose kernels are not written yet
// (SEQKERN_CPU_ONLY_OPS).
//
// `lstm`, `gru`, `rnn` and their cells are differentiable, with autograd registered from Python;
// `..._forward` are the same kernels without it.
#include <torch/csrc/stable/library.h>

#include "torch/backend.h"
#include "torch/ops_recurrent.h"

namespace seqkern {
namespace {

#define SEQKERN_LSTM_SCHEMA                                                         \
  "(Tensor input, Tensor? h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, " \
  "Tensor? b_hh, Tensor? w_hr, Tensor? lengths, bool reverse, bool save_gates, "    \
  "bool save_cells) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor c, Tensor gates)"
#define SEQKERN_LSTM_CELL_SCHEMA(more)                                                             \
  "(Tensor input, Tensor h, Tensor c, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, " more \
  "bool save_gates) -> (Tensor h, Tensor c, Tensor gates)"
#define SEQKERN_GRU_SCHEMA                                                            \
  "(Tensor input, Tensor? h0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, " \
  "Tensor? lengths, bool reverse, bool save_gates) -> (Tensor output, Tensor h_n, "   \
  "Tensor gates, Tensor u_n)"
#define SEQKERN_RNN_SCHEMA                                                            \
  "(Tensor input, Tensor? h0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, " \
  "Tensor? lengths, bool reverse, bool relu) -> (Tensor output, Tensor h_n)"
#define SEQKERN_GRU_CELL_SCHEMA(more)                                                    \
  "(Tensor input, Tensor h, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, " more \
  "bool save_gates) -> (Tensor h, Tensor gates)"
#define SEQKERN_RNN_CELL_SCHEMA(more)                                                    \
  "(Tensor input, Tensor h, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, " more \
  "bool relu) -> Tensor"

#if !defined(SEQKERN_BACKEND_CUDA)
void define(torch::stable::detail::StableLibrary& m) {
  m.def("lstm" SEQKERN_LSTM_SCHEMA);
  m.def("lstm_forward" SEQKERN_LSTM_SCHEMA);
  m.def(
      "lstm_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_c, "
      "Tensor input, Tensor? h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? w_hr, "
      "Tensor? lengths, Tensor output, Tensor c, Tensor gates, bool activated, bool reverse, "
      "int needs) -> (Tensor dinput, Tensor dh0, Tensor dc0, Tensor dw_ih, Tensor dw_hh, "
      "Tensor db, Tensor dw_hr)");
  m.def("lstm_cell" SEQKERN_LSTM_CELL_SCHEMA(""));
  m.def("lstm_cell_forward" SEQKERN_LSTM_CELL_SCHEMA("Tensor? packed, "));
  m.def("cell_pack(Tensor w_ih, Tensor w_hh) -> Tensor");
  m.def(
      "lstm_cell_backward(Tensor? grad_h, Tensor? grad_c, Tensor input, Tensor h0, Tensor c0, "
      "Tensor w_ih, Tensor w_hh, Tensor c, Tensor gates, int needs) -> (Tensor dinput, "
      "Tensor dh0, Tensor dc0, Tensor dw_ih, Tensor dw_hh, Tensor db)");
  m.def("gru" SEQKERN_GRU_SCHEMA);
  m.def("gru_forward" SEQKERN_GRU_SCHEMA);
  m.def(
      "gru_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor? h0, Tensor w_ih, "
      "Tensor w_hh, Tensor? lengths, Tensor output, Tensor gates, Tensor u_n, bool activated, "
      "bool reverse, int needs) -> (Tensor dinput, Tensor dh0, Tensor dw_ih, Tensor dw_hh, "
      "Tensor db_ih, Tensor db_hh)");
  m.def("rnn" SEQKERN_RNN_SCHEMA);
  m.def("rnn_forward" SEQKERN_RNN_SCHEMA);
  m.def(
      "rnn_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor? h0, Tensor w_ih, "
      "Tensor w_hh, Tensor? lengths, Tensor output, bool reverse, bool relu, int needs) -> "
      "(Tensor dinput, Tensor dh0, Tensor dw_ih, Tensor dw_hh, Tensor db)");
  m.def("gru_cell" SEQKERN_GRU_CELL_SCHEMA(""));
  m.def("gru_cell_forward" SEQKERN_GRU_CELL_SCHEMA("Tensor? packed, "));
  m.def(
      "gru_cell_backward(Tensor? grad_h, Tensor input, Tensor h0, Tensor w_ih, Tensor w_hh, "
      "Tensor gates, int needs) -> (Tensor dinput, Tensor dh0, Tensor dw_ih, Tensor dw_hh, "
      "Tensor db_ih, Tensor db_hh)");
  m.def("rnn_cell" SEQKERN_RNN_CELL_SCHEMA(""));
  m.def("rnn_cell_forward" SEQKERN_RNN_CELL_SCHEMA("Tensor? packed, "));
  m.def(
      "rnn_cell_backward(Tensor? grad_h, Tensor input, Tensor h0, Tensor w_ih, Tensor w_hh, "
      "Tensor h, bool relu, int needs) -> (Tensor dinput, Tensor dh0, Tensor dw_ih, "
      "Tensor dw_hh, Tensor db)");
}
#endif

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("lstm", TORCH_BOX(&lstm));
  m.impl("lstm_forward", TORCH_BOX(&lstm));
  m.impl("lstm_backward", TORCH_BOX(&lstm_backward));
  m.impl("lstm_cell", TORCH_BOX(&lstm_cell));
  m.impl("lstm_cell_forward", TORCH_BOX(&lstm_cell_forward));
  m.impl("cell_pack", TORCH_BOX(&cell_pack));
  m.impl("lstm_cell_backward", TORCH_BOX(&lstm_cell_backward));
  m.impl("gru", TORCH_BOX(&gru));
  m.impl("gru_forward", TORCH_BOX(&gru));
  m.impl("gru_backward", TORCH_BOX(&gru_backward));
  m.impl("rnn", TORCH_BOX(&rnn));
  m.impl("rnn_forward", TORCH_BOX(&rnn));
  m.impl("rnn_backward", TORCH_BOX(&rnn_backward));
  m.impl("gru_cell", TORCH_BOX(&gru_cell));
  m.impl("gru_cell_forward", TORCH_BOX(&gru_cell_forward));
  m.impl("gru_cell_backward", TORCH_BOX(&gru_cell_backward));
  m.impl("rnn_cell", TORCH_BOX(&rnn_cell));
  m.impl("rnn_cell_forward", TORCH_BOX(&rnn_cell_forward));
  m.impl("rnn_cell_backward", TORCH_BOX(&rnn_cell_backward));
}

}  // namespace
}  // namespace seqkern

#if defined(SEQKERN_BACKEND_CPU)
STABLE_TORCH_LIBRARY_FRAGMENT(seqkern, m) { seqkern::define(m); }
STABLE_TORCH_LIBRARY_IMPL(seqkern, CPU, m) { seqkern::implement(m); }
#elif defined(SEQKERN_BACKEND_EMULATOR)
STABLE_TORCH_LIBRARY_FRAGMENT(seqkern_emu, m) { seqkern::define(m); }
STABLE_TORCH_LIBRARY_IMPL(seqkern_emu, CPU, m) { seqkern::implement(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(seqkern, CUDA, m) { seqkern::implement(m); }
#endif
