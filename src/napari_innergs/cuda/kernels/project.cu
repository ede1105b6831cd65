// Line integrals through voxels: Joseph's projector, its exact transpose, and FDK's backprojector.
//
// A ray is followed along the axis in which it moves fastest (of equal ones the last). On each plane of voxel centres
// the volume is interpolated linearly in the two other axes, zero from one voxel outside; the sum is multiplied by the
// length of the ray between two planes. A ray's numbers are worked out in double precision, once, and rounded alike for
// both directions. Backward is a gather: a voxel looks at the pixels onto which the square that reaches to its
// neighbours on each plane through it is projected, and takes from those whose rays are followed across that plane
// what forward gave them. Each number has one writer, so there is one mode, and it gives the same bits every time.
//
// Axes are (z, y, x). `frames` holds twelve double precision numbers for each view, handed over as 64-bit words:
// source or direction, centre of pixel (0, 0), step from column to column and from row to row, in voxels. `squared`
// holds the six numbers (zz, zy, zx, yy, yx, xx) by which steps in voxels are squared lengths in the world.
#include "common.cuh"

#define TRACK 8    // floats of a ray
#define GLANCE 16  // floats of a view
#define TIE (1.0 - 1e-9)
// Share of a square and part of a pixel by which what a voxel may be seen on is widened.
#define SQUARE_SLACK 1e-3f
#define PIXEL_SLACK 1e-2f

// On plane k of the axis followed a ray is at `p + (k - middle) dp` in the next axis, and in the one after it at
// `q + (k - middle) dq`; `middle` is the middle of the grid.
struct Track {
    float p, dp, q, dq;
    float length;
    int first, last;  // planes; none: last < first
    int axis;
};

// Narrow [low, high] to where -1 < a + k b < size.
__device__ __forceinline__ void narrow(double a, double b, int size, double& low, double& high) {
    if (fabs(b) > 1e-9) {
        const double k0 = (-1.0 - a) / b, k1 = (size - a) / b;
        low = fmax(low, fmin(k0, k1));
        high = fmin(high, fmax(k0, k1));
    } else if (!(a > -1.0 && a < size)) {
        high = low - 1.0;
    }
}

__device__ __forceinline__ Track track_of(const int64* __restrict__ frames, const int64* __restrict__ squared, int cone,
                                          int64 view, int row, int column, int depth, int height, int width) {
    const double* f = reinterpret_cast<const double*>(frames) + 12 * view;
    const double* s = reinterpret_cast<const double*>(squared);
    double z = f[3] + column * f[6] + row * f[9];
    double y = f[4] + column * f[7] + row * f[10];
    double x = f[5] + column * f[8] + row * f[11];
    double dz = f[0], dy = f[1], dx = f[2];
    if (cone) {
        dz = z - f[0], dy = y - f[1], dx = x - f[2];
        z = f[0], y = f[1], x = f[2];
    }
    Track t;
    t.axis = 2;
    double fastest = fabs(dx);
    if (TIE * fabs(dy) > fastest) t.axis = 1, fastest = fabs(dy);
    if (TIE * fabs(dz) > fastest) t.axis = 0, fastest = fabs(dz);
    const double square = s[0] * dz * dz + s[3] * dy * dy + s[5] * dx * dx +
                          2.0 * (s[1] * dz * dy + s[2] * dz * dx + s[4] * dy * dx);
    t.length = fastest > 0.0 ? (float)(sqrt(square) / fastest) : 0.0f;
    // the axis followed, and the two after it
    const double start = t.axis == 0 ? z : t.axis == 1 ? y : x;
    const double run = t.axis == 0 ? dz : t.axis == 1 ? dy : dx;
    const double p = t.axis == 0 ? y : t.axis == 1 ? x : z, rise_p = t.axis == 0 ? dy : t.axis == 1 ? dx : dz;
    const double q = t.axis == 0 ? x : t.axis == 1 ? z : y, rise_q = t.axis == 0 ? dx : t.axis == 1 ? dz : dy;
    const int planes = t.axis == 0 ? depth : t.axis == 1 ? height : width;
    const int size_p = t.axis == 0 ? height : t.axis == 1 ? width : depth;
    const int size_q = t.axis == 0 ? width : t.axis == 1 ? depth : height;
    const double dp = rise_p / run, dq = rise_q / run, middle = 0.5 * (planes - 1);
    t.p = (float)(p + (middle - start) * dp);
    t.dp = (float)dp;
    t.q = (float)(q + (middle - start) * dq);
    t.dq = (float)dq;
    double low = 0.0, high = planes - 1.0;
    if (cone && run > 0.0) low = fmax(low, start + 1e-6);
    if (cone && run < 0.0) high = fmin(high, start - 1e-6);
    narrow(p - start * dp, dp, size_p, low, high);
    narrow(q - start * dq, dq, size_q, low, high);
    const bool met = fastest > 0.0 && low <= high;
    t.first = met ? (int)ceil(low) : 0;
    t.last = met ? (int)floor(high) : -1;
    return t;
}

