// The LSTM on the CPU, one row at a time.
#include "ops/lstm.h"

#include "cpu/kernels.h"
#include "cpu/vmath.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

template <class Acc>
SEQKERN_INLINE Acc sigmoid1(Acc x) {
  return Acc(1) / (Acc(1) + exp1(-x));
}
template <class Acc>
SEQKERN_INLINE Acc tanh1(Acc x) {
  if constexpr (sizeof(Acc) == 4) {
    return ::tanhf(x);
  } else {
    return ::tanh(x);
  }
}

SEQKERN_INLINE int64_t length_of(const RecurrentInputs& r, int64_t b) {
  return r.lengths ? r.lengths[b] : r.T;
}
SEQKERN_INLINE int64_t time_of(const RecurrentInputs& r, int64_t L, int64_t s) {
  return r.reverse ? L - 1 - s : s;
}

// Acc per row of scratch: forward a [4 H], m [H], h [P], c [H]; backward more.
SEQKERN_INLINE int64_t row_scratch(const RecurrentInputs& r) { return 8 * r.H + 4 * r.P; }

template <class T>
void forward_rows(const LstmForwardArgs& args, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  const RecurrentInputs& r = args.in.r;
  const int64_t H = r.H, P = r.P;
  const T* w_hh = static_cast<const T*>(r.w_hh);
  const T* b_hh = static_cast<const T*>(r.b_hh);
  const T* w_hr = static_cast<const T*>(args.in.w_hr);
  const T* gates_x = static_cast<const T*>(args.gates_x);
  for (int64_t b = begin; b < end; ++b) {
    Acc* a = static_cast<Acc*>(args.workspace) + b * row_scratch(r);
    Acc *m = a + 4 * H, *h = m + H, *c = h + P;
    for (int64_t j = 0; j < P; ++j)
      h[j] = r.h0 ? load1(static_cast<const T*>(r.h0) + b * P + j) : 0;
    for (int64_t j = 0; j < H; ++j) {
      c[j] = args.in.c0 ? load1(static_cast<const T*>(args.in.c0) + b * H + j) : 0;
    }
    const int64_t L = length_of(r, b);
    for (int64_t s = 0; s < r.T; ++s) {
      const int64_t t = s < L ? time_of(r, L, s) : s;
      T* h_t = static_cast<T*>(args.h) + t * args.h_strides.t + b * args.h_strides.b;
      T* c_t = args.c ? static_cast<T*>(args.c) + (t * r.B + b) * H : nullptr;
      if (s >= L) {
        for (int64_t j = 0; j < P; ++j) store1(h_t + j, Acc(0));
        for (int64_t j = 0; c_t && j < H; ++j) store1(c_t + j, Acc(0));
        continue;
      }
      const T* x = gates_x + t * args.gates_x_strides.t + b * args.gates_x_strides.b;
      T* gates = args.gates ? static_cast<T*>(args.gates) + (t * r.B + b) * 4 * H : nullptr;
      for (int64_t j = 0; j < 4 * H; ++j) {
        a[j] = 0;
        for (int64_t k = 0; k < P; ++k) a[j] += load1(w_hh + j * P + k) * h[k];
        a[j] += load1(x + j) + (b_hh ? load1(b_hh + j) : Acc(0));
        a[j] = j >= 2 * H && j < 3 * H ? tanh1(a[j]) : sigmoid1(a[j]);
      }
      for (int64_t j = 0; gates && j < 4 * H; ++j) store1(gates + j, a[j]);
      for (int64_t j = 0; j < H; ++j) {
        c[j] = a[H + j] * c[j] + a[j] * a[2 * H + j];
        if (c_t) store1(c_t + j, c[j]);
        m[j] = a[3 * H + j] * tanh1(c[j]);
      }
      for (int64_t j = 0; j < P; ++j) {
        Acc value = w_hr ? Acc(0) : m[j];
        for (int64_t k = 0; w_hr && k < H; ++k) value += load1(w_hr + j * H + k) * m[k];
        store1(h_t + j, value);
        h[j] = load1(h_t + j);
      }
    }
    for (int64_t j = 0; j < P; ++j) store1(static_cast<T*>(args.h_n) + b * P + j, h[j]);
    for (int64_t j = 0; j < H; ++j) store1(static_cast<T*>(args.c_n) + b * H + j, c[j]);
  }
}

