// Matrix products of activations [T, k] with weights [n, k] in one of two precisions.
//
// With bfloat16 activations, a Q8 or Q4 value is an exact bf16 too: f32 += bf16 * bf16 in pairs
// (VDPBF16PS), scaled every 32 inputs. With 8-bit activations, one scale for every 32 of a row as in
// llama.cpp's Q8_1, i32 += u8 * s8 in fours (VPDPBUSD). Either way
//
//   sum w x = scale sum q x + minimum sum x      over 32 inputs.
//
// A row's result depends on nothing but the row: sums run over k in one order, whatever the tile.

#pragma once

#include "layout.h"

namespace {

constexpr int kTileBlock = 10;  // tiles that stay in the L2 cache while weights pass by

// Weights are read once a step, from memory: ask for what comes some rows of a panel later.
inline void prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at) + 4096, _MM_HINT_T1); }

inline __m512 load_half(const uint16_t* at) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}

template <int MR>
void store_rows(const __m512 (&acc)[MR], float* out, size_t stride) {
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) _mm512_storeu_ps(out + m * stride, acc[m]);
}

// The scales, and of Q4 the minima, of 16 outputs' next group.
template <bool IS_Q4>
struct GroupScales {
  __m512 scale, minimum;

  explicit GroupScales(const uint16_t*& at) : scale(load_half(at)), minimum(_mm512_setzero_ps()) {
    if (IS_Q4) minimum = load_half(at + kLanes);
    at += IS_Q4 ? 2 * kLanes : kLanes;
  }
};

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
    const GroupScales<IS_Q4> of(scales);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const __m512 both = _mm512_mul_ps(of.scale, _mm512_set1_ps(in.scales[group + m]));
      acc[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m]), both, acc[m]);
      if (IS_Q4) acc[m] = _mm512_fmadd_ps(of.minimum, _mm512_set1_ps(in.sums[group + m]), acc[m]);
    }
  }
  store_rows<MR>(acc, out, stride);
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
    const GroupScales<IS_Q4> of(scales);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      acc[m] = _mm512_fmadd_ps(sum[m], of.scale, acc[m]);
      if (IS_Q4) acc[m] = _mm512_fmadd_ps(of.minimum, _mm512_set1_ps(in.sums[group + m]), acc[m]);
    }
  }
  store_rows<MR>(acc, out, stride);
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

}  // namespace
