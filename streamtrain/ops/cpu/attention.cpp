// The attention branch of a block: norm, queries, keys and values, RoPE, softmax attention within each image,
// projection, LayerScale, residual; and its gradients.
//
// A tile is one image or several small ones; it passes through the whole branch while it is in a core's cache. The backward
// recomputes the activations. Scores are fp32; the softmax is rounded to the tokens' type for the matmuls.
#include <torch/library.h>

#include "rows.h"

namespace streamtrain {
namespace {

using at::Tensor;

// rows of a tile of small images, and queries whose scores are computed together
constexpr int64_t TILE_ROWS = 256;

// Slots of ``scratch``.
enum {
  QKV, PROJ, QKV_BACK, PROJ_BACK, NORMED, HEADS, MERGED, RESULT, STATS, SUMS, GRAD_BRANCH, GRAD_MERGED, GRAD_HEADS, TRANSPOSED,
  GRAD_BRANCH_TRANSPOSED, PAIRS, KEY, VALUE, VALUE_TRANSPOSED, KEY_PAIRS, SCORES, GRAD_SCORES, WEIGHTS, WEIGHT_PAIRS, QUERY_TRANSPOSED,
  GRAD_TRANSPOSED, GRAD_KEY, GRAD_VALUE
};

template <class T>
struct Branch {
  const Tensor norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, gamma;
  int64_t dim, heads, head_dim;

  Branch(const std::vector<Tensor>& weights, int64_t num_heads)
      : norm_weight(weights.at(0)), norm_bias(weights.at(1)), qkv_weight(weights.at(2)), qkv_bias(weights.at(3)),
        proj_weight(weights.at(4)), proj_bias(weights.at(5)), gamma(weights.at(6)), heads(num_heads) {
    dim = proj_weight.size(0);
    head_dim = dim / heads;
    for (const Tensor& vector : {norm_weight, norm_bias, proj_bias, gamma}) check<T>(vector, {dim});
    check<T>(qkv_weight, {3 * dim, dim});
    check<T>(qkv_bias, {3 * dim});
    check<T>(proj_weight, {dim, dim});
    TORCH_CHECK(dim % 32 == 0 && head_dim * heads == dim && head_dim % 32 == 0);
  }
  float scale() const { return 1.f / std::sqrt(static_cast<float>(head_dim)); }
};

template <class T>
struct Tile {
  int64_t first, images, length;
  // [length, head_dim], for the tokens of an image
  const T *cosine, *sine;
  int64_t rows() const { return images * length; }
};

template <class T>
struct Tiles {
  std::vector<Tile<T>> all;
  int64_t threads = at::get_num_threads(), rows = 0, length = 0;

  // ``factors``: cosines and sines for each size of images
  Tiles(at::IntArrayRef sizes, const std::vector<Tensor>& factors, int64_t head_dim) {
    int64_t first = 0;
    for (size_t group = 0; group < sizes.size(); group++) {
      const Tensor &cosine = factors.at(2 * group), &sine = factors.at(2 * group + 1);
      const int64_t length_here = cosine.size(0), images = sizes[group] / length_here;
      check<T>(cosine, {length_here, head_dim});
      check<T>(sine, {length_here, head_dim});
      TORCH_CHECK(images * length_here == sizes[group]);
      const int64_t step = std::max<int64_t>(1, TILE_ROWS / length_here);
      for (int64_t image = 0; image < images; image += step) {
        const Tile<T> tile{first + image * length_here, std::min(step, images - image), length_here, in<T>(cosine), in<T>(sine)};
        all.push_back(tile);
        rows = std::max(rows, tile.rows());
      }
      length = std::max(length, length_here);
      first += sizes[group];
    }
  }
};

// Rotates the vector ``from`` [head_dim]; ``back`` applies the inverse rotation.
template <bool back, class T>
void rotate(const float* from, const T* cosine, const T* sine, int64_t head_dim, T* to) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < head_dim; i += 16) {
    const int64_t other = i < half ? i + half : i - half;
    const __m512 crossed = _mm512_mul_ps(_mm512_loadu_ps(from + other), load(sine + (back ? other : i)));
    store(to + i, _mm512_fmadd_ps(_mm512_loadu_ps(from + i), load(cosine + i), crossed));
  }
}

// First step of both directions: a tile's normed rows [rows, row_stride(dim)] and its rotated heads [3, heads, rows, head_dim].
template <class T>
struct TileHeads {
  T *normed, *heads;
  float *mean, *inverse_std, *result;

