// Logits of bottlenecks and prototypes, Sinkhorn's sums, and the cross-entropy between student and teacher. They process one
// panel of prototypes at a time (the loss up to four), whose logits, targets and gradients stay in a core's cache.
#include <torch/library.h>

#include "rows.h"

#include <limits>

namespace streamtrain {
namespace {

using at::Tensor;

// rows whose logits are computed together
constexpr int64_t BLOCK = 256;
// largest number of panels that the loss processes together
constexpr int64_t MAX_PANELS = 4;
// smaller than any possible sum; keeps the logarithm finite without any row
constexpr float MIN_SUM = 1e-30f;
// A row's sum below this may be inexact: terms that underflowed to 0 add up to less than 2e-38.
constexpr float VANISHING = 1e-25f;

// Slots of ``scratch``.
enum { STUDENT, TEACHER, WEIGHT, LOGITS, TARGETS, DIFFERENCE, TRANSPOSED, ROWS, GRAD_ROWS, GRAD_WEIGHT, HIGHEST, MATCHED };

const float* fp32_data(const Tensor& tensor, int64_t count) {
  TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.is_contiguous() && tensor.numel() == count,
              "expected ", count, " dense fp32 numbers, not ", tensor.numel(), " of ", tensor.scalar_type());
  return tensor.const_data_ptr<float>();
}

const float* fp32_data(const std::optional<Tensor>& tensor, int64_t count) { return tensor ? fp32_data(*tensor, count) : nullptr; }

// Mask of the 16 columns from ``i`` that are among the first ``width``.
__mmask16 columns_from(int64_t i, int64_t width) { return width - i >= 16 ? 0xffff : i < width ? (1u << (width - i)) - 1 : 0; }

// Bottlenecks [rows, dim] and prototypes [all, dim].
template <class T>
struct Factors {
  const T *features, *weight;
  int64_t rows, all, dim, panels;

  Factors(const Tensor& left, const Tensor& right)
      : features(in<T>(left)), weight(in<T>(right)), rows(left.size(0)), all(right.size(0)), dim(right.size(1)) {
    check<T>(left, {rows, dim});
    check<T>(right, {all, dim});
    TORCH_CHECK(dim % 32 == 0);
    panels = (all + PANEL - 1) / PANEL;
  }
  int64_t width(int64_t panel) const { return std::min(PANEL, all - panel * PANEL); }
  // Packs the panel as a right operand [dim, PANEL], with zeros beyond its width.
  void pack(int64_t panel, T* to) const {
    pack_right_transposed(weight + panel * PANEL * dim, dim, width(panel), PANEL, dim, to);
  }
  // Computes the logits [count, PANEL] of the rows from ``first``.
  void logits(int64_t first, int64_t count, const T* packed, float* to) const {
    matmul(count, PANEL, dim, features + first * dim, dim, packed, PANEL, to, PANEL, false);
  }
};

// ``features @ weight.T / temperature + column``: fp32 ``out [rows, all]``.
template <class T>
void logits(const Tensor& features, const Tensor& weight, double temperature, const std::optional<Tensor>& column, const Tensor& out) {
  const Factors<T> factors(features, weight);
  const float* column_data = fp32_data(column, factors.all);
  fp32_data(out, factors.rows * factors.all);
  float* to = out.mutable_data_ptr<float>();
  const __m512 scale = _mm512_set1_ps(1.0 / temperature);
  for_tiles(factors.panels, at::get_num_threads(), [&](int64_t, int64_t panel) {
    T* packed = scratch<T>(STUDENT, PANEL * factors.dim);
    float* block = scratch<float>(LOGITS, BLOCK * PANEL);
    factors.pack(panel, packed);
    const int64_t start = panel * PANEL, width = factors.width(panel);
    for (int64_t first = 0; first < factors.rows; first += BLOCK) {
      const int64_t count = std::min(BLOCK, factors.rows - first);
      factors.logits(first, count, packed, block);
      for (int64_t r = 0; r < count; r++) {
        for (int64_t i = 0; i < width; i += 16) {
          const __mmask16 mask = columns_from(i, width);
          __m512 value = _mm512_mul_ps(_mm512_loadu_ps(block + r * PANEL + i), scale);
          if (column_data) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, column_data + start + i));
          _mm512_mask_storeu_ps(to + (first + r) * factors.all + start + i, mask, value);
        }
      }
    }
  });
}

