// From logits to one token a row: what serving/engine/sampler.py tells, a row at a time.
//
// A row is read twice where nothing is cut, a few times where something is. The k-th largest logit and
// the end of the nucleus are found without sorting: tokens are counted (or their probabilities summed)
// in bins by their distance from the largest, and only the bin that the cut falls into is put in order.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "exponential.h"

namespace {

constexpr int kLanes = 16;
constexpr int kBins = 2048;
constexpr float kCountedRange = 32.0f;  // logits below the largest that have bins of their own
constexpr float kSummedRange = 24.0f;   // the same in units of the temperature: e^-24 is nothing
constexpr int kChunk = 512;             // tokens whose probabilities are summed at a time

struct Row {
  const float* logits;
  int columns;
  float largest;
  int32_t best;      // its first place
  bool is_finite;    // all of them
};

Row scan(const float* logits, int columns) {
  __m512 best = _mm512_set1_ps(-std::numeric_limits<float>::infinity()), sum = _mm512_setzero_ps();
  __m512i best_at = _mm512_setzero_si512();
  __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    const __m512 values = _mm512_loadu_ps(logits + i);
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
  float total = _mm512_reduce_add_ps(sum), largest = values[0];
  int32_t place = places[0];
  for (int lane = 1; lane < kLanes; ++lane)
    if (values[lane] > largest || (values[lane] == largest && places[lane] < place))
      largest = values[lane], place = places[lane];
  for (; i < columns; ++i) {
    total += logits[i];
    if (logits[i] > largest) largest = logits[i], place = i;
  }
  return {logits, columns, largest, place, std::isfinite(total)};
}

// The k-th largest logit.
float nth_largest(const Row& row, int k) {
  const float scale = (kBins - 1) / kCountedRange;
  const auto bin_of = [&](float logit) { return int(std::min((row.largest - logit) * scale, float(kBins - 1))); };
  std::vector<int32_t> counts(kBins);
  for (int i = 0; i < row.columns; ++i) ++counts[bin_of(row.logits[i])];
  int bin = 0, before = 0;
  while (before + counts[bin] < k) before += counts[bin++];
  std::vector<float> inside;
  for (int i = 0; i < row.columns; ++i)
    if (bin_of(row.logits[i]) == bin) inside.push_back(row.logits[i]);
  std::nth_element(inside.begin(), inside.begin() + (k - before - 1), inside.end(), std::greater<float>());
  return inside[k - before - 1];
}

// The least logit of the most likely tokens whose probabilities reach top_p of all that is not below `cut`.
float nucleus(const Row& row, float cut, float temperature, float top_p, const float* weights) {
  const float scale = (kBins - 1) / (kSummedRange * temperature);
  const auto bin_of = [&](float logit) { return int(std::min((row.largest - logit) * scale, float(kBins - 1))); };
  std::vector<double> sums(kBins);
  for (int i = 0; i < row.columns; ++i)
    if (row.logits[i] >= cut) sums[bin_of(row.logits[i])] += weights[i];
  double total = 0;
  for (double sum : sums) total += sum;
  const double wanted = total * top_p;
  double before = 0;
  int bin = 0;
  while (bin < kBins - 1 && before + sums[bin] < wanted) before += sums[bin++];
  std::vector<std::pair<float, float>> inside;  // logit, weight
  for (int i = 0; i < row.columns; ++i)
    if (row.logits[i] >= cut && bin_of(row.logits[i]) == bin) inside.emplace_back(row.logits[i], weights[i]);
  std::sort(inside.begin(), inside.end(), std::greater<>());
  for (const auto& [logit, weight] : inside)
    if ((before += weight) >= wanted) return logit;
  return cut;  // only rounding keeps the sum from reaching it
}

// The first token at which the probabilities of those not below `cut` exceed `uniform` of their sum.
int32_t draw(const Row& row, float cut, const float* weights, double uniform) {
  const int chunks = (row.columns + kChunk - 1) / kChunk;
  std::vector<double> sums(chunks);
  const auto weight_of = [&](int i) { return row.logits[i] >= cut ? double(weights[i]) : 0.0; };
  double total = 0;
  for (int c = 0; c < chunks; ++c) {
    const int end = std::min(row.columns, (c + 1) * kChunk);
    for (int i = c * kChunk; i < end; ++i) sums[c] += weight_of(i);
    total += sums[c];
  }
  const double target = total * uniform;
  double before = 0;
  int c = 0;
  while (c < chunks - 1 && before + sums[c] <= target) before += sums[c++];
  int32_t last = row.best;  // where rounding leaves nothing above the target, the last that can be drawn
  for (int i = c * kChunk; i < row.columns; ++i) {
    const double weight = weight_of(i);
    if (weight == 0) continue;
    last = i;
    if ((before += weight) > target) return i;
  }
  return last;
}

int32_t sample(const Row& row, float temperature, int top_k, float top_p, float min_p, double uniform,
               float* weights) {
  const __m512 largest = _mm512_set1_ps(row.largest), divisor = _mm512_set1_ps(temperature);
  for (int i = 0; i < row.columns; i += kLanes) {
    const __mmask16 inside = row.columns - i >= kLanes ? 0xffff : (1u << (row.columns - i)) - 1;
    const __m512 logits = _mm512_maskz_loadu_ps(inside, row.logits + i);
    const __m512 scaled = _mm512_div_ps(_mm512_sub_ps(logits, largest), divisor);
    // Below e^-87 a weight is 0, as the sum of the others cannot tell.
    const __mmask16 counts = inside & _mm512_cmp_ps_mask(scaled, _mm512_set1_ps(-87.0f), _CMP_GT_OQ);
    _mm512_mask_storeu_ps(weights + i, inside, _mm512_maskz_mov_ps(counts, exponential(scaled)));
  }
  float cut = -std::numeric_limits<float>::infinity();
  if (min_p > 0) cut = row.largest + temperature * std::log(min_p);
  if (top_k > 0 && top_k < row.columns) cut = std::max(cut, nth_largest(row, top_k));
  if (top_p < 1) cut = std::max(cut, nucleus(row, cut, temperature, top_p, weights));
  return draw(row, cut, weights, uniform);
}

}  // namespace

extern "C" {

// One token for each row of logits [S, columns], -1 where a row is not finite. Of each row: temperature
// (0 takes the largest), top_k (0 is off), top_p, min_p, and a number in [0, 1).
void searoom_sample(const float* logits, int rows, int columns, int stride, const float* temperature,
                    const int32_t* top_k, const float* top_p, const float* min_p, const double* uniform,
                    int threads, int32_t* out) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> weights;
#pragma omp for schedule(dynamic, 1)
    for (int s = 0; s < rows; ++s) {
      const Row row = scan(logits + size_t(s) * stride, columns);
      if (!row.is_finite) {
        out[s] = -1;
      } else if (temperature[s] == 0) {
        out[s] = row.best;
      } else {
        weights.resize(columns);
        out[s] = sample(row, temperature[s], top_k[s], top_p[s], min_p[s], uniform[s], weights.data());
      }
    }
  }
}
}
