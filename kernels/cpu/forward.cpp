// A decoder's forward pass on CPUs with AVX-512 (BF16 and VNNI), for steps of few or many tokens.
//
//   T tokens of the step   d hidden size   H query heads, K key/value heads, D head dim   f MLP width
//
// The pass is cut at the two places of a layer where tensor-parallel ranks sum their parts: half-layer
// 2i is layer i's attention, 2i + 1 its MLP. Each begins with x += delta and ends with its output in
// delta, so that whoever calls may sum delta over ranks in between.
//
//   attention   x += delta; norm | qkv | rotate, write K and V | attend | out      each | is a barrier
//   MLP         x += delta; norm | gate and up, SwiGLU | down
//
// Weights stand in panels of 16 outputs, so that one 512-bit register holds 2 (BF16) or 4 (8-bit)
// consecutive inputs of 16 outputs, and a product with one broadcast activation needs no reduction:
//
//   BF16   w
//   Q8     w = scale (q - 128)         q in 0..255, scale f16 for 32 inputs
//   Q4     w = scale q + minimum       q in 0..15
//
// They are multiplied in one of two precisions. With bfloat16 activations, a q is an exact bf16 too:
// f32 += bf16 * bf16 in pairs (VDPBF16PS), scaled every 32 inputs. With 8-bit activations, one scale
// for every 32 of a row as in llama.cpp's Q8_1, i32 += u8 * s8 in fours (VPDPBUSD). Either way
//
//   sum w x = scale sum q x + minimum sum x      over 32 inputs.
//
// The KV cache is bf16 [2, N, K, block_tokens, D] a layer, read in place, one pass with a running
// softmax (Milakov & Gimelshein 2018; Dao et al. 2022).

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "exponential.h"

namespace {

using bf16 = uint16_t;

constexpr int kLanes = 16;       // outputs of a panel: 32-bit lanes of a register
constexpr int kGroup = 32;       // inputs that share a scale
constexpr int kMostRows = 12;    // activation rows of a register tile: two registers each
constexpr int kTileBlock = 10;   // tiles that stay in the L2 cache while weights pass by
constexpr int kKeyTile = 64;     // keys of an attention tile
constexpr int kQueryRows = 48;   // (token, head) rows of an attention tile
constexpr int kMaxHeadDim = 256;

enum Format : int32_t { kBf16 = 0, kQ8 = 1, kQ4 = 2 };

}  // namespace

extern "C" {

// A weight [n, k]; n is a multiple of 32 and k of 32.
struct Matrix {
  int32_t format, n, k, unused;
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
  int32_t hidden, heads, kv_heads, head_dim, ffn, block_tokens, num_blocks, threads, is_int8, unused;
  float eps, unused_float;
  const float* frequencies;  // [D / 2]
  const Layer* layers;
};

struct Step {
  int32_t tokens, sequences, table_width, unused;
  const int32_t *positions, *slots;                           // [T]
  const int32_t *query_start, *context_lens, *block_tables;   // [B + 1], [B], [B, table_width]
  float *x, *delta;                                           // [T, d]
};
}

namespace {

// ---- memory ------------------------------------------------------------------------------------

template <typename T>
struct Buffer {
  T* data = nullptr;
  size_t capacity = 0;
  ~Buffer() { std::free(data); }
  T* get(size_t count) {
    if (count > capacity) {
      std::free(data);
      capacity = count + count / 4;
      data = static_cast<T*>(std::aligned_alloc(64, (capacity * sizeof(T) + 63) / 64 * 64));
      if (data == nullptr) throw std::bad_alloc();
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

// ---- products ----------------------------------------------------------------------------------

inline __m512i load(const void* at) { return _mm512_loadu_si512(at); }

// Weights are read once a step, from memory: ask for what comes some rows of a panel later.
inline void prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at) + 4096, _MM_HINT_T0); }

inline __m512i broadcast4(const void* at) {
  int32_t four;
  std::memcpy(&four, at, 4);
  return _mm512_set1_epi32(four);
}

inline __m512 load_half(const uint16_t* at) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}

