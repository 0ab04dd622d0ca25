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

namespace {

using bf16 = uint16_t;

constexpr int kLanes = 16;       // outputs of a panel: 32-bit lanes of a register
constexpr int kGroup = 32;       // inputs that share a scale
constexpr int kBf16Rows = 24;    // activation rows of a register tile: one register each
constexpr int kGroupedRows = 12; // and two each where groups have scales
constexpr int kRowBlock = 120;   // activation rows that stay in the L2 cache while weights pass by
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

// The input of a matrix product, [T, k], in the one or the other form.
struct Activations {
  int k = 0;
  size_t stride = 0;  // values from row to row
  bool is_int8 = false;
  Buffer<bf16> wide_buffer;
  Buffer<int8_t> quant_buffer;
  Buffer<float> scale_buffer, sum_buffer;
  Buffer<int32_t> offset_buffer;
  bf16* wide = nullptr;
  int8_t* quants = nullptr;
  float* scales = nullptr;     // [T, k / 32]
  float* sums = nullptr;       // of 32 values
  int32_t* offsets = nullptr;  // -128 * sum of quants

  void shape(int rows, int columns, bool int8) {
    k = columns;
    is_int8 = int8;
    // An odd number of cache lines, so that the rows of a tile do not fall into the same few sets.
    const size_t line = is_int8 ? 64 : 32;
    stride = ((k + line - 1) / line | 1) * line;
    const size_t values = size_t(rows) * stride, groups = size_t(rows) * (k / kGroup);
    sums = sum_buffer.get(groups);
    if (is_int8) {
      quants = quant_buffer.get(values);
      scales = scale_buffer.get(groups);
      offsets = offset_buffer.get(groups);
    } else {
      wide = wide_buffer.get(values);
    }
  }

  // Stores 32 values at column `at` (a multiple of 32) of `row`.
  void store(int row, int at, __m512 low, __m512 high) {
    const size_t place = size_t(row) * stride + at, group = (size_t(row) * k + at) / kGroup;
    if (!is_int8) {
      alignas(64) static const uint16_t kOrder[32] = {0,  2,  1,  3,  4,  6,  5,  7,  8,  10, 9,
                                                      11, 12, 14, 13, 15, 16, 18, 17, 19, 20, 22,
                                                      21, 23, 24, 26, 25, 27, 28, 30, 29, 31};
      const __m512bh narrow = _mm512_cvtne2ps_pbh(high, low);
      const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
      sums[group] = _mm512_reduce_add_ps(_mm512_dpbf16_ps(_mm512_setzero_ps(), narrow, ones));
      _mm512_storeu_si512(wide + place, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), (__m512i)narrow));
      return;
    }
    const float largest =
        _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
    const float scale = largest / 127.0f;
    const __m512 inverse = _mm512_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
    const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse));
    const __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(quants + place), _mm512_cvtsepi32_epi8(a));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(quants + place + 16), _mm512_cvtsepi32_epi8(b));
    const int sum = _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
    // A NaN or an infinity must not vanish in the maximum or in the conversion to integers.
    const bool is_broken = _mm512_cmp_ps_mask(low, high, _CMP_UNORD_Q) != 0 || !std::isfinite(largest);
    scales[group] = is_broken ? std::numeric_limits<float>::quiet_NaN() : scale;
    sums[group] = scales[group] * float(sum);
    offsets[group] = -128 * sum;
  }
};

