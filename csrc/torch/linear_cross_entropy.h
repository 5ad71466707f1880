// The pieces of ops::linear_cross_entropy: arguments, how the logits are cut, and one chunk of
// rows.
#pragma once

#include "ops/linear_cross_entropy.h"
#include "torch/cross_entropy.h"
#include "torch/matrix.h"

namespace seqkern::linear_cross_entropy_parts {

inline constexpr std::string_view kOp = "linear_cross_entropy";

struct Options {
  int64_t ignore_index;
  double label_smoothing;
  double z_loss;
  double softcap;
  int64_t first_class;  // the class of weight's first row
  int64_t num_classes;  // of the whole vocabulary; 0: weight has all of it
  int64_t chunk_bytes;  // 0: our choice
};

// The arguments, checked and as the loop needs them.
struct Head {
  ScalarType acc;
  DType acc_dtype;
  DType dtype;
  int64_t N;                           // rows of hidden
  Tensor hidden;                       // T [N, H]
  Tensor weight;                       // T [V, H], any strides
  Tensor target;                       // int64 [R]
  std::optional<Tensor> kept;          // int64 [R]: the rows that count, where some do not
  std::optional<Tensor> bias;          // Acc [V]
  std::optional<Tensor> class_weight;  // Acc [num_classes]
  std::optional<Tensor> weight_sum;    // Acc []
  LinearCrossEntropyRows rows;         // of all R
  int64_t first_class;

  int64_t R() const { return rows.N; }
  int64_t H() const { return hidden.size(1); }
  int64_t V() const { return weight.size(0); }
  // Whether GEMMs take hidden, weight and dlogits in their own 16 bits.
  bool mixed() const { return hidden.scalar_type() != acc && Backend::mixed_gemm(dtype); }
  LinearCrossEntropyRows rows_from(int64_t begin, int64_t count) const {
    LinearCrossEntropyRows r = rows;
    r.target += begin;
    r.N = count;
    return r;
  }
};

// drop_ignored: where the host can look, rows with ignored targets take no part at all.
Head prepare(const Tensor& hidden, const Tensor& weight, const Tensor& target,
             const std::optional<Tensor>& bias, const std::optional<Tensor>& class_weight,
             const Options& options, bool drop_ignored);

// A tensor over the N rows (its first dimension) as the R rows that count, and back; what is
// left out becomes 0.
Tensor to_kept(const Head& head, const Tensor& t);
Tensor from_kept(const Head& head, const Tensor& t);

inline int64_t item_size(ScalarType acc) { return acc == ScalarType::Double ? 8 : 4; }

// How [R, V] is cut: chunks of rows, each in tiles of columns.
struct Plan {
  int64_t rows;   // per chunk
  int64_t width;  // of a tile
  // A chunk's logits are kept until its gradient is made from them. Else they are made twice, the
  // second time tile by tile for all rows.
  bool all_tiles;
};
Plan make_plan(const Head& head, bool all_tiles, int64_t chunk_bytes);

struct Wanted {
  bool hidden, weight, bias;
  bool any() const { return hidden || weight || bias; }
};

// Gradients being made; those not wanted are absent.
struct Gradients {
  std::optional<Tensor> hidden;  // Acc [R, H]
  std::optional<Tensor> weight;  // Acc or weight_gradient_type [V, H]
  std::optional<Tensor> bias;    // Acc [V]
  bool any() const { return hidden || weight || bias; }
};
Gradients allocate_gradients(const Head& head, const Plan& plan, const Wanted& wanted);

// In which weight's gradient is returned. Acc; but a bfloat16 one is bfloat16: in float it would be
// the largest tensor of all. (float16 must stay wide until its unit is divided out.)
ScalarType weight_gradient_type(const Head& head);

// The gradient of the loss that the forward pass makes gradients for. Rounded to float16, p / N of
// a mean would be lost, and no loss scale has come yet: then a power of two near N, divided out of
// the finished sums.
double unit_gradient(const Head& head, Reduction reduction);
void divide_by_unit(const Head& head, Gradients& grads, double unit);

// One chunk of rows after the other, in buffers made once.
class Chunks {
 public:
  Chunks(const Head& head, const Plan& plan);

  // Calls f(begin, count) for each chunk, with its rows of hidden in place.
  template <class F>
  void for_each(F&& f) {
    for (int64_t begin = 0; begin < head_.R(); begin += plan_.rows) {
      enter(begin, std::min(plan_.rows, head_.R() - begin));
      f(begin, count_);
    }
  }

  // Makes logits tile by tile and folds them into the state of all rows, [kStateParts, R].
  //
  // Of the chunk, which keeps them where the plan says so.
  void add_chunk_to_state(void* state);
  // Of all rows: a tile of the weight is read once.
  void add_rows_to_state(void* state);

  // From row statistics to gradients. args are of all R rows.
  //
  // Of the chunk, from the logits that add_chunk_to_state left.
  void add_chunk_to_gradients(const LinearCrossEntropyGradientArgs& args, Gradients& grads);
  // Of all rows, with logits made anew: tile by tile, so that a tile's part of dW is finished
  // before the next one's begins.
  void add_rows_to_gradients(const LinearCrossEntropyGradientArgs& args, Gradients& grads);

 private:
  // Columns [first, first + width), with what their gradients need.
  struct Tile {
    int64_t first;
    int64_t width;
    Tensor weight;                  // [width, H] as a GEMM takes it
    std::optional<Tensor> dweight;  // [width, H], the sum of the chunks' parts
    bool continued;                 // dh holds the parts of other tiles
  };
  Tile make_tile(int64_t first, bool continued, const Gradients& grads);
  // Its part of dW, now that it is whole, where grads has it.
  void finish_tile(const Tile& tile, const Gradients& grads) const;
  // What the current chunk's rows add to the gradients by way of a tile.
  void add_part(LinearCrossEntropyGradientArgs args, const Tile& tile, Gradients& grads);
  void enter(int64_t begin, int64_t count);
  void add_tile_to_state(int64_t first, const Tensor& weight, void* state);
  LogitsTile tile_at(int64_t first, const Tensor& logits) const;
  Tensor tile_memory(int64_t first, int64_t width) const;
  // Weight's rows [first, first + width) as a GEMM takes them.
  Tensor weight_operand(int64_t first, int64_t width);
  void accumulate(const Tensor& out, const Tensor& a, const Tensor& b, bool continued);

  const Head& head_;
  Plan plan_;
  Tensor logits_;                          // Acc, one tile or all
  std::optional<Tensor> dlogits_;          // T, one tile, where GEMMs take 16-bit operands
  std::optional<Tensor> weight_scratch_;   // Acc, one tile's weight, where they do not
  std::optional<Tensor> dweight_scratch_;  // Acc, one tile's dW, where grads has it rounded
  std::optional<Tensor> product_scratch_;  // Acc, for accumulating products of 16-bit operands
  std::optional<Tensor> hidden_;           // [count, H] as a GEMM takes it
  int64_t begin_ = 0;
  int64_t count_ = 0;
};

}  // namespace seqkern::linear_cross_entropy_parts