// d[j] of the gates of one unit, from the activated gates and the gradients at m and c; dc becomes
// the gradient at the c before.
template <class Acc>
SEQKERN_INLINE void cell_gradient(const Acc* gates, Acc c_before, Acc c_after, Acc dm, Acc& dc,
                                  Acc* d) {
  const Acc i = gates[0], f = gates[1], g = gates[2], o = gates[3];
  const Acc tanh_c = tanh1(c_after);
  dc += dm * o * (1 - tanh_c * tanh_c);
  d[0] = dc * g * i * (1 - i);
  d[1] = dc * c_before * f * (1 - f);
  d[2] = dc * i * (1 - g * g);
  d[3] = dm * tanh_c * o * (1 - o);
  dc *= f;
}

template <class T>
void backward_rows(const LstmBackwardArgs& args, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  const RecurrentInputs& r = args.in.r;
  const int64_t H = r.H, P = r.P;
  const T* w_hh = static_cast<const T*>(r.w_hh);
  const T* w_hr = static_cast<const T*>(args.in.w_hr);
  const T* c_all = static_cast<const T*>(args.c);
  for (int64_t b = begin; b < end; ++b) {
    Acc* d = static_cast<Acc*>(args.workspace) + b * row_scratch(r);
    Acc *dm = d + 4 * H, *dh = dm + H, *dc = dh + P;
    for (int64_t j = 0; j < P; ++j) {
      dh[j] = args.dh_n ? load1(static_cast<const T*>(args.dh_n) + b * P + j) : Acc(0);
    }
    for (int64_t j = 0; j < H; ++j) {
      dc[j] = args.dc_n ? load1(static_cast<const T*>(args.dc_n) + b * H + j) : Acc(0);
    }
    const int64_t L = length_of(r, b);
    for (int64_t j = 0; args.dgates_0 && j < 4 * H; ++j) {
      store1(static_cast<T*>(args.dgates_0) + b * 4 * H + j, Acc(0));
    }
    for (int64_t s = r.T - 1; s >= 0; --s) {
      const int64_t t = s < L ? time_of(r, L, s) : s;
      const int64_t n = t * r.B + b;
      T* dgates = static_cast<T*>(args.dgates) + n * 4 * H;
      T* dh_total = w_hr ? static_cast<T*>(args.dh_total) + n * P : nullptr;
      T* m = w_hr ? static_cast<T*>(args.m) + n * H : nullptr;
      if (s >= L) {
        for (int64_t j = 0; j < 4 * H; ++j) store1(dgates + j, Acc(0));
        for (int64_t j = 0; w_hr && j < P; ++j) store1(dh_total + j, Acc(0));
        for (int64_t j = 0; w_hr && j < H; ++j) store1(m + j, Acc(0));
        continue;
      }
      if (args.dh) {
        const T* g = static_cast<const T*>(args.dh) + t * args.dh_strides.t + b * args.dh_strides.b;
        for (int64_t j = 0; j < P; ++j) dh[j] += load1(g + j);
      }
      for (int64_t j = 0; w_hr && j < P; ++j) {
        store1(dh_total + j, dh[j]);
        dh[j] = load1(dh_total + j);
      }
      const T* gates = static_cast<const T*>(args.gates) + n * 4 * H;
      for (int64_t j = 0; j < H; ++j) {
        dm[j] = w_hr ? Acc(0) : dh[j];
        for (int64_t k = 0; w_hr && k < P; ++k) dm[j] += dh[k] * load1(w_hr + k * H + j);
        Acc unit[4], unit_d[4];
        for (int k = 0; k < 4; ++k) {
          unit[k] = load1(gates + k * H + j);
          if (!args.activated) unit[k] = k == 2 ? tanh1(unit[k]) : sigmoid1(unit[k]);
        }
        const Acc c_after = load1(c_all + n * H + j);
        Acc c_before = args.in.c0 ? load1(static_cast<const T*>(args.in.c0) + b * H + j) : Acc(0);
        if (s > 0) c_before = load1(c_all + (time_of(r, L, s - 1) * r.B + b) * H + j);
        if (args.dc) dc[j] += load1(static_cast<const T*>(args.dc) + n * H + j);
        cell_gradient(unit, c_before, c_after, dm[j], dc[j], unit_d);
        if (m) store1(m + j, unit[3] * tanh1(c_after));
        for (int k = 0; k < 4; ++k) {
          store1(dgates + k * H + j, unit_d[k]);
          d[k * H + j] = load1(dgates + k * H + j);
          if (s == 0 && args.dgates_0) {
            store1(static_cast<T*>(args.dgates_0) + (b * 4 + k) * H + j, unit_d[k]);
          }
        }
      }
      for (int64_t j = 0; j < P; ++j) {
        dh[j] = 0;
        for (int64_t k = 0; k < 4 * H; ++k) dh[j] += d[k] * load1(w_hh + k * P + j);
      }
    }
    for (int64_t j = 0; args.dh0 && j < P; ++j) {
      store1(static_cast<T*>(args.dh0) + b * P + j, dh[j]);
    }
    for (int64_t j = 0; args.dc0 && j < H; ++j) {
      store1(static_cast<T*>(args.dc0) + b * H + j, dc[j]);
    }
  }
}