// A register tile: the first MR rows of tile `t` of `in`, times 32 outputs of two neighbouring panels (or,
// where groups have scales, twice 16 outputs of one), to out [MR, 32].
template <int MR>
void tile_bf16(const Matrix& w, int panel, const Activations& in, int t, float* out, size_t stride) {
  const size_t size = size_t(in.k) * kLanes;
  const bf16* values = reinterpret_cast<const bf16*>(w.values) + panel * size;
  const uint32_t* x = in.values_of(t);
  __m512 acc[MR][2];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) acc[m][0] = acc[m][1] = _mm512_setzero_ps();
  for (int pair = 0; pair < in.k / 2; ++pair, values += 2 * kLanes, x += in.height) {
    const __m512bh first = (__m512bh)load(values), second = (__m512bh)load(values + size);
    prefetch(values);
    prefetch(values + size);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const __m512bh value = (__m512bh)_mm512_set1_epi32(x[m]);
      acc[m][0] = _mm512_dpbf16_ps(acc[m][0], first, value);
      acc[m][1] = _mm512_dpbf16_ps(acc[m][1], second, value);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
    _mm512_storeu_ps(out + m * stride, acc[m][0]);
    _mm512_storeu_ps(out + m * stride + kLanes, acc[m][1]);
  }
}

// Of Q4 or Q8 with 8-bit activations.
template <int MR, bool IS_Q4>
void panel_int8(const uint8_t* w, const uint16_t* scales, const Activations& in, int t, float* out, size_t stride) {
  const __m512i low_nibbles = _mm512_set1_epi8(0x0f);
  const uint32_t* x = in.values_of(t);
  const int height = in.height;
  size_t group = in.groups_of(t);
  __m512 acc[MR];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) acc[m] = _mm512_setzero_ps();
  for (int g = 0; g < in.k / kGroup; ++g, group += height, x += 8 * height) {
    __m512i sum[MR];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
      sum[m] = IS_Q4 ? _mm512_setzero_si512() : _mm512_set1_epi32(in.offsets[group + m]);
    const uint32_t* four = x;
    const uint32_t* later = x + 4 * height;  // of Q4, the second half of the group
#pragma GCC unroll 8
    for (int i = 0; i < (IS_Q4 ? 4 : 8); ++i, w += 64, four += height, later += height) {
      const __m512i packed = load(w);
      prefetch(w);
      const __m512i first = IS_Q4 ? _mm512_and_si512(packed, low_nibbles) : packed;
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) sum[m] = _mm512_dpbusd_epi32(sum[m], first, _mm512_set1_epi32(four[m]));
      if (IS_Q4) {
        const __m512i second = _mm512_and_si512(_mm512_srli_epi16(packed, 4), low_nibbles);
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m)
          sum[m] = _mm512_dpbusd_epi32(sum[m], second, _mm512_set1_epi32(later[m]));
      }
    }
    const __m512 scale = load_half(scales);
    const __m512 minimum = IS_Q4 ? load_half(scales + kLanes) : _mm512_setzero_ps();
    scales += IS_Q4 ? 2 * kLanes : kLanes;
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(in.scales[group + m]));
      acc[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m]), both, acc[m]);
      if (IS_Q4) acc[m] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(in.sums[group + m]), acc[m]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) _mm512_storeu_ps(out + m * stride, acc[m]);
}

// The 32 values at place `pair` (0, 1: first half of the group; 2, 3: second) of a load of Q4 or Q8.
template <bool IS_Q4>
inline __m512bh widen(__m512i packed, int pair) {
  if (IS_Q4) {
    // bf16 of 0..15, twice: the lookup sees five bits, of which the last belongs to a neighbour.
    const __m512i numbers = _mm512_broadcast_i64x4(_mm256_setr_epi16(
        0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140,
        0x4150, 0x4160, 0x4170));
    return (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(packed, (pair & 1) * 8 + (pair & 2) * 2),
                                              numbers);
  }
  // Below 256 an integer as f32 has its last 16 bits 0: the first 16 are its bf16.
  const __m512i byte = _mm512_set1_epi32(0xff);
  const __m512 offset = _mm512_set1_ps(128.0f);
  const __m512i first = _mm512_and_si512(_mm512_srli_epi32(packed, pair * 8), byte);
  const __m512i second = _mm512_and_si512(_mm512_srli_epi32(packed, pair * 8 + 16), byte);
  const __m512i low = (__m512i)_mm512_sub_ps(_mm512_cvtepi32_ps(first), offset);
  const __m512i high = (__m512i)_mm512_sub_ps(_mm512_cvtepi32_ps(second), offset);
  return (__m512bh)_mm512_or_si512(_mm512_srli_epi32(low, 16), high);
}

