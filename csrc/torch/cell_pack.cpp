// ops::cell_pack: both weights of a step in the layout of its kernel, for who keeps the copy.
#include <cstring>

#include "torch/cell_step.h"
#include "torch/ops_recurrent.h"

namespace seqkern {

Tensor cell_pack(const Tensor& w_ih, const Tensor& w_hh) {
  constexpr std::string_view kOp = "cell_pack";
  [[maybe_unused]] const Backend::Guard guard(w_ih);
  const DType dtype = float_dtype(w_ih, kOp, "w_ih");
  check(w_hh.dim() == 2 && w_hh.size(1) >= 1 && w_hh.size(0) % w_hh.size(1) == 0, kOp,
        ": w_hh must be [gates H, H], got ", describe(w_hh));
  const int64_t H = w_hh.size(1), G = w_hh.size(0) / H;
  check(G == 1 || G == 3 || G == 4, kOp, ": w_hh must be of 1, 3 or 4 gates, got ", describe(w_hh));
  const Checker checked{kOp, w_ih};
  check(w_ih.dim() == 2, kOp, ": w_ih must be [gates H, I], got ", describe(w_ih));
  const int64_t I = w_ih.size(1);
  const Tensor first = checked(w_ih, "w_ih", {G * H, I});
  const Tensor second = checked(w_hh, "w_hh", {G * H, H});
#if defined(SEQKERN_BACKEND_CPU)
  cpu::CellStepPackArgs args{.dtype = dtype,
                             .G = G,
                             .I = I,
                             .H = H,
                             .w_ih = first.const_data_ptr(),
                             .w_hh = second.const_data_ptr(),
                             .members = torch::stable::get_num_threads(),
                             .packed = nullptr};
  constexpr auto kHead = static_cast<int64_t>(sizeof(PackedWeights));
  const int64_t size[] = {kHead + Backend::workspace_bytes(args)};
  const Tensor packed = empty_on(w_ih, Sizes(size, 1), ScalarType::Byte);
  std::memset(packed.mutable_data_ptr(), 0, kHead);  // also what lies between its members
  auto* kept = static_cast<PackedWeights*>(packed.mutable_data_ptr());
  *kept = {.isa = static_cast<int64_t>(cpu::active_isa()),
           .dtype = static_cast<int64_t>(dtype),
           .G = G,
           .I = I,
           .H = H,
           .members = args.members};
  args.packed = kept + 1;
  Backend::run(args);
  return packed;
#else
  (void)dtype;
  return empty_on(w_ih, {0}, ScalarType::Byte);  // kernels there read weights where they are
#endif
}

}  // namespace seqkern
