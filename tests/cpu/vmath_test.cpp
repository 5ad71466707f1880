// Scans the vector functions of one instruction set against long double and prints the worst error
// of each, as `name value` lines; tests/cpu/test_vmath.py holds the bounds.
#include "cpu/vmath.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>

#include "cpu/part.h"
#include "cpu/simd.h"

using namespace seqkern;
using namespace seqkern::cpu::SEQKERN_ISA;

namespace {

// Error of `actual` in units of the last place of a correctly rounded result.
template <class T>
double ulps(T actual, long double exact) {
  if (std::isnan(actual)) return std::isnan(exact) ? 0 : INFINITY;
  const T rounded = static_cast<T>(exact);
  const T next = std::nextafter(std::abs(rounded), std::numeric_limits<T>::infinity());
  const long double unit = static_cast<long double>(next) - std::abs(rounded);
  return static_cast<double>(std::abs(actual - exact) / unit);
}

// Worst error of f over xs given by next(), a full vector at a time.
template <class T, class F, class G, class Next>
double worst(F f, G exact, Next next, int64_t count) {
  constexpr int L = kLanes<T>;
  double bad = 0;
  for (int64_t i = 0; i + L <= count; i += L) {
    Vec<T> x;
    for (int l = 0; l < L; ++l) x[l] = next(i + l);
    const Vec<T> y = f(x);
    for (int l = 0; l < L; ++l) {
      const double error = ulps<T>(y[l], exact(static_cast<long double>(x[l])));
      if (error > bad) bad = error;
    }
  }
  return bad;
}

float from_bits(uint32_t u) { return bitcast<float>(u); }

void exponentials() {
  // Every 61st negative float down to the smallest normal result, and denormal arguments.
  const uint32_t last = bitcast<uint32_t>(-87.33654f), first = 0x80000000u;
  const int64_t count = (last - first) / 61;
  std::printf("exp_float %g\n",
              worst<float>([](VecF x) { return exp_nonpositive<float>(x); },
                           [](long double x) { return std::exp(x); },
                           [&](int64_t i) { return from_bits(first + 61 * i); }, count));
  std::printf("exp_double %g\n",
              worst<double>([](VecD x) { return exp_nonpositive<double>(x); },
                            [](long double x) { return std::exp(x); },
                            [](int64_t i) { return -708.39 * (i + 1) / 1000000.0; }, 1000000));
  std::printf("expm1_float %g\n",
              worst<float>([](VecF x) { return expm1_nonpositive<float>(x); },
                           [](long double x) { return std::expm1(x); },
                           [&](int64_t i) { return from_bits(first + 61 * i); }, count));
  std::printf("expm1_double %g\n",
              worst<double>([](VecD x) { return expm1_nonpositive<double>(x); },
                            [](long double x) { return std::expm1(x); },
                            [](int64_t i) { return -40.0 * (i + 1) / 1000000.0; }, 1000000));
  const VecF below = exp_nonpositive<float>(splat<VecF>(-87.4f));
  const VecF minus_inf = exp_nonpositive<float>(splat<VecF>(-INFINITY));
  const VecF nan = exp_nonpositive<float>(splat<VecF>(NAN));
  const VecD nan_double = exp_nonpositive<double>(splat<VecD>(NAN));
  const VecF odd_nan = exp_nonpositive<float>(splat<VecF>(from_bits(0xffc12345u)));
  std::printf("exp_zero_below %g\n", double(below[0] != 0 || minus_inf[0] != 0));
  std::printf("exp_nan_stays %g\n", double(nan[0] == nan[0] || nan_double[0] == nan_double[0] ||
                                           odd_nan[0] == odd_nan[0]));
}

void logarithms() {
  // Every 997th normal positive float, and all near 1, where the logarithm is near 0.
  std::printf("log_float %g\n",
              worst<float>([](VecF x) { return log_nonnegative<float>(x); },
                           [](long double x) { return std::log(x); },
                           [](int64_t i) {
                             return from_bits(0x00800000u + 997u * static_cast<uint32_t>(i));
                           },
                           (0x7f800000 - 0x00800000) / 997));
  std::printf("log_float_near_1 %g\n",
              worst<float>([](VecF x) { return log_nonnegative<float>(x); },
                           [](long double x) { return std::log(x); },
                           [](int64_t i) {
                             return from_bits(0x3f800000u - 2000000u + static_cast<uint32_t>(i));
                           },
                           4000000));
  std::printf(
      "log_double %g\n",
      worst<double>([](VecD x) { return log_nonnegative<double>(x); },
                    [](long double x) { return std::log(x); },
                    [](int64_t i) { return std::exp(-700 + 1400.0 * i / 1000000); }, 1000000));
  std::printf("log_double_near_1 %g\n",
              worst<double>([](VecD x) { return log_nonnegative<double>(x); },
                            [](long double x) { return std::log(x); },
                            [](int64_t i) { return 0.5 + 1.5 * i / 1000000; }, 1000000));
  const VecF ends = log_nonnegative<float>(VecF{0.0f, INFINITY, NAN, 1.0f});
  const VecD doubles = log_nonnegative<double>(splat<VecD>(NAN));
  std::printf("log_ends_wrong %g\n",
              double(ends[0] != -INFINITY || ends[1] != INFINITY || ends[2] == ends[2] ||
                     ends[3] != 0 || doubles[0] == doubles[0]));
}

void hyperbolic_tangents() {
  const auto value = [](auto u) { return tanh_with_derivative(u).value; };
  const auto derivative = [](auto u) { return tanh_with_derivative(u).derivative; };
  const auto exact = [](long double x) { return std::tanh(x); };
  const auto exact_derivative = [](long double x) {
    const long double c = std::cosh(x);
    return 1 / (c * c);
  };
  const auto wide = [](int64_t i) { return (i % 2 ? -1 : 1) * 20.0f * (i + 1) / 4000000.0f; };
  const auto small = [](int64_t i) {
    return from_bits(0x00800000u + 701u * static_cast<uint32_t>(i));
  };
  const auto alone = [](auto u) { return vtanh(u); };
  std::printf("vtanh_float %g\n", worst<float>(alone, exact, wide, 4000000));
  std::printf("vtanh_float_small %g\n", worst<float>(alone, exact, small, 1400000));
  const VecF ends = vtanh(VecF{INFINITY, -INFINITY, NAN, -0.0f});
  std::printf("vtanh_ends_wrong %g\n", double(ends[0] != 1 || ends[1] != -1 || ends[2] == ends[2] ||
                                              !std::signbit(ends[3])));
  std::printf("tanh_float %g\n", worst<float>(value, exact, wide, 4000000));
  std::printf("tanh_float_small %g\n", worst<float>(value, exact, small, 1400000));
  std::printf("tanh_derivative_float %g\n",
              worst<float>(derivative, exact_derivative, wide, 4000000));
  std::printf(
      "tanh_double %g\n",
      worst<double>(value, exact, [](int64_t i) { return 20.0 * (i - 50000) / 50000.0; }, 100000));
}

void sigmoids() {
  const auto exact = [](long double x) { return 1 / (1 + std::exp(-x)); };
  // Down to where e^x is still normal: both tails, and the middle.
  const auto wide = [](int64_t i) { return -87.0f + 120.0f * (i + 1) / 4000000.0f; };
  std::printf("sigmoid_float %g\n",
              worst<float>([](VecF x) { return sigmoid<float>(x); }, exact, wide, 4000000));
  std::printf(
      "sigmoid_double %g\n",
      worst<double>([](VecD x) { return sigmoid<double>(x); }, exact,
                    [](int64_t i) { return -700.0 + 750.0 * (i + 1) / 1000000.0; }, 1000000));
  std::printf(
      "vtanh_double %g\n",
      worst<double>([](VecD x) { return vtanh(x); }, [](long double x) { return std::tanh(x); },
                    [](int64_t i) { return (i % 2 ? -1 : 1) * 20.0 * (i + 1) / 1000000.0; },
                    1000000));
  const VecF ends = {};
  const VecF low = sigmoid<float>(ends - INFINITY), high = sigmoid<float>(ends + INFINITY);
  const VecF nan = sigmoid<float>(ends + NAN);
  std::printf("sigmoid_ends_wrong %g\n", double(low[0] != 0 || high[0] != 1 || nan[0] == nan[0]));
}

void conversions() {
  int64_t half_loads = 0, half_stores = 0, bf16_stores = 0;
  constexpr int L = kLanes<float>;
  for (uint32_t h = 0; h < 65536; h += L) {
    Half in[L], out[L];
    for (int l = 0; l < L; ++l) in[l].bits = static_cast<uint16_t>(h + l);
    const VecF v = load(in);
    store(out, v);
    for (int l = 0; l < L; ++l) {
      const uint16_t bits = in[l].bits;
      const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
      const bool is_nan = exponent == 31 && mantissa;
      const float exact =
          std::ldexp(exponent ? 1024.0f + mantissa : mantissa, (exponent ? exponent : 1) - 25);
      const float signed_exact =
          (bits & 0x8000 ? -1.0f : 1.0f) * (exponent == 31 ? INFINITY : exact);
      half_loads += is_nan ? v[l] == v[l] : v[l] != signed_exact;
      half_loads += is_nan ? load1(in + l) == load1(in + l) : load1(in + l) != signed_exact;
      half_stores +=
          is_nan ? (out[l].bits & 0x7c00) != 0x7c00 || !(out[l].bits & 1023) : out[l].bits != bits;
    }
  }
  // Rounding: the value halfway between two neighbours goes to the even one, anything beyond it
  // away.
  for (uint32_t h = 0; h < 0x7c00; ++h) {
    Half low{static_cast<uint16_t>(h)};
    const float a = load1(&low);
    Half high{static_cast<uint16_t>(h + 1)};
    const float b = h + 1 == 0x7c00 ? 65536.0f : load1(&high);
    const float middle = 0.5f * (a + b);
    const float tries[] = {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, INFINITY)};
    const uint16_t expected[] = {static_cast<uint16_t>(h + (h & 1)), static_cast<uint16_t>(h),
                                 static_cast<uint16_t>(h + 1)};
    for (int k = 0; k < 3; ++k) {
      Half lanes[L], one;
      store(lanes, splat<VecF>(tries[k]));
      store1(&one, tries[k]);
      half_stores += lanes[0].bits != expected[k] || one.bits != expected[k];
    }
  }
  for (uint32_t b = 0; b < 0x7f80; ++b) {
    const float tries[] = {from_bits(b << 16), from_bits((b << 16) + 0x8000),
                           from_bits((b << 16) + 0x7fff), from_bits((b << 16) + 0x8001)};
    const uint16_t expected[] = {static_cast<uint16_t>(b), static_cast<uint16_t>(b + (b & 1)),
                                 static_cast<uint16_t>(b), static_cast<uint16_t>(b + 1)};
    for (int k = 0; k < 4; ++k) {
      BFloat16 lanes[L], one;
      store(lanes, splat<VecF>(tries[k]));
      store1(&one, tries[k]);
      bf16_stores += lanes[0].bits != expected[k] || one.bits != expected[k];
    }
  }
  BFloat16 nan;
  store1(&nan,
         from_bits(0x7f800001u));  // the payload's upper bits are zero: must not become infinity
  bf16_stores += (nan.bits & 0x7f) == 0;
  std::printf("half_load_mismatches %g\n", double(half_loads));
  std::printf("half_store_mismatches %g\n", double(half_stores));
  std::printf("bf16_store_mismatches %g\n", double(bf16_stores));
}