// Log-sum-exps of rows over consecutive panels, separate for each thread and each column modulo 16.
struct RowSums {
  int64_t threads, rows;
  // [threads, rows, 16]: the largest logit, and the sum of exponentials relative to it
  float *highest, *sums;

  explicit RowSums(int64_t rows) : threads(at::get_num_threads()), rows(rows) {
    const int64_t all = 16 * threads * rows;
    highest = scratch<float>(HIGHEST, 2 * all);
    sums = highest + all;
    std::fill(highest, sums, -std::numeric_limits<float>::infinity());
    std::fill(sums, sums + all, 0.f);
  }
  // Adds the first ``width`` values of ``logits * scale + column`` of a row.
  void add(int64_t thread, int64_t row, const float* logits, __m512 scale, const float* column, int64_t width) const {
    const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    float *highest_here = highest + 16 * (thread * rows + row), *sum_here = sums + 16 * (thread * rows + row);
    const __m512 before = _mm512_loadu_ps(highest_here);
    __m512 values[PANEL / 16], maximum = before, sum = _mm512_loadu_ps(sum_here);
    for (int64_t i = 0; i < PANEL; i += 16) {
      const __mmask16 mask = columns_from(i, width);
      __m512 value = _mm512_mul_ps(_mm512_loadu_ps(logits + i), scale);
      if (column) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, column + i));
      values[i / 16] = _mm512_mask_blend_ps(mask, none, value);
      maximum = _mm512_max_ps(values[i / 16], maximum);
    }
    // if all values so far are -inf, the sum must be 0, not NaN
    const __m512 shift = _mm512_mask_mov_ps(maximum, _mm512_cmp_ps_mask(maximum, none, _CMP_EQ_OQ), _mm512_setzero_ps());
    if (_mm512_cmp_ps_mask(maximum, before, _CMP_NEQ_UQ)) sum = _mm512_mul_ps(sum, exponential(_mm512_sub_ps(before, shift)));
    for (const __m512 value : values) sum = _mm512_add_ps(sum, exponential(_mm512_sub_ps(value, shift)));
    _mm512_storeu_ps(highest_here, maximum);
    _mm512_storeu_ps(sum_here, sum);
  }
  Tensor whole() const {
    const auto shaped = [&](float* from) { return at::from_blob(from, {threads, rows, 16}, at::kFloat); };
    return at::logsumexp(shaped(highest) + shaped(sums).log(), {0, 2});
  }
};

// [rows]: log-sum-exp over all prototypes of ``features @ weight.T / temperature + column``.
template <class T>
Tensor row_log_sum_exp(const Tensor& features, const Tensor& weight, double temperature, const std::optional<Tensor>& column) {
  const Factors<T> factors(features, weight);
  const float* column_data = fp32_data(column, factors.all);
  const __m512 scale = _mm512_set1_ps(1.0 / temperature);
  const RowSums sums(factors.rows);
  for_tiles(factors.panels, sums.threads, [&](int64_t thread, int64_t panel) {
    T* packed = scratch<T>(STUDENT, PANEL * factors.dim);
    float* block = scratch<float>(LOGITS, BLOCK * PANEL);
    factors.pack(panel, packed);
    for (int64_t first = 0; first < factors.rows; first += BLOCK) {
      const int64_t count = std::min(BLOCK, factors.rows - first);
      factors.logits(first, count, packed, block);
      for (int64_t r = 0; r < count; r++)
        sums.add(thread, first + r, block + r * PANEL, scale, column_data ? column_data + panel * PANEL : nullptr, factors.width(panel));
    }
  });
  return sums.whole();
}

