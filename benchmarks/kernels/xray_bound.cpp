// What one core can do: line integrals of Gaussians on a flat panel, forward and backward, in C++ with GCC vector
// extensions. A mark to measure the package's kernels against, not part of the package. It has none of the
// product's safeguards: stepped Gaussians are stepped without starting afresh, values are not clamped, one channel
// only, rows must be padded by 16 numbers.
//
// Records are those of the package (20 numbers): projected mean, K, g, H, peak, support (centre, half width and
// height, tilt, half height at the centre), T or -1 where the Gaussian must not be stepped. With `exact` set, every
// Gaussian is evaluated pixel by pixel.
// Build:  g++ -O3 -march=native -ffast-math -fPIC -c xray_bound.cpp && g++ -shared xray_bound.o -o xray_bound.so
#include <algorithm>
#include <cmath>
#include <cstring>

#include "lanes.h"

namespace {
inline V rsqrtv(V x) {
#if defined(__AVX512F__)
  V y = (V)_mm512_rsqrt14_ps((__m512)x);
#else
  V y = (V)(0x5f375a86 - ((I)x >> 1));
  y = y * (1.5f - 0.5f * x * y * y);
  y = y * (1.5f - 0.5f * x * y * y);
#endif
  return y * (1.5f - 0.5f * x * y * y);
}

struct Gaussian {
  float mx, my, kxx, kxy, kyy, gx, gy, hxx, hxy, hyy, peak, ex, ey, hx, hy, tilt, hc, step, unused[2];
};

struct Box {
  int x0, x1, y0, y1;
};

inline Box box(const Gaussian& g, int y_lo, int y_hi, int W) {
  return {std::max(0, (int)std::ceil(g.ex - g.hx)), std::min(W - 1, (int)std::floor(g.ex + g.hx)),
          std::max(y_lo, (int)std::ceil(g.ey - g.hy)), std::min(y_hi - 1, (int)std::floor(g.ey + g.hy))};
}

// The rows that the ellipse reaches in a block of a wide footprint.
inline void narrow(const Gaussian& g, const Box& b, int xb, int& y0, int& y1) {
  if (b.x1 - b.x0 < L) return;
  float top = g.tilt * g.hx * g.hx / g.hy, left = xb - g.ex, right = std::min(left + L - 1, g.hx);
  float u = std::min(std::max(top, left), right), d = std::min(std::max(-top, left), right), i = 1 / g.hx;
  float hi = g.tilt * u + g.hc * std::sqrt(std::max(1 - u * u * i * i, 0.f));
  float lo = g.tilt * d - g.hc * std::sqrt(std::max(1 - d * d * i * i, 0.f));
  y0 = std::max(y0, (int)std::ceil(g.ey + lo));
  y1 = std::min(y1, (int)std::floor(g.ey + hi));
}

constexpr float MIDDLE = 2.4f;

inline void start(const Gaussian& g, V x, float y, V& e, V& r, V& q) {
  float axx = g.kxx + g.hxx * (1 - MIDDLE) + g.gx * g.gx * (4 * MIDDLE - 2);
  float axy = g.kxy + g.hxy * (1 - MIDDLE) + g.gx * g.gy * (4 * MIDDLE - 2);
  float ayy = g.kyy + g.hyy * (1 - MIDDLE) + g.gy * g.gy * (4 * MIDDLE - 2), c = g.gy * g.kyy;
  V n0 = x * x * (0.5f * axx) + x * g.gx - x * x * x * (g.gx * g.kxx);
  V n1 = x * axy + g.gy - x * x * (2 * g.gx * g.kxy + g.gy * g.kxx);
  V n2 = 0.5f * ayy - x * (g.gx * g.kyy + 2 * g.gy * g.kxy);
  e = expv(-(n0 + (n1 + (n2 - c * y) * y) * y));
  r = expv(-(n1 + n2 * (2 * y + 1) - c * (3 * y * (y + 1) + 1)));
  q = expv(-(2 * n2 - 6 * c * (y + 1)));
}
}  // namespace

