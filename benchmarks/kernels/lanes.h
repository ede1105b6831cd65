// Sixteen numbers at a time with GCC vector extensions: what the C++ bounds share.
#pragma once
#include <cstddef>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {
constexpr int L = 16;
typedef float V __attribute__((vector_size(64)));
typedef float VU __attribute__((vector_size(64), aligned(4)));
typedef int I __attribute__((vector_size(64)));

inline V all(float x) { return x - V{}; }
const V LANES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
inline V load(const float* p) { return *(const VU*)p; }

// Two to the power of t.
inline V power(V t) {
#if defined(__AVX512F__)
  V n = (V)_mm512_roundscale_ps((__m512)t, 8);
#else
  t = t < -126.f ? all(-126.f) : t;
  V n = __builtin_convertvector(__builtin_convertvector(t + 256.5f, I) - 256, V);
#endif
  V f = t - n, p = all(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  return (V)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * (V)((__builtin_convertvector(n, I) + 127) << 23);
#endif
}

inline V expv(V x) { return power(x * 1.44269504f); }

inline float sum(V v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s = 0;
  for (int i = 0; i < L; i++) s += v[i];
  return s;
#endif
}

inline V keep(V e, float threshold) {
#if defined(__AVX512F__)
  return (V)_mm512_maskz_mov_ps(_mm512_cmp_ps_mask((__m512)e, _mm512_set1_ps(threshold), _CMP_GE_OQ), (__m512)e);
#else
  return e >= threshold ? e : V{};
#endif
}

// Denormal numbers cost a hundred cycles each on some processors: flushed here, for the duration of a call.
struct Flush {
#if defined(__SSE2__)
  unsigned old = _mm_getcsr();
  Flush() { _mm_setcsr(old | 0x8040); }
  ~Flush() { _mm_setcsr(old); }
#endif
};
}  // namespace
