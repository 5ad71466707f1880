// Softmax and log-softmax on the CPU: a row is read for its maximum and sum, and once more, mostly
// from cache, for its result.
#include "cpu/softmax.h"

#include "cpu/kernels.h"
#include "ops/softmax.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

template <class Acc>
constexpr Acc minus_infinity() {
  return -static_cast<Acc>(__builtin_inf());
}

// out[i] = f(i) for i in [0, len), a vector at a time. f may read whole vectors.
template <class T, class F>
SEQKERN_INLINE void write(T* out, int64_t len, F&& f) {
  constexpr int L = kLanes<AccOf<T>>;
  int64_t i = 0;
  for (; i + L <= len; i += L) store(out + i, f(i));
  if (i < len) store_part<AccOf<T>>(out + i, f(i), len - i);
}

template <class T, bool kLog>
void forward_rows(const SoftmaxForwardArgs& a, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  constexpr int L = kLanes<Acc>;
  alignas(64) Acc buffer[kBlock];
  for (int64_t n = begin; n < end; ++n) {
    const T* x_n = static_cast<const T*>(a.x) + a.x_rows.offset(n);
    T* y_n = static_cast<T*>(a.y) + n * a.V;
    Online<Acc> online;
    const Acc* x = nullptr;
    for (int64_t v = 0; v < a.V; v += kBlock) {
      const int64_t len = a.V - v < kBlock ? a.V - v : kBlock;
      x = stage<T, Acc, false>(x_n + v, len, Acc(0), minus_infinity<Acc>(), buffer);
      online.add(x, (len + L - 1) / L * L);
    }
    const V m = splat<V>(online.max);
    const Acc sum = hsum(online.sum);
    // What a row of -inf leaves is 0 / 0 and -inf - -inf: NaN, as it should be.
    const V factor = splat<V>(Acc(1) / sum);
    const V log_sum = splat<V>(log1(sum));
    for (int64_t v = 0; v < a.V; v += kBlock) {
      const int64_t len = a.V - v < kBlock ? a.V - v : kBlock;
      if (a.V > kBlock) {  // a row of one block is staged still
        x = stage<T, Acc, false>(x_n + v, len, Acc(0), minus_infinity<Acc>(), buffer);
      }
      write(y_n + v, len, [&](int64_t i) __attribute__((always_inline)) -> V {
        const V d = load(x + i) - m;
        return kLog ? d - log_sum : exp_nonpositive<Acc>(d) * factor;
      });
    }
  }
}

template <class T, bool kLog>
void backward_rows(const SoftmaxBackwardArgs& a, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  constexpr int L = kLanes<Acc>;
  alignas(64) Acc dy_buffer[kBlock];
  alignas(64) Acc y_buffer[kBlock];
  for (int64_t n = begin; n < end; ++n) {
    const T* dy_n = static_cast<const T*>(a.dy) + a.dy_rows.offset(n);
    const T* y_n = static_cast<const T*>(a.y) + n * a.V;
    T* dx_n = static_cast<T*>(a.dx) + n * a.V;
    const Acc* dy = nullptr;
    const Acc* y = nullptr;
    const auto stage_block = [&](int64_t v, int64_t len) __attribute__((always_inline)) {
      dy = stage<T, Acc, false>(dy_n + v, len, Acc(0), Acc(0), dy_buffer);
      y = stage<T, Acc, false>(y_n + v, len, Acc(0), Acc(0), y_buffer);
    };
    V s0 = {}, s1 = {};
    const auto term = [&](int64_t i) __attribute__((always_inline)) -> V {
      return kLog ? load(dy + i) : load(dy + i) * load(y + i);
    };
    for (int64_t v = 0; v < a.V; v += kBlock) {
      const int64_t len = a.V - v < kBlock ? a.V - v : kBlock;
      stage_block(v, len);
      const int64_t padded = (len + L - 1) / L * L;
      int64_t i = 0;
      for (; i + 2 * L <= padded; i += 2 * L) {
        s0 += term(i);
        s1 += term(i + L);
      }
      if (i < padded) s0 += term(i);
    }
    const V sum = splat<V>(hsum(s0 + s1));
    for (int64_t v = 0; v < a.V; v += kBlock) {
      const int64_t len = a.V - v < kBlock ? a.V - v : kBlock;
      if (a.V > kBlock) stage_block(v, len);
      write(dx_n + v, len, [&](int64_t i) __attribute__((always_inline)) -> V {
        return kLog ? load(dy + i) - exp_nonpositive<Acc>(load(y + i)) * sum
                    : load(y + i) * (load(dy + i) - sum);
      });
    }
  }
}

}  // namespace

void softmax_forward(const SoftmaxForwardArgs& a, int64_t begin, int64_t end) {
  dispatch_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    a.log ? forward_rows<T, true>(a, begin, end) : forward_rows<T, false>(a, begin, end);
  });
}

void softmax_backward(const SoftmaxBackwardArgs& a, int64_t begin, int64_t end) {
  dispatch_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    a.log ? backward_rows<T, true>(a, begin, end) : backward_rows<T, false>(a, begin, end);
  });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
