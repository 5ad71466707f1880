// Causal attention on the CPU, backward.
#include "cpu/attention.h"
#include "cpu/kernels.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

template <class T>
struct Score {
  using Acc = AccOf<T>;
  Score(const AttentionInputs& in, int64_t b, int64_t h)
      : in(in), b(b), h(h), kv(h / (in.NH / in.NKV)) {}

  const T* q(int64_t i) const {
    return static_cast<const T*>(in.q) + b * in.q_strides.b + h * in.q_strides.h +
           i * in.q_strides.t;
  }
  const T* k(int64_t j) const {
    return static_cast<const T*>(in.k) + b * in.k_strides.b + kv * in.k_strides.h +
           j * in.k_strides.t;
  }
  const T* v(int64_t j) const {
    return static_cast<const T*>(in.v) + b * in.v_strides.b + kv * in.v_strides.h +
           j * in.v_strides.t;
  }

  struct Value {
    Acc value, derivative;
  };
  Value operator()(int64_t i, int64_t j) const {
    Acc s = 0;
    for (int64_t d = 0; d < in.D; ++d) s += load1(q(i) + d) * load1(k(j) + d);
    s *= static_cast<Acc>(in.scale);
    Acc derivative = 1;
    if (in.softcap > 0) {
      const Acc t = static_cast<Acc>(::tanh(s / in.softcap));
      s = static_cast<Acc>(in.softcap) * t;
      derivative = 1 - t * t;
    }
    if (in.alibi_slopes) {
      s -= static_cast<Acc>(in.alibi_slopes[b * in.alibi_batch_stride + h]) *
           static_cast<Acc>(i + in.Tk - in.Tq - j);
    }
    return {s, derivative};
  }
  Acc keep(int64_t i, int64_t j) const {
    if (!in.seed) return 1;
    const PhiloxBits bits =
        attention_dropout_bits(static_cast<uint64_t>(*in.seed), b, h, in.NH, i, j / 4);
    return bits.word[j % 4] >= dropout_threshold(in.dropout_p)
               ? static_cast<Acc>(1 / (1 - in.dropout_p))
               : Acc(0);
  }

  const AttentionInputs& in;
  int64_t b, h, kv;
};

template <class T>
void backward_head(const AttentionBackwardArgs& a, int64_t b, int64_t kv) {
  using Acc = AccOf<T>;
  const AttentionInputs& in = a.in;
  const AttentionRow row(in, b);
  const int64_t group = in.NH / in.NKV;
  const auto at_ = [&](auto* base, const HeadStrides& s, int64_t head, int64_t t) {
    return base + b * s.b + head * s.h + t * s.t;
  };
  const T* dout = static_cast<const T*>(a.dout);
  const auto terms = [&](const Score<T>& score, int64_t i, int64_t j, Acc& kept) {
    const int64_t n = (b * in.NH + score.h) * in.Tq + i;
    const auto s = score(i, j);
    const Acc p = exp1(s.value - static_cast<const Acc*>(a.lse)[n]);
    Acc dp = 0, delta = 0;
    for (int64_t d = 0; dout && d < in.D; ++d) {
      const Acc g = load1(at_(dout, a.dout_strides, score.h, i) + d);
      dp += g * load1(score.v(j) + d);
      delta += g * load1(at_(static_cast<const T*>(a.out), a.out_strides, score.h, i) + d);
    }
    kept = p * score.keep(i, j);
    const Acc dlse = a.dlse ? static_cast<const Acc*>(a.dlse)[n] : Acc(0);
    return p * s.derivative * ((dp * score.keep(i, j) - delta) + dlse) * static_cast<Acc>(in.scale);
  };
  for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
    const Score<T> score(in, b, h);
    for (int64_t i = 0; i < in.Tq; ++i) {
      Acc dq[256] = {};
      const bool seen = i >= row.begin && i < row.end;
      for (int64_t j = seen ? row.first_key(i) : 0; seen && j < row.end_key(i); ++j) {
        Acc kept;
        const Acc ds = terms(score, i, j, kept);
        for (int64_t d = 0; d < in.D; ++d) dq[d] += ds * load1(score.k(j) + d);
      }
      for (int64_t d = 0; d < in.D; ++d) {
        store1(at_(static_cast<T*>(a.dq), a.dq_strides, h, i) + d, dq[d]);
      }
    }
  }
  for (int64_t j = 0; j < in.Tk; ++j) {
    Acc dk[256] = {}, dv[256] = {};
    const bool seen = j >= (in.cu_seqlens ? row.begin : 0) && j < row.end + row.offset;
    for (int64_t h = kv * group; seen && h < (kv + 1) * group; ++h) {
      const Score<T> score(in, b, h);
      for (int64_t i = row.first_query(j); i < row.end_query(j); ++i) {
        Acc kept;
        const Acc ds = terms(score, i, j, kept);
        for (int64_t d = 0; d < in.D; ++d) {
          dk[d] += ds * load1(score.q(i) + d);
          if (dout) dv[d] += kept * load1(at_(dout, a.dout_strides, h, i) + d);
        }
      }
    }
    for (int64_t d = 0; d < in.D; ++d) {
      store1(at_(static_cast<T*>(a.dk), a.dk_strides, kv, j) + d, dk[d]);
      store1(at_(static_cast<T*>(a.dv), a.dv_strides, kv, j) + d, dv[d]);
    }
  }
}

}  // namespace

void attention_backward(const AttentionBackwardArgs& a, int64_t begin, int64_t end) {
  dispatch_dtype(a.in.dtype, [&](auto tag) {
    for (int64_t task = begin; task < end; ++task) {
      backward_head<typename decltype(tag)::type>(a, task / a.in.NKV, task % a.in.NKV);
    }
  });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
