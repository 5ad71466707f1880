// Linear-cross-entropy on CUDA: the sums over chunks that no GEMM makes.
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/softmax.cuh"
#include "cuda/vec.cuh"
#include "ops/linear_cross_entropy.h"

namespace seqkern::cuda {
namespace {

constexpr const char* kName = "linear_cross_entropy";
constexpr int kThreads = 128;

// A warp's lanes take neighbouring columns, the block's warps share the rows: a chunk has some
// thousand columns, too few for a thread each. A warp's rows are added up in groups, as a sum's
// rounding grows with its terms.
constexpr int kColumnWarps = 32;

template <class T>
__global__ void __launch_bounds__(kColumnWarps* kWarp)
    column_sums_kernel(const __grid_constant__ ColumnSumsArgs a) {
  using Acc = AccOf<T>;
  struct Parts {
    Acc of[kColumnWarps][kWarp + 1];  // + 1: a column's parts are in different banks
  };
  static_assert(kColumnWarps == kWarp);  // a warp adds up the parts of a column
  constexpr int64_t kGroup = 32 * kColumnWarps;
  Parts& parts = shared<Parts>();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarp;
  Acc total = 0;
  if (first + lane < a.width) {
    const T* x = static_cast<const T*>(a.x) + first + lane;
    for (int64_t row = warp; row < a.N; row += kGroup) {
      const int64_t end = row + kGroup < a.N ? row + kGroup : a.N;
      Acc s = 0;
#pragma unroll 8
      for (int64_t n = row; n < end; n += kColumnWarps) s += load1(x + n * a.width);
      total += s;
    }
  }
  parts.of[warp][lane] = total;
  // Orders the parts before they are added up.
  __syncthreads();
  total = warp_reduce(parts.of[lane][warp], Add<Acc>{});
  if (lane != 0 || first + warp >= a.width) return;
  Acc& sum = static_cast<Acc*>(a.sum)[first + warp];
  sum = a.first ? total : sum + total;
}

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    accumulate_kernel(const __grid_constant__ AccumulateArgs a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= a.numel) return;
  const Acc x = a.x ? static_cast<const Acc*>(a.x)[i] : Acc(0);
  Acc& sum = static_cast<Acc*>(a.sum)[i];
  sum = static_cast<Acc>(a.factor) * sum + x;
}

}  // namespace

void linear_cross_entropy_column_sums(const ColumnSumsArgs& a, Stream stream) {
  dispatch_dtype(a.dtype, [&]<class T>(TypeTag<T>) {
    launch(column_sums_kernel<T>,
           {.name = kName,
            .grid = static_cast<unsigned>(ceil_div<int64_t>(a.width, kWarp)),
            .block = kColumnWarps * kWarp,
            .stream = stream},
           a);
  });
}

void accumulate(const AccumulateArgs& a, Stream stream) {
  const LaunchConfig config = {.name = kName,
                               .grid = static_cast<unsigned>(ceil_div<int64_t>(a.numel, kThreads)),
                               .block = kThreads,
                               .stream = stream};
  a.acc == DType::kFloat64 ? launch(accumulate_kernel<double>, config, a)
                           : launch(accumulate_kernel<float>, config, a);
}

void visit_linear_cross_entropy_sums_kernels(VisitKernel visit, void* context) {
  const auto add = [&](const std::string& name, auto kernel) {
    visit(context, ("linear_cross_entropy_" + name).c_str(), reinterpret_cast<const void*>(kernel));
  };
  add("column_sums<float32>", column_sums_kernel<float>);
  add("column_sums<float64>", column_sums_kernel<double>);
  add("column_sums<float16>", column_sums_kernel<Half>);
  add("column_sums<bfloat16>", column_sums_kernel<BFloat16>);
  add("accumulate<float32>", accumulate_kernel<float>);
  add("accumulate<float64>", accumulate_kernel<double>);
}

}  // namespace seqkern::cuda