// Of Q4 or Q8 with bfloat16 activations.
template <int MR, bool IS_Q4>
void panel_wide(const uint8_t* w, const uint16_t* scales, const Activations& in, int t, float* out, size_t stride) {
  constexpr int kLoads = IS_Q4 ? 4 : 8, kPairs = IS_Q4 ? 4 : 2;
  const uint32_t* x = in.values_of(t);
  const int height = in.height;
  size_t group = in.groups_of(t);
  __m512 acc[MR];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) acc[m] = _mm512_setzero_ps();
  for (int g = 0; g < in.k / kGroup; ++g, group += height, x += 16 * height) {
    __m512 sum[MR];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) sum[m] = _mm512_setzero_ps();
    const uint32_t* earlier = x;
    const uint32_t* later = x + 8 * height;  // of Q4, the second half of the group
#pragma GCC unroll 8
    for (int i = 0; i < kLoads; ++i, w += 64, earlier += 2 * height, later += 2 * height) {
      const __m512i packed = load(w);
      prefetch(w);
#pragma GCC unroll 4
      for (int pair = 0; pair < kPairs; ++pair) {
        const __m512bh weights = widen<IS_Q4>(packed, pair);
        const uint32_t* values = (pair & 2 ? later : earlier) + (pair & 1) * height;
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m)
          sum[m] = _mm512_dpbf16_ps(sum[m], weights, (__m512bh)_mm512_set1_epi32(values[m]));
      }
    }
    const __m512 scale = load_half(scales);
    const __m512 minimum = IS_Q4 ? load_half(scales + kLanes) : _mm512_setzero_ps();
    scales += IS_Q4 ? 2 * kLanes : kLanes;
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      acc[m] = _mm512_fmadd_ps(sum[m], scale, acc[m]);
      if (IS_Q4) acc[m] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(in.sums[group + m]), acc[m]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) _mm512_storeu_ps(out + m * stride, acc[m]);
}

template <int MR>
void tile(const Matrix& w, int panel, const Activations& in, int t, float* out, size_t stride) {
  if (w.format == kBf16) return tile_bf16<MR>(w, panel, in, t, out, stride);
  const bool is_q4 = w.format == kQ4;
  const size_t values = size_t(w.k) * kLanes / (is_q4 ? 2 : 1);
  const size_t scales = size_t(w.k) / kGroup * kLanes * (is_q4 ? 2 : 1);
  const auto multiply = in.is_int8 ? (is_q4 ? panel_int8<MR, true> : panel_int8<MR, false>)
                                   : (is_q4 ? panel_wide<MR, true> : panel_wide<MR, false>);
  for (int p = panel; p < panel + 2; ++p, out += kLanes)
    multiply(w.values + p * values, w.scales + p * scales, in, t, out, stride);
}

void tile_of(int rows, const Matrix& w, int panel, const Activations& in, int t, float* out, size_t stride) {
  switch (rows) {
#define ROWS(n) \
  case n:       \
    return tile<n>(w, panel, in, t, out, stride);
    ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
#undef ROWS
  }
}

// Calls body(unit, tile, rows) for all units of work and tiles of rows, some tiles at a time, so that
// their activations stay in the L2 cache while the weights pass by. Called by every thread.
template <typename Body>
void for_each_tile(int units, int tokens, const Activations& in, Body body) {
  const int tiles = (tokens + in.height - 1) / in.height, blocks = (tiles + kTileBlock - 1) / kTileBlock;
  const int chunk = units > 512 ? 8 : 1;
#pragma omp for schedule(dynamic, chunk)
  for (int i = 0; i < units * blocks; ++i) {
    const int first = i / units * kTileBlock, last = std::min(tiles, first + kTileBlock);
    for (int t = first; t < last; ++t) body(i % units, t, std::min(in.height, tokens - t * in.height));
  }
}

// out [T, n] = in [T, k] w^T. Called by every thread of a parallel region.
void multiply(const Matrix& w, const Activations& in, int tokens, float* out, size_t stride) {
  for_each_tile(w.n / 32, tokens, in, [&](int unit, int t, int rows) {
    tile_of(rows, w, 2 * unit, in, t, out + size_t(t) * in.height * stride + unit * 32, stride);
  });
}

// ---- elementwise -------------------------------------------------------------------------------

inline __m512 silu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 negated = _mm512_sub_ps(_mm512_setzero_ps(), x);
  const __m512 bounded = _mm512_min_ps(_mm512_set1_ps(88.0f), negated);
  return _mm512_div_ps(x, _mm512_add_ps(one, exponential(bounded)));
}