struct Workspace {
  Activations norm, attended, gated;
  Buffer<float> qkv, cosines;
  Buffer<bf16> queries;
  std::vector<int32_t> items;
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

// out[m, 0:16] of one panel.
template <int MR>
void tile_bf16(const bf16* w, const bf16* x, size_t x_stride, int k, float* out, size_t stride) {
  __m512 acc[MR];
#pragma GCC unroll 32
  for (int m = 0; m < MR; ++m) acc[m] = _mm512_setzero_ps();
  for (int pair = 0; pair < k / 2; ++pair, w += 2 * kLanes) {
    const __m512bh weights = (__m512bh)load(w);
    prefetch(w);
#pragma GCC unroll 32
    for (int m = 0; m < MR; ++m)
      acc[m] = _mm512_dpbf16_ps(acc[m], weights, (__m512bh)broadcast4(x + m * x_stride + 2 * pair));
  }
#pragma GCC unroll 32
  for (int m = 0; m < MR; ++m) _mm512_storeu_ps(out + m * stride, acc[m]);
}

// The same, of Q8 or Q4 with 8-bit activations.
template <int MR, bool IS_Q4>
void tile_int8(const uint8_t* w, const uint16_t* scales, const Activations& in, int row, float* out,
               size_t stride) {
  const int k = in.k, groups = k / kGroup;
  const int8_t* x = in.quants + row * in.stride;
  const float* x_scales = in.scales + size_t(row) * groups;
  const float* x_sums = in.sums + size_t(row) * groups;
  const int32_t* x_offsets = in.offsets + size_t(row) * groups;
  const __m512i low_nibbles = _mm512_set1_epi8(0x0f);
  __m512 acc[MR];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) acc[m] = _mm512_setzero_ps();
  for (int g = 0; g < groups; ++g) {
    __m512i sum[MR];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
      sum[m] = IS_Q4 ? _mm512_setzero_si512() : _mm512_set1_epi32(x_offsets[size_t(m) * groups + g]);
    const int8_t* values = x + g * kGroup;
    if (IS_Q4) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512i both = load(w + i * 64);
        prefetch(w + i * 64);
        const __m512i low = _mm512_and_si512(both, low_nibbles);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_nibbles);
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
          sum[m] = _mm512_dpbusd_epi32(sum[m], low, broadcast4(values + m * in.stride + 4 * i));
          sum[m] = _mm512_dpbusd_epi32(sum[m], high, broadcast4(values + m * in.stride + 16 + 4 * i));
        }
      }
      w += 256;
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const __m512i four = load(w + i * 64);
        prefetch(w + i * 64);
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m)
          sum[m] = _mm512_dpbusd_epi32(sum[m], four, broadcast4(values + m * in.stride + 4 * i));
      }
      w += 512;
    }
    const __m512 scale = load_half(scales);
    const __m512 minimum = IS_Q4 ? load_half(scales + kLanes) : _mm512_setzero_ps();
    scales += IS_Q4 ? 2 * kLanes : kLanes;
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x_scales[size_t(m) * groups + g]));
      acc[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m]), both, acc[m]);
      if (IS_Q4)
        acc[m] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(x_sums[size_t(m) * groups + g]), acc[m]);
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

// The same with bfloat16 activations.
template <int MR, bool IS_Q4>
void tile_wide(const uint8_t* w, const uint16_t* scales, const Activations& in, int row, float* out,
               size_t stride) {
  constexpr int kLoads = IS_Q4 ? 4 : 8, kPairs = IS_Q4 ? 4 : 2;
  const int groups = in.k / kGroup;
  const bf16* x = in.wide + row * in.stride;
  const float* x_sums = in.sums + size_t(row) * groups;
  __m512 acc[MR];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) acc[m] = _mm512_setzero_ps();
  for (int g = 0; g < groups; ++g, x += kGroup) {
    __m512 sum[MR];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) sum[m] = _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int i = 0; i < kLoads; ++i, w += 64) {
      const __m512i packed = load(w);
      prefetch(w);
#pragma GCC unroll 4
      for (int pair = 0; pair < kPairs; ++pair) {
        const __m512bh weights = widen<IS_Q4>(packed, pair);
        const int at = 4 * i + (pair & 1) * 2 + (pair & 2) * 8;
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m)
          sum[m] = _mm512_dpbf16_ps(sum[m], weights, (__m512bh)broadcast4(x + m * in.stride + at));
      }
    }
    const __m512 scale = load_half(scales);
    const __m512 minimum = IS_Q4 ? load_half(scales + kLanes) : _mm512_setzero_ps();
    scales += IS_Q4 ? 2 * kLanes : kLanes;
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      acc[m] = _mm512_fmadd_ps(sum[m], scale, acc[m]);
      if (IS_Q4)
        acc[m] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(x_sums[size_t(m) * groups + g]), acc[m]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) _mm512_storeu_ps(out + m * stride, acc[m]);
}