// For each prototype: the largest ``features @ weight.T / temperature + row`` of these rows, and the sum of exponentials
// relative to it. If no other rank has rows (``alone``), instead: the scaling of each prototype that gives it ``1 / all`` of the
// total, and the rows' log-sum-exps after it, without ``row`` (undefined where ``row`` is -inf).
template <class T>
std::vector<Tensor> sinkhorn(const Tensor& features, const Tensor& weight, double temperature, const Tensor& row, bool alone) {
  const Factors<T> factors(features, weight);
  const int64_t count = factors.rows, threads = at::get_num_threads();
  const float* row_data = fp32_data(row, count);
  const __m512 scale = _mm512_set1_ps(1.0 / temperature);
  const float nothing = -std::numeric_limits<float>::infinity();
  const Tensor highest = at::empty({factors.all}, at::kFloat), sum = at::empty({factors.all}, at::kFloat);
  float *highest_data = highest.mutable_data_ptr<float>(), *sum_data = sum.mutable_data_ptr<float>();
  // [threads, rows, 16]: sums of each row's exponentials after the columns' scalings
  const ThreadSums thread_sums{16 * count, threads};
  float* scaled = scratch<float>(HIGHEST, alone ? threads * thread_sums.size : 0);
  if (alone) std::fill(scaled, scaled + threads * thread_sums.size, 0.f);
  for_tiles(factors.panels, threads, [&](int64_t thread, int64_t panel) {
    T* packed = scratch<T>(STUDENT, PANEL * factors.dim);
    float* block = scratch<float>(TARGETS, std::max<int64_t>(1, count) * PANEL);
    factors.pack(panel, packed);
    for (int64_t first = 0; first < count; first += BLOCK)
      factors.logits(first, std::min(BLOCK, count - first), packed, block + first * PANEL);
    const int64_t width = factors.width(panel), start = panel * PANEL;
    float maximum[PANEL], total[PANEL], factor[PANEL];
    for (int64_t i = 0; i < PANEL; i += 16) {
      const auto entry = [&](int64_t r) {
        return _mm512_fmadd_ps(_mm512_loadu_ps(block + r * PANEL + i), scale, _mm512_set1_ps(row_data[r]));
      };
      __m512 top = _mm512_set1_ps(nothing), over = _mm512_setzero_ps();
      for (int64_t r = 0; r < count; r++) top = _mm512_max_ps(entry(r), top);
      // without a valid row the sum must be 0, not NaN
      const __m512 shift = _mm512_mask_mov_ps(top, _mm512_cmp_ps_mask(top, _mm512_set1_ps(nothing), _CMP_EQ_OQ), _mm512_setzero_ps());
      for (int64_t r = 0; r < count; r++) {
        const __m512 power = exponential(_mm512_sub_ps(entry(r), shift));
        if (alone) _mm512_storeu_ps(block + r * PANEL + i, power);
        over = _mm512_add_ps(over, power);
      }
      _mm512_storeu_ps(maximum + i, alone ? shift : top);
      _mm512_storeu_ps(total + i, over);
    }
    if (alone) {
      for (int64_t i = 0; i < PANEL; i++) {
        const float all = factors.all * (total[i] < MIN_SUM ? MIN_SUM : total[i]);
        maximum[i] = -maximum[i] - std::log(all);
        factor[i] = i < width ? 1.f / all : 0.f;
      }
      for (int64_t r = 0; r < count; r++) {
        __m512 own = _mm512_loadu_ps(scaled + thread * thread_sums.size + 16 * r);
        for (int64_t i = 0; i < PANEL; i += 16) own = _mm512_fmadd_ps(_mm512_loadu_ps(block + r * PANEL + i), _mm512_loadu_ps(factor + i), own);
        _mm512_storeu_ps(scaled + thread * thread_sums.size + 16 * r, own);
      }
    }
    std::copy(maximum, maximum + width, highest_data + start);
    std::copy(total, total + width, sum_data + start);
  });
  if (!alone) return {highest, sum};
  const Tensor row_sum = at::empty({count}, at::kFloat);
  float* row_sum_data = row_sum.mutable_data_ptr<float>();
  bool vanished = false;
  for (int64_t r = 0; r < count; r++) {
    const float own = _mm512_reduce_add_ps(thread_sums(scaled + 16 * r));
    row_sum_data[r] = std::log(own) - row_data[r];
    vanished |= own < VANISHING && row_data[r] != nothing;
  }
  // Before the first scaling, a row may be far below the others in every column; its exponentials underflowed.
  return {highest, vanished ? row_log_sum_exp<T>(features, weight, temperature, highest) : row_sum};
}

