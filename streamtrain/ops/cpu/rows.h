// Operations on rows: layer norm, exponentials, GELU, sums over threads; and the rows that a branch computes.
#pragma once

#include "tiles.h"

#include <cmath>
#include <vector>

namespace streamtrain {

// The rows of tokens that a branch computes: all, or the rows of the images that drop-path keeps.
struct Rows {
  // null: row i is i
  const int64_t* index;
  int64_t count;
  // factor of each row's branch
  std::vector<float> scale;

  // ``total``: number of tokens; ``counts`` [rows], if given, multiply the groups' scales
  Rows(const std::optional<at::Tensor>& row_index, at::IntArrayRef sizes, at::ArrayRef<double> scales,
       const std::optional<at::Tensor>& counts, int64_t total)
      : index(row_index ? row_index->const_data_ptr<int64_t>() : nullptr) {
    TORCH_CHECK(sizes.size() == scales.size() && (!row_index || row_index->is_contiguous()));
    for (size_t group = 0; group < sizes.size(); group++) scale.insert(scale.end(), sizes[group], scales[group]);
    count = scale.size();
    if (counts) {
      TORCH_CHECK(counts->scalar_type() == at::kFloat && counts->is_contiguous() && counts->numel() == count);
      const float* factors = counts->const_data_ptr<float>();
      for (int64_t row = 0; row < count; row++) scale[row] *= factors[row];
    }
    TORCH_CHECK(count <= total, count, " rows of ", total);
    if (!row_index) return;
    TORCH_CHECK(row_index->numel() == count && std::is_sorted(index, index + count), "rows must be sorted, and as many as their sizes say");
    TORCH_CHECK(!count || (index[0] >= 0 && index[count - 1] < total), "rows beyond the ", total, " that there are");
  }
  int64_t operator[](int64_t at) const { return index ? index[at] : at; }

  // Copies the other rows of ``from`` [total, dim] to ``to``.
  template <class T>
  void copy_others(const T* from, int64_t total, int64_t dim, T* to) const {
    if (from == to) return;
    const auto pass = [&](int64_t first, int64_t end) { std::copy(from + first * dim, from + end * dim, to + first * dim); };
    int64_t next = 0;
    for (int64_t i = 0; i < count; i++) {
      const int64_t row = (*this)[i];
      if (row > next) pass(next, row);
      next = row + 1;
    }
    pass(next, total);
  }
};

template <class T>
constexpr at::ScalarType TYPE = c10::CppTypeToScalarType<T>::value;

template <class T>
void check(const at::Tensor& tensor, at::IntArrayRef shape) {
  TORCH_CHECK(tensor.scalar_type() == TYPE<T> && tensor.is_contiguous() && tensor.sizes() == shape,
              "expected a contiguous tensor of ", TYPE<T>, " and shape ", shape, ", not one of ", tensor.scalar_type(),
              ", shape ", tensor.sizes(), " and strides ", tensor.strides());
}

template <class T>
const T* in(const at::Tensor& tensor) {
  return tensor.const_data_ptr<T>();
}

// Dispatches an operation by the type of its first tensor.
template <auto of_bf16, auto of_fp32>
struct ByType;

template <class Result, class First, class... Others, Result (*of_bf16)(First, Others...), Result (*of_fp32)(First, Others...)>
struct ByType<of_bf16, of_fp32> {
  static Result call(First first, Others... others) {
    return (first.scalar_type() == at::kFloat ? of_fp32 : of_bf16)(first, others...);
  }
};

// e^x within 2 ulp; inf on overflow, 0 where the result would be denormal, and NaN for NaN
inline __m512 exponential(__m512 x) {
  // denormals are a hundred times slower; the comparison is true for NaN, and min returns NaN
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.33f), _CMP_NLT_UQ);
  x = _mm512_min_ps(_mm512_set1_ps(100.f), x);
  const __m512 scaled = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
  const __m512 whole = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // subtract the multiple of log 2 in two parts, without rounding error
  __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693145752f), x);
  rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(1.42860677e-6f), rest);
  __m512 sum = _mm512_set1_ps(1.f / 720);
  for (const float factor : {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(factor));
  return _mm512_maskz_scalef_ps(normal, sum, whole);
}

