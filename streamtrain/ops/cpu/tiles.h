// Matmuls of tiles that fit a core's cache, and the layouts of their operands.
//
// The matmul is oneDNN's, called through ATen: operands in bf16 (with AMX where available) or fp32, the result in fp32. A bf16
// right operand has pairs of rows interleaved, [rows / 2][columns][2]. Right operands are stored in panels of PANEL columns, so
// that a matmul reads contiguous memory. Rows are padded with zeros to a multiple of LINE.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>

namespace streamtrain {

using bf16 = at::BFloat16;

// values per cache line; T is bf16 or float, here and below
template <class T>
constexpr int64_t LINE = 64 / sizeof(T);
// columns per panel
constexpr int64_t PANEL = 64;
// terms that an fp32 matmul sums sequentially: 4096 in one sum would triple the rounding error
template <class T>
constexpr int64_t AT_ONCE = std::is_same_v<T, float> ? 512 : INT64_MAX;

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// The stride for rows of ``width`` values, an odd number of cache lines: with a power of two, a tile's rows would compete for
// the same few cache sets.
template <class T>
int64_t row_stride(int64_t width) {
  const int64_t lines = (width + LINE<T> - 1) / LINE<T>;
  return LINE<T> * (lines + 1 - lines % 2);
}

// Memory of each thread that persists between calls, by slot: mapping new memory would cost more than filling it.
template <class T>
T* scratch(int slot, int64_t count) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  struct Buffer {
    std::unique_ptr<void, Free> memory;
    size_t bytes = 0;
  };
  constexpr int SLOTS = 32;
  thread_local Buffer buffers[SLOTS];
  TORCH_INTERNAL_ASSERT(slot < SLOTS);
  Buffer& buffer = buffers[slot];
  const size_t wanted = std::max<int64_t>(4096, round_up(count * sizeof(T), 4096));
  if (buffer.bytes < wanted) {
    buffer.memory.reset();
    buffer.memory.reset(std::aligned_alloc(64, wanted));
    TORCH_CHECK(buffer.memory, "no memory for ", wanted, " bytes");
    buffer.bytes = wanted;
  }
  return static_cast<T*>(buffer.memory.get());
}

// result [m, n] = (or +=) left [m, k] @ right [k, n]; a row of the right operand has ``right_width`` columns
template <class T>
void matmul(int64_t m, int64_t n, int64_t k, const T* left, int64_t left_stride, const T* right, int64_t right_width,
             float* result, int64_t result_stride, bool add) {
  if (!k && !add)
    for (int64_t row = 0; row < m; row++) std::fill_n(result + row * result_stride, n, 0.f);
  if (!m || !k) return;
  constexpr bool interleaved = std::is_same_v<T, bf16>;
  for (int64_t first = 0; first < k; first += AT_ONCE<T>)
    at::native::cpublas::brgemm(m, n, std::min(AT_ONCE<T>, k - first), left_stride, right_width, result_stride, add || first,
                                left + first, right + first * right_width, result, interleaved);
}

inline __m256i raw(const bf16* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

inline __m512 load(const float* from) { return _mm512_loadu_ps(from); }

inline __m512 load(const bf16* from) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw(from)), 16)); }

// 16 values in storage format
template <class T>
struct Stored {
  using type = __m256i;
};
template <>
struct Stored<float> {
  using type = __m512;
};
template <class T>
using Sixteen = typename Stored<T>::type;

template <class T>
Sixteen<T> narrow(__m512 values) {
  if constexpr (std::is_same_v<T, float>)
    return values;
  else
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values));
}

inline void put(float* to, __m512 values) { _mm512_storeu_ps(to, values); }

inline void put(bf16* to, __m256i values) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), values); }

template <class T>
void store(T* to, __m512 values) {
  put(to, narrow<T>(values));
}

// Interleaves 16 columns of two rows.
inline __m512i interleaved(__m256i first, __m256i second) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

// Stores 16 columns from ``column`` of two rows of a right operand; the rows begin at ``to`` and have ``width`` columns.
inline void put_rows(float* to, int64_t width, int64_t column, __m512 first, __m512 second) {
  put(to + column, first);
  put(to + width + column, second);
}

inline void put_rows(bf16* to, int64_t, int64_t column, __m256i first, __m256i second) {
  _mm512_storeu_si512(to + 2 * column, interleaved(first, second));
}

[[gnu::always_inline]] inline void transpose_16x16(__m512i rows[16]) {
  __m512i step[16];
  for (int i = 0; i < 8; i++) {
    step[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    step[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    for (int j = 0; j < 2; j++) {
      rows[4 * i + 2 * j] = _mm512_unpacklo_epi64(step[4 * i + j], step[4 * i + j + 2]);
      rows[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(step[4 * i + j], step[4 * i + j + 2]);
    }
  }
  // rows[4 i + c] now has column c of each group of four columns, of rows 4 i to 4 i + 3
  for (int c = 0; c < 4; c++) {
    const __m512i low = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0x44), high = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0xee);
    const __m512i low2 = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0x44), high2 = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0xee);
    step[c] = _mm512_shuffle_i32x4(low, low2, 0x88);
    step[4 + c] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    step[8 + c] = _mm512_shuffle_i32x4(high, high2, 0x88);
    step[12 + c] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
  std::copy(step, step + 16, rows);
}