// out[0:MR, 0:16] = in[row : row + MR] times the 16 outputs of a panel.
template <int MR>
void tile(const Matrix& w, int panel, const Activations& in, int row, float* out, size_t stride) {
  const size_t k = w.k, groups = k / kGroup;
  if (w.format == kBf16) {
    const bf16* values = reinterpret_cast<const bf16*>(w.values) + panel * k * kLanes;
    tile_bf16<MR>(values, in.wide + row * in.stride, in.stride, w.k, out, stride);
  } else if constexpr (MR <= kGroupedRows) {
    const bool is_q4 = w.format == kQ4;
    const uint8_t* values = w.values + panel * k * kLanes / (is_q4 ? 2 : 1);
    const uint16_t* scales = w.scales + panel * groups * kLanes * (is_q4 ? 2 : 1);
    const auto multiply = in.is_int8 ? (is_q4 ? tile_int8<MR, true> : tile_int8<MR, false>)
                                     : (is_q4 ? tile_wide<MR, true> : tile_wide<MR, false>);
    multiply(values, scales, in, row, out, stride);
  }
}

void tile_of(int rows, const Matrix& w, int panel, const Activations& in, int row, float* out, size_t stride) {
  switch (rows) {
#define ROWS(n) \
  case n:       \
    return tile<n>(w, panel, in, row, out, stride);
    ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
    ROWS(13) ROWS(14) ROWS(15) ROWS(16) ROWS(17) ROWS(18) ROWS(19) ROWS(20) ROWS(21) ROWS(22) ROWS(23) ROWS(24)
#undef ROWS
  }
}

// Rows of the next tile, so that all tiles of `left` rows are about equally high.
inline int tile_rows(const Matrix& w, int left) {
  const int most = w.format == kBf16 ? kBf16Rows : kGroupedRows, tiles = (left + most - 1) / most;
  return (left + tiles - 1) / tiles;
}

inline int row_blocks(int tokens) { return (tokens + kRowBlock - 1) / kRowBlock; }

// out [T, n] = in [T, k] w^T. Called by every thread of a parallel region.
void multiply(const Matrix& w, const Activations& in, int tokens, float* out, size_t stride) {
  const int units = w.n / 32, blocks = row_blocks(tokens), chunk = units > 512 ? 8 : 1;
#pragma omp for schedule(dynamic, chunk)
  for (int i = 0; i < units * blocks; ++i) {
    const int unit = i % units, end = std::min(tokens, (i / units + 1) * kRowBlock);
    for (int panel = 2 * unit; panel < 2 * unit + 2; ++panel) {
      for (int row = i / units * kRowBlock, rows; row < end; row += rows) {
        rows = tile_rows(w, end - row);
        tile_of(rows, w, panel, in, row, out + row * stride + panel * kLanes, stride);
      }
    }
  }
}

// ---- elementwise -------------------------------------------------------------------------------

// e^x for x <= 88, relative error below 1e-6: 2^n by exponent, the rest by a polynomial on [-0.5, 0.5].
// Of two operands one of which is NaN, min and max return the second: so NaN stays NaN.
inline __m512 exponential(__m512 x) {
  const __m512 scaled = _mm512_mul_ps(_mm512_max_ps(_mm512_set1_ps(-87.0f), x), _mm512_set1_ps(1.44269504f));
  const __m512 whole = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 part = _mm512_sub_ps(scaled, whole);
  __m512 sum = _mm512_set1_ps(1.5403530e-4f);  // ln(2)^n / n!
  for (float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(c));
  return _mm512_scalef_ps(sum, whole);
}

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
  const int units = w.n / 64, blocks = row_blocks(tokens);