// The normal distribution function of GELU at x, and its density. Abramowitz and Stegun 7.1.26, error below 1e-7.
inline void normal(__m512 x, __m512& distribution, __m512& density) {
  const __m512 one = _mm512_set1_ps(1.f);
  const __m512 size = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.707106781f));
  const __m512 bell = exponential(_mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-0.5f)));
  const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(size, _mm512_set1_ps(0.3275911f), one));
  __m512 tail = _mm512_set1_ps(0.5f * 1.061405429f);
  for (const float factor : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f, 0.f})
    tail = _mm512_fmadd_ps(tail, t, _mm512_set1_ps(0.5f * factor));
  tail = _mm512_mul_ps(tail, bell);
  const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  distribution = _mm512_mask_blend_ps(negative, _mm512_sub_ps(one, tail), tail);
  density = _mm512_mul_ps(bell, _mm512_set1_ps(0.39894228f));
}

// GELU at x and its derivative. For bf16 by minimax polynomials up to |x| = 4.5 and constant beyond: the factor of x has an
// error of at most 2e-5, the derivative 6e-5, while rounding to bf16 changes a value near 1 by 2e-3.
template <class T>
[[gnu::always_inline]] inline void gelu(__m512 x, __m512& value, __m512& slope) {
  if constexpr (std::is_same_v<T, float>) {
    normal(x, value, slope);
    slope = _mm512_fmadd_ps(x, slope, value);
    value = _mm512_mul_ps(x, value);
  } else {
    constexpr float END = 4.5f;
    // the bounds are the first operands, so that NaN stays NaN
    const __m512 inside = _mm512_max_ps(_mm512_set1_ps(-END), _mm512_min_ps(_mm512_set1_ps(END), x)), half = _mm512_set1_ps(0.5f);
    // scaled to -1..1: powers of larger values would cancel
    const __m512 at = _mm512_fmadd_ps(_mm512_mul_ps(inside, inside), _mm512_set1_ps(2.f / (END * END)), _mm512_set1_ps(-1.f));
    __m512 part = _mm512_set1_ps(4.203340657e-3f), steep = _mm512_set1_ps(-2.472349617e-2f);
    for (const float factor : {-1.003261270e-2f, 1.098118348e-2f, -1.579804827e-2f, 2.814690014e-2f, -4.090368414e-2f,
                               5.475579745e-2f, -7.714182952e-2f, 1.569030922e-1f})
      part = _mm512_fmadd_ps(part, at, _mm512_set1_ps(factor));
    for (const float factor : {5.596710427e-2f, -4.548335356e-2f, 4.773260245e-2f, -8.775826543e-2f, 1.050390036e-1f,
                               -9.536763302e-2f, 8.618592224e-2f, -8.992300258e-2f, 1.594457563e-1f})
      steep = _mm512_fmadd_ps(steep, at, _mm512_set1_ps(factor));
    value = _mm512_mul_ps(x, _mm512_fmadd_ps(part, inside, half));
    slope = _mm512_fmadd_ps(steep, inside, half);
  }
}

// Layer norm of one row; the backward needs ``mean`` and ``inverse_std``.
template <class T>
void norm_row(const T* x, const T* weight, const T* bias, float eps, int64_t dim, T* to, float& mean,
              float& inverse_std) {
  __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < dim; i += 16) sum = _mm512_add_ps(sum, load(x + i));
  mean = _mm512_reduce_add_ps(sum) / dim;
  const __m512 center = _mm512_set1_ps(mean);
  for (int64_t i = 0; i < dim; i += 16) {
    const __m512 difference = _mm512_sub_ps(load(x + i), center);
    squares = _mm512_fmadd_ps(difference, difference, squares);
  }
  inverse_std = 1.f / std::sqrt(_mm512_reduce_add_ps(squares) / dim + eps);
  const __m512 factor = _mm512_set1_ps(inverse_std);
  for (int64_t i = 0; i < dim; i += 16) {
    const __m512 unit = _mm512_mul_ps(_mm512_sub_ps(load(x + i), center), factor);
    store(to + i, _mm512_fmadd_ps(unit, load(weight + i), load(bias + i)));
  }
}