  TileHeads(const Branch<T>& branch, const Tiles<T>& tiles, const Tile<T>& tile, const Rows& rows, const T* x, const T* qkv, float eps) {
    const int64_t dim = branch.dim, head_dim = branch.head_dim, count = tile.rows(), stride = row_stride<T>(dim);
    normed = scratch<T>(NORMED, tiles.rows * stride);
    heads = scratch<T>(HEADS, 3 * tiles.rows * dim);
    result = scratch<float>(RESULT, std::max<int64_t>(16, tiles.rows) * std::max(PANEL, head_dim));
    mean = scratch<float>(STATS, 2 * tiles.rows);
    inverse_std = mean + tiles.rows;
    const T *weight = in<T>(branch.norm_weight), *bias = in<T>(branch.norm_bias), *qkv_bias = in<T>(branch.qkv_bias);
    for (int64_t row = 0; row < count; row++)
      norm_row(x + rows[tile.first + row] * dim, weight, bias, eps, dim, normed + row * stride, mean[row], inverse_std[row]);
    for (int64_t head = 0; head < 3 * branch.heads; head++) {
      const int64_t column = head * head_dim;
      matmul(count, head_dim, dim, normed, stride, qkv + column * dim, head_dim, result, head_dim, false);
      T* place = heads + head * count * head_dim;
      for (int64_t row = 0; row < count; row++, place += head_dim) {
        float* values = result + row * head_dim;
        for (int64_t i = 0; i < head_dim; i += 16) {
          const __m512 value = _mm512_add_ps(_mm512_loadu_ps(values + i), load(qkv_bias + column + i));
          if (head < 2 * branch.heads)
            _mm512_storeu_ps(values + i, value);
          else
            store(place + i, value);
        }
        const int64_t factor = row % tile.length * head_dim;
        if (head < 2 * branch.heads) rotate<false>(values, tile.cosine + factor, tile.sine + factor, head_dim, place);
      }
    }
  }
};

// Softmax of the first ``length`` columns (keys) of ``scores`` [count, padded] in place, rounded to ``weights`` [count, wide];
// all other columns become 0.
template <class T>
void softmax(float* scores, int64_t count, int64_t length, int64_t padded, float scale, T* weights, int64_t wide) {
  const __mmask16 last = length % 16 ? (1u << length % 16) - 1 : 0xffff;
  const __m512 factor = _mm512_set1_ps(scale), none = _mm512_set1_ps(-INFINITY);
  for (int64_t row = 0; row < count; row++) {
    float* values = scores + row * padded;
    const auto mask = [&](int64_t i) -> __mmask16 { return i + 16 <= length ? 0xffff : i < length ? last : 0; };
    __m512 maximum = none, sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < length; i += 16) maximum = _mm512_max_ps(maximum, _mm512_mask_loadu_ps(none, mask(i), values + i));
    const __m512 shift = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_max_ps(maximum)), factor);
    for (int64_t i = 0; i < padded; i += 16) {
      const __m512 entry = _mm512_maskz_mov_ps(mask(i), exponential(_mm512_fmsub_ps(_mm512_loadu_ps(values + i), factor, shift)));
      sum = _mm512_add_ps(sum, entry);
      _mm512_storeu_ps(values + i, entry);
    }
    const __m512 share = _mm512_set1_ps(1.f / _mm512_reduce_add_ps(sum));
    for (int64_t i = 0; i < padded; i += 16) {
      const __m512 entry = _mm512_mul_ps(_mm512_loadu_ps(values + i), share);
      _mm512_storeu_ps(values + i, entry);
      store(weights + row * wide + i, entry);
    }
    for (int64_t i = padded; i < wide; i += 16) store(weights + row * wide + i, _mm512_setzero_ps());
  }
}

