// The attention branch of a block: norm, queries, keys and values, RoPE, softmax attention within each image,
// projection, LayerScale, residual; and its gradients.
//
// A tile is one image, or as many small ones as fit; it goes through all of it while it lies in a core's cache. The
// backward makes again what it needs. Scores are fp32, their softmax is rounded to the tokens' type for the products.
#include <torch/library.h>

#include "rows.h"

namespace streamtrain {
namespace {

using at::Tensor;

// rows of a tile of small images, and queries whose scores are there at once
constexpr int64_t TILE_ROWS = 256;

// The slots of ``scratch``.
enum {
  QKV, PROJ, QKV_BACK, PROJ_BACK, NORMED, HEADS, MERGED, RESULT, STATS, SUMS, GIVEN, BY_MERGED, BY_HEADS, TURNED,
  GIVEN_TURNED, PAIRS, KEY, VALUE, VALUE_TURNED, KEY_PAIRS, SCORES, BY_SCORES, WEIGHTS, WEIGHT_PAIRS, QUERY_TURNED,
  BY_TURNED, BY_KEY, BY_VALUE
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
  // of the image's tokens, [length, head_dim]
  const T *cosine, *sine;
  int64_t rows() const { return images * length; }
};

template <class T>
struct Tiles {
  std::vector<Tile<T>> all;
  int64_t threads = at::get_num_threads(), rows = 0, length = 0;

  // ``factors``: cosines and sines of one size of images after the other
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

// Turns the vector ``from`` [head_dim] by factors; ``back`` does the opposite.
template <bool back, class T>
void turn(const float* from, const T* cosine, const T* sine, int64_t head_dim, T* to) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < head_dim; i += 16) {
    const int64_t other = i < half ? i + half : i - half;
    const __m512 turned = _mm512_mul_ps(_mm512_loadu_ps(from + other), load(sine + (back ? other : i)));
    store(to + i, _mm512_fmadd_ps(_mm512_loadu_ps(from + i), load(cosine + i), turned));
  }
}

// What both directions begin with: a tile's normed rows [rows, spread(dim)] and its heads [3, heads, rows, head_dim], turned.
template <class T>
struct Begun {
  T *normed, *heads;
  float *mean, *rate, *result;

  Begun(const Branch<T>& branch, const Tiles<T>& tiles, const Tile<T>& tile, const Rows& rows, const T* x, const T* qkv, float eps) {
    const int64_t dim = branch.dim, head_dim = branch.head_dim, count = tile.rows(), stride = spread<T>(dim);
    normed = scratch<T>(NORMED, tiles.rows * stride);
    heads = scratch<T>(HEADS, 3 * tiles.rows * dim);
    result = scratch<float>(RESULT, std::max<int64_t>(16, tiles.rows) * std::max(PANEL, head_dim));
    mean = scratch<float>(STATS, 2 * tiles.rows);
    rate = mean + tiles.rows;
    const T *weight = in<T>(branch.norm_weight), *bias = in<T>(branch.norm_bias), *qkv_bias = in<T>(branch.qkv_bias);
    for (int64_t row = 0; row < count; row++)
      norm_row(x + rows[tile.first + row] * dim, weight, bias, eps, dim, normed + row * stride, mean[row], rate[row]);
    for (int64_t head = 0; head < 3 * branch.heads; head++) {
      const int64_t column = head * head_dim;
      product(count, head_dim, dim, normed, stride, qkv + column * dim, head_dim, result, head_dim, false);
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
        if (head < 2 * branch.heads) turn<false>(values, tile.cosine + factor, tile.sine + factor, head_dim, place);
      }
    }
  }
};