// Backward of the layer norm of one row, from ``grad_norm``: ``grad_x`` includes ``grad_residual``; adds to the gradients of
// weight and bias.
template <class T>
void norm_row_backward(const T* x, const T* weight, float mean, float inverse_std, int64_t dim, const float* grad_norm,
                       const T* grad_residual, T* grad_x, float* grad_weight, float* grad_bias) {
  const __m512 center = _mm512_set1_ps(mean), factor = _mm512_set1_ps(inverse_std);
  __m512 sum = _mm512_setzero_ps(), matched = _mm512_setzero_ps();
  for (int64_t i = 0; i < dim; i += 16) {
    const __m512 unit = _mm512_mul_ps(_mm512_sub_ps(load(x + i), center), factor), grad = _mm512_loadu_ps(grad_norm + i);
    _mm512_storeu_ps(grad_weight + i, _mm512_fmadd_ps(grad, unit, _mm512_loadu_ps(grad_weight + i)));
    _mm512_storeu_ps(grad_bias + i, _mm512_add_ps(grad, _mm512_loadu_ps(grad_bias + i)));
    const __m512 grad_unit = _mm512_mul_ps(grad, load(weight + i));
    sum = _mm512_add_ps(sum, grad_unit);
    matched = _mm512_fmadd_ps(grad_unit, unit, matched);
  }
  const __m512 level = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / dim), slope = _mm512_set1_ps(_mm512_reduce_add_ps(matched) / dim);
  for (int64_t i = 0; i < dim; i += 16) {
    const __m512 unit = _mm512_mul_ps(_mm512_sub_ps(load(x + i), center), factor);
    const __m512 grad_unit = _mm512_mul_ps(_mm512_loadu_ps(grad_norm + i), load(weight + i));
    const __m512 own = _mm512_sub_ps(_mm512_sub_ps(grad_unit, level), _mm512_mul_ps(unit, slope));
    store(grad_x + i, _mm512_fmadd_ps(own, factor, load(grad_residual + i)));
  }
}

template <class T>
void add_row(float* sum, const T* row, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) _mm512_storeu_ps(sum + i, _mm512_add_ps(_mm512_loadu_ps(sum + i), load(row + i)));
}

// Adds a branch's result to the residual stream: ``to = x + (branch + bias) * gamma * scale`` for ``count`` columns.
template <class T>
void add_branch(const T* x, const float* branch, const T* bias, const T* gamma, float scale, int64_t count,
                       T* to) {
  const __m512 share = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 value = _mm512_add_ps(_mm512_loadu_ps(branch + i), load(bias + i));
    store(to + i, _mm512_fmadd_ps(value, _mm512_mul_ps(load(gamma + i), share), load(x + i)));
  }
}

template <class T>
void scale_row(const T* from, float scale, int64_t count, T* to) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < count; i += 16) store(to + i, _mm512_mul_ps(load(from + i), factor));
}

// Sums of several threads in consecutive blocks of ``size``; ``own`` points into the block of the first thread.
struct ThreadSums {
  int64_t size, threads;

  __m512 operator()(const float* own) const {
    __m512 sum = _mm512_loadu_ps(own);
    for (int64_t thread = 1; thread < threads; thread++) sum = _mm512_add_ps(sum, _mm512_loadu_ps(own + thread * size));
    return sum;
  }
  // Adds up the blocks of all threads in the first.
  void add_up(float* own) const {
    at::parallel_for(0, size / 16, 1 << 12, [&](int64_t begin, int64_t end) {
      for (int64_t i = 16 * begin; i < 16 * end; i += 16) _mm512_storeu_ps(own + i, (*this)(own + i));
    });
  }
};

