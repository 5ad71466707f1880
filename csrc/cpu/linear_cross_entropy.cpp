// Linear-cross-entropy on the CPU: a tile was just written by a GEMM and is read from cache.
#include "ops/linear_cross_entropy.h"

#include "cpu/kernels.h"
#include "cpu/softmax.h"

namespace seqkern::cpu::SEQKERN_ISA {
namespace {

// A row of the tile from column v on, as the softmax sees it: bias added, capped, padded with -inf.
template <class Acc, bool kCap>
SEQKERN_INLINE const Acc* stage_logits(const LinearCrossEntropyRows& rows, const LogitsTile& tile,
                                       const Acc* x, int64_t v, int64_t len, Acc* buffer,
                                       Acc* derivative = nullptr) {
  constexpr int L = kLanes<Acc>;
  constexpr Acc kPad = -static_cast<Acc>(__builtin_inf());
  const Acc softcap = static_cast<Acc>(rows.softcap);
  if (!tile.bias) return stage<Acc, Acc, kCap>(x + v, len, softcap, kPad, buffer, derivative);
  const Acc* bias = static_cast<const Acc*>(tile.bias) + v;
  int64_t i = 0;
  for (; i + L <= len; i += L) store(buffer + i, load(x + v + i) + load(bias + i));
  for (; i < len; ++i) buffer[i] = x[v + i] + bias[i];
  for (; i % L != 0; ++i) buffer[i] = kPad;
  // In place where a cap or padding remains to be applied: each vector is read before it is
  // written.
  return stage<Acc, Acc, kCap>(buffer, len, softcap, kPad, buffer, derivative);
}

bool ignored(const LinearCrossEntropyRows& rows, int64_t n) {
  return rows.target[n] == rows.ignore_index;
}

template <class Acc>
Acc weight_of(const LinearCrossEntropyRows& rows, int64_t y) {
  return rows.class_weight ? static_cast<const Acc*>(rows.class_weight)[y] : Acc(1);
}

// ---------------------------------------------------------------- state

template <class Acc, bool kCap, bool kSmooth>
void state_rows(const LinearCrossEntropyStateArgs& a, int64_t begin, int64_t end) {
  constexpr int L = kLanes<Acc>;
  const LinearCrossEntropyRows& rows = a.rows;
  const LogitsTile& tile = a.tile;
  const Acc* weight = static_cast<const Acc*>(rows.class_weight);
  if (weight) weight += tile.first_class;
  Acc* state = static_cast<Acc*>(a.state);
  alignas(64) Acc buffer[kBlock];

  for (int64_t n = begin; n < end; ++n) {
    const auto part = [&](int k) -> Acc& { return state[k * a.stride + n]; };
    if (a.first) {
      part(kStateMax) = lowest<Acc>();
      part(kStateSum) = part(kStateTarget) = part(kStateMass) = part(kStateDot) = 0;
    }
    if (rows.skip_ignored && ignored(rows, n)) continue;
    const Acc* x_n = static_cast<const Acc*>(tile.logits) + n * tile.width;
    const int64_t y = rows.target[n] - tile.first_class;
    const Acc old_max = part(kStateMax);
    Online<Acc> online;
    online.max = old_max;
    TargetSums<Acc> sums;
    for (int64_t v = 0; v < tile.width; v += kBlock) {
      const int64_t len = tile.width - v < kBlock ? tile.width - v : kBlock;
      const Acc* x = stage_logits<Acc, kCap>(rows, tile, x_n, v, len, buffer);
      if (y >= v && y < v + len && !ignored(rows, n)) part(kStateTarget) = x[y - v];
      online.add(x, (len + L - 1) / L * L);
      if constexpr (kSmooth) {
        if (v == 0) sums.shift = online.max;
        add_targets<Acc>(sums, x, nullptr, weight ? weight + v : nullptr, Acc(0), Acc(1), len);
      }
    }
    const Acc m = online.max;
    const Acc old_sum = part(kStateSum);
    part(kStateMax) = m;
    part(kStateSum) = (old_sum == 0 ? Acc(0) : old_sum * exp1(old_max - m)) + hsum(online.sum);
    if constexpr (kSmooth) {
      const Acc mass = part(kStateMass);
      if (mass != 0) part(kStateDot) += mass * (old_max - m);
      part(kStateDot) += sums.logits + sums.mass * (sums.shift - m);
      part(kStateMass) += sums.mass;
    }
  }
}

// ---------------------------------------------------------------- finish

template <class Acc>
void finish_rows(const LinearCrossEntropyFinishArgs& a, int64_t begin, int64_t end) {
  const LinearCrossEntropyRows& rows = a.rows;
  const Acc smoothing = static_cast<Acc>(rows.label_smoothing);
  const Acc uniform = smoothing / static_cast<Acc>(rows.V);
  const Acc* state = static_cast<const Acc*>(a.state);
  for (int64_t n = begin; n < end; ++n) {
    const auto part = [&](int k) { return state[k * a.stride + n]; };
    const bool skip = ignored(rows, n);
    const Acc m = part(kStateMax);
    const Acc log_sum = log1(part(kStateSum));
    const Acc lse = m + log_sum;
    const Acc log_p = skip ? Acc(0) : (part(kStateTarget) - m) - log_sum;
    Acc loss = 0;
    if (!skip) {
      loss = (Acc(1) - smoothing) * weight_of<Acc>(rows, rows.target[n]) * -log_p;
      if (smoothing > 0) loss += uniform * (part(kStateMass) * log_sum - part(kStateDot));
      if (a.add_z_loss) loss += static_cast<Acc>(rows.z_loss) * lse * lse;
    }
    static_cast<Acc*>(a.row_loss)[n] = loss;
    if (a.lse) static_cast<Acc*>(a.lse)[n] = lse;
    if (a.logprob) static_cast<Acc*>(a.logprob)[n] = log_p;
    const bool unused = skip && rows.skip_ignored;
    static_cast<Acc*>(a.row_log_sum)[n] = unused ? Acc(0) : log_sum;
    static_cast<Acc*>(a.row_max)[n] = unused ? Acc(0) : m;
    static_cast<Acc*>(a.row_sum)[n] = unused ? Acc(1) : part(kStateSum);
  }
}

// ---------------------------------------------------------------- gradient

// dx_v = scale * p_v - g w_v e / V, times the cap's derivative. p_v = exp(x_v - m) / sum, not
// exp((x_v - m) - log sum): the rounding of the logarithm would be an error of all p_v alike, which
// the GEMMs' sums do not average out.
template <class G, bool kCap, bool kSmooth>
void gradient_rows(const LinearCrossEntropyGradientArgs& a, int64_t begin, int64_t end) {
  using Acc = AccOf<G>;
  using V = Vec<Acc>;
  constexpr int L = kLanes<Acc>;
  const LinearCrossEntropyRows& rows = a.rows;
  const LogitsTile& tile = a.tile;
  const Acc* grad_loss = static_cast<const Acc*>(a.grad_loss);
  const Acc* norm = static_cast<const Acc*>(a.norm);
  const Acc* weight = static_cast<const Acc*>(rows.class_weight);
  if (weight) weight += tile.first_class;
  const Acc smoothing = static_cast<Acc>(rows.label_smoothing);
  const Acc uniform = smoothing / static_cast<Acc>(rows.V);
  const Acc weight_sum =
      rows.weight_sum ? *static_cast<const Acc*>(rows.weight_sum) : static_cast<Acc>(rows.V);
  alignas(64) Acc x_buffer[kBlock];
  alignas(64) Acc cap_buffer[kCap ? kBlock : 1];

  for (int64_t n = begin; n < end; ++n) {
    const bool skip = ignored(rows, n);
    const int64_t y = rows.target[n] - tile.first_class;
    const Acc g = skip || !grad_loss ? Acc(0) : grad_loss[n * a.grad_loss_stride];
    const Acc g_ce = g == 0 ? Acc(0) : g * (norm ? norm[0] : Acc(1));
    const Acc g_z = g == 0 ? Acc(0) : g * (norm ? norm[1] : Acc(1));
    const Acc g_lse = a.grad_lse ? static_cast<const Acc*>(a.grad_lse)[n] : Acc(0);
    const Acc g_logprob =
        skip || !a.grad_logprob ? Acc(0) : static_cast<const Acc*>(a.grad_logprob)[n];
    G* dx_n = static_cast<G*>(a.dlogits) + n * tile.width;
    if (skip && (rows.skip_ignored || g_lse == 0)) {
      __builtin_memset(dx_n, 0, tile.width * sizeof(G));
      continue;
    }
    const Acc* x_n = static_cast<const Acc*>(tile.logits) + n * tile.width;
    const Acc m = static_cast<const Acc*>(a.row_max)[n];
    const Acc sum = static_cast<const Acc*>(a.row_sum)[n];
    const Acc log_sum = log1(sum);
    const Acc weight_y = skip ? Acc(0) : weight_of<Acc>(rows, rows.target[n]);
    const Acc on_target = g_ce * (Acc(1) - smoothing) * weight_y - g_logprob;
    const Acc mass = uniform * weight_sum;
    const Acc z =
        rows.z_loss == 0 ? Acc(0) : g_z * 2 * static_cast<Acc>(rows.z_loss) * (m + log_sum);
    const Acc rest = g_ce * mass + z + g_lse;
    const Acc scale = (on_target + rest) / sum;
    const bool has_class = !skip && y >= 0 && y < tile.width;
    Acc x_y = 0;
    Acc cap_derivative = 1;
    const V max_v = splat<V>(m);

    for (int64_t v = 0; v < tile.width; v += kBlock) {
      const int64_t len = tile.width - v < kBlock ? tile.width - v : kBlock;
      const Acc* x = stage_logits<Acc, kCap>(rows, tile, x_n, v, len, x_buffer, cap_buffer);
      if (has_class && y >= v && y < v + len) {
        x_y = x[y - v];
        if constexpr (kCap) cap_derivative = cap_buffer[y - v];
      }
      const auto gradient = [&](int64_t i) __attribute__((always_inline)) {
        V d = exp_nonpositive<Acc>(load(x + i) - max_v) * scale;
        if constexpr (kSmooth) {
          V q = splat<V>(uniform);
          if (weight) {
            q *= load_part<Acc>(weight + v + i, len - i);
          }
          d -= q * g_ce;
        }
        if constexpr (kCap) d *= load(cap_buffer + i);
        return d;
      };
      int64_t i = 0;
      for (; i + L <= len; i += L) store(dx_n + v + i, gradient(i));
      if (i < len) store_part<Acc>(dx_n + v + i, gradient(i), len - i);
    }

    if (has_class && on_target != 0) {
      // p_y - 1 as expm1: exact where the model is sure, which is where the subtraction would
      // cancel.
      const Acc log_p = (x_y - m) - log_sum;
      Acc d = on_target * expm1_nonpositive<Acc>(splat<V>(log_p))[0];
      if (rest != 0) d += rest * exp1(log_p);
      if constexpr (kSmooth) d -= g_ce * uniform * weight_y;
      store1(dx_n + y, d * cap_derivative);
    }
  }
}

// ---------------------------------------------------------------- column sums

// Rows are added up in groups: the rounding of a sum grows with its number of terms.
constexpr int64_t kGroup = 32;

template <class T>
void column_sums(const ColumnSumsArgs& a, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  constexpr int L = kLanes<Acc>;
  constexpr int64_t kColumns = 4 * L;
  const T* x = static_cast<const T*>(a.x);
  Acc* sum = static_cast<Acc*>(a.sum);
  for (int64_t v = begin; v < end; v += kColumns) {
    const int64_t columns = end - v < kColumns ? end - v : kColumns;
    alignas(64) Acc total[kColumns] = {};
    for (int64_t row = 0; row < a.N; row += kGroup) {
      const int64_t last = row + kGroup < a.N ? row + kGroup : a.N;
      if (columns == kColumns) {
        Vec<Acc> s0 = {}, s1 = {}, s2 = {}, s3 = {};
        for (int64_t n = row; n < last; ++n) {
          const T* x_n = x + n * a.width + v;
          s0 += load(x_n);
          s1 += load(x_n + L);
          s2 += load(x_n + 2 * L);
          s3 += load(x_n + 3 * L);
        }
        store(total, load(total) + s0);
        store(total + L, load(total + L) + s1);
        store(total + 2 * L, load(total + 2 * L) + s2);
        store(total + 3 * L, load(total + 3 * L) + s3);
      } else {
        for (int64_t i = 0; i < columns; ++i) {
          Acc s = 0;
          for (int64_t n = row; n < last; ++n) s += load1(x + n * a.width + v + i);
          total[i] += s;
        }
      }
    }
    for (int64_t i = 0; i < columns; ++i) sum[v + i] = a.first ? total[i] : sum[v + i] + total[i];
  }
}

template <class F>
void specialize(const LinearCrossEntropyRows& rows, F&& f) {
  using False = std::false_type;
  using True = std::true_type;
  const bool smooth = rows.label_smoothing != 0;
  if (rows.softcap > 0) {
    smooth ? f(True{}, True{}) : f(True{}, False{});
  } else {
    smooth ? f(False{}, True{}) : f(False{}, False{});
  }
}

}  // namespace

void linear_cross_entropy_state(const LinearCrossEntropyStateArgs& a, int64_t begin, int64_t end) {
  specialize(a.rows, [&](auto cap, auto smooth) {
    a.rows.acc == DType::kFloat64 ? state_rows<double, cap.value, smooth.value>(a, begin, end)
                                  : state_rows<float, cap.value, smooth.value>(a, begin, end);
  });
}

void linear_cross_entropy_finish(const LinearCrossEntropyFinishArgs& a, int64_t begin,
                                 int64_t end) {
  a.rows.acc == DType::kFloat64 ? finish_rows<double>(a, begin, end)
                                : finish_rows<float>(a, begin, end);
}

void linear_cross_entropy_gradient(const LinearCrossEntropyGradientArgs& a, int64_t begin,
                                   int64_t end) {
  specialize(a.rows, [&](auto cap, auto smooth) {
    dispatch_dtype(a.grad_dtype, [&](auto tag) {
      gradient_rows<typename decltype(tag)::type, cap.value, smooth.value>(a, begin, end);
    });
  });
}

void linear_cross_entropy_column_sums(const ColumnSumsArgs& a, int64_t begin, int64_t end) {
  dispatch_dtype(a.dtype,
                 [&](auto tag) { column_sums<typename decltype(tag)::type>(a, begin, end); });
}

}  // namespace seqkern::cpu::SEQKERN_ISA