extern "C" {
// One view: bands of rows with lists of members; `image` has rows of `line` numbers.
void forward(int exact, int H, int W, int line, int band, const long* offsets, const int* members, const Gaussian* gs,
             const float* amps, float cut, float* image) {
  Flush flush;
  float threshold = std::exp(-0.5f * cut);
  for (int b = 0; b * band < H; b++) {
    int y_lo = b * band, y_hi = std::min(H, y_lo + band);
    std::memset(image + (ptrdiff_t)y_lo * line, 0, sizeof(float) * (y_hi - y_lo) * line);
    for (long j = offsets[b]; j < offsets[b + 1]; j++) {
      const Gaussian& g = gs[members[j]];
      float a = amps[members[j]] * g.peak;
      Box s = box(g, y_lo, y_hi, W);
      for (int xb = s.x0; xb <= s.x1; xb += L) {
        int y0 = s.y0, y1 = s.y1;
        narrow(g, s, xb, y0, y1);
        V x = all(xb - g.mx) + LANES;
        float* p = image + (ptrdiff_t)y0 * line + xb;
        if (g.step >= 0 && !exact) {
          V e, r, q;
          start(g, x, y0 - g.my, e, r, q);
          for (int y = y0; y <= y1; y++, p += line) {
            *(VU*)p = load(p) + a * keep(e, threshold);
            e *= r;
            r *= q;
            q *= g.step;
          }
        } else {
          V r0 = 1 + x * (2 * g.gx + g.hxx * x), r1 = 2 * (g.gy + g.hxy * x), q0 = g.kxx * x * x, q1 = 2 * g.kxy * x;
          float dy = y0 - g.my;
          for (int y = y0; y <= y1; y++, p += line, dy += 1) {
            V t = rsqrtv(r0 + dy * (r1 + g.hyy * dy)), e = expv(-0.5f * (q0 + dy * (q1 + g.kyy * dy)) * (t * t));
            *(VU*)p = load(p) + a * (keep(e, threshold) * t);
          }
        }
      }
    }
  }
}

// One view: sums and channel totals as the package gathers them (for peak 1).
void backward(int exact, int n, int H, int W, int line, const int* top, const int* bottom, const Gaussian* gs, float cut,
              const float* grad, float* sums) {
  Flush flush;
  float threshold = std::exp(-0.5f * cut);
  for (int i = 0; i < n; i++) {
    if (bottom[i] <= top[i]) continue;
    const Gaussian& g = gs[i];
    Box s = box(g, 0, H, W);
    float* o = sums + (size_t)i * 12;
    if (g.step >= 0 && !exact) {
      V m[15] = {};
      for (int xb = s.x0; xb <= s.x1; xb += L) {
        int y0 = s.y0, y1 = s.y1;
        narrow(g, s, xb, y0, y1);
        V x = all(xb - g.mx) + LANES, e, r, q, c[5] = {};
        const float* p = grad + (ptrdiff_t)y0 * line + xb;
        float dy = y0 - g.my;
        start(g, x, dy, e, r, q);
        for (int y = y0; y <= y1; y++, p += line, dy += 1) {
          V w = keep(e, threshold) * load(p);
          float y2 = dy * dy;
          c[0] += w;
          c[1] += w * dy;
          c[2] += w * y2;
          c[3] += w * (y2 * dy);
          c[4] += w * (y2 * y2);
          e *= r;
          r *= q;
          q *= g.step;
        }
        V* to = m;
        for (int b = 0; b < 5; b++) {
          V w = c[b];
          for (int a = 0; a + b < 5; a++, w *= x) *to++ += w;
        }
      }
      float f[15];
      for (int k = 0; k < 15; k++) f[k] = sum(m[k]);
      // f: 0..4 are x^0..x^4, 5..8 y x^0..x^3, 9..11 y^2, 12..13 y^3, 14 y^4
      float u = 2 * g.gx, v = 2 * g.gy, k1 = g.kxx, k2 = 2 * g.kxy, k3 = g.kyy;
      o[0] = f[0];
      o[1] = f[1] - u * f[2] - v * f[6];
      o[2] = f[5] - u * f[6] - v * f[9];
      o[3] = f[2] - u * f[3] - v * f[7];
      o[4] = f[6] - u * f[7] - v * f[10];
      o[5] = f[9] - u * f[10] - v * f[12];
      o[6] = 0.5f * (k1 * f[2] + k2 * f[6] + k3 * f[9] - f[0]);
      o[7] = 0.5f * (k1 * f[3] + k2 * f[7] + k3 * f[10] - f[1]);
      o[8] = 0.5f * (k1 * f[7] + k2 * f[10] + k3 * f[12] - f[5]);
      o[9] = 0.5f * (k1 * f[4] + k2 * f[8] + k3 * f[11] - f[2]);
      o[10] = 0.5f * (k1 * f[8] + k2 * f[11] + k3 * f[13] - f[6]);
      o[11] = 0.5f * (k1 * f[11] + k2 * f[13] + k3 * f[14] - f[9]);
    } else {
      V m[12] = {};
      for (int xb = s.x0; xb <= s.x1; xb += L) {
        int y0 = s.y0, y1 = s.y1;
        narrow(g, s, xb, y0, y1);
        V x = all(xb - g.mx) + LANES, c[6] = {};
        V r0 = 1 + x * (2 * g.gx + g.hxx * x), r1 = 2 * (g.gy + g.hxy * x), q0 = g.kxx * x * x, q1 = 2 * g.kxy * x;
        const float* p = grad + (ptrdiff_t)y0 * line + xb;
        float dy = y0 - g.my;
        for (int y = y0; y <= y1; y++, p += line, dy += 1) {
          V t = rsqrtv(r0 + dy * (r1 + g.hyy * dy)), ir = t * t, q = (q0 + dy * (q1 + g.kyy * dy)) * ir;
          V w = keep(expv(-0.5f * q), threshold) * t * load(p), wr = w * ir, wq = wr * (0.5f * q - 0.5f);
          float y2 = dy * dy;
          m[0] += w;
          c[0] += wr;
          c[1] += wr * dy;
          c[2] += wr * y2;
          c[3] += wq;
          c[4] += wq * dy;
          c[5] += wq * y2;
        }
        V a = c[0] * x, b = c[3] * x;
        m[1] += a;
        m[2] += c[1];
        m[3] += a * x;
        m[4] += c[1] * x;
        m[5] += c[2];
        m[6] += c[3];
        m[7] += b;
        m[8] += c[4];
        m[9] += b * x;
        m[10] += c[4] * x;
        m[11] += c[5];
      }
      for (int k = 0; k < 12; k++) o[k] = sum(m[k]);
    }
  }
}
}
