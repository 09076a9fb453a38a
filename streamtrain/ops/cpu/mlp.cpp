// The MLP branch of a block: norm, up, GELU (or a gated SiLU), down, LayerScale, residual; and its gradients.
//
// A tile of rows passes through the whole branch while it is in a core's cache, so that the hidden activations, four times as
// wide as the tokens, never reach main memory; the backward recomputes them.
#include <torch/library.h>

#include "rows.h"

namespace streamtrain {
namespace {

using at::Tensor;

// bytes of cache for the rows of a tile
constexpr int64_t TILE_BYTES = 3 << 19;

// Slots of ``scratch``.
enum { UP, DOWN, UP_BACK, DOWN_BACK, NORMED, ACTIVE, FIRST, SECOND, THIRD, TRANSPOSED, GRAD_BRANCH, GRAD_BRANCH_TRANSPOSED, PAIRS, STATS, GRAD_NORM, SUMS };

template <class T>
struct Branch {
  const Tensor norm_weight, norm_bias, up_weight, up_bias, down_weight, down_bias, gamma;
  int64_t dim, hidden;
  // of the first layer: twice ``hidden`` if gated, the gate first
  int64_t width;
  bool gated;

  explicit Branch(const std::vector<Tensor>& weights)
      : norm_weight(weights.at(0)), norm_bias(weights.at(1)), up_weight(weights.at(2)), up_bias(weights.at(3)),
        down_weight(weights.at(4)), down_bias(weights.at(5)), gamma(weights.at(6)) {
    dim = down_weight.size(0);
    hidden = down_weight.size(1);
    width = up_weight.size(0);
    gated = width == 2 * hidden;
    for (const Tensor& vector : {norm_weight, norm_bias, down_bias, gamma}) check<T>(vector, {dim});
    check<T>(up_weight, {width, dim});
    check<T>(up_bias, {width});
    check<T>(down_weight, {dim, hidden});
    TORCH_CHECK((gated || width == hidden) && dim % 32 == 0 && hidden % 32 == 0);
  }
};

struct Tiles {
  int64_t threads, rows, count;
  Tiles(int64_t total, int64_t bytes_per_row) {
    threads = at::get_num_threads();
    const int64_t fitting = std::clamp<int64_t>(TILE_BYTES / bytes_per_row, 32, 512);
    // the same number of tiles for every thread, all of the same size
    const int64_t tiles = std::max(threads, round_up((total + fitting - 1) / fitting, threads));
    rows = std::max<int64_t>(32, round_up((total + tiles - 1) / tiles, 32));
    count = (total + rows - 1) / rows;
  }
};

// The first layer's packed weights: the gate, then up.
template <class T>
T* packed_up(const Branch<T>& branch) {
  T* packed = scratch<T>(UP, branch.width * branch.dim);
  for (int64_t first = 0; first < branch.width; first += branch.hidden)
    pack_forward(in<T>(branch.up_weight) + first * branch.dim, branch.hidden, branch.dim, PANEL, packed + first * branch.dim);
  return packed;
}

// silu(x) and its derivative
inline void silu(__m512 x, __m512& value, __m512& slope) {
  const __m512 one = _mm512_set1_ps(1.f);
  const __m512 gate = _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
  value = _mm512_mul_ps(x, gate);
  slope = _mm512_fmadd_ps(_mm512_sub_ps(x, value), gate, gate);
}

template <class T>
void forward(const Tensor& tokens, const Tensor& out, const std::optional<Tensor>& row_index, at::IntArrayRef sizes,
             const std::vector<double>& scales, const std::optional<Tensor>& counts, const std::vector<Tensor>& weights,
             double eps) {
  const Branch<T> branch(weights);
  const int64_t dim = branch.dim, hidden = branch.hidden, stride = row_stride<T>(dim), active_stride = row_stride<T>(hidden);
  check<T>(tokens, {tokens.size(0), dim});
  check<T>(out, tokens.sizes());
  const Rows rows(row_index, sizes, scales, counts, tokens.size(0));
  const T* up = packed_up(branch);
  T* down = scratch<T>(DOWN, dim * hidden);
  pack_forward(in<T>(branch.down_weight), dim, hidden, PANEL, down);
  const T *x = in<T>(tokens), *norm_weight = in<T>(branch.norm_weight), *norm_bias = in<T>(branch.norm_bias);
  const T *up_bias = in<T>(branch.up_bias), *down_bias = in<T>(branch.down_bias), *gamma = in<T>(branch.gamma);
  T* to = out.mutable_data_ptr<T>();
  rows.copy_others(x, tokens.size(0), dim, to);

  const Tiles tiles(rows.count, sizeof(T) * (dim + hidden));
  for_tiles(tiles.count, tiles.threads, [&](int64_t, int64_t tile) {
    const int64_t first = tile * tiles.rows, count = std::min(tiles.rows, rows.count - first);
    T *normed = scratch<T>(NORMED, tiles.rows * stride), *active = scratch<T>(ACTIVE, tiles.rows * active_stride);
    float *one = scratch<float>(FIRST, tiles.rows * PANEL), *two = scratch<float>(SECOND, tiles.rows * PANEL);
    float mean, inverse_std;
    for (int64_t row = 0; row < count; row++)
      norm_row(x + rows[first + row] * dim, norm_weight, norm_bias, eps, dim, normed + row * stride, mean, inverse_std);
    for (int64_t column = 0; column < hidden; column += PANEL) {
      const int64_t panel = std::min(PANEL, hidden - column);
      matmul(count, panel, dim, normed, stride, up + column * dim, panel, one, panel, false);
      if (branch.gated) matmul(count, panel, dim, normed, stride, up + (hidden + column) * dim, panel, two, panel, false);
      for (int64_t row = 0; row < count; row++) {
        for (int64_t i = 0; i < panel; i += 16) {
          const __m512 value = _mm512_add_ps(_mm512_loadu_ps(one + row * panel + i), load(up_bias + column + i));
          __m512 result, unused;
          if (branch.gated) {
            const __m512 other = _mm512_add_ps(_mm512_loadu_ps(two + row * panel + i), load(up_bias + hidden + column + i));
            silu(value, result, unused);
            result = _mm512_mul_ps(result, other);
          } else {
            gelu<T>(value, result, unused);
          }
          store(active + row * active_stride + column + i, result);
        }
      }
    }
    for (int64_t column = 0; column < dim; column += PANEL) {
      const int64_t panel = std::min(PANEL, dim - column);
      matmul(count, panel, hidden, active, active_stride, down + column * hidden, panel, one, panel, false);
      for (int64_t row = 0; row < count; row++) {
        const int64_t place = rows[first + row] * dim + column;
        add_branch(x + place, one + row * panel, down_bias + column, gamma + column, rows.scale[first + row], panel, to + place);
      }
    }
  });
}

// Sums of one thread over its tiles.
struct Sums {
  // [panel, dim, PANEL]: ``grad_branch.T @ active`` and ``normed.T @ grad_hidden``; the first tile overwrites them
  float *down, *up;
  float *up_bias, *grad_branch, *norm_weight, *norm_bias, *end;
  template <class T>
  static int64_t size(const Branch<T>& branch) {
    return branch.dim * (branch.hidden + branch.width) + branch.width + 3 * branch.dim;
  }
  template <class T>
  Sums(float* memory, const Branch<T>& branch) {
    down = memory;
    up = down + branch.dim * branch.hidden;
    up_bias = up + branch.dim * branch.width;
    grad_branch = up_bias + branch.width;
    norm_weight = grad_branch + branch.dim;
    norm_bias = norm_weight + branch.dim;
    end = norm_bias + branch.dim;
  }
  void clear_vectors() const { std::fill(up_bias, end, 0.f); }
};

template <class T>
std::vector<Tensor> gradients(const Branch<T>& branch, const Sums& sums, const ThreadSums& thread_sums);

template <class T>
std::vector<Tensor> backward(const Tensor& grad_out, const Tensor& tokens, const Tensor& grad_tokens,
                             const std::optional<Tensor>& row_index, at::IntArrayRef sizes, const std::vector<double>& scales,
                             const std::optional<Tensor>& counts, const std::vector<Tensor>& weights, double eps) {
  const Branch<T> branch(weights);
  const int64_t dim = branch.dim, hidden = branch.hidden, width = branch.width;
  const int64_t stride = row_stride<T>(dim), grad_stride = row_stride<T>(width);
  check<T>(tokens, {tokens.size(0), dim});
  check<T>(grad_out, tokens.sizes());
  check<T>(grad_tokens, tokens.sizes());
  const Rows rows(row_index, sizes, scales, counts, tokens.size(0));
  const T* up = packed_up(branch);
  T *up_back = scratch<T>(UP_BACK, width * dim), *down_back = scratch<T>(DOWN_BACK, dim * hidden);
  pack_backward(in<T>(branch.up_weight), width, dim, PANEL, nullptr, up_back);
  pack_backward(in<T>(branch.down_weight), dim, hidden, PANEL, in<T>(branch.gamma), down_back);
  const T *x = in<T>(tokens), *grad_residual = in<T>(grad_out), *up_bias = in<T>(branch.up_bias);
  const T *norm_weight = in<T>(branch.norm_weight), *norm_bias = in<T>(branch.norm_bias);
  T* to = grad_tokens.mutable_data_ptr<T>();
  rows.copy_others(grad_residual, tokens.size(0), dim, to);

  const Tiles tiles(rows.count, sizeof(T) * (4 * dim + width));
  const int64_t max_rows = tiles.rows, threads = tiles.threads, size = Sums::size(branch);
  float* memory = scratch<float>(SUMS, threads * size);
  if (!tiles.count) std::fill(memory, memory + size, 0.f);
  for_tiles(tiles.count, threads, [&](int64_t thread, int64_t tile) {
    const int64_t first = tile * max_rows, count = std::min(max_rows, rows.count - first), padded = round_up(count, LINE<T>);
    const Sums sums(memory + thread * size, branch);
    const bool more = tile >= threads;
    if (!more) sums.clear_vectors();
    T *normed = scratch<T>(NORMED, max_rows * stride), *grad_branch = scratch<T>(GRAD_BRANCH, max_rows * stride);
    T* transposed = scratch<T>(TRANSPOSED, dim * row_stride<T>(max_rows));
    T* grad_branch_transposed = scratch<T>(GRAD_BRANCH_TRANSPOSED, dim * row_stride<T>(max_rows));
    const int64_t transposed_stride = row_stride<T>(padded);
    // the gradient of the first layer's result
    T* grad_hidden = scratch<T>(ACTIVE, max_rows * grad_stride);
    T* pairs = scratch<T>(PAIRS, 3 * max_rows * PANEL);
    float *one = scratch<float>(FIRST, max_rows * PANEL), *two = scratch<float>(SECOND, max_rows * PANEL);
    float *three = scratch<float>(THIRD, max_rows * PANEL), *grad_norm = scratch<float>(GRAD_NORM, max_rows * dim);
    float *mean = scratch<float>(STATS, 2 * max_rows), *inverse_std = mean + max_rows;
    for (int64_t row = 0; row < count; row++) {
      const int64_t place = rows[first + row] * dim;
      norm_row(x + place, norm_weight, norm_bias, eps, dim, normed + row * stride, mean[row], inverse_std[row]);
      scale_row(grad_residual + place, rows.scale[first + row], dim, grad_branch + row * stride);
      add_row(sums.grad_branch, grad_branch + row * stride, dim);
    }
    pack_left_transposed(normed, stride, count, padded, dim, transposed);
    pack_left_transposed(grad_branch, stride, count, padded, dim, grad_branch_transposed);
    for (int64_t column = 0; column < hidden; column += PANEL) {
      const int64_t panel = std::min(PANEL, hidden - column), upper = hidden + column;
      T *active = pairs, *grad_one = active + padded * panel, *grad_two = grad_one + padded * panel;
      matmul(count, panel, dim, normed, stride, up + column * dim, panel, one, panel, false);
      matmul(count, panel, dim, grad_branch, stride, down_back + column * dim, panel, two, panel, false);
      if (branch.gated) matmul(count, panel, dim, normed, stride, up + upper * dim, panel, three, panel, false);
      for (int64_t i = 0; i < panel; i += 16) {
        const __m512 bias = load(up_bias + column + i);
        const __m512 upper_bias = branch.gated ? load(up_bias + upper + i) : bias;
        __m512 sum = _mm512_setzero_ps(), upper_sum = sum;
        for (int64_t row = 0; row < padded; row += 2) {
          Sixteen<T> values[2] = {}, ones[2] = {}, twos[2] = {};
          for (int64_t k = 0; k < std::min<int64_t>(2, count - row); k++) {
            const int64_t place = (row + k) * panel + i;
            const __m512 value = _mm512_add_ps(_mm512_loadu_ps(one + place), bias), grad = _mm512_loadu_ps(two + place);
            __m512 result, slope;
            if (branch.gated) {
              const __m512 other = _mm512_add_ps(_mm512_loadu_ps(three + place), upper_bias);
              silu(value, result, slope);
              const __m512 grad_other = _mm512_mul_ps(grad, result);
              twos[k] = narrow<T>(grad_other);
              upper_sum = _mm512_add_ps(upper_sum, grad_other);
              result = _mm512_mul_ps(result, other);
              slope = _mm512_mul_ps(slope, other);
              put(grad_hidden + (row + k) * grad_stride + upper + i, twos[k]);
            } else {
              gelu<T>(value, result, slope);
            }
            const __m512 grad_value = _mm512_mul_ps(grad, slope);
            values[k] = narrow<T>(result);
            ones[k] = narrow<T>(grad_value);
            sum = _mm512_add_ps(sum, grad_value);
            put(grad_hidden + (row + k) * grad_stride + column + i, ones[k]);
          }
          const int64_t pair = row * panel;
          put_rows(active + pair, panel, i, values[0], values[1]);
          put_rows(grad_one + pair, panel, i, ones[0], ones[1]);
          if (branch.gated) put_rows(grad_two + pair, panel, i, twos[0], twos[1]);
        }
        float* place = sums.up_bias + column + i;
        _mm512_storeu_ps(place, _mm512_add_ps(_mm512_loadu_ps(place), sum));
        if (branch.gated) _mm512_storeu_ps(place + hidden, _mm512_add_ps(_mm512_loadu_ps(place + hidden), upper_sum));
      }
      matmul(dim, panel, padded, grad_branch_transposed, transposed_stride, active, panel, sums.down + column * dim, panel, more);
      matmul(dim, panel, padded, transposed, transposed_stride, grad_one, panel, sums.up + column * dim, panel, more);
      if (branch.gated) matmul(dim, panel, padded, transposed, transposed_stride, grad_two, panel, sums.up + upper * dim, panel, more);
    }
    for (int64_t column = 0; column < dim; column += PANEL) {
      const int64_t panel = std::min(PANEL, dim - column);
      matmul(count, panel, width, grad_hidden, grad_stride, up_back + column * width, panel, grad_norm + column, dim, false);
    }
    for (int64_t row = 0; row < count; row++) {
      const int64_t place = rows[first + row] * dim;
      norm_row_backward(x + place, norm_weight, mean[row], inverse_std[row], dim, grad_norm + row * dim, grad_residual + place, to + place,
                        sums.norm_weight, sums.norm_bias);
    }
  });
  return gradients(branch, Sums(memory, branch), ThreadSums{size, std::min(threads, tiles.count)});
}

template <class T>
std::vector<Tensor> gradients(const Branch<T>& branch, const Sums& sums, const ThreadSums& thread_sums) {
  const int64_t dim = branch.dim, hidden = branch.hidden;
  const T* gamma = in<T>(branch.gamma);
  std::vector<Tensor> up;
  for (int64_t first = 0; first < branch.width; first += hidden)
    up.push_back(gradient<T>(thread_sums, sums.up + first * dim, dim, hidden, nullptr, true));
  return {
      gradient<T>(thread_sums, sums.norm_weight, dim), gradient<T>(thread_sums, sums.norm_bias, dim),
      branch.gated ? at::cat(up) : up[0], gradient<T>(thread_sums, sums.up_bias, branch.width),
      gradient<T>(thread_sums, sums.down, dim, hidden, gamma, false), gradient<T>(thread_sums, sums.grad_branch, dim, gamma),
      gradient_by_scale<T>(thread_sums, sums.down, sums.grad_branch, in<T>(branch.down_weight), in<T>(branch.down_bias), dim, hidden),
  };
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(streamtrain, library) {
  library.def("mlp_forward", ByType<forward<bf16>, forward<float>>::call);
  library.def("mlp_backward", ByType<backward<bf16>, backward<float>>::call);
}

}  // namespace streamtrain
