// What one core can do: sorted alpha compositing of 2D Gaussians, forward and backward, in C++ with GCC vector
// extensions. A mark to measure the package's kernels against, not part of the package. Three channels; lists, records
// and limits are the package's, and so are the decisions which pixels count, from which backward follows.
//
// Records (16 numbers): column, row; ixx, slope and pyy, the first and last times -log2(e) / 2; log2 of the opacity;
// half height of the support; column of its middle for each row; half width at the centre; row of its rightmost point;
// one over the half height. Sixteen lanes are a block of 4 by 4 pixels, a cell has 8 by 8 blocks.
// Build:  g++ -O3 -march=native -ffast-math -fPIC -c rgb_bound.cpp && g++ -shared rgb_bound.o -o rgb_bound.so
#include <algorithm>
#include <cmath>
#include <cstring>

#include "lanes.h"

namespace {
constexpr int EDGE = 4, CELL = 32, BLOCKS = CELL / EDGE, FIELDS = 16, SUMS = 16, C = 3, LOOK = 32;
const V COLUMNS = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
const V ROWS = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};

inline V reciprocal(V x) {
#if defined(__AVX512F__)
  V y = (V)_mm512_rcp14_ps((__m512)x);
  return y * (2.0f - x * y);
#else
  return 1.0f / x;
#endif
}

inline bool any_from(V x, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)all(limit), _CMP_GE_OQ) != 0;
#else
  I m = x >= limit;
  int out = 0;
  for (int i = 0; i < L; i++) out |= m[i];
  return out != 0;
#endif
}

// Two vectors halved into one: lanes H apart are added, those of `a` in front.
template <int H>
inline V folded(V a, V b) {
  I low;
  for (int i = 0; i < L; i++) low[i] = i / H * 2 * H + i % H;
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + H);
}

// Lane i of the result is the sum of the lanes of m[i].
inline V totals(const V (&m)[L]) {
  V a[8], b[4];
  for (int i = 0; i < 8; i++) a[i] = folded<8>(m[2 * i], m[2 * i + 1]);
  for (int i = 0; i < 4; i++) b[i] = folded<4>(a[2 * i], a[2 * i + 1]);
  return folded<1>(folded<2>(b[0], b[1]), folded<2>(b[2], b[3]));
}

inline V clamped(V x, V low, V high) {
  x = x > low ? x : low;
  return x < high ? x : high;
}

inline V root(V x) {
  x = x > 0 ? x : V{};
#if defined(__AVX512F__)
  return (V)_mm512_sqrt_ps((__m512)x);
#else
  for (int i = 0; i < L; i++) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// The greatest integers at or below numbers from -1 on, and the least at or above them.
inline I down(V x) { return __builtin_convertvector(x + 1.f, I) - 1; }
inline I up(V x) { return down(x) - (__builtin_convertvector(down(x), V) < x); }

struct Gaussian {
  float mx, my, ax, slope, ay, peak;
  V lanes_t;
  int y0, y1;
  alignas(64) int first[L], last[L];  // blocks that the support meets, for each row of blocks
  Gaussian(const float* r, int cell_x, int cell_y)
      : mx(r[0] - cell_x), my(r[1] - cell_y), ax(r[2]), slope(r[3]), ay(r[4]), peak(r[5]) {
    const float hy = r[6], tilt = r[7], half = r[8], top_x = r[9], ihy = r[10];
    lanes_t = ROWS + COLUMNS * slope;
    y0 = (int)std::ceil(std::clamp(my - hy, 0.f, CELL - 1.f)) / EDGE;
    y1 = (int)std::floor(std::clamp(my + hy, 0.f, CELL - 1.f)) / EDGE;
    V low = LANES * (float)EDGE - my, high = clamped(low + (EDGE - 1.f), all(-hy), all(hy));
    low = clamped(low, all(-hy), all(hy));
    const V a = clamped(all(top_x), low, high), b = clamped(all(-top_x), low, high);
    const V right = tilt * a + half * root(1 - a * ihy * (a * ihy)) + mx;
    const V left = tilt * b - half * root(1 - b * ihy * (b * ihy)) + (mx - (EDGE - 1.f));
    *(I*)first = up(clamped(left * (1.f / EDGE), V{}, all(BLOCKS)));
    *(I*)last = down(clamped(right * (1.f / EDGE), all(-1), all(BLOCKS - 1)));
  }
};

inline int place(int y, int x, int stride) {
  return ((y / EDGE) * BLOCKS + x / EDGE) * stride + y % EDGE * EDGE + x % EDGE;
}
}  // namespace

