// What one core can do: sums of 3D Gaussians on planes, forward and backward, in C++ with GCC vector extensions.
// A mark to measure the package's kernels against, not part of the package. It has none of the product's safeguards: every
// Gaussian is stepped (E *= R, R *= Q) without starting afresh, rows must be padded by 16 numbers, widths are not checked.
// Build:  g++ -O3 -march=native -ffast-math -fPIC -c bound.cpp && g++ -shared bound.o -o bound.so
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "lanes.h"

namespace {
struct Gaussian {  // (x, y, t) = (column, row, normal)
  float mx, my, mt, kx, ky, it, a, b, c, hx, hy, q;
};

struct Span {
  int x0, x1, y0, y1;
  float cx, cy, dt, ez;
};

inline bool span(const Gaussian& g, float t, float cut, int W, int H, Span& s) {
  float dt = t - g.mt, ez = dt * dt * g.it, r2 = cut - ez;
  if (r2 <= 0) return false;
  float r = std::sqrt(r2);
  s.cx = g.mx + g.kx * dt;
  s.cy = g.my + g.ky * dt;
  s.dt = dt;
  s.ez = ez;
  s.x0 = std::max(0, (int)std::ceil(s.cx - r * g.hx));
  s.x1 = std::min(W - 1, (int)std::floor(s.cx + r * g.hx));
  s.y0 = std::max(0, (int)std::ceil(s.cy - r * g.hy));
  s.y1 = std::min(H - 1, (int)std::floor(s.cy + r * g.hy));
  return s.x0 <= s.x1 && s.y0 <= s.y1;
}

inline void start(const Gaussian& g, const Span& s, V dx, float dy, V& e, V& r) {
  e = expv(-0.5f * (g.a * dx * dx + (2 * g.b * dy) * dx + (g.c * dy * dy + s.ez)));
  r = expv(-(g.b * dx + g.c * (dy + 0.5f)));
}

template <int C>
inline void splat(const Gaussian& g, const Span& s, const float* amp, float threshold, float* plane, ptrdiff_t cs, ptrdiff_t ld) {
  for (int xb = s.x0; xb <= s.x1; xb += L) {
    V e, r;
    start(g, s, all(xb - s.cx) + LANES, s.y0 - s.cy, e, r);
    float* p = plane + (ptrdiff_t)s.y0 * ld + xb;
    for (int y = s.y0; y <= s.y1; y++, p += ld) {
      V em = keep(e, threshold), v[C];
      for (int c = 0; c < C; c++) v[c] = load(p + c * cs) + amp[c] * em;
      for (int c = 0; c < C; c++) *(VU*)(p + c * cs) = v[c];
      e *= r;
      r *= g.q;
    }
  }
}

// Rows of the channels lie beside each other, (plane, row, channel, column): no two channels fall on the same cache set.
struct Image {
  int planes, H, W;
  ptrdiff_t channel_stride, ld, plane_stride;
  Image(int C, int planes, int H, int W, int line)
      : planes(planes), H(H), W(W), channel_stride(line), ld((ptrdiff_t)C * line), plane_stride(ld * H) {}
};

// Forward by lists: offsets and members of each slab of `slab` planes.
template <int C>
void forward_c(const Image& m, const float* t, float cut, const Gaussian* g, const float* amp, int slab, const long* offsets,
               const int* members, float* out) {
  float threshold = std::exp(-0.5f * cut);
  for (int s = 0; s * slab < m.planes; s++) {
    int planes = std::min(slab, m.planes - s * slab);
    std::memset(out + s * slab * m.plane_stride, 0, sizeof(float) * planes * m.plane_stride);  // and use it while it is near
    for (long j = offsets[s]; j < offsets[s + 1]; j++) {
      const Gaussian& q = g[members[j]];
      for (int k = s * slab; k < std::min(m.planes, (s + 1) * slab); k++) {
        Span sp;
        if (span(q, t[k], cut, m.W, m.H, sp))
          splat<C>(q, sp, amp + (size_t)members[j] * C, threshold, out + k * m.plane_stride, m.channel_stride, m.ld);
      }
    }
  }
}

template <int C>
void backward_c(const Image& im, const float* t, float cut, int N, const Gaussian* g, const int* first, const int* last,
                const float* amp, const float* grad, float* moments, float* d_amp) {
  float threshold = std::exp(-0.5f * cut);
  for (int i = 0; i < N; i++) {
    const Gaussian& q = g[i];
    const float* A = amp + (size_t)i * C;
    V M[10], ac[C];
    for (auto& m : M) m = V{};
    for (auto& a : ac) a = V{};
    for (int k = first[i]; k < last[i]; k++) {
      Span s;
      if (!span(q, t[k], cut, im.W, im.H, s)) continue;
      float w_ = s.dt, ux = q.kx * w_, uy = q.ky * w_;
      for (int xb = s.x0; xb <= s.x1; xb += L) {
        V dx = all(xb - s.cx) + LANES, m0 = {}, m1 = {}, m2 = {}, e, r;
        float Y = s.y0 - s.cy + uy;
        start(q, s, dx, s.y0 - s.cy, e, r);
        const float* p = grad + k * im.plane_stride + (ptrdiff_t)s.y0 * im.ld + xb;
        for (int y = s.y0; y <= s.y1; y++, Y += 1.f, p += im.ld) {
          V em = keep(e, threshold), w;
          if (C == 1) {
            w = em * load(p);
          } else {
            w = V{};
            for (int c = 0; c < C; c++) {
              V gc = load(p + c * im.channel_stride);
              ac[c] += gc * em;
              w += A[c] * gc;
            }
            w *= em;
          }
          m0 += w;
          V wy = w * Y;
          m1 += wy;
          m2 += wy * Y;
          e *= r;
          r *= q.q;
        }
        V X = dx + ux, tx = m0 * X;
        M[0] += m0; M[1] += tx; M[2] += m1; M[3] += m0 * w_; M[4] += tx * X;
        M[5] += m1 * X; M[6] += tx * w_; M[7] += m2; M[8] += m1 * w_; M[9] += m0 * (w_ * w_);
      }
    }
    float a = C == 1 ? A[0] : 1.f, total = sum(M[0]);
    moments[i] = total * a;
    for (int n = 1; n < 10; n++) moments[(size_t)n * N + i] = sum(M[n]) * a;
    if (C == 1) d_amp[i] = total;
    else for (int c = 0; c < C; c++) d_amp[(size_t)i * C + c] = sum(ac[c]);
  }
}
}  // namespace