// x += delta, and the RMS norm of x as activations. Called by every thread.
void add_norm(float* x, const float* delta, const float* weight, float eps, int tokens, int d,
              Activations& out) {
#pragma omp for schedule(static)
  for (int t = 0; t < tokens; ++t) {
    float* row = x + size_t(t) * d;
    __m512 squares = _mm512_setzero_ps();
    for (int i = 0; i < d; i += kLanes) {
      __m512 value = _mm512_loadu_ps(row + i);
      if (delta != nullptr) {
        value = _mm512_add_ps(value, _mm512_loadu_ps(delta + size_t(t) * d + i));
        _mm512_storeu_ps(row + i, value);
      }
      squares = _mm512_fmadd_ps(value, value, squares);
    }
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / float(d) + eps));
    for (int i = 0; i < d; i += kGroup) {
      const __m512 low = _mm512_mul_ps(_mm512_loadu_ps(row + i), scale);
      const __m512 high = _mm512_mul_ps(_mm512_loadu_ps(row + i + kLanes), scale);
      out.store(t, i, _mm512_mul_ps(low, _mm512_loadu_ps(weight + i)),
                _mm512_mul_ps(high, _mm512_loadu_ps(weight + i + kLanes)));
    }
  }
}

void gate_up(const Matrix& w, const Activations& in, int tokens, Activations& out) {
  for_each_tile(w.n / 64, tokens, in, [&](int unit, int t, int rows) {
    alignas(64) float both[kMostRows][64];
    tile_of(rows, w, 4 * unit, in, t, both[0], 64);
    tile_of(rows, w, 4 * unit + 2, in, t, both[0] + 32, 64);
    for (int m = 0; m < rows; ++m) {
      const __m512 low = silu(_mm512_load_ps(both[m])), high = silu(_mm512_load_ps(both[m] + 16));
      out.store(t * in.height + m, unit * 32, _mm512_mul_ps(low, _mm512_load_ps(both[m] + 32)),
                _mm512_mul_ps(high, _mm512_load_ps(both[m] + 48)));
    }
  });
}

inline void store_bf16(bf16* to, __m512 values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(values));
}

// A head's D values rotated (pairs half a head apart), or only converted where `cosines` is null.
void rotate_head(const float* from, const float* cosines, const float* sines, int head_dim, bf16* to) {
  const int half = head_dim / 2;
  for (int i = 0; i < half; i += kLanes) {
    const __m512 first = _mm512_loadu_ps(from + i), second = _mm512_loadu_ps(from + half + i);
    if (cosines == nullptr) {
      store_bf16(to + i, first);
      store_bf16(to + half + i, second);
      continue;
    }
    const __m512 c = _mm512_loadu_ps(cosines + i), s = _mm512_loadu_ps(sines + i);
    store_bf16(to + i, _mm512_fmsub_ps(first, c, _mm512_mul_ps(second, s)));
    store_bf16(to + half + i, _mm512_fmadd_ps(second, c, _mm512_mul_ps(first, s)));
  }
}

// Rotated queries to the workspace, rotated keys and plain values to the cache.
void rotate_and_write(const Model& model, const Step& step, bf16* cache, Workspace& work) {
  const int D = model.head_dim, H = model.heads, K = model.kv_heads;
  const size_t width = size_t(H + 2 * K) * D, values = size_t(model.num_blocks) * K * model.block_tokens * D;
#pragma omp for schedule(static)
  for (int t = 0; t < step.tokens; ++t) {
    const float* row = work.qkv.data + t * width;
    const float *cosines = work.cosines.data + size_t(t) * D, *sines = cosines + D / 2;
    for (int h = 0; h < H; ++h)
      rotate_head(row + h * D, cosines, sines, D, work.queries.data + (size_t(t) * H + h) * D);
    const int block = step.slots[t] / model.block_tokens, offset = step.slots[t] % model.block_tokens;
    for (int h = 0; h < K; ++h) {
      bf16* place = cache + ((size_t(block) * K + h) * model.block_tokens + offset) * D;
      rotate_head(row + (H + h) * D, cosines, sines, D, place);
      rotate_head(row + (H + K + h) * D, nullptr, nullptr, D, place + values);
    }
  }
}

// ---- attention ---------------------------------------------------------------------------------