// One thread for each ray: its integral.
extern "C" __global__ void __launch_bounds__(128)
    integrate_rays(const float* __restrict__ volume, int depth, int height, int width,
                   const int64* __restrict__ frames, const int64* __restrict__ squared, int cone, int rows, int columns,
                   int64 rays, float* __restrict__ out) {
    const int64 at = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= rays) return;
    const int64 line = at / columns;
    const Track t = track_of(frames, squared, cone, line / rows, (int)(line % rows), (int)(at % columns), depth, height,
                             width);
    const int64 strides[3] = {(int64)height * width, width, 1};
    const int64 along = t.axis == 0 ? strides[0] : t.axis == 1 ? strides[1] : strides[2];
    const int64 step_p = t.axis == 0 ? strides[1] : t.axis == 1 ? strides[2] : strides[0];
    const int64 step_q = t.axis == 0 ? strides[2] : t.axis == 1 ? strides[0] : strides[1];
    const int planes = t.axis == 0 ? depth : t.axis == 1 ? height : width;
    const int size_p = t.axis == 0 ? height : t.axis == 1 ? width : depth;
    const int size_q = t.axis == 0 ? width : t.axis == 1 ? depth : height;
    const float middle = 0.5f * (planes - 1);
    float total = 0.0f;
    for (int k = t.first; k <= t.last; k++) {
        const float p = fmaf((float)k - middle, t.dp, t.p), q = fmaf((float)k - middle, t.dq, t.q);
        const float low_p = floorf(p), low_q = floorf(q);
        if (!(low_p >= -1.0f && low_p < size_p && low_q >= -1.0f && low_q < size_q)) continue;
        const int i = (int)low_p, j = (int)low_q;
        const float f = p - low_p, g = q - low_q;
        const float* cell = volume + (k * along + i * step_p + j * step_q);
        const bool i0 = i >= 0, i1 = i + 1 < size_p, j0 = j >= 0, j1 = j + 1 < size_q;
        const float near = fmaf(f, i1 && j0 ? cell[step_p] : 0.0f, (1.0f - f) * (i0 && j0 ? cell[0] : 0.0f));
        const float far =
            fmaf(f, i1 && j1 ? cell[step_p + step_q] : 0.0f, (1.0f - f) * (i0 && j1 ? cell[step_q] : 0.0f));
        total += fmaf(g, far, (1.0f - g) * near);
    }
    out[at] = total * t.length;
}