// The softmax of ``scores`` [count, padded] in place, of which ``length`` columns are keys, the rest becomes 0; rounded to
// ``weights`` [count, wide], whose columns beyond are 0 too.
template <class T>
void softmax(float* scores, int64_t count, int64_t length, int64_t padded, float scale, T* weights, int64_t wide) {
  const __mmask16 last = length % 16 ? (1u << length % 16) - 1 : 0xffff;
  const __m512 factor = _mm512_set1_ps(scale), none = _mm512_set1_ps(-INFINITY);
  for (int64_t row = 0; row < count; row++) {
    float* values = scores + row * padded;
    const auto mask = [&](int64_t i) -> __mmask16 { return i + 16 <= length ? 0xffff : i < length ? last : 0; };
    __m512 most = none, sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < length; i += 16) most = _mm512_max_ps(most, _mm512_mask_loadu_ps(none, mask(i), values + i));
    const __m512 shift = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_max_ps(most)), factor);
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
void forward(const Tensor& tokens, const Tensor& out, const std::optional<Tensor>& kept, at::IntArrayRef sizes,
             const std::vector<double>& scales, const std::optional<Tensor>& counts, const std::vector<Tensor>& factors,
             int64_t num_heads, const std::vector<Tensor>& weights, double eps) {
  const Branch<T> branch(weights, num_heads);
  const int64_t dim = branch.dim, head_dim = branch.head_dim, stride = spread<T>(dim);
  check<T>(tokens, {tokens.size(0), dim});
  check<T>(out, tokens.sizes());
  const Rows rows(kept, sizes, scales, counts, tokens.size(0));
  const Tiles<T> tiles(sizes, factors, head_dim);
  T *qkv = scratch<T>(QKV, 3 * dim * dim), *proj = scratch<T>(PROJ, dim * dim);
  pack_forward(in<T>(branch.qkv_weight), 3 * dim, dim, head_dim, qkv);
  pack_forward(in<T>(branch.proj_weight), dim, dim, PANEL, proj);
  const T *x = in<T>(tokens), *proj_bias = in<T>(branch.proj_bias), *gamma = in<T>(branch.gamma);
  T* to = out.mutable_data_ptr<T>();
  rows.pass_others(x, tokens.size(0), dim, to);
  const int64_t padded_most = rounded(tiles.length, 16), wide_most = rounded(tiles.length, LINE<T>);
  const int64_t queries_most = std::min(tiles.length, TILE_ROWS);

  for_tiles(tiles.all.size(), tiles.threads, [&](int64_t, int64_t index) {
    const Tile<T>& tile = tiles.all[index];
    const int64_t count = tile.rows(), length = tile.length, padded = rounded(length, 16), wide = rounded(length, LINE<T>);
    const Begun<T> begun(branch, tiles, tile, rows, x, qkv, eps);
    T* merged = scratch<T>(MERGED, tiles.rows * stride);
    T *key = scratch<T>(KEY, padded_most * head_dim), *value = scratch<T>(VALUE, wide_most * head_dim);
    float* scores = scratch<float>(SCORES, queries_most * padded_most);
    T* softmaxed = scratch<T>(WEIGHTS, queries_most * wide_most);
    for (int64_t head = 0; head < branch.heads; head++) {
      for (int64_t image = 0; image < tile.images; image++) {
        const auto part = [&](int64_t kind) {
          return begun.heads + ((kind * branch.heads + head) * count + image * length) * head_dim;
        };
        as_right_transposed(part(1), head_dim, length, padded, head_dim, key);
        as_right(part(2), head_dim, length, wide, head_dim, value);
        for (int64_t first = 0; first < length; first += TILE_ROWS) {
          const int64_t queries = std::min(TILE_ROWS, length - first);
          product(queries, padded, head_dim, part(0) + first * head_dim, head_dim, key, padded, scores, padded, false);
          softmax(scores, queries, length, padded, branch.scale(), softmaxed, wide);
          product(queries, head_dim, wide, softmaxed, wide, value, head_dim, begun.result, head_dim, false);
          for (int64_t row = 0; row < queries; row++)
            for (int64_t i = 0; i < head_dim; i += 16)
              store(merged + (image * length + first + row) * stride + head * head_dim + i, _mm512_loadu_ps(begun.result + row * head_dim + i));
        }
      }
    }
    for (int64_t column = 0; column < dim; column += PANEL) {
      const int64_t panel = std::min(PANEL, dim - column);
      product(count, panel, dim, merged, stride, proj + column * dim, panel, begun.result, panel, false);
      for (int64_t row = 0; row < count; row++) {
        const int64_t place = rows[tile.first + row] * dim + column;
        add_branch(x + place, begun.result + row * panel, proj_bias + column, gamma + column, rows.scale[tile.first + row], panel, to + place);
      }
    }
  });
}

// What a thread sums over its tiles.
struct Sums {
  // [panel, dim, PANEL]: ``given.T @ merged`` and ``normed.T @ by_qkv``; begun by the first tile
  float *proj, *qkv;
  float *qkv_bias, *given, *norm_weight, *norm_bias, *end;
  static int64_t size(int64_t dim) { return 4 * dim * dim + 6 * dim; }
  Sums(float* memory, int64_t dim) {
    proj = memory;
    qkv = proj + dim * dim;
    qkv_bias = qkv + 3 * dim * dim;
    given = qkv_bias + 3 * dim;
    norm_weight = given + dim;
    norm_bias = norm_weight + dim;
    end = norm_bias + dim;
  }
  void begin_vectors() const { std::fill(qkv_bias, end, 0.f); }
};