extern "C" {
// covs: [tt, tr, tc, rr, rc, cc]; means: (t, r, c)
void prepare(int N, const float* means, const float* covs, const float* t, int planes, float cut, Gaussian* g, int* first, int* last) {
  for (int i = 0; i < N; i++) {
    const float *m = means + 3 * i, *s = covs + 6 * i;
    float it = 1 / s[0], ky = s[1] * it, kx = s[2] * it;
    float yy = s[3] - ky * s[1], xy = s[4] - ky * s[2], xx = s[5] - kx * s[2], id = 1 / (xx * yy - xy * xy);
    g[i] = {m[2], m[1], m[0], kx, ky, it, yy * id, -xy * id, xx * id, std::sqrt(xx), std::sqrt(yy), std::exp(-xx * id)};
    float reach = std::sqrt(cut * s[0]);
    first[i] = std::lower_bound(t, t + planes, m[0] - reach) - t;
    last[i] = std::upper_bound(t, t + planes, m[0] + reach) - t;
  }
}

// Call with members = nullptr for the number of entries.
long bin(int N, const int* first, const int* last, int planes, int slab, long* offsets, int* members) {
  int slabs = (planes + slab - 1) / slab;
  std::vector<long> count(slabs + 1, 0);
  for (int i = 0; i < N; i++)
    if (last[i] > first[i])
      for (int s = first[i] / slab; s <= (last[i] - 1) / slab; s++) count[s + 1]++;
  for (int s = 0; s < slabs; s++) count[s + 1] += count[s];
  std::copy(count.begin(), count.end(), offsets);
  if (members)
    for (int i = 0; i < N; i++)
      if (last[i] > first[i])
        for (int s = first[i] / slab; s <= (last[i] - 1) / slab; s++) members[count[s]++] = i;
  return offsets[slabs];
}

#define CHANNELS(call) \
  switch (C) { \
    case 1: call(1); break; \
    case 2: call(2); break; \
    case 4: call(4); break; \
    case 5: call(5); break; \
    default: return 1; \
  } \
  return 0;

int forward(int C, int planes, int H, int W, int line, const float* t, float cut,
            const Gaussian* g, const float* amp, int slab, const long* offsets, const int* members, float* out) {
  Flush flush;
  Image m(C, planes, H, W, line);
#define F(c) forward_c<c>(m, t, cut, g, amp, slab, offsets, members, out)
  CHANNELS(F)
}

int backward(int C, int planes, int H, int W, int line, const float* t, float cut, int N,
             const Gaussian* g, const int* first, const int* last, const float* amp, const float* grad, float* moments,
             float* d_amp) {
  Flush flush;
  Image m(C, planes, H, W, line);
#define B(c) backward_c<c>(m, t, cut, N, g, first, last, amp, grad, moments, d_amp)
  CHANNELS(B)
}
}