template <class T>
void cell_forward_rows(const LstmCellForwardArgs& args, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  const int64_t H = args.H;
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t j = 0; j < H; ++j) {
      Acc unit[4];
      for (int k = 0; k < 4; ++k) {
        const int64_t at = (b * 4 + k) * H + j;
        Acc a = load1(static_cast<const T*>(args.gates_x) + at);
        if (args.gates_h) a += load1(static_cast<const T*>(args.gates_h) + at);
        if (args.bias) a += load1(static_cast<const T*>(args.bias) + k * H + j);
        unit[k] = k == 2 ? tanh1(a) : sigmoid1(a);
        if (args.gates) store1(static_cast<T*>(args.gates) + at, unit[k]);
      }
      const Acc c = unit[1] * load1(static_cast<const T*>(args.c0) + b * H + j) + unit[0] * unit[2];
      store1(static_cast<T*>(args.c) + b * H + j, c);
      store1(static_cast<T*>(args.h) + b * H + j, unit[3] * tanh1(c));
    }
  }
}

template <class T>
void cell_backward_rows(const LstmCellBackwardArgs& args, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  const int64_t H = args.H;
  const auto at = [](const void* p, int64_t index) {
    return p ? load1(static_cast<const T*>(p) + index) : Acc(0);
  };
  for (int64_t n = begin * H; n < end * H; ++n) {
    const int64_t b = n / H, j = n % H;
    Acc unit[4], d[4];
    for (int k = 0; k < 4; ++k) unit[k] = at(args.gates, (b * 4 + k) * H + j);
    Acc dc = at(args.dc, n);
    cell_gradient(unit, at(args.c0, n), at(args.c, n), at(args.dh, n), dc, d);
    for (int k = 0; k < 4; ++k) store1(static_cast<T*>(args.dgates) + (b * 4 + k) * H + j, d[k]);
    store1(static_cast<T*>(args.dc0) + n, dc);
  }
}

int64_t scratch_bytes(const RecurrentInputs& r) {
  return r.B * row_scratch(r) * (r.dtype == DType::kFloat64 ? 8 : 4);
}

}  // namespace

int64_t lstm_forward_workspace(const LstmForwardArgs& args) { return scratch_bytes(args.in.r); }
int64_t lstm_backward_workspace(const LstmBackwardArgs& args) { return scratch_bytes(args.in.r); }

void lstm_forward(const LstmForwardArgs& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.in.r.dtype,
                 [&](auto tag) { forward_rows<typename decltype(tag)::type>(args, begin, end); });
}
void lstm_backward(const LstmBackwardArgs& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.in.r.dtype,
                 [&](auto tag) { backward_rows<typename decltype(tag)::type>(args, begin, end); });
}
void lstm_cell_forward(const LstmCellForwardArgs& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto tag) {
    cell_forward_rows<typename decltype(tag)::type>(args, begin, end);
  });
}
void lstm_cell_backward(const LstmCellBackwardArgs& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto tag) {
    cell_backward_rows<typename decltype(tag)::type>(args, begin, end);
  });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