// Parts of vectors at the end of a page, behind which nothing may be touched.
template <class T>
int64_t wrong_parts(char* page_end) {
  using Acc = AccOf<T>;
  constexpr int L = kLanes<Acc>;
  int64_t wrong = 0;
  for (int64_t count = -1; count <= L; ++count) {
    const int64_t some = count < 0 ? 0 : count;
    T* p = reinterpret_cast<T*>(page_end) - some;
    const T beside = p[-1];
    for (int64_t i = 0; i < some; ++i) store1(p + i, static_cast<Acc>(i + 1));
    Vec<Acc> v = load_part<Acc>(p, count, splat<Vec<Acc>>(Acc(77)));
    for (int64_t i = 0; i < L; ++i) wrong += v[i] != (i < some ? Acc(i + 1) : Acc(77));
    store_part<Acc>(p, v + Acc(1), count);
    for (int64_t i = 0; i < some; ++i) wrong += load1(p + i) != Acc(i + 2);
    wrong += __builtin_memcmp(p - 1, &beside, sizeof(T)) != 0;
  }
  return wrong;
}

void parts() {
  const long page = sysconf(_SC_PAGESIZE);
  void* pages = mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  char* end = static_cast<char*>(pages) + page;
  if (pages == MAP_FAILED || mprotect(end, page, PROT_NONE)) return;
  const int64_t wrong = wrong_parts<float>(end) + wrong_parts<double>(end) +
                        wrong_parts<BFloat16>(end) + wrong_parts<Half>(end);
  std::printf("parts_wrong %g\n", double(wrong));
}

}  // namespace

int main() {
  exponentials();
  logarithms();
  hyperbolic_tangents();
  sigmoids();
  conversions();
  parts();
}