// The part of the cross-entropy that needs the logits of student and teacher. For each row of the student:
//   matched[i] = sum_k target_ik logit_ik, with target_i = sum_j exp(teacher's logits + column + row) at rows pair_ij
//   difference_ik = exp(logit_ik - shift_i) - factor_i target_ik
// Returns matched and, with ``need_gradient``, difference @ weight (fp32) and difference.T @ features.
template <class T>
std::vector<Tensor> cross_entropy(const Tensor& features, const Tensor& weight, double temperature, const Tensor& shift,
                                  const Tensor& factor, const Tensor& teacher_features, const Tensor& teacher_weight,
                                  double teacher_temperature, const Tensor& column, const Tensor& row, const Tensor& pair,
                                  bool need_gradient) {
  const Factors<T> student(features, weight), teacher(teacher_features, teacher_weight);
  const int64_t rows = student.rows, dim = student.dim, padded = round_up(rows, LINE<T>), threads = at::get_num_threads();
  const float *shift_data = fp32_data(shift, rows), *factor_data = fp32_data(factor, rows);
  const float *column_data = fp32_data(column, student.all), *row_data = fp32_data(row, teacher.rows);
  TORCH_CHECK(pair.scalar_type() == at::kLong && pair.is_contiguous() && pair.size(0) == rows && teacher.all == student.all);
  TORCH_CHECK(pair.numel() == 0 || (pair.max().item<int64_t>() < teacher.rows));
  const int64_t pairs = pair.size(1), *pair_data = pair.const_data_ptr<int64_t>();
  const __m512 scale = _mm512_set1_ps(1.0 / temperature), teacher_scale = _mm512_set1_ps(1.0 / teacher_temperature);

  Tensor grad_weight = need_gradient ? at::empty_like(weight) : Tensor();
  T *to = need_gradient ? grad_weight.mutable_data_ptr<T>() : nullptr, *right = scratch<T>(ROWS, padded * dim);
  pack_right(student.features, dim, rows, padded, dim, right);
  const int64_t size = round_up(rows * (1 + dim), 16);
  float* memory = scratch<float>(MATCHED, threads * size);
  std::fill(memory, memory + threads * size, 0.f);
  // Several panels at once, because the rows' gradient sums are often larger than a core's cache: fewer reads and writes.
  const int64_t panels_at_once = std::clamp<int64_t>(student.panels / threads, 1, MAX_PANELS), across = panels_at_once * PANEL;
  const int64_t stride = row_stride<T>(across);
  for_tiles((student.panels + panels_at_once - 1) / panels_at_once, threads, [&](int64_t thread, int64_t tile) {
    float *matched = memory + thread * size, *grad_rows = matched + rows;
    T *packed = scratch<T>(STUDENT, PANEL * dim), *teachers = scratch<T>(TEACHER, PANEL * teacher.dim);
    T* back = scratch<T>(WEIGHT, across * dim);
    float *block = scratch<float>(LOGITS, BLOCK * PANEL), *targets = scratch<float>(TARGETS, round_up(teacher.rows, BLOCK) * PANEL);
    T *differences = scratch<T>(DIFFERENCE, padded * stride), *transposed = scratch<T>(TRANSPOSED, PANEL * row_stride<T>(padded));
    float* result = scratch<float>(GRAD_WEIGHT, PANEL * dim);
    const int64_t end = std::min(student.panels, (tile + 1) * panels_at_once), start_of_all = tile * across;
    for (int64_t panel = tile * panels_at_once; panel < end; panel++) {
      T* difference = differences + (panel * PANEL - start_of_all);
      const int64_t start = panel * PANEL, width = student.width(panel);
      student.pack(panel, packed);
      teacher.pack(panel, teachers);
      const auto masked = [&](int64_t i) { return columns_from(i, width); };
      for (int64_t first = 0; first < teacher.rows; first += BLOCK) {
        const int64_t count = std::min(BLOCK, teacher.rows - first);
        float* place = targets + first * PANEL;
        teacher.logits(first, count, teachers, place);
        for (int64_t r = 0; r < count; r++, place += PANEL) {
          const __m512 own = _mm512_set1_ps(row_data[first + r]);
          for (int64_t i = 0; i < PANEL; i += 16) {
            const __m512 added = _mm512_add_ps(own, _mm512_maskz_loadu_ps(masked(i), column_data + start + i));
            const __m512 entry = exponential(_mm512_fmadd_ps(_mm512_loadu_ps(place + i), teacher_scale, added));
            _mm512_storeu_ps(place + i, _mm512_maskz_mov_ps(masked(i), entry));
          }
        }
      }
      for (int64_t first = 0; first < rows; first += BLOCK) {
        const int64_t count = std::min(BLOCK, rows - first);
        student.logits(first, count, packed, block);
        for (int64_t r = 0; r < count; r++) {
          const int64_t at = first + r;
          const __m512 down = _mm512_set1_ps(shift_data[at]), share = _mm512_set1_ps(factor_data[at]);
          __m512 sum = _mm512_setzero_ps();
          for (int64_t i = 0; i < PANEL; i += 16) {
            __m512 target = _mm512_setzero_ps();
            for (int64_t j = 0; j < pairs; j++) {
              const int64_t teacher_row = pair_data[at * pairs + j];
              if (teacher_row >= 0) target = _mm512_add_ps(target, _mm512_loadu_ps(targets + teacher_row * PANEL + i));
            }
            const __m512 logit = _mm512_mul_ps(_mm512_loadu_ps(block + r * PANEL + i), scale);
            sum = _mm512_fmadd_ps(target, logit, sum);
            const __m512 entry = _mm512_fnmadd_ps(share, target, exponential(_mm512_sub_ps(logit, down)));
            if (need_gradient) store(difference + at * stride + i, _mm512_maskz_mov_ps(masked(i), entry));
          }
          matched[at] += _mm512_reduce_add_ps(sum);
        }
      }
      if (!need_gradient) continue;
      pack_left_transposed(difference, stride, rows, padded, PANEL, transposed);
      matmul(PANEL, dim, padded, transposed, row_stride<T>(padded), right, dim, result, dim, false);
      for (int64_t i = 0; i < width * dim; i += 16) store(to + start * dim + i, _mm512_loadu_ps(result + i));
    }
    if (!need_gradient) return;
    const int64_t columns = (end - tile * panels_at_once) * PANEL;
    pack_right(student.weight + start_of_all * dim, dim, std::min(columns, student.all - start_of_all), columns, dim, back);
    for (int64_t first = 0; first < rows; first += BLOCK)
      matmul(std::min(BLOCK, rows - first), dim, columns, differences + first * stride, stride, back, dim, grad_rows + first * dim, dim, true);
  });
  ThreadSums{size, threads}.add_up(memory);
  const auto copied = [](float* from, at::IntArrayRef shape) { return at::from_blob(from, shape, at::kFloat).clone(); };
  if (!need_gradient) return {copied(memory, {rows})};
  return {copied(memory, {rows}), copied(memory + rows, {rows, dim}), grad_weight};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(streamtrain, library) {
  library.def("logits", ByType<logits<bf16>, logits<float>>::call);
  library.def("row_log_sum_exp", ByType<row_log_sum_exp<bf16>, row_log_sum_exp<float>>::call);
  library.def("sinkhorn", ByType<sinkhorn<bf16>, sinkhorn<float>>::call);
  library.def("cross_entropy", ByType<cross_entropy<bf16>, cross_entropy<float>>::call);
}

}  // namespace streamtrain