// rows[i] holds 16 32-bit values; afterwards rows[j] holds value j of each.
inline void transpose(__m512i (&rows)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

template <int DB>  // head dim / 16
struct KeyTile {
  alignas(64) int32_t keys[kKeyTile / 16][DB * 8][16];  // pairs of dims of 16 keys
  alignas(64) int32_t values[kKeyTile / 2][DB * 16];    // pairs of keys of each dim
};

// One head's keys and values in the paged cache.
struct Context {
  const bf16 *keys, *values;
  const int32_t* table;
  int block_tokens, end;  // slots from `end` on may hold anything
  size_t block_stride;

  size_t place(int at, int head_dim) const {
    return table[at / block_tokens] * block_stride + size_t(at % block_tokens) * head_dim;
  }
};

// Sixteen keys and values, a few kilobytes somewhere in memory: no hardware guesses them.
inline void prefetch_keys(const Context& context, size_t place, int head_dim) {
  const int step = 64 / sizeof(bf16);
  for (int i = 0; i < 16 * head_dim; i += step) {
    _mm_prefetch(reinterpret_cast<const char*>(context.keys + place + i), _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(context.values + place + i), _MM_HINT_T1);
  }
}

// Keys and values `first : first + 64`, zeros from the end of the context on. What comes next is asked
// for meanwhile: `next` values further on (the next head's, in the same block), or two groups ahead.
template <int DB>
void load_keys(const Context& context, int first, size_t next, KeyTile<DB>& tile) {
  constexpr int D = DB * 16;
  const bf16 *keys = context.keys, *values = context.values;
  const int end = context.end;
  alignas(64) static const uint16_t kPairs[2][32] = {
      {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
      {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
  const __m512i low_pairs = load(kPairs[0]), high_pairs = load(kPairs[1]);
  const int groups = std::min(kKeyTile, (end - first + 15) / 16 * 16) / 16;
  for (int g = 0; g < groups; ++g) {
    const int at = first + g * 16;
    const size_t place = context.place(at, D);
    const int valid = std::min(16, end - at);
    if (next != 0)
      prefetch_keys(context, place + next, D);
    else if (at + 32 < end)
      prefetch_keys(context, context.place(at + 32, D), D);
    for (int part = 0; part < DB / 2; ++part) {
      __m512i rows[16];
      for (int i = 0; i < 16; ++i)
        rows[i] = i < valid ? load(keys + place + i * D + part * 32) : _mm512_setzero_si512();
      transpose(rows);
      for (int i = 0; i < 16; ++i) _mm512_store_si512(tile.keys[g][part * 16 + i], rows[i]);
      for (int i = 0; i < 16; i += 2) {
        const __m512i a = i < valid ? load(values + place + i * D + part * 32) : _mm512_setzero_si512();
        const __m512i b = i + 1 < valid ? load(values + place + (i + 1) * D + part * 32) : _mm512_setzero_si512();
        int32_t* to = tile.values[g * 8 + i / 2] + part * 32;
        _mm512_store_si512(to, _mm512_permutex2var_epi16(a, low_pairs, b));
        _mm512_store_si512(to + 16, _mm512_permutex2var_epi16(a, high_pairs, b));
      }
    }
  }
}

template <int DB>
struct QueryTile {
  int rows;
  const bf16* queries[kQueryRows];
  int limit[kQueryRows];  // the last key that a row sees
  float largest[kQueryRows], total[kQueryRows];
  alignas(64) float out[kQueryRows][DB * 16];
};

// The part of G groups of 16 keys of a tile in rows r : r + R: scores, running softmax, weighted values.
template <int DB, int R, int G>
void attend_rows(QueryTile<DB>& q, int r, const KeyTile<DB>& tile, int first, float scale) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 nothing = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  alignas(64) bf16 weights[R][kKeyTile];
  __m512 scores[R][G];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) scores[i][g] = _mm512_setzero_ps();
  for (int pair = 0; pair < DB * 8; ++pair) {
    __m512bh keys[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) keys[g] = (__m512bh)load(tile.keys[g][pair]);
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const __m512bh query = (__m512bh)broadcast4(q.queries[r + i] + 2 * pair);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) scores[i][g] = _mm512_dpbf16_ps(scores[i][g], keys[g], query);
    }
  }
  __m512 rescale[R];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) {
    __m512 most = nothing;
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const __mmask16 seen = _mm512_cmple_epi32_mask(
          lanes, _mm512_set1_epi32(q.limit[r + i] - first - g * 16));
      scores[i][g] = _mm512_mask_mul_ps(nothing, seen, scores[i][g], _mm512_set1_ps(scale));
      most = _mm512_max_ps(scores[i][g], most);
    }
    const float before = q.largest[r + i];
    const float largest = std::max(before, _mm512_reduce_max_ps(most));
    const float shrink = std::exp(before - largest);  // 0 at first: before is -inf
    q.largest[r + i] = largest;
    __m512 sum = _mm512_setzero_ps();
    __m512 kept[4] = {};
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const __mmask16 seen = _mm512_cmp_ps_mask(scores[i][g], nothing, _CMP_NEQ_UQ);
      kept[g] = _mm512_maskz_mov_ps(seen, exponential(_mm512_sub_ps(scores[i][g], _mm512_set1_ps(largest))));
      sum = _mm512_add_ps(sum, kept[g]);
    }
    q.total[r + i] = q.total[r + i] * shrink + _mm512_reduce_add_ps(sum);
    _mm512_store_si512(weights[i], (__m512i)_mm512_cvtne2ps_pbh(kept[1], kept[0]));
    _mm512_store_si512(weights[i] + 32, (__m512i)_mm512_cvtne2ps_pbh(kept[3], kept[2]));
    rescale[i] = _mm512_set1_ps(shrink);
  }
  constexpr int C = DB < 4 ? DB : 4;  // columns of 16 dims at a time
  static_assert(DB % C == 0);
  for (int column = 0; column < DB; column += C) {
    __m512 acc[R][C];
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c)
        acc[i][c] = _mm512_mul_ps(_mm512_load_ps(q.out[r + i] + (column + c) * 16), rescale[i]);
    for (int pair = 0; pair < G * 8; ++pair) {
      __m512bh values[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) values[c] = (__m512bh)load(tile.values[pair] + (column + c) * 16);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        const __m512bh weight = (__m512bh)broadcast4(weights[i] + 2 * pair);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[i][c] = _mm512_dpbf16_ps(acc[i][c], values[c], weight);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) _mm512_store_ps(q.out[r + i] + (column + c) * 16, acc[i][c]);
  }
}