// The gradient by one image's head, ``by`` its merged result: written to ``to`` [length, stride], the columns of query, key
// and value ``dim`` apart; its merged result again to ``merged``.
template <class T>
struct HeadBackward {
  int64_t length, head_dim, dim, merged_stride, stride;
  const T *query, *key, *value, *by, *cosine, *sine;
  float scale;
  T *merged, *to;

  void operator()(int64_t length_most, float* result) const {
    constexpr bool exact = std::is_same_v<T, float>;
    const int64_t padded = rounded(length, 16), wide = rounded(length, LINE<T>);
    const int64_t padded_most = rounded(length_most, 16), wide_most = rounded(length_most, LINE<T>);
    const int64_t queries_most = rounded(std::min(length_most, TILE_ROWS), LINE<T>);
    T *key_turned = scratch<T>(KEY, padded_most * head_dim), *value_turned = scratch<T>(VALUE_TURNED, padded_most * head_dim);
    T *key_pairs = scratch<T>(KEY_PAIRS, wide_most * head_dim), *value_pairs = scratch<T>(VALUE, wide_most * head_dim);
    float *scores = scratch<float>(SCORES, queries_most * padded_most), *by_scores = scratch<float>(BY_SCORES, queries_most * padded_most);
    T *weights = scratch<T>(WEIGHTS, queries_most * wide_most), *pairs = scratch<T>(WEIGHT_PAIRS, 2 * queries_most * padded_most);
    T *query_turned = scratch<T>(QUERY_TURNED, head_dim * spread<T>(queries_most)), *by_turned = scratch<T>(BY_TURNED, head_dim * spread<T>(queries_most));
    float *by_key = scratch<float>(BY_KEY, head_dim * padded_most), *by_value = scratch<float>(BY_VALUE, head_dim * padded_most);
    as_right_transposed(key, head_dim, length, padded, head_dim, key_turned);
    as_right_transposed(value, head_dim, length, padded, head_dim, value_turned);
    as_right(key, head_dim, length, wide, head_dim, key_pairs);
    as_right(value, head_dim, length, wide, head_dim, value_pairs);
    for (int64_t first = 0; first < length; first += TILE_ROWS) {
      const int64_t queries = std::min(TILE_ROWS, length - first), even = rounded(queries, LINE<T>);
      const T *asked = query + first * head_dim, *given = by + first * head_dim;
      product(queries, padded, head_dim, asked, head_dim, key_turned, padded, scores, padded, false);
      softmax(scores, queries, length, padded, scale, weights, wide);
      product(queries, head_dim, wide, weights, wide, value_pairs, head_dim, result, head_dim, false);
      product(queries, padded, head_dim, given, head_dim, value_turned, padded, by_scores, padded, false);
      T *weight_pairs = pairs, *score_pairs = pairs + even * padded;
      as_right(weights, wide, queries, even, padded, weight_pairs);
      for (int64_t row = 0; row < queries; row++) {
        // the average of the scores' gradients; in fp32 from themselves, since a rounded result would make it three times
        // as rough
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < head_dim; i += 16) {
          const __m512 average = _mm512_loadu_ps(result + row * head_dim + i);
          if (!exact) sum = _mm512_fmadd_ps(average, load(given + row * head_dim + i), sum);
          store(merged + (first + row) * merged_stride + i, average);
        }
        for (int64_t i = 0; exact && i < padded; i += 16)
          sum = _mm512_fmadd_ps(_mm512_loadu_ps(scores + row * padded + i), _mm512_loadu_ps(by_scores + row * padded + i), sum);
        const __m512 matched = _mm512_set1_ps(_mm512_reduce_add_ps(sum)), factor = _mm512_set1_ps(scale);
        for (int64_t i = 0; i < padded; i += 16) {
          const __m512 away = _mm512_sub_ps(_mm512_loadu_ps(by_scores + row * padded + i), matched);
          store(weights + row * wide + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(scores + row * padded + i), factor), away));
        }
      }
      as_right(weights, wide, queries, even, padded, score_pairs);
      product(queries, head_dim, wide, weights, wide, key_pairs, head_dim, result, head_dim, false);
      for (int64_t row = 0; row < queries; row++) {
        const int64_t factor = (first + row) * head_dim;
        turn<true>(result + row * head_dim, cosine + factor, sine + factor, head_dim, to + (first + row) * stride);
      }
      as_left_transposed(asked, head_dim, queries, even, head_dim, query_turned);
      as_left_transposed(given, head_dim, queries, even, head_dim, by_turned);
      product(head_dim, padded, even, query_turned, spread<T>(even), score_pairs, padded, by_key, padded, first > 0);
      product(head_dim, padded, even, by_turned, spread<T>(even), weight_pairs, padded, by_value, padded, first > 0);
    }
    for (int64_t row = 0; row < length; row += 16) {
      const int64_t count = std::min<int64_t>(16, length - row);
      float* block = result;
      turn_block(by_key + row, padded, head_dim, block);
      for (int64_t i = 0; i < count; i++) {
        const int64_t factor = (row + i) * head_dim;
        turn<true>(block + i * head_dim, cosine + factor, sine + factor, head_dim, to + (row + i) * stride + dim);
      }
      turn_block(by_value + row, padded, head_dim, block);
      for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; k < head_dim; k += 16) store(to + (row + i) * stride + 2 * dim + k, _mm512_loadu_ps(block + i * head_dim + k));
    }
  }

  // 16 columns of ``from [head_dim, padded]`` as rows: ``out [16, head_dim]``
  static void turn_block(const float* from, int64_t padded, int64_t head_dim, float* out) {
    __m512i block[16];
    for (int64_t k = 0; k < head_dim; k += 16) {
      for (int i = 0; i < 16; i++) block[i] = _mm512_loadu_si512(from + (k + i) * padded);
      transpose_16x16(block);
      for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + i * head_dim + k, block[i]);
    }
  }
};

