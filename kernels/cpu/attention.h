// Attention over the paged KV cache, bf16 [2, N, K, block_tokens, D] a layer, read in place: one pass with
// a running softmax (Milakov & Gimelshein 2018; Dao et al. 2022), over tiles of 64 keys from the first on.
// Prefill and decode are the same: a tile of queries, one row a token and head, against one head's keys.

#pragma once

#include <cstring>
#include <memory>

#include "exponential.h"
#include "layout.h"

namespace {

constexpr int kKeyTile = 64;    // keys of an attention tile
constexpr int kQueryRows = 48;  // (token, head) rows of an attention tile, at least the heads of a token

inline __m512i broadcast4(const void* at) {
  int32_t four;
  std::memcpy(&four, at, 4);
  return _mm512_set1_epi32(four);
}

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
  float largest[kQueryRows];
  alignas(64) float total[kQueryRows][kLanes];  // to be summed over lanes
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
    __mmask16 seen[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      seen[g] = _mm512_cmple_epi32_mask(lanes, _mm512_set1_epi32(q.limit[r + i] - first - g * 16));
      scores[i][g] = _mm512_mask_mul_ps(nothing, seen[g], scores[i][g], _mm512_set1_ps(scale));
      most = _mm512_max_ps(scores[i][g], most);
    }
    const float before = q.largest[r + i];
    const float largest = std::max(before, _mm512_reduce_max_ps(most));
    // 0 at first, when `before` is -inf; 1 in most tiles of a long context.
    const float shrink = before == largest ? 1.0f : std::exp(before - largest);
    q.largest[r + i] = largest;
    __m512 sum = _mm512_mul_ps(_mm512_load_ps(q.total[r + i]), _mm512_set1_ps(shrink));
    __m512 kept[4] = {};
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      kept[g] = _mm512_maskz_mov_ps(seen[g], exponential(_mm512_sub_ps(scores[i][g], _mm512_set1_ps(largest))));
      sum = _mm512_add_ps(sum, kept[g]);
    }
    _mm512_store_ps(q.total[r + i], sum);
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
    std::memset(q.total[r], 0, sizeof q.total[r]);
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
    const __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(_mm512_load_ps(q.total[r])));
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