#pragma omp for schedule(dynamic, 1)
  for (int i = 0; i < units * blocks; ++i) {
    const int unit = i % units, end = std::min(tokens, (i / units + 1) * kRowBlock);
    for (int row = i / units * kRowBlock, rows; row < end; row += rows) {
      rows = tile_rows(w, end - row);
      alignas(64) float both[kBf16Rows][64];
      for (int panel = 0; panel < 4; ++panel)
        tile_of(rows, w, 4 * unit + panel, in, row, both[0] + panel * kLanes, 64);
      for (int m = 0; m < rows; ++m) {
        const __m512 low = silu(_mm512_load_ps(both[m])), high = silu(_mm512_load_ps(both[m] + 16));
        out.store(row + m, unit * 32, _mm512_mul_ps(low, _mm512_load_ps(both[m] + 32)),
                  _mm512_mul_ps(high, _mm512_load_ps(both[m] + 48)));
      }
    }
  }
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

// Keys and values `first : first + 64` of one head, zeros from `end` on: slots there may hold anything.
template <int DB>
void load_keys(const bf16* keys, const bf16* values, const int32_t* table, int block_tokens, size_t block_stride,
               int first, int end, KeyTile<DB>& tile) {
  constexpr int D = DB * 16;
  alignas(64) static const uint16_t kPairs[2][32] = {
      {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
      {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
  const __m512i low_pairs = load(kPairs[0]), high_pairs = load(kPairs[1]);
  const int groups = std::min(kKeyTile, (end - first + 15) / 16 * 16) / 16;
  for (int g = 0; g < groups; ++g) {
    const int at = first + g * 16;
    const size_t place = table[at / block_tokens] * block_stride + size_t(at % block_tokens) * D;
    const int valid = std::min(16, end - at);
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

// One key tile's part of rows r : r + R: scores, running softmax, weighted values.
template <int DB, int R>
void attend_rows(QueryTile<DB>& q, int r, const KeyTile<DB>& tile, int first, int groups, float scale) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 nothing = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  alignas(64) bf16 weights[R][kKeyTile];
  __m512 scores[R][4];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i)
    scores[i][0] = scores[i][1] = scores[i][2] = scores[i][3] = _mm512_setzero_ps();
  for (int pair = 0; pair < DB * 8; ++pair) {
    __m512bh keys[4];
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) keys[g] = (__m512bh)load(tile.keys[g][pair]);
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const __m512bh query = (__m512bh)broadcast4(q.queries[r + i] + 2 * pair);
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) scores[i][g] = _mm512_dpbf16_ps(scores[i][g], keys[g], query);
    }
  }
  __m512 rescale[R];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) {
    __m512 most = nothing;
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      const __mmask16 seen = _mm512_cmple_epi32_mask(
          lanes, _mm512_set1_epi32(g < groups ? q.limit[r + i] - first - g * 16 : -1));
      scores[i][g] = _mm512_mask_mul_ps(nothing, seen, scores[i][g], _mm512_set1_ps(scale));
      most = _mm512_max_ps(scores[i][g], most);
    }
    const float before = q.largest[r + i];
    const float largest = std::max(before, _mm512_reduce_max_ps(most));
    const float shrink = std::exp(before - largest);  // 0 at first: before is -inf
    q.largest[r + i] = largest;
    __m512 sum = _mm512_setzero_ps();
    __m512 kept[4];
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
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
    for (int pair = 0; pair < groups * 8; ++pair) {
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

// Tokens begin : end (rows of the step) of sequence b, all query heads of one key/value head.
template <int DB>
void attend(const Model& model, const Step& step, const bf16* cache, Workspace& work, int b, int head, int begin,
            int end) {
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
  const size_t block_stride = size_t(K) * model.block_tokens * D;
  const bf16* keys = cache + size_t(head) * model.block_tokens * D;
  const bf16* values = keys + model.num_blocks * block_stride;
  const int32_t* table = step.block_tables + size_t(b) * step.table_width;
  const int context = before + end;
  const float scale = 1.0f / std::sqrt(float(D));
  for (int first = 0; first < context; first += kKeyTile) {
    load_keys<DB>(keys, values, table, model.block_tokens, block_stride, first, context, *tile);
    const int groups = std::min(kKeyTile / 16, (context - first + 15) / 16);
    int r = 0;
    for (; r + 4 <= q.rows; r += 4) attend_rows<DB, 4>(q, r, *tile, first, groups, scale);
    switch (q.rows - r) {
      case 3: attend_rows<DB, 3>(q, r, *tile, first, groups, scale); break;
      case 2: attend_rows<DB, 2>(q, r, *tile, first, groups, scale); break;
      case 1: attend_rows<DB, 1>(q, r, *tile, first, groups, scale); break;
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

// Work items (sequence, head, begin, end), the longest contexts first so that threads end together.
void list_items(const Model& model, const Step& step, Workspace& work) {
  const int tokens = std::max(1, kQueryRows / (model.heads / model.kv_heads));
  work.items.clear();
  for (int b = step.sequences - 1; b >= 0; --b)
    for (int end = step.query_start[b + 1]; end > step.query_start[b]; end -= tokens)
      for (int head = 0; head < model.kv_heads; ++head)
        work.items.insert(work.items.end(), {b, head, std::max(step.query_start[b], end - tokens), end});
}

void attend_all(const Model& model, const Step& step, const bf16* cache, Workspace& work) {
  const int count = int(work.items.size() / 4);
#pragma omp for schedule(dynamic, 1)
  for (int i = 0; i < count; ++i) {
    const int32_t* item = work.items.data() + 4 * i;
    switch (model.head_dim) {
#define HEAD_DIM(d) \
  case d:           \
    attend<d / 16>(model, step, cache, work, item[0], item[1], item[2], item[3]); \
    break;
      HEAD_DIM(32) HEAD_DIM(64) HEAD_DIM(128) HEAD_DIM(256)
#undef HEAD_DIM
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

// The largest of each row of logits [S, n], -1 where the row's sum is not finite.
void searoom_argmax(const float* logits, int rows, int columns, int stride, int threads, int32_t* out) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int s = 0; s < rows; ++s) {
    const float* row = logits + size_t(s) * stride;
    __m512 best = _mm512_set1_ps(-std::numeric_limits<float>::infinity()), sum = _mm512_setzero_ps();
    __m512i best_at = _mm512_setzero_si512(), at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int i = 0;
    for (; i + kLanes <= columns; i += kLanes) {
      const __m512 values = _mm512_loadu_ps(row + i);
      const __mmask16 greater = _mm512_cmp_ps_mask(values, best, _CMP_GT_OQ);
      best = _mm512_mask_mov_ps(best, greater, values);
      best_at = _mm512_mask_mov_epi32(best_at, greater, at);
      at = _mm512_add_epi32(at, _mm512_set1_epi32(kLanes));
      sum = _mm512_add_ps(sum, values);
    }
    float values[kLanes];
    int32_t places[kLanes];
    _mm512_storeu_ps(values, best);
    _mm512_storeu_si512(places, best_at);
    float total = _mm512_reduce_add_ps(sum), top = values[0];
    int32_t place = places[0];
    for (int lane = 1; lane < kLanes; ++lane)
      if (values[lane] > top || (values[lane] == top && places[lane] < place)) top = values[lane], place = places[lane];
    for (; i < columns; ++i) {
      total += row[i];
      if (row[i] > top) top = row[i], place = i;
    }
    out[s] = std::isfinite(total) ? place : -1;
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