// Converts a weight's summed panels ``from [columns / PANEL, rows, PANEL]`` to its gradient [rows, columns], each row times
// ``factor [rows]`` if given; or transposed, [columns, rows]. ``rows`` and ``columns`` are multiples of 16.
template <class T>
at::Tensor gradient(const ThreadSums& thread_sums, const float* from, int64_t rows, int64_t columns, const T* factor, bool transposed) {
  const at::Tensor result = at::empty({transposed ? columns : rows, transposed ? rows : columns}, TYPE<T>);
  T* to = result.mutable_data_ptr<T>();
  at::parallel_for(0, rows / 16, 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = 16 * begin; row < 16 * end; row += 16) {
      for (int64_t column = 0; column < columns; column += 16) {
        const int64_t first = column / PANEL * PANEL, width = std::min(PANEL, columns - first);
        const float* place = from + first * rows + row * width + column - first;
        __m512i block[16];
        for (int i = 0; i < 16; i++) block[i] = _mm512_castps_si512(thread_sums(place + i * width));
        if (transposed) transpose_16x16(block);
        for (int i = 0; i < 16; i++) {
          __m512 values = _mm512_castsi512_ps(block[i]);
          if (factor) values = _mm512_mul_ps(values, _mm512_set1_ps(factor[row + i]));
          store(to + (transposed ? (column + i) * rows + row : (row + i) * columns + column), values);
        }
      }
    }
  });
  return result;
}

// The same for the gradient of a vector; ``count`` is a multiple of 16.
template <class T>
at::Tensor gradient(const ThreadSums& thread_sums, const float* from, int64_t count, const T* factor = nullptr) {
  const at::Tensor result = at::empty({count}, TYPE<T>);
  T* to = result.mutable_data_ptr<T>();
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 sum = thread_sums(from + i);
    store(to + i, factor ? _mm512_mul_ps(sum, load(factor + i)) : sum);
  }
  return result;
}

// The gradient [rows] of LayerScale's factors. They multiply the result of the last layer, so their gradient follows from the
// sums for that layer: panels ``from`` for ``weight`` [rows, columns], ``grad_branch`` for ``bias``.
template <class T>
at::Tensor gradient_by_scale(const ThreadSums& thread_sums, const float* from, const float* grad_branch, const T* weight, const T* bias,
                             int64_t rows, int64_t columns) {
  const at::Tensor result = at::empty({rows}, TYPE<T>);
  T* to = result.mutable_data_ptr<T>();
  at::parallel_for(0, rows / 16, 4, [&](int64_t begin, int64_t end) {
    for (int64_t start = 16 * begin; start < 16 * end; start += 16) {
      float sums[16];
      for (int64_t row = start; row < start + 16; row++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t column = 0; column < columns; column += 16) {
          const int64_t first = column / PANEL * PANEL, width = std::min(PANEL, columns - first);
          sum = _mm512_fmadd_ps(thread_sums(from + first * rows + row * width + column - first), load(weight + row * columns + column), sum);
        }
        sums[row - start] = _mm512_reduce_add_ps(sum);
      }
      store(to + start, _mm512_fmadd_ps(thread_sums(grad_branch + start), load(bias + start), _mm512_loadu_ps(sums)));
    }
  });
  return result;
}

// Runs ``work(thread, tile)`` for all tiles. Each thread always gets the same tiles, so that sums are deterministic.
template <class Work>
void for_tiles(int64_t tiles, int64_t threads, const Work& work) {
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; thread++)
      for (int64_t tile = thread; tile < tiles; tile += threads) work(thread, tile);
    at::native::cpublas::brgemm_release();
  });
}

}  // namespace streamtrain