// One thread for each ray: what the transpose has to know of it.
extern "C" __global__ void __launch_bounds__(128)
    trace_rays(int depth, int height, int width, const int64* __restrict__ frames, const int64* __restrict__ squared,
               int cone, int start, int rows, int columns, int64 rays, float* __restrict__ tracks) {
    const int64 at = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= rays) return;
    const int64 line = at / columns;
    const Track t = track_of(frames, squared, cone, start + line / rows, (int)(line % rows), (int)(at % columns), depth,
                             height, width);
    float4* track = reinterpret_cast<float4*>(tracks) + (TRACK / 4) * at;
    track[0] = make_float4(t.p, t.dp, t.q, t.dq);
    track[1] =
        make_float4(t.length, __int_as_float(t.first), __int_as_float(t.last), __int_as_float(t.axis));
}

// The pixels from `first` to `last` that numbers from `low` to `high` reach.
__device__ __forceinline__ void reach(float low, float high, int size, int& first, int& last) {
    const float slack = fmaf(SQUARE_SLACK, high - low, PIXEL_SLACK);
    first = (int)ceilf(fminf(fmaxf(low - slack, 0.0f), (float)size));
    last = (int)floorf(fminf(fmaxf(high + slack, -1.0f), (float)(size - 1)));
}

// One thread for each voxel adds to it what the rays of some views carry.
//
// `glances` holds for each view, with X a place from the middle of the grid: three rows of four that make of (X, 1)
// the column and the row, both times w, and w; source or direction; 1 for a cone.
extern "C" __global__ void __launch_bounds__(128)
    collect_rays(const float* __restrict__ data, const float* __restrict__ tracks, const float* __restrict__ glances,
                 int start, int views, int rows, int columns, int depth, int height, int width, int64 voxels,
                 float* __restrict__ volume) {
    const int64 at = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= voxels) return;
    const int place[3] = {(int)(at / ((int64)height * width)), (int)(at / width % height), (int)(at % width)};
    const float middle[3] = {0.5f * (depth - 1), 0.5f * (height - 1), 0.5f * (width - 1)};
    const float z = place[0] - middle[0], y = place[1] - middle[1], x = place[2] - middle[2];
    const int64 pixels = (int64)rows * columns;
    float total = 0.0f;
    for (int view = 0; view < views; view++) {
        const float* m = glances + (int64)GLANCE * (start + view);
        const bool cone = m[15] != 0.0f;
        const float ray[3] = {cone ? z - m[12] : m[12], cone ? y - m[13] : m[13], cone ? x - m[14] : m[14]};
        const float column = fmaf(m[0], z, fmaf(m[1], y, fmaf(m[2], x, m[3])));
        const float row = fmaf(m[4], z, fmaf(m[5], y, fmaf(m[6], x, m[7])));
        const float w = fmaf(m[8], z, fmaf(m[9], y, fmaf(m[10], x, m[11])));
        const float fastest = fmaxf(fabsf(ray[0]), fmaxf(fabsf(ray[1]), fabsf(ray[2])));
        // a ray within one voxel may move that much slower in this axis than the one through the voxel
        const float least = cone ? fastest - 1.01f : 0.999f * fastest;
#pragma unroll
        for (int axis = 0; axis < 3; axis++) {
            if (!(fabsf(ray[axis]) >= least)) continue;
            const int p = (axis + 1) % 3, q = (axis + 2) % 3;
            int u0 = 0, u1 = columns - 1, v0 = 0, v1 = rows - 1;
            const float wp = m[8 + p], wq = m[8 + q], spread = 1.1f * (fabsf(wp) + fabsf(wq));
            if (w + spread < 0.0f) continue;  // behind the source
            // where the square is partly behind it, every pixel may be meant
            if (w - spread > 0.0f) {
                float left = 1e30f, right = -1e30f, top = 1e30f, bottom = -1e30f;
#pragma unroll
                for (int corner = 0; corner < 4; corner++) {
                    const float a = corner & 1 ? 1.0f : -1.0f, b = corner & 2 ? 1.0f : -1.0f;
                    const float inverse = 1.0f / fmaf(a, wp, fmaf(b, wq, w));
                    const float u = fmaf(a, m[p], fmaf(b, m[q], column)) * inverse;
                    const float v = fmaf(a, m[4 + p], fmaf(b, m[4 + q], row)) * inverse;
                    left = fminf(left, u), right = fmaxf(right, u);
                    top = fminf(top, v), bottom = fmaxf(bottom, v);
                }
                reach(left, right, columns, u0, u1);
                reach(top, bottom, rows, v0, v1);
            }
            const float off = place[axis] - middle[axis];
            for (int v = v0; v <= v1; v++) {
                for (int u = u0; u <= u1; u++) {
                    const int64 pixel = (int64)v * columns + u;
                    const float4* track = reinterpret_cast<const float4*>(tracks) + (TRACK / 4) * (view * pixels + pixel);
                    const float4 b = track[1];
                    if (__float_as_int(b.w) != axis || place[axis] < __float_as_int(b.y) ||
                        place[axis] > __float_as_int(b.z))
                        continue;
                    const float4 a = track[0];
                    const float share_p = 1.0f - fabsf(fmaf(off, a.y, a.x) - place[p]);
                    const float share_q = 1.0f - fabsf(fmaf(off, a.w, a.z) - place[q]);
                    if (share_p > 0.0f && share_q > 0.0f)
                        total = fmaf(share_p * share_q, b.x * data[(start + view) * pixels + pixel], total);
                }
            }
        }
    }
    volume[at] += total;
}

