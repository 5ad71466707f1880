// Numbers as a GPU makes them where it does not round the exact result: approximations, and sums of
// the tensor core.
#include <algorithm>
#include <cfenv>

#include "ptx.h"

namespace seqkern::emulator::ptx {
namespace {

uint64_t hash(uint64_t x) {
  x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93u;
  x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93u;
  return x ^ (x >> 32);
}

// From -1 to 1, the same for the same operands.
double noise(uint64_t operands) {
  return static_cast<double>(static_cast<int64_t>(hash(operands))) * 0x1p-63;
}

bool is_normal(double y) { return std::isfinite(y) && y != 0; }

uint64_t bits(float x) { return std::bit_cast<uint32_t>(x); }

// y with up to `units` in the last place of a float between it and the result.
float near(double y, double units, uint64_t operands) {
  const auto rounded = static_cast<float>(y);
  if (!is_normal(rounded) || std::fabs(rounded) < std::numeric_limits<float>::min()) return rounded;
  // Half a unit goes to rounding.
  return static_cast<float>(y * (1 + (units - 0.5) * noise(operands) * 0x1p-23));
}

}  // namespace

float fma_downwards(float a, float b, float c) {
  std::fesetround(FE_DOWNWARD);
  volatile float va = a, vb = b, vc = c;
  volatile float y = __builtin_fmaf(va, vb, vc);
  std::fesetround(FE_TONEAREST);
  return y;
}

// Up to 2 units in the last place. Powers of two are exact: CUDA's own exp and tanh of doubles rest
// on that.
float ex2(float x, bool flush) {
  if (flush) x = flushed(x);
  const double exact = std::exp2(static_cast<double>(x));
  const float y = x == std::floor(x) ? static_cast<float>(exact) : near(exact, 2, bits(x));
  return flush ? flushed(y) : y;
}

float lg2(float x) {
  const double y = std::log2(static_cast<double>(x));
  if (!is_normal(y)) return static_cast<float>(y);
  // 2^-22, of 1 around an operand of 1.
  return static_cast<float>(y + noise(bits(x)) * 0x1p-22 * std::max(1.0, std::fabs(y)));
}

float reciprocal(float x) { return flushed(near(1 / static_cast<double>(flushed(x)), 1, bits(x))); }

// What begins Newton's iterations: the high half of the result.
double reciprocal(double x) {
  if (std::fabs(x) < std::numeric_limits<double>::min()) x = std::copysign(0.0, x);
  const double y = 1 / x;
  if (!is_normal(y)) return y;
  return std::bit_cast<double>(std::bit_cast<uint64_t>(y) & 0xffffffff00000000u);
}

float quotient(float a, float b) {
  // Beyond 2^126 the reciprocal is 0.
  if (std::fabs(b) > 0x1p126f && std::isfinite(b))
    return std::isfinite(a) ? std::copysign(0.0f, a) * std::copysign(1.0f, b) : std::nanf("");
  return near(static_cast<double>(a) / b, 2, bits(a) << 32 | bits(b));
}

namespace {

// Sums of the tensor core, as others measured them on an A100 (Fasi et al., Numerical behavior of
// NVIDIA tensor cores, 2021; Khattak and Mikaitis, arXiv 2512.07004): the exact products of eight k
// and what is summed so far are cut off, not rounded, one bit below the last of a float as large as
// the largest of them, and so is their sum. (An H100 takes sixteen at once and two bits.)
constexpr int kSummedAtOnce = 8;
constexpr int kBitsBelow = 24;

float summed(const double* products, int count, double sum) {
  int exponent = std::numeric_limits<int>::min();
  bool finite = std::isfinite(sum);
  const auto look = [&](double x) {
    finite = finite && std::isfinite(x);
    if (x != 0 && std::isfinite(x)) exponent = std::max(exponent, std::ilogb(x));
  };
  look(sum);
  for (int i = 0; i < count; ++i) look(products[i]);
  if (!finite) {
    for (int i = 0; i < count; ++i) sum += products[i];
    return static_cast<float>(sum);
  }
  if (exponent == std::numeric_limits<int>::min()) return static_cast<float>(sum);
  const double scale = std::ldexp(1.0, kBitsBelow - exponent);
  double total = std::trunc(sum * scale);
  for (int i = 0; i < count; ++i) total += std::trunc(products[i] * scale);
  const double exact = total / scale;
  const auto rounded = static_cast<float>(exact);
  if (std::fabs(static_cast<double>(rounded)) <= std::fabs(exact)) return rounded;
  return std::nextafter(rounded, 0.0f);
}

struct At {
  Operands operands;
  int instruction;
};

}  // namespace

Tile multiply(int at, const Operands& own, bool bfloat) {
  return warp_collective("mma.sync", At{own, at}, [&](const Lanes<At>& lanes, int lane) {
    Tile d;
    At all[kWarpSize];
    for (int l = 0; l < kWarpSize; ++l) {
      all[l] = lanes[l];
      if (all[l].instruction != at)
        fail("mma.sync: the lanes of a warp are at different instructions");
    }
    const auto half = [&](uint32_t pair, int which) -> double {
      return bfloat ? half_of<BFloat16>(pair, which) : half_of<Half>(pair, which);
    };
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i / 2) * 8;
      const int column = 2 * (lane % 4) + i % 2;
      float sum = std::bit_cast<float>(own.c[i]);
      for (int first = 0; first < 16; first += kSummedAtOnce) {
        double products[kSummedAtOnce];
        for (int j = 0; j < kSummedAtOnce; ++j) {
          const int k = first + j, pair = (k % 8) / 2;
          products[j] = half(all[(row % 8) * 4 + pair].operands.a[row / 8 + 2 * (k / 8)], k % 2) *
                        half(all[column * 4 + pair].operands.b[k / 8], k % 2);
        }
        sum = summed(products, kSummedAtOnce, sum);
      }
      d.x[i] = std::bit_cast<uint32_t>(sum);
    }
    return d;
  });
}

}  // namespace seqkern::emulator::ptx