template <class T>
void forward(const Tensor& tokens, const Tensor& out, const std::optional<Tensor>& row_index, at::IntArrayRef sizes,
             const std::vector<double>& scales, const std::optional<Tensor>& counts, const std::vector<Tensor>& factors,
             int64_t num_heads, const std::vector<Tensor>& weights, double eps) {
  const Branch<T> branch(weights, num_heads);
  const int64_t dim = branch.dim, head_dim = branch.head_dim, stride = row_stride<T>(dim);
  check<T>(tokens, {tokens.size(0), dim});
  check<T>(out, tokens.sizes());
  const Rows rows(row_index, sizes, scales, counts, tokens.size(0));
  const Tiles<T> tiles(sizes, factors, head_dim);
  T *qkv = scratch<T>(QKV, 3 * dim * dim), *proj = scratch<T>(PROJ, dim * dim);
  pack_forward(in<T>(branch.qkv_weight), 3 * dim, dim, head_dim, qkv);
  pack_forward(in<T>(branch.proj_weight), dim, dim, PANEL, proj);
  const T *x = in<T>(tokens), *proj_bias = in<T>(branch.proj_bias), *gamma = in<T>(branch.gamma);
  T* to = out.mutable_data_ptr<T>();
  rows.copy_others(x, tokens.size(0), dim, to);
  const int64_t max_padded = round_up(tiles.length, 16), max_wide = round_up(tiles.length, LINE<T>);
  const int64_t max_queries = std::min(tiles.length, TILE_ROWS);

  for_tiles(tiles.all.size(), tiles.threads, [&](int64_t, int64_t index) {
    const Tile<T>& tile = tiles.all[index];
    const int64_t count = tile.rows(), length = tile.length, padded = round_up(length, 16), wide = round_up(length, LINE<T>);
    const TileHeads<T> tile_heads(branch, tiles, tile, rows, x, qkv, eps);
    T* merged = scratch<T>(MERGED, tiles.rows * stride);
    T *key = scratch<T>(KEY, max_padded * head_dim), *value = scratch<T>(VALUE, max_wide * head_dim);
    float* scores = scratch<float>(SCORES, max_queries * max_padded);
    T* softmaxed = scratch<T>(WEIGHTS, max_queries * max_wide);
    for (int64_t head = 0; head < branch.heads; head++) {
      for (int64_t image = 0; image < tile.images; image++) {
        const auto part = [&](int64_t kind) {
          return tile_heads.heads + ((kind * branch.heads + head) * count + image * length) * head_dim;
        };
        pack_right_transposed(part(1), head_dim, length, padded, head_dim, key);
        pack_right(part(2), head_dim, length, wide, head_dim, value);
        for (int64_t first = 0; first < length; first += TILE_ROWS) {
          const int64_t queries = std::min(TILE_ROWS, length - first);
          matmul(queries, padded, head_dim, part(0) + first * head_dim, head_dim, key, padded, scores, padded, false);
          softmax(scores, queries, length, padded, branch.scale(), softmaxed, wide);
          matmul(queries, head_dim, wide, softmaxed, wide, value, head_dim, tile_heads.result, head_dim, false);
          for (int64_t row = 0; row < queries; row++)
            for (int64_t i = 0; i < head_dim; i += 16)
              store(merged + (image * length + first + row) * stride + head * head_dim + i, _mm512_loadu_ps(tile_heads.result + row * head_dim + i));
        }
      }
    }
    for (int64_t column = 0; column < dim; column += PANEL) {
      const int64_t panel = std::min(PANEL, dim - column);
      matmul(count, panel, dim, merged, stride, proj + column * dim, panel, tile_heads.result, panel, false);
      for (int64_t row = 0; row < count; row++) {
        const int64_t place = rows[tile.first + row] * dim + column;
        add_branch(x + place, tile_heads.result + row * panel, proj_bias + column, gamma + column, rows.scale[tile.first + row], panel, to + place);
      }
    }
  });
}

// Sums of one thread over its tiles.
struct Sums {
  // [panel, dim, PANEL]: ``grad_branch.T @ merged`` and ``normed.T @ grad_heads``; the first tile overwrites them
  float *proj, *qkv;
  float *qkv_bias, *grad_branch, *norm_weight, *norm_bias, *end;
  static int64_t size(int64_t dim) { return 4 * dim * dim + 6 * dim; }
  Sums(float* memory, int64_t dim) {
    proj = memory;
    qkv = proj + dim * dim;
    qkv_bias = qkv + 3 * dim * dim;
    grad_branch = qkv_bias + 3 * dim;
    norm_weight = grad_branch + dim;
    norm_bias = norm_weight + dim;
    end = norm_bias + dim;
  }
  void clear_vectors() const { std::fill(qkv_bias, end, 0.f); }
};

// Backward of one head of one image. ``grad`` is the gradient of its result; the gradients of query, key and value are written
// to ``to`` [length, stride], ``dim`` columns apart, and the recomputed result to ``merged``.
template <class T>
struct HeadBackward {
  int64_t length, head_dim, dim, merged_stride, stride;
  const T *query, *key, *value, *grad, *cosine, *sine;
  float scale;
  T *merged, *to;

