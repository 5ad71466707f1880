// Softmax-cross-entropy on the CPU, backward: the logits are read once and the gradient is written
// once.
#include "cpu/cross_entropy.h"
#include "cpu/kernels.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

// Gradients of the rows' classes, which are written over what the rest of the row is made like: as
// many as a vector has lanes at a time, since for one row alone the two exponentials take as long
// as for all of them.
template <class T>
struct ClassGradients {
  using Acc = AccOf<T>;
  static constexpr int L = kLanes<Acc>;

  int count = 0;
  alignas(64) Acc log_p[L];
  RowGradient<Acc> rows[L];
  Acc smooth[L], cap_derivative[L];
  T* to[L];

  void add(const RowGradient<Acc>& row, Acc log_p_y, Acc smooth_y, Acc derivative, T* dx_y) {
    log_p[count] = log_p_y;
    rows[count] = row;
    smooth[count] = smooth_y;
    cap_derivative[count] = derivative;
    to[count] = dx_y;
    if (++count == L) write();
  }
  void write() {
    for (int i = count; i < L; ++i) log_p[i] = 0;
    const Vec<Acc> p_less_1 = expm1_nonpositive<Acc>(load(log_p));
    const Vec<Acc> p = exp_nonpositive<Acc>(load(log_p));
    for (int i = 0; i < count; ++i) {
      store1(to[i], (rows[i].of_class(p_less_1[i], p[i]) - smooth[i]) * cap_derivative[i]);
    }
    count = 0;
  }
};

// dx_v = scale * p_v - g w_v q_v with p_v = exp((x_v - m) - log_sum), times the cap's derivative.
template <class T, bool kCap, bool kTargetSums>
void backward_rows(const CrossEntropyBackwardArgs& a, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  constexpr int L = kLanes<Acc>;
  const CrossEntropyInputs& in = a.in;
  const Options<Acc> o(in);
  const T* logits = static_cast<const T*>(in.logits);
  const T* probs = static_cast<const T*>(in.target_probs);
  const Acc* row_max = static_cast<const Acc*>(a.row_max);
  const Acc* row_log_sum = static_cast<const Acc*>(a.row_log_sum);
  T* dlogits = static_cast<T*>(a.dlogits);
  alignas(64) Acc x_buffer[kBlock];
  alignas(64) Acc p_buffer[kBlock];
  alignas(64) Acc cap_buffer[kCap ? kBlock : 1];
  const Acc keep = probs ? Acc(1) - o.smoothing : Acc(0);
  const Acc uniform = o.smoothing / static_cast<Acc>(in.V);
  ClassGradients<T> classes;

  for (int64_t n = begin; n < end; ++n) {
    RowGradient<Acc> row(a, o, n);
    T* dx_n = dlogits + n * in.V;
    if (row.none) {
      __builtin_memset(dx_n, 0, in.V * sizeof(T));
      continue;
    }
    const int64_t y = in.target ? in.target[n] : 0;
    const T* x_n = logits + in.logits_rows.offset(n);
    const T* p_n = probs ? probs + in.target_probs_rows.offset(n) : nullptr;
    const Acc m = row_max[n];
    const Acc log_sum = row_log_sum[n];
    if (p_n) {
      TargetSums<Acc> sums;
      for (int64_t v = 0; v < in.V; v += kBlock) {
        const int64_t len = in.V - v < kBlock ? in.V - v : kBlock;
        const Acc* p = stage<T, Acc, false>(p_n + v, len, Acc(0), Acc(0), p_buffer);
        add_targets(sums, p, p, o.weight ? o.weight + v : nullptr, keep, uniform, len);
      }
      row.set_mass(sums.mass);
    }
    const Acc scale = row.scale();
    Acc x_y = 0;
    Acc cap_derivative = 1;
    const V max_v = splat<V>(m);
    const V log_sum_v = splat<V>(log_sum);

    for (int64_t v = 0; v < in.V; v += kBlock) {
      const int64_t len = in.V - v < kBlock ? in.V - v : kBlock;
      const Acc* x = stage<T, Acc, kCap>(x_n + v, len, o.softcap,
                                         -static_cast<Acc>(__builtin_inf()), x_buffer, cap_buffer);
      const Acc* p = nullptr;
      if constexpr (kTargetSums) {
        if (p_n) p = stage<T, Acc, false>(p_n + v, len, Acc(0), Acc(0), p_buffer);
      }
      if (y >= v && y < v + len) {
        x_y = x[y - v];
        if constexpr (kCap) cap_derivative = cap_buffer[y - v];
      }
      const auto gradient = [&](int64_t i) __attribute__((always_inline)) {
        const V x_v = load(x + i);
        V d = exp_nonpositive<Acc>((x_v - max_v) - log_sum_v) * scale;
        if constexpr (kTargetSums) {
          V q = splat<V>(uniform);
          if (p) q += load(p + i) * keep;
          if (o.weight) {
            q *= load_part<Acc>(o.weight + v + i, len - i);
          }
          d -= q * row.g_ce;
        }
        if constexpr (kCap) d *= load(cap_buffer + i);
        return d;
      };
      int64_t i = 0;
      for (; i + L <= len; i += L) {
        __builtin_prefetch(x_n + v + i + kPrefetchAhead);
        store(dx_n + v + i, gradient(i));
      }
      if (i < len) store_part<Acc>(dx_n + v + i, gradient(i), len - i);
    }

    if (row.on_target != 0) {
      const Acc smooth = kTargetSums ? row.g_ce * uniform * o.weight_of(y) : Acc(0);
      classes.add(row, (x_y - m) - log_sum, smooth, cap_derivative, dx_n + y);
    }
  }
  classes.write();
}

}  // namespace

void cross_entropy_backward(const CrossEntropyBackwardArgs& a, int64_t begin, int64_t end) {
  if (backward_of_few(a, begin, end)) return;
  if (a.in.side) return backward_columns(a, begin, end);
  specialize(a.in, [&](auto tag, auto cap, auto sums) {
    backward_rows<typename decltype(tag)::type, cap.value, sums.value>(a, begin, end);
  });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
