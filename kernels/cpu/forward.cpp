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
//   layout.h       what lies where: weights, activations, a step
//   products.h     matrix products in two precisions
//   attention.h    attention over the paged cache
//   sample.cpp     from logits to tokens
//   packing.cpp    weights into their layout

#include "attention.h"
#include "exponential.h"
#include "layout.h"
#include "products.h"

namespace {

inline __m512 silu(__m512 x) {
  const __m512 negated = _mm512_sub_ps(_mm512_setzero_ps(), x);
  const __m512 bounded = _mm512_min_ps(_mm512_set1_ps(88.0f), negated);  // in this order NaN stays NaN
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(bounded)));
}

// x += delta (where there is one), and the RMS norm of x as activations. Called by every thread.
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

}  // namespace

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

// Logits [S, n] of hidden states x [S, d], through the final norm.
void searoom_head(const Model* model, Workspace* work, const Matrix* head, const float* norm, float* x,
                  int rows, float* logits) {
  work->norm.shape(rows, model->hidden, model->is_int8 != 0);
#pragma omp parallel num_threads(model->threads)
  {
    add_norm(x, nullptr, norm, model->eps, rows, model->hidden, work->norm);
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
  Buffer<float> both;
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
}