  void operator()(int64_t max_length, float* result) const {
    constexpr bool exact = std::is_same_v<T, float>;
    const int64_t padded = round_up(length, 16), wide = round_up(length, LINE<T>);
    const int64_t max_padded = round_up(max_length, 16), max_wide = round_up(max_length, LINE<T>);
    const int64_t max_queries = round_up(std::min(max_length, TILE_ROWS), LINE<T>);
    T *key_transposed = scratch<T>(KEY, max_padded * head_dim), *value_transposed = scratch<T>(VALUE_TRANSPOSED, max_padded * head_dim);
    T *key_pairs = scratch<T>(KEY_PAIRS, max_wide * head_dim), *value_pairs = scratch<T>(VALUE, max_wide * head_dim);
    float *scores = scratch<float>(SCORES, max_queries * max_padded), *grad_scores = scratch<float>(GRAD_SCORES, max_queries * max_padded);
    T *weights = scratch<T>(WEIGHTS, max_queries * max_wide), *pairs = scratch<T>(WEIGHT_PAIRS, 2 * max_queries * max_padded);
    T *query_transposed = scratch<T>(QUERY_TRANSPOSED, head_dim * row_stride<T>(max_queries)), *grad_transposed = scratch<T>(GRAD_TRANSPOSED, head_dim * row_stride<T>(max_queries));
    float *grad_key = scratch<float>(GRAD_KEY, head_dim * max_padded), *grad_value = scratch<float>(GRAD_VALUE, head_dim * max_padded);
    pack_right_transposed(key, head_dim, length, padded, head_dim, key_transposed);
    pack_right_transposed(value, head_dim, length, padded, head_dim, value_transposed);
    pack_right(key, head_dim, length, wide, head_dim, key_pairs);
    pack_right(value, head_dim, length, wide, head_dim, value_pairs);
    for (int64_t first = 0; first < length; first += TILE_ROWS) {
      const int64_t queries = std::min(TILE_ROWS, length - first), even = round_up(queries, LINE<T>);
      const T *query_rows = query + first * head_dim, *grad_branch = grad + first * head_dim;
      matmul(queries, padded, head_dim, query_rows, head_dim, key_transposed, padded, scores, padded, false);
      softmax(scores, queries, length, padded, scale, weights, wide);
      matmul(queries, head_dim, wide, weights, wide, value_pairs, head_dim, result, head_dim, false);
      matmul(queries, padded, head_dim, grad_branch, head_dim, value_transposed, padded, grad_scores, padded, false);
      T *weight_pairs = pairs, *score_pairs = pairs + even * padded;
      pack_right(weights, wide, queries, even, padded, weight_pairs);
      for (int64_t row = 0; row < queries; row++) {
        // the weighted mean of the scores' gradients; for fp32 from the gradients themselves, because computing it from the
        // result would triple its error
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < head_dim; i += 16) {
          const __m512 average = _mm512_loadu_ps(result + row * head_dim + i);
          if (!exact) sum = _mm512_fmadd_ps(average, load(grad_branch + row * head_dim + i), sum);
          store(merged + (first + row) * merged_stride + i, average);
        }
        for (int64_t i = 0; exact && i < padded; i += 16)
          sum = _mm512_fmadd_ps(_mm512_loadu_ps(scores + row * padded + i), _mm512_loadu_ps(grad_scores + row * padded + i), sum);
        const __m512 matched = _mm512_set1_ps(_mm512_reduce_add_ps(sum)), factor = _mm512_set1_ps(scale);
        for (int64_t i = 0; i < padded; i += 16) {
          const __m512 difference = _mm512_sub_ps(_mm512_loadu_ps(grad_scores + row * padded + i), matched);
          store(weights + row * wide + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(scores + row * padded + i), factor), difference));
        }
      }
      pack_right(weights, wide, queries, even, padded, score_pairs);
      matmul(queries, head_dim, wide, weights, wide, key_pairs, head_dim, result, head_dim, false);
      for (int64_t row = 0; row < queries; row++) {
        const int64_t factor = (first + row) * head_dim;
        rotate<true>(result + row * head_dim, cosine + factor, sine + factor, head_dim, to + (first + row) * stride);
      }
      pack_left_transposed(query_rows, head_dim, queries, even, head_dim, query_transposed);
      pack_left_transposed(grad_branch, head_dim, queries, even, head_dim, grad_transposed);
      matmul(head_dim, padded, even, query_transposed, row_stride<T>(even), score_pairs, padded, grad_key, padded, first > 0);
      matmul(head_dim, padded, even, grad_transposed, row_stride<T>(even), weight_pairs, padded, grad_value, padded, first > 0);
    }
    for (int64_t row = 0; row < length; row += 16) {
      const int64_t count = std::min<int64_t>(16, length - row);
      float* block = result;
      transpose_block(grad_key + row, padded, head_dim, block);
      for (int64_t i = 0; i < count; i++) {
        const int64_t factor = (row + i) * head_dim;
        rotate<true>(block + i * head_dim, cosine + factor, sine + factor, head_dim, to + (row + i) * stride + dim);
      }
      transpose_block(grad_value + row, padded, head_dim, block);
      for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; k < head_dim; k += 16) store(to + (row + i) * stride + 2 * dim + k, _mm512_loadu_ps(block + i * head_dim + k));
    }
  }

  // Transposes 16 columns of ``from [head_dim, padded]`` to ``out [16, head_dim]``.
  static void transpose_block(const float* from, int64_t padded, int64_t head_dim, float* out) {
    __m512i block[16];
    for (int64_t k = 0; k < head_dim; k += 16) {
      for (int i = 0; i < 16; i++) block[i] = _mm512_loadu_si512(from + (k + i) * padded);
      transpose_16x16(block);
      for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + i * head_dim + k, block[i]);
    }
  }
};