template <class T>
std::vector<Tensor> gradients(const Branch<T>& branch, const Sums& sums, const Parts& parts);

template <class T>
std::vector<Tensor> backward(const Tensor& by_out, const Tensor& tokens, const Tensor& by_tokens,
                             const std::optional<Tensor>& kept, at::IntArrayRef sizes, const std::vector<double>& scales,
                             const std::optional<Tensor>& counts, const std::vector<Tensor>& factors, int64_t num_heads,
                             const std::vector<Tensor>& weights, double eps) {
  const Branch<T> branch(weights, num_heads);
  const int64_t dim = branch.dim, head_dim = branch.head_dim, stride = spread<T>(dim), by_stride = spread<T>(3 * dim);
  check<T>(tokens, {tokens.size(0), dim});
  check<T>(by_out, tokens.sizes());
  check<T>(by_tokens, tokens.sizes());
  const Rows rows(kept, sizes, scales, counts, tokens.size(0));
  const Tiles<T> tiles(sizes, factors, head_dim);
  T *qkv = scratch<T>(QKV, 3 * dim * dim), *qkv_back = scratch<T>(QKV_BACK, 3 * dim * dim);
  T* proj_back = scratch<T>(PROJ_BACK, dim * dim);
  pack_forward(in<T>(branch.qkv_weight), 3 * dim, dim, head_dim, qkv);
  pack_backward(in<T>(branch.qkv_weight), 3 * dim, dim, PANEL, nullptr, qkv_back);
  pack_backward(in<T>(branch.proj_weight), dim, dim, head_dim, in<T>(branch.gamma), proj_back);
  const T *x = in<T>(tokens), *passed = in<T>(by_out), *norm_weight = in<T>(branch.norm_weight);
  T* to = by_tokens.mutable_data_ptr<T>();
  rows.pass_others(passed, tokens.size(0), dim, to);
  const int64_t most = rounded(tiles.rows, LINE<T>), threads = tiles.threads, size = Sums::size(dim);
  float* memory = scratch<float>(SUMS, threads * size);
  const int64_t used = std::min<int64_t>(threads, tiles.all.size());
  if (!used) std::fill(memory, memory + size, 0.f);

  for_tiles(tiles.all.size(), threads, [&](int64_t thread, int64_t index) {
    const Tile<T>& tile = tiles.all[index];
    const int64_t count = tile.rows(), length = tile.length, padded = rounded(count, LINE<T>);
    const Sums sums(memory + thread * size, dim);
    const bool more = index >= threads;
    if (!more) sums.begin_vectors();
    const Begun<T> begun(branch, tiles, tile, rows, x, qkv, eps);
    T *given = scratch<T>(GIVEN, most * stride), *merged = scratch<T>(MERGED, most * stride);
    T *by_merged = scratch<T>(BY_MERGED, most * dim), *by_heads = scratch<T>(BY_HEADS, most * by_stride);
    T *turned = scratch<T>(TURNED, dim * spread<T>(most)), *given_turned = scratch<T>(GIVEN_TURNED, dim * spread<T>(most));
    const int64_t turned_stride = spread<T>(padded);
    T* pairs = scratch<T>(PAIRS, most * PANEL);
    for (int64_t row = 0; row < count; row++) {
      scale_row(passed + rows[tile.first + row] * dim, rows.scale[tile.first + row], dim, given + row * stride);
      add_row(sums.given, given + row * stride, dim);
    }
    for (int64_t head = 0; head < branch.heads; head++) {
      const int64_t column = head * head_dim;
      T* by = by_merged + column * count;
      product(count, head_dim, dim, given, stride, proj_back + column * dim, head_dim, begun.result, head_dim, false);
      for (int64_t i = 0; i < count * head_dim; i += 16) store(by + i, _mm512_loadu_ps(begun.result + i));
      for (int64_t image = 0; image < tile.images; image++) {
        const int64_t first = image * length;
        const auto part = [&](int64_t kind) { return begun.heads + ((kind * branch.heads + head) * count + first) * head_dim; };
        const HeadBackward<T> work{length, head_dim, dim, stride, by_stride, part(0), part(1), part(2), by + first * head_dim, tile.cosine, tile.sine,
                                branch.scale(), merged + first * stride + column, by_heads + first * by_stride + column};
        work(tiles.length, begun.result);
      }
    }
    as_left_transposed(given, stride, count, padded, dim, given_turned);
    as_left_transposed(begun.normed, stride, count, padded, dim, turned);
    for (int64_t column = 0; column < dim; column += PANEL) {
      const int64_t panel = std::min(PANEL, dim - column);
      as_right(merged + column, stride, count, padded, panel, pairs);
      product(dim, panel, padded, given_turned, turned_stride, pairs, panel, sums.proj + column * dim, panel, more);
    }
    for (int64_t column = 0; column < 3 * dim; column += PANEL) {
      const int64_t panel = std::min(PANEL, 3 * dim - column);
      as_right(by_heads + column, by_stride, count, padded, panel, pairs);
      product(dim, panel, padded, turned, turned_stride, pairs, panel, sums.qkv + column * dim, panel, more);
    }
    for (int64_t row = 0; row < count; row++) add_row(sums.qkv_bias, by_heads + row * by_stride, 3 * dim);
    // the queries, keys and values have been used
    float* by_norm = scratch<float>(SCORES, most * dim);
    for (int64_t column = 0; column < dim; column += PANEL) {
      const int64_t panel = std::min(PANEL, dim - column);
      product(count, panel, 3 * dim, by_heads, by_stride, qkv_back + column * 3 * dim, panel, by_norm + column, dim, false);
    }
    for (int64_t row = 0; row < count; row++) {
      const int64_t place = rows[tile.first + row] * dim;
      norm_row_backward(x + place, norm_weight, begun.mean[row], begun.rate[row], dim, by_norm + row * dim, passed + place,
                        to + place, sums.norm_weight, sums.norm_bias);
    }
  });
  return gradients(branch, Sums(memory, dim), Parts{size, used});
}

template <class T>
std::vector<Tensor> gradients(const Branch<T>& branch, const Sums& sums, const Parts& parts) {
  const int64_t dim = branch.dim;
  const T* gamma = in<T>(branch.gamma);
  return {
      gradient<T>(parts, sums.norm_weight, dim), gradient<T>(parts, sums.norm_bias, dim),
      gradient<T>(parts, sums.qkv, dim, 3 * dim, nullptr, true), gradient<T>(parts, sums.qkv_bias, 3 * dim),
      gradient<T>(parts, sums.proj, dim, dim, gamma, false), gradient<T>(parts, sums.given, dim, gamma),
      gradient_by_scale<T>(parts, sums.proj, sums.given, in<T>(branch.proj_weight), in<T>(branch.proj_bias), dim, dim),
  };
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(streamtrain, library) {
  library.def("attention_forward", ByType<forward<bf16>, forward<float>>::call);
  library.def("attention_backward", ByType<backward<bf16>, backward<float>>::call);
}

}  // namespace streamtrain