extern "C" void forward(int cells, int across, int height, int width, const float* records, const float* colours,
                        const long* begins, const int* members, long* used, float least, float most, float dark,
                        float* out) {
  constexpr int S = L * (C + 1);
  alignas(64) static float scratch[BLOCKS * BLOCKS * S];
  const long pixels = (long)height * width;
  for (int cell = 0; cell < cells; cell++) {
    const int cy = cell / across * CELL, cx = cell % across * CELL;
    const int rows = std::min(CELL, height - cy), columns = std::min(CELL, width - cx);
    std::memset(scratch, 0, sizeof scratch);
    for (int y = 0; y < rows; y++)
      for (int x = 0; x < columns; x++) scratch[place(y, x, S)] = 1;
    long j = begins[cell], end = begins[cell + 1];
    for (; j < end; j++) {
      if ((j - begins[cell]) % LOOK == LOOK - 1) {
        bool lit = false;
        for (int b = 0; b < BLOCKS * BLOCKS && !lit; b++) lit = any_from(*(V*)(scratch + b * S), dark);
        if (!lit) break;
      }
      const int i = members[j];
      const Gaussian g(records + (long)i * FIELDS, cx, cy);
      const float* colour = colours + (long)i * C;
      for (int by = g.y0; by <= g.y1; by++) {
        const float low = by * EDGE - g.my;
        for (int b = g.first[by]; b <= g.last[by]; b++) {
          V* p = (V*)(scratch + (by * BLOCKS + b) * S);
          const V through = p[0];
          if (!any_from(through, dark)) continue;
          const float left = b * EDGE - g.mx;
          const V x = COLUMNS + left, t = g.lanes_t + (low + g.slope * left);
          V a = power(x * (x * g.ax) + (t * (t * g.ay) + g.peak));
          a = (a >= least) & (through >= dark) ? a : V{};
          const V w = (a < most ? a : all(most)) * through;
          p[0] = through - w;
          for (int c = 0; c < C; c++) p[1 + c] += w * colour[c];
        }
      }
    }
    used[cell] = j;
    for (int y = 0; y < rows; y++)
      for (int x = 0; x < columns; x++) {
        const float* p = scratch + place(y, x, S);
        const long o = (long)(cy + y) * width + cx + x;
        out[o + C * pixels] = 1 - p[0];
        for (int c = 0; c < C; c++) out[o + c * pixels] = p[(c + 1) * L];
      }
  }
}

extern "C" void backward(int cells, int across, int height, int width, const float* records, const float* colours,
                         const long* begins, const int* members, const long* used, const int* places, float least,
                         float most, float dark, const float* out, const float* grad, float* sums) {
  constexpr int S = L * (C + 3);
  alignas(64) static float scratch[BLOCKS * BLOCKS * S];
  const long pixels = (long)height * width;
  for (int cell = 0; cell < cells; cell++) {
    const int cy = cell / across * CELL, cx = cell % across * CELL;
    const int rows = std::min(CELL, height - cy), columns = std::min(CELL, width - cx);
    std::memset(scratch, 0, sizeof scratch);
    for (int y = 0; y < rows; y++)
      for (int x = 0; x < columns; x++) {
        float* p = scratch + place(y, x, S);
        const long o = (long)(cy + y) * width + cx + x;
        p[0] = 1;
        p[L] = 0;
        for (int c = 0; c <= C; c++) {
          const float g = grad[o + c * pixels];
          p[L] += g * out[o + c * pixels];
          p[(c == C ? 2 : 3 + c) * L] = g;
        }
      }
    for (long j = begins[cell]; j < used[cell]; j++) {
      const int i = members[j];
      const Gaussian g(records + (long)i * FIELDS, cx, cy);
      const float* colour = colours + (long)i * C;
      V m[L] = {};
      for (int by = g.y0; by <= g.y1; by++) {
        const float low = by * EDGE - g.my;
        for (int b = g.first[by]; b <= g.last[by]; b++) {
          V* p = (V*)(scratch + (by * BLOCKS + b) * S);
          const V through = p[0];
          if (!any_from(through, dark)) continue;
          const float left = b * EDGE - g.mx;
          const V x = COLUMNS + left, t = g.lanes_t + (low + g.slope * left);
          const V full = power(x * (x * g.ax) + (t * (t * g.ay) + g.peak));
          V a = (full >= least) & (through >= dark) ? full : V{};
          a = a < most ? a : all(most);
          const V w = a * through;
          p[0] = through - w;
          V v = p[2];
          for (int c = 0; c < C; c++) {
            v += colour[c] * p[3 + c];
            m[6 + c] += w * p[3 + c];
          }
          v *= w;
          const V rest = p[1] - v;
          p[1] = rest;
          v -= rest * (a * reciprocal(1 - a));
          v = full <= most ? v : V{};
          const V vx = v * x, vt = v * t;
          m[0] += v;
          m[1] += vx;
          m[2] += vt;
          m[3] += vx * x;
          m[4] += vx * t;
          m[5] += vt * t;
        }
      }
      *(VU*)(sums + (long)places[j] * SUMS) = totals(m);
    }
  }
}