template <class T>
std::vector<Tensor> gradients(const Branch<T>& branch, const Sums& sums, const ThreadSums& thread_sums);

template <class T>
std::vector<Tensor> backward(const Tensor& grad_out, const Tensor& tokens, const Tensor& grad_tokens,
                             const std::optional<Tensor>& row_index, at::IntArrayRef sizes, const std::vector<double>& scales,
                             const std::optional<Tensor>& counts, const std::vector<Tensor>& factors, int64_t num_heads,
                             const std::vector<Tensor>& weights, double eps) {
  const Branch<T> branch(weights, num_heads);
  const int64_t dim = branch.dim, head_dim = branch.head_dim, stride = row_stride<T>(dim), grad_stride = row_stride<T>(3 * dim);
  check<T>(tokens, {tokens.size(0), dim});
  check<T>(grad_out, tokens.sizes());
  check<T>(grad_tokens, tokens.sizes());
  const Rows rows(row_index, sizes, scales, counts, tokens.size(0));
  const Tiles<T> tiles(sizes, factors, head_dim);
  T *qkv = scratch<T>(QKV, 3 * dim * dim), *qkv_back = scratch<T>(QKV_BACK, 3 * dim * dim);
  T* proj_back = scratch<T>(PROJ_BACK, dim * dim);
  pack_forward(in<T>(branch.qkv_weight), 3 * dim, dim, head_dim, qkv);
  pack_backward(in<T>(branch.qkv_weight), 3 * dim, dim, PANEL, nullptr, qkv_back);
  pack_backward(in<T>(branch.proj_weight), dim, dim, head_dim, in<T>(branch.gamma), proj_back);
  const T *x = in<T>(tokens), *grad_residual = in<T>(grad_out), *norm_weight = in<T>(branch.norm_weight);
  T* to = grad_tokens.mutable_data_ptr<T>();
  rows.copy_others(grad_residual, tokens.size(0), dim, to);
  const int64_t max_rows = round_up(tiles.rows, LINE<T>), threads = tiles.threads, size = Sums::size(dim);
  float* memory = scratch<float>(SUMS, threads * size);
  const int64_t used = std::min<int64_t>(threads, tiles.all.size());
  if (!used) std::fill(memory, memory + size, 0.f);

  for_tiles(tiles.all.size(), threads, [&](int64_t thread, int64_t index) {
    const Tile<T>& tile = tiles.all[index];
    const int64_t count = tile.rows(), length = tile.length, padded = round_up(count, LINE<T>);
    const Sums sums(memory + thread * size, dim);
    const bool more = index >= threads;
    if (!more) sums.clear_vectors();
    const TileHeads<T> tile_heads(branch, tiles, tile, rows, x, qkv, eps);
    T *grad_branch = scratch<T>(GRAD_BRANCH, max_rows * stride), *merged = scratch<T>(MERGED, max_rows * stride);
    T *grad_merged = scratch<T>(GRAD_MERGED, max_rows * dim), *grad_heads = scratch<T>(GRAD_HEADS, max_rows * grad_stride);
    T* transposed = scratch<T>(TRANSPOSED, dim * row_stride<T>(max_rows));
    T* grad_branch_transposed = scratch<T>(GRAD_BRANCH_TRANSPOSED, dim * row_stride<T>(max_rows));
    const int64_t transposed_stride = row_stride<T>(padded);
    T* pairs = scratch<T>(PAIRS, max_rows * PANEL);
    for (int64_t row = 0; row < count; row++) {
      scale_row(grad_residual + rows[tile.first + row] * dim, rows.scale[tile.first + row], dim, grad_branch + row * stride);
      add_row(sums.grad_branch, grad_branch + row * stride, dim);
    }
    for (int64_t head = 0; head < branch.heads; head++) {
      const int64_t column = head * head_dim;
      T* grad = grad_merged + column * count;
      matmul(count, head_dim, dim, grad_branch, stride, proj_back + column * dim, head_dim, tile_heads.result, head_dim, false);
      for (int64_t i = 0; i < count * head_dim; i += 16) store(grad + i, _mm512_loadu_ps(tile_heads.result + i));
      for (int64_t image = 0; image < tile.images; image++) {
        const int64_t first = image * length;
        const auto part = [&](int64_t kind) { return tile_heads.heads + ((kind * branch.heads + head) * count + first) * head_dim; };
        const HeadBackward<T> work{length, head_dim, dim, stride, grad_stride, part(0), part(1), part(2), grad + first * head_dim, tile.cosine, tile.sine,
                                branch.scale(), merged + first * stride + column, grad_heads + first * grad_stride + column};
        work(tiles.length, tile_heads.result);
      }
    }
    pack_left_transposed(grad_branch, stride, count, padded, dim, grad_branch_transposed);
    pack_left_transposed(tile_heads.normed, stride, count, padded, dim, transposed);
    for (int64_t column = 0; column < dim; column += PANEL) {
      const int64_t panel = std::min(PANEL, dim - column);
      pack_right(merged + column, stride, count, padded, panel, pairs);
      matmul(dim, panel, padded, grad_branch_transposed, transposed_stride, pairs, panel, sums.proj + column * dim, panel, more);
    }
    for (int64_t column = 0; column < 3 * dim; column += PANEL) {
      const int64_t panel = std::min(PANEL, 3 * dim - column);
      pack_right(grad_heads + column, grad_stride, count, padded, panel, pairs);
      matmul(dim, panel, padded, transposed, transposed_stride, pairs, panel, sums.qkv + column * dim, panel, more);
    }
    for (int64_t row = 0; row < count; row++) add_row(sums.qkv_bias, grad_heads + row * grad_stride, 3 * dim);
    // the scores of the last head are no longer needed
    float* grad_norm = scratch<float>(SCORES, max_rows * dim);
    for (int64_t column = 0; column < dim; column += PANEL) {
      const int64_t panel = std::min(PANEL, dim - column);
      matmul(count, panel, 3 * dim, grad_heads, grad_stride, qkv_back + column * 3 * dim, panel, grad_norm + column, dim, false);
    }
    for (int64_t row = 0; row < count; row++) {
      const int64_t place = rows[tile.first + row] * dim;
      norm_row_backward(x + place, norm_weight, tile_heads.mean[row], tile_heads.inverse_std[row], dim, grad_norm + row * dim, grad_residual + place,
                        to + place, sums.norm_weight, sums.norm_bias);
    }
  });
  return gradients(branch, Sums(memory, dim), ThreadSums{size, used});
}

template <class T>
std::vector<Tensor> gradients(const Branch<T>& branch, const Sums& sums, const ThreadSums& thread_sums) {
  const int64_t dim = branch.dim;
  const T* gamma = in<T>(branch.gamma);
  return {
      gradient<T>(thread_sums, sums.norm_weight, dim), gradient<T>(thread_sums, sums.norm_bias, dim),
      gradient<T>(thread_sums, sums.qkv, dim, 3 * dim, nullptr, true), gradient<T>(thread_sums, sums.qkv_bias, 3 * dim),
      gradient<T>(thread_sums, sums.proj, dim, dim, gamma, false), gradient<T>(thread_sums, sums.grad_branch, dim, gamma),
      gradient_by_scale<T>(thread_sums, sums.proj, sums.grad_branch, in<T>(branch.proj_weight), in<T>(branch.proj_bias), dim, dim),
  };
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(streamtrain, library) {
  library.def("attention_forward", ByType<forward<bf16>, forward<float>>::call);
  library.def("attention_backward", ByType<backward<bf16>, backward<float>>::call);
}

}  // namespace streamtrain
