// What lies where: weights in panels, activations in tiles, a model's and a step's arrays.
//
// Weights stand in panels of 16 outputs, so that a 512-bit register holds 2 or 4 inputs of 16 outputs, and
// a product with broadcast activations needs no reduction:
//
//   BF16   w
//   Q8     w = scale (q - 128)         q in 0..255, scale f16 for 32 inputs
//   Q4     w = scale q + minimum       q in 0..15

#pragma once

#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <new>
#include <vector>

namespace {

using bf16 = uint16_t;

constexpr int kLanes = 16;     // outputs of a panel: 32-bit lanes of a register
constexpr int kGroup = 32;     // inputs that share a scale
constexpr size_t kHugePage = 2 << 20;
constexpr int kMostRows = 12;  // activation rows of a register tile: two registers each

enum Format : int32_t { kBf16 = 0, kQ8 = 1, kQ4 = 2 };

}  // namespace

extern "C" {

// A weight [n, k]; n is a multiple of 32 and k of 32.
struct Matrix {
  int32_t format, n, k;
  const uint8_t* values;   // BF16 [n/16][k/2][16][2], in pairs (0, 2), (1, 3) of every four inputs;
                           // Q8 [n/16][k/4][16][4]; Q4 [n/16][k/32][4][16][4], inputs 0-15 in low halves
  const uint16_t* scales;  // f16: Q8 [n/16][k/32][16]; Q4 [n/16][k/32][scale, minimum][16]
};

struct Layer {
  const float *input_norm, *mlp_norm;  // [d]
  Matrix qkv, out;                     // [(H + 2K) D, d], [d, H D]
  Matrix gate_up, down;                // [2 f, d] as 32 gates, 32 ups, 32 gates...; [d, f]
  bf16* cache;                         // [2, N, K, block_tokens, D]
};

struct Model {
  int32_t hidden, heads, kv_heads, head_dim, ffn, block_tokens, num_blocks, threads, is_int8;
  float eps;
  const float* frequencies;  // [D / 2]
  const Layer* layers;
};

struct Step {
  int32_t tokens, sequences, table_width;
  const int32_t *positions, *slots;                           // [T]
  const int32_t *query_start, *context_lens, *block_tables;   // [B + 1], [B], [B, table_width]
  float *x, *delta;                                           // [T, d]
};
}

namespace {

template <typename T>
struct Buffer {
  T* data = nullptr;
  size_t capacity = 0;
  ~Buffer() { std::free(data); }
  T* get(size_t count) {
    if (count > capacity) {
      std::free(data);
      capacity = count + count / 4;
      const size_t bytes = (capacity * sizeof(T) + 63) / 64 * 64;
      const size_t alignment = bytes < kHugePage ? 64 : kHugePage;
      data = static_cast<T*>(std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment));
      if (data == nullptr) throw std::bad_alloc();
      if (alignment == kHugePage) madvise(data, bytes, MADV_HUGEPAGE);
    }
    return data;
  }
};

// The input of a matrix product, [T, k], rounded to what it is multiplied in. What a tile of rows needs
// next lies together: pairs of bf16 or fours of int8 of all its rows, then the next ones.
struct Activations {
  int k = 0;
  bool is_int8 = false;
  int height = 0;              // rows of a tile; the last tile may use fewer
  uint32_t* values = nullptr;  // [tiles, k / 2, height] pairs (0, 2), (1, 3) of every four, or [tiles, k / 4, height]
  float* scales = nullptr;     // [tiles, k / 32, height], of int8
  float* sums = nullptr;       // of 32 values
  int32_t* offsets = nullptr;  // -128 * sum of int8

  void shape(int rows, int columns, bool int8) {
    k = columns;
    is_int8 = int8;
    const int tiles = (rows + kMostRows - 1) / kMostRows;
    height = (rows + tiles - 1) / std::max(tiles, 1);
    const size_t padded = size_t(tiles) * height, groups = padded * (k / kGroup);
    values = value_buffer_.get(padded * k / (is_int8 ? 4 : 2));
    sums = sum_buffer_.get(groups);
    scales = scale_buffer_.get(groups);
    offsets = offset_buffer_.get(groups);
  }

  const uint32_t* values_of(int tile) const { return values + size_t(tile) * (k / (is_int8 ? 4 : 2)) * height; }
  size_t groups_of(int tile) const { return size_t(tile) * (k / kGroup) * height; }

  // Stores 32 values at column `at` (a multiple of 32) of `row`.
  void store(int row, int at, __m512 low, __m512 high) {
    const int tile = row / height, within = row % height;
    const size_t group = groups_of(tile) + size_t(at / kGroup) * height + within;
    const __m512i places = _mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(height));
    uint32_t* to = values + (size_t(tile) * (k / (is_int8 ? 4 : 2)) + at / (is_int8 ? 4 : 2)) * height + within;
    if (!is_int8) {
      alignas(64) static const uint16_t kOrder[32] = {0,  2,  1,  3,  4,  6,  5,  7,  8,  10, 9,
                                                      11, 12, 14, 13, 15, 16, 18, 17, 19, 20, 22,
                                                      21, 23, 24, 26, 25, 27, 28, 30, 29, 31};
      const __m512bh narrow = _mm512_cvtne2ps_pbh(high, low);
      const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
      sums[group] = _mm512_reduce_add_ps(_mm512_dpbf16_ps(_mm512_setzero_ps(), narrow, ones));
      _mm512_i32scatter_epi32(to, places,
                              _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), (__m512i)narrow), 4);
      return;
    }
    const float largest =
        _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
    const float scale = largest / 127.0f;
    const __m512 inverse = _mm512_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
    const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse));
    const __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
    const __m256i bytes = _mm256_set_m128i(_mm512_cvtsepi32_epi8(b), _mm512_cvtsepi32_epi8(a));
    _mm256_i32scatter_epi32(to, _mm512_castsi512_si256(places), bytes, 4);
    const int sum = _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
    // A NaN or an infinity must not vanish in the maximum or in the conversion to integers.
    const bool is_broken = _mm512_cmp_ps_mask(low, high, _CMP_UNORD_Q) != 0 || !std::isfinite(largest);
    scales[group] = is_broken ? std::numeric_limits<float>::quiet_NaN() : scale;
    sums[group] = scales[group] * float(sum);
    offsets[group] = -128 * sum;
  }

 private:
  Buffer<uint32_t> value_buffer_;
  Buffer<float> scale_buffer_, sum_buffer_;
  Buffer<int32_t> offset_buffer_;
};

// Attention's unit of work: tokens begin : end (rows of the step) of a sequence, some key/value heads.
struct Item {
  int sequence, first_head, last_head, begin, end;
};

struct Workspace {
  Activations norm, attended, gated;
  Buffer<float> qkv, cosines;
  Buffer<bf16> queries;
  std::vector<Item> items;
};

inline __m512i load(const void* at) { return _mm512_loadu_si512(at); }

}  // namespace
