#pragma once

#include <immintrin.h>

#include <initializer_list>

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