template <int DB, int R>
void attend_rows(int groups, QueryTile<DB>& q, int r, const KeyTile<DB>& tile, int first, float scale) {
  switch (groups) {
    case 1: return attend_rows<DB, R, 1>(q, r, tile, first, scale);
    case 2: return attend_rows<DB, R, 2>(q, r, tile, first, scale);
    case 3: return attend_rows<DB, R, 3>(q, r, tile, first, scale);
    case 4: return attend_rows<DB, R, 4>(q, r, tile, first, scale);
  }
}

// Tokens begin : end (rows of the step) of sequence b, all query heads of one key/value head; the same
// thread goes on with the next head where it `has_next`.
template <int DB>
void attend(const Model& model, const Step& step, const bf16* cache, Workspace& work, int b, int head, int begin,
            int end, bool has_next) {
  constexpr int D = DB * 16;
  const int H = model.heads, K = model.kv_heads, share = H / K;
  const int before = step.context_lens[b] - step.query_start[b + 1];  // position = before + row
  static thread_local std::unique_ptr<KeyTile<DB>> tile;
  static thread_local std::unique_ptr<QueryTile<DB>> held;
  if (!tile) tile.reset(new KeyTile<DB>());
  if (!held) held.reset(new QueryTile<DB>());
  QueryTile<DB>& q = *held;
  q.rows = (end - begin) * share;
  for (int r = 0; r < q.rows; ++r) {
    const int t = begin + r / share;
    q.queries[r] = work.queries.data + (size_t(t) * H + head * share + r % share) * D;
    q.limit[r] = before + t;
    q.largest[r] = -std::numeric_limits<float>::infinity();
    q.total[r] = 0;
    std::memset(q.out[r], 0, sizeof q.out[r]);
  }
  const size_t next_head = size_t(model.block_tokens) * D, block_stride = K * next_head;
  const bf16* keys = cache + head * next_head;
  const Context context = {keys,
                           keys + model.num_blocks * block_stride,
                           step.block_tables + size_t(b) * step.table_width,
                           model.block_tokens,
                           before + end,
                           block_stride};
  const float scale = 1.0f / std::sqrt(float(D));
  for (int first = 0; first < context.end; first += kKeyTile) {
    load_keys<DB>(context, first, has_next ? next_head : 0, *tile);
    const int groups = std::min(kKeyTile / 16, (context.end - first + 15) / 16);
    int r = 0;
    for (; r + 4 <= q.rows; r += 4) attend_rows<DB, 4>(groups, q, r, *tile, first, scale);
    switch (q.rows - r) {
      case 3: attend_rows<DB, 3>(groups, q, r, *tile, first, scale); break;
      case 2: attend_rows<DB, 2>(groups, q, r, *tile, first, scale); break;
      case 1: attend_rows<DB, 1>(groups, q, r, *tile, first, scale); break;
    }
  }
  for (int r = 0; r < q.rows; ++r) {
    const __m512 inverse = _mm512_set1_ps(1.0f / q.total[r]);
    const int column = (head * share + r % share) * D;
    for (int i = 0; i < D; i += kGroup)
      work.attended.store(begin + r / share, column + i, _mm512_mul_ps(_mm512_load_ps(q.out[r] + i), inverse),
                          _mm512_mul_ps(_mm512_load_ps(q.out[r] + i + kLanes), inverse));
  }
}