// One thread for each voxel of some planes: the sum over views of what is seen there, interpolated linearly and zero
// from one pixel outside, times a factor over w squared.
//
// `glances` as above, but for the factor in the place of the source, and the column and row from the middle of the
// panel.
extern "C" __global__ void __launch_bounds__(128)
    look_back(const float* __restrict__ data, const float* __restrict__ glances, int views, int rows, int columns,
              int start, int depth, int height, int width, int64 voxels, float* __restrict__ out) {
    const int64 at = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= voxels) return;
    const float z = start + (int)(at / ((int64)height * width)) - 0.5f * (depth - 1);
    const float y = (int)(at / width % height) - 0.5f * (height - 1), x = (int)(at % width) - 0.5f * (width - 1);
    const int64 pixels = (int64)rows * columns;
    float total = 0.0f;
    for (int view = 0; view < views; view++) {
        const float* m = glances + (int64)GLANCE * view;
        const float w = fmaf(m[8], z, fmaf(m[9], y, fmaf(m[10], x, m[11])));
        if (!(w > 0.0f)) continue;  // behind the source nothing is seen
        const float inverse = 1.0f / w;
        const float u = fmaf(fmaf(m[0], z, fmaf(m[1], y, fmaf(m[2], x, m[3]))), inverse, 0.5f * (columns - 1));
        const float v = fmaf(fmaf(m[4], z, fmaf(m[5], y, fmaf(m[6], x, m[7]))), inverse, 0.5f * (rows - 1));
        const float low_u = floorf(u), low_v = floorf(v);
        if (!(low_u >= -1.0f && low_u < columns && low_v >= -1.0f && low_v < rows)) continue;
        const int i = (int)low_u, j = (int)low_v;
        const float f = u - low_u, g = v - low_v;
        const float* cell = data + (view * pixels + (int64)j * columns + i);
        const bool i0 = i >= 0, i1 = i + 1 < columns, j0 = j >= 0, j1 = j + 1 < rows;
        const float above = fmaf(f, i1 && j0 ? cell[1] : 0.0f, (1.0f - f) * (i0 && j0 ? cell[0] : 0.0f));
        const float below =
            fmaf(f, i1 && j1 ? cell[columns + 1] : 0.0f, (1.0f - f) * (i0 && j1 ? cell[columns] : 0.0f));
        total = fmaf(fmaf(g, below, (1.0f - g) * above), m[12] * inverse * inverse, total);
    }
    out[at] = total;
}
