// The recurrent ops as library_recurrent.cpp registers them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace seqkern {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm(
    const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0, const Tensor& w_ih,
    const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
    const OptionalTensor& w_hr, const OptionalTensor& lengths, bool reverse, bool save_gates,
    bool save_cells);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
    const OptionalTensor& grad_c_n, const OptionalTensor& grad_c, const Tensor& input,
    const OptionalTensor& h0, const OptionalTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
    const OptionalTensor& w_hr, const OptionalTensor& lengths, const Tensor& output,
    const Tensor& c, const Tensor& gates, bool activated, bool reverse, int64_t needs);

std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& input, const Tensor& h0,
                                             const Tensor& c0, const Tensor& w_ih,
                                             const Tensor& w_hh, const OptionalTensor& b_ih,
                                             const OptionalTensor& b_hh, bool save_gates);

Tensor cell_pack(const Tensor& w_ih, const Tensor& w_hh);

std::tuple<Tensor, Tensor, Tensor> lstm_cell_forward(const Tensor& input, const Tensor& h0,
                                                     const Tensor& c0, const Tensor& w_ih,
                                                     const Tensor& w_hh, const OptionalTensor& b_ih,
                                                     const OptionalTensor& b_hh,
                                                     const OptionalTensor& packed, bool save_gates);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_cell_backward(
    const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Tensor& input,
    const Tensor& h0, const Tensor& c0, const Tensor& w_ih, const Tensor& w_hh, const Tensor& c,
    const Tensor& gates, int64_t needs);

std::tuple<Tensor, Tensor, Tensor, Tensor> gru(const Tensor& input, const OptionalTensor& h0,
                                               const Tensor& w_ih, const Tensor& w_hh,
                                               const OptionalTensor& b_ih,
                                               const OptionalTensor& b_hh,
                                               const OptionalTensor& lengths, bool reverse,
                                               bool save_gates);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_backward(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const Tensor& input,
    const OptionalTensor& h0, const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& lengths,
    const Tensor& output, const Tensor& gates, const Tensor& u_n, bool activated, bool reverse,
    int64_t needs);

std::tuple<Tensor, Tensor> rnn(const Tensor& input, const OptionalTensor& h0, const Tensor& w_ih,
                               const Tensor& w_hh, const OptionalTensor& b_ih,
                               const OptionalTensor& b_hh, const OptionalTensor& lengths,
                               bool reverse, bool relu);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_backward(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const Tensor& input,
    const OptionalTensor& h0, const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& lengths,
    const Tensor& output, bool reverse, bool relu, int64_t needs);

std::tuple<Tensor, Tensor> gru_cell(const Tensor& input, const Tensor& h0, const Tensor& w_ih,
                                    const Tensor& w_hh, const OptionalTensor& b_ih,
                                    const OptionalTensor& b_hh, bool save_gates);

std::tuple<Tensor, Tensor> gru_cell_forward(const Tensor& input, const Tensor& h0,
                                            const Tensor& w_ih, const Tensor& w_hh,
                                            const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                                            const OptionalTensor& packed, bool save_gates);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(
    const OptionalTensor& grad_h, const Tensor& input, const Tensor& h0, const Tensor& w_ih,
    const Tensor& w_hh, const Tensor& gates, int64_t needs);

Tensor rnn_cell(const Tensor& input, const Tensor& h0, const Tensor& w_ih, const Tensor& w_hh,
                const OptionalTensor& b_ih, const OptionalTensor& b_hh, bool relu);

Tensor rnn_cell_forward(const Tensor& input, const Tensor& h0, const Tensor& w_ih,
                        const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                        const OptionalTensor& packed, bool relu);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_cell_backward(
    const OptionalTensor& grad_h, const Tensor& input, const Tensor& h0, const Tensor& w_ih,
    const Tensor& w_hh, const Tensor& h, bool relu, int64_t needs);

}  // namespace seqkern