// The longest contexts of a prompt first, so that threads end together. Where there are many sequences
// one item has all heads of its tokens: they lie side by side in the cache.
void list_items(const Model& model, const Step& step, Workspace& work) {
  const int tokens = std::max(1, kQueryRows / (model.heads / model.kv_heads));
  const int heads = step.sequences >= 8 * model.threads ? model.kv_heads : 1;
  work.items.clear();
  for (int b = step.sequences - 1; b >= 0; --b)
    for (int end = step.query_start[b + 1]; end > step.query_start[b]; end -= tokens)
      for (int head = 0; head < model.kv_heads; head += heads)
        work.items.push_back({b, head, head + heads, std::max(step.query_start[b], end - tokens), end});
}

void attend_all(const Model& model, const Step& step, const bf16* cache, Workspace& work) {
  const int count = int(work.items.size());
#pragma omp for schedule(dynamic, 1)
  for (int i = 0; i < count; ++i) {
    const Item& item = work.items[i];
    for (int head = item.first_head; head < item.last_head; ++head) {
      const bool has_next = head + 1 < item.last_head;
      switch (model.head_dim) {
#define HEAD_DIM(d) \
  case d:           \
    attend<d / 16>(model, step, cache, work, item.sequence, head, item.begin, item.end, has_next); \
    break;
        HEAD_DIM(32) HEAD_DIM(64) HEAD_DIM(128) HEAD_DIM(256)
#undef HEAD_DIM
      }
    }
  }
}

}  // namespace

// ---- what Python calls -------------------------------------------------------------------------

extern "C" {

Workspace* searoom_workspace() { return new Workspace(); }
void searoom_free(Workspace* work) { delete work; }

// Half-layers first : last of the step; x and delta are read and written. Before 0, delta is taken as 0.
void searoom_run(const Model* model_at, const Step* step_at, Workspace* work, int first, int last) {
  const Model& model = *model_at;
  const Step& step = *step_at;
  const int T = step.tokens, d = model.hidden, D = model.head_dim;
  const bool int8 = model.is_int8 != 0;
  const size_t width = size_t(model.heads + 2 * model.kv_heads) * D;
  work->norm.shape(T, d, int8);
  work->attended.shape(T, model.heads * D, int8);
  work->gated.shape(T, model.ffn, int8);
  work->qkv.get(T * width);
  work->queries.get(size_t(T) * model.heads * D);
  work->cosines.get(size_t(T) * D);
  list_items(model, step, *work);
#pragma omp parallel num_threads(model.threads)
  {
#pragma omp for schedule(static)
    for (int t = 0; t < T; ++t)
      for (int i = 0; i < D / 2; ++i) {
        const float angle = float(step.positions[t]) * model.frequencies[i];
        work->cosines.data[size_t(t) * D + i] = std::cos(angle);
        work->cosines.data[size_t(t) * D + D / 2 + i] = std::sin(angle);
      }
    for (int half = first; half < last; ++half) {
      const Layer& layer = model.layers[half / 2];
      const float* delta = half == 0 ? nullptr : step.delta;
      const float* weight = half % 2 == 0 ? layer.input_norm : layer.mlp_norm;
      add_norm(step.x, delta, weight, model.eps, T, d, work->norm);
      if (half % 2 == 0) {
        multiply(layer.qkv, work->norm, T, work->qkv.data, width);
        rotate_and_write(model, step, layer.cache, *work);
        attend_all(model, step, layer.cache, *work);
        multiply(layer.out, work->attended, T, step.delta, d);
      } else {
        gate_up(layer.gate_up, work->norm, T, work->gated);
        multiply(layer.down, work->gated, T, step.delta, d);
      }
    }
  }
}

// logits [S, n] of rows [S, d], after x += delta and the final norm; both are overwritten by nothing.
void searoom_head(const Model* model, Workspace* work, const Matrix* head, const float* norm, float* x,
                  const float* delta, int rows, float* logits) {
  work->norm.shape(rows, model->hidden, model->is_int8 != 0);
#pragma omp parallel num_threads(model->threads)
  {
    add_norm(x, delta, norm, model->eps, rows, model->hidden, work->norm);
    multiply(*head, work->norm, rows, logits, head->n);
  }
}

// The matrix products of a step of `tokens` and nothing else, on whatever the workspace holds: a bound.
void searoom_linears(const Model* model_at, Workspace* work, const Matrix* head, int num_layers, int tokens,
                     float* delta, float* logits) {
  const Model& model = *model_at;
  const bool int8 = model.is_int8 != 0;
  const size_t width = size_t(model.heads + 2 * model.kv_heads) * model.head_dim;
  work->norm.shape(tokens, model.hidden, int8);
  work->attended.shape(tokens, model.heads * model.head_dim, int8);
  work->gated.shape(tokens, model.ffn, int8);
  work->qkv.get(tokens * width);
  static Buffer<float> both;
  both.get(size_t(tokens) * 2 * model.ffn);
#pragma omp parallel num_threads(model.threads)
  {
    for (int i = 0; i < num_layers; ++i) {
      const Layer& layer = model.layers[i];
      multiply(layer.qkv, work->norm, tokens, work->qkv.data, width);
      multiply(layer.out, work->attended, tokens, delta, model.hidden);
      multiply(layer.gate_up, work->norm, tokens, both.data, size_t(2) * model.ffn);
      multiply(layer.down, work->gated, tokens, delta, model.hidden);
    }
    multiply(*head, work->norm, tokens, logits, head->n);
  }
}

// Rows `ids` of a packed [n, k] as out [tokens, k]: a tied embedding is read out of the head.
void searoom_rows(const Matrix* matrix, const int32_t* ids, int tokens, int threads, float* out) {
  const Matrix& w = *matrix;
  const size_t k = w.k, groups = k / kGroup;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int t = 0; t < tokens; ++t) {
    const size_t panel = ids[t] / kLanes, lane = ids[t] % kLanes;
    for (size_t i = 0; i < k; ++i) {
      float& value = out[t * k + i];
      const size_t group = panel * groups + i / kGroup, within = i % kGroup;
      if (w.format == kBf16) {
        const size_t at = ((panel * (k / 2) + i / 4 * 2 + i % 2) * kLanes + lane) * 2 + i % 4 / 2;
        const uint32_t bits = uint32_t(reinterpret_cast<const bf16*>(w.values)[at]) << 16;
        std::memcpy(&value, &bits, 4);
      } else if (w.format == kQ8) {
        const uint8_t q = w.values[((panel * (k / 4) + i / 4) * kLanes + lane) * 4 + i % 4];
        value = _cvtsh_ss(w.scales[group * kLanes + lane]) * (int(q) - 128);
      } else {
        const uint8_t both = w.values[group * 256 + within % 16 / 4 * 64 + lane * 4 + within % 4];
        const uint16_t* scales = w.scales + group * 2 * kLanes + lane;
        value = _cvtsh_ss(scales[0]) * (within < 16 ? both & 15 : both >> 4) + _cvtsh_ss(scales[kLanes]);
      }
    }
  }
}