// Packs ``from [rows, columns]`` as a right operand, columns a multiple of 16, with zeros from ``rows`` to ``padded``.
inline void pack_right(const bf16* from, int64_t stride, int64_t rows, int64_t padded, int64_t columns, bf16* to) {
  const __m256i zero = _mm256_setzero_si256();
  for (int64_t row = 0; row < padded; row += 2) {
    const bf16 *first = from + row * stride, *second = first + stride;
    for (int64_t column = 0; column < columns; column += 16)
      put_rows(to + row * columns, columns, column, row < rows ? raw(first + column) : zero, row + 1 < rows ? raw(second + column) : zero);
  }
}

inline void pack_right(const float* from, int64_t stride, int64_t rows, int64_t padded, int64_t columns, float* to) {
  for (int64_t row = 0; row < rows; row++) std::copy_n(from + row * stride, columns, to + row * columns);
  std::fill(to + rows * columns, to + padded * columns, 0.f);
}

// Packs ``from [width, depth]`` transposed as a right operand ``to [depth][padded]``, with zeros from ``width`` to ``padded``;
// ``depth`` and ``padded`` are multiples of 16.
inline void pack_right_transposed(const bf16* from, int64_t stride, int64_t width, int64_t padded, int64_t depth, bf16* to) {
  __m512i block[16];
  for (int64_t column = 0; column < padded; column += 16) {
    for (int64_t row = 0; row < depth; row += 32) {
      const int64_t pairs = std::min<int64_t>(16, (depth - row) / 2);
      const __mmask16 mask = (1u << pairs) - 1;
      for (int i = 0; i < 16; i++)
        block[i] = column + i < width ? _mm512_maskz_loadu_epi32(mask, from + (column + i) * stride + row) : _mm512_setzero_si512();
      transpose_16x16(block);
      for (int i = 0; i < pairs; i++) _mm512_storeu_si512(to + (row / 2 + i) * 2 * padded + 2 * column, block[i]);
    }
  }
}

// Transposes ``from [rows, columns]`` to ``to [columns, to_stride]``, with zeros from ``rows`` to ``padded``; ``columns`` and
// ``padded`` are multiples of 16.
inline void transpose(const float* from, int64_t stride, int64_t rows, int64_t padded, int64_t columns, float* to, int64_t to_stride) {
  __m512i block[16];
  for (int64_t column = 0; column < columns; column += 16) {
    for (int64_t row = 0; row < padded; row += 16) {
      for (int i = 0; i < 16; i++)
        block[i] = row + i < rows ? _mm512_loadu_si512(from + (row + i) * stride + column) : _mm512_setzero_si512();
      transpose_16x16(block);
      for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + (column + i) * to_stride + row, block[i]);
    }
  }
}

inline void pack_right_transposed(const float* from, int64_t stride, int64_t width, int64_t padded, int64_t depth, float* to) {
  transpose(from, stride, width, padded, depth, to, padded);
}

// The same in bf16; ``padded`` is a multiple of 32.
inline void transpose(const bf16* from, int64_t stride, int64_t rows, int64_t padded, int64_t columns, bf16* to, int64_t to_stride) {
  const __m256i zero = _mm256_setzero_si256();
  __m512i block[16];
  for (int64_t column = 0; column < columns; column += 16) {
    for (int64_t row = 0; row < padded; row += 32) {
      for (int i = 0; i < 16; i++) {
        const int64_t at = row + 2 * i;
        const bf16* place = from + at * stride + column;
        block[i] = interleaved(at < rows ? raw(place) : zero, at + 1 < rows ? raw(place + stride) : zero);
      }
      transpose_16x16(block);
      for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + (column + i) * to_stride + row, block[i]);
    }
  }
}

// Transposes to a left operand with the stride row_stride(padded).
template <class T>
void pack_left_transposed(const T* from, int64_t stride, int64_t rows, int64_t padded, int64_t columns, T* to) {
  transpose(from, stride, rows, padded, columns, to, row_stride<T>(padded));
}

// Packs a weight [out, in] as the right operand of ``tokens @ weight.T``: panels of ``panel`` output features.
template <class T>
void pack_forward(const T* weight, int64_t out, int64_t in, int64_t panel, T* to) {
  at::parallel_for(0, (out + panel - 1) / panel, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; index++) {
      const int64_t first = index * panel, width = std::min(panel, out - first);
      pack_right_transposed(weight + first * in, in, width, width, in, to + first * in);
    }
  });
}

// Packs a weight [out, in] as the right operand of ``gradient @ weight``, each row times ``factor [out]`` if given: panels of
// ``panel`` input features.
template <class T>
void pack_backward(const T* weight, int64_t out, int64_t in, int64_t panel, const std::type_identity_t<T>* factor, T* to) {
  at::parallel_for(0, (in + panel - 1) / panel, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; index++) {
      const int64_t first = index * panel, width = std::min(panel, in - first);
      T* place = to + first * out;
      if (!factor) {
        pack_right(weight + first, in, out, out, width, place);
        continue;
      }
      for (int64_t row = 0; row < out; row += 2) {
        const __m512 one = _mm512_set1_ps(factor[row]), two = _mm512_set1_ps(factor[row + 1]);
        const T* from = weight + row * in + first;
        for (int64_t column = 0; column < width; column += 16) {
          const Sixteen<T> left = narrow<T>(_mm512_mul_ps(load(from + column), one));
          put_rows(place + row * width, width, column, left, narrow<T>(_mm512_mul_ps(load(from + in + column), two)));
        }
      }
    }
  });
}

}  // namespace streamtrain