// ---- packing; shapes as in Matrix, sources row-major ----

void searoom_pack_bf16(const bf16* from, int n, int k, bf16* to) {
#pragma omp parallel for schedule(static)
  for (int panel = 0; panel < n / kLanes; ++panel)
    for (int pair = 0; pair < k / 2; ++pair)
      for (int lane = 0; lane < kLanes; ++lane)
        for (int half = 0; half < 2; ++half)
          to[((size_t(panel) * (k / 2) + pair) * kLanes + lane) * 2 + half] =
              from[size_t(panel * kLanes + lane) * k + pair / 2 * 4 + pair % 2 + 2 * half];
}

// from: unsigned values [n, k], one a byte.
void searoom_pack_q8(const uint8_t* from, int n, int k, uint8_t* to) {
#pragma omp parallel for schedule(static)
  for (int panel = 0; panel < n / kLanes; ++panel)
    for (int four = 0; four < k / 4; ++four)
      for (int lane = 0; lane < kLanes; ++lane)
        std::memcpy(to + ((size_t(panel) * (k / 4) + four) * kLanes + lane) * 4,
                    from + size_t(panel * kLanes + lane) * k + 4 * four, 4);
}

void searoom_pack_q4(const uint8_t* from, int n, int k, uint8_t* to) {
#pragma omp parallel for schedule(static)
  for (int panel = 0; panel < n / kLanes; ++panel)
    for (int group = 0; group < k / kGroup; ++group)
      for (int lane = 0; lane < kLanes; ++lane) {
        const uint8_t* values = from + size_t(panel * kLanes + lane) * k + group * kGroup;
        uint8_t* block = to + (size_t(panel) * (k / kGroup) + group) * 256;
        for (int i = 0; i < 16; ++i) block[i / 4 * 64 + lane * 4 + i % 4] = values[i] | values[i + 16] << 4;
      }
}
}
