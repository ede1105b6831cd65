// Line integrals of Gaussians onto flat panels, and their adjoint.
//
// Passed in as macros: C, the channels handled at once (from `amp_start` on), TILE, and the rules by which a
// Gaussian is usable (MIN_PIVOT, SMALLEST, LARGEST). For one view a Gaussian is
//     peak r^(-1/2) exp(-q / 2),  q = (x, y) K (x, y)^T / r,  r = 1 + 2 g.(x, y) + (x, y) H (x, y)^T
// with (x, y) the offset from its projected mean. Its support q <= cut is an ellipse, K - cut H about a centre of
// its own. The geometry is done in double precision, once for each Gaussian and view; pixels in single precision.
// The sum has no order, so nothing is sorted by depth, and backward keeps nothing for each pixel.
//
// `frames` holds 20 double precision numbers for each view, handed over as 64-bit words: source or direction; u; v;
// normal; the vectors that give column and row; the column and row to take off.
#include "common.cuh"

#define VIEW_RECORD 20  // floats
#define VIEW_SUMS 12
#define FRAME 20
#if C + VIEW_SUMS > 16
#error "more channels than sum_scattered has room for"
#endif

struct Vector {
    double x, y, z;
};

__device__ __forceinline__ Vector mix(double a, const Vector& p, double b, const Vector& q) {
    return {a * p.x + b * q.x, a * p.y + b * q.y, a * p.z + b * q.z};
}
__device__ __forceinline__ double dot(const Vector& p, const Vector& q) { return p.x * q.x + p.y * q.y + p.z * q.z; }
__device__ __forceinline__ Vector cross(const Vector& p, const Vector& q) {
    return {p.y * q.z - p.z * q.y, p.z * q.x - p.x * q.z, p.x * q.y - p.y * q.x};
}

struct Symmetric {
    double xx, xy, xz, yy, yz, zz;
};

__device__ __forceinline__ Vector times(const Symmetric& m, const Vector& p) {
    return {m.xx * p.x + m.xy * p.y + m.xz * p.z, m.xy * p.x + m.yy * p.y + m.yz * p.z,
            m.xz * p.x + m.yz * p.y + m.zz * p.z};
}

// Add the symmetric sum of outer products p q + s t, entries off the diagonal counted twice.
__device__ __forceinline__ void add_outer(Symmetric& m, const Vector& p, const Vector& q, const Vector& s,
                                          const Vector& t) {
    m.xx += p.x * q.x + s.x * t.x;
    m.xy += 2.0 * (p.x * q.y + s.x * t.y);
    m.xz += 2.0 * (p.x * q.z + s.x * t.z);
    m.yy += p.y * q.y + s.y * t.y;
    m.yz += 2.0 * (p.y * q.z + s.y * t.z);
    m.zz += p.z * q.z + s.z * t.z;
}

struct Shape {
    Symmetric cov, adjugate;
    double det;  // zero for a Gaussian that is unusable
};

__device__ __forceinline__ Shape load_shape(const float* __restrict__ means, const float* __restrict__ covs, int64 i) {
    const float* s = covs + 6 * i;
    const float* m = means + 3 * i;
    Shape g;
    g.cov = {s[0], s[1], s[2], s[3], s[4], s[5]};
    g.det = 0.0;
    const Symmetric& c = g.cov;
    // A sum is finite only if all of its terms are. The comparisons are false for what is not a number.
    const double total = c.xx + c.xy + c.xz + c.yy + c.yz + c.zz + m[0] + m[1] + m[2];
    const double least = fmin(c.xx, fmin(c.yy, c.zz)), most = fmax(c.xx, fmax(c.yy, c.zz));
    if (!(isfinite(total) && least > SMALLEST && most < LARGEST)) return g;
    const double ky = c.xy / c.xx, kz = c.xz / c.xx;
    const double cyy = c.yy - ky * c.xy, cyz = c.yz - ky * c.xz;
    const double det = cyy * (c.zz - kz * c.xz) - cyz * cyz;
    if (!(cyy > MIN_PIVOT * c.yy && det > MIN_PIVOT * cyy * c.zz)) return g;
    g.adjugate = {c.yy * c.zz - c.yz * c.yz, c.xz * c.yz - c.xy * c.zz, c.xy * c.yz - c.xz * c.yy,
                  c.xx * c.zz - c.xz * c.xz, c.xy * c.xz - c.xx * c.yz, c.xx * c.yy - c.xy * c.xy};
    g.det = c.xx * det;
    return g;
}

struct Frame {
    Vector p, u, v, normal, to_x, to_y;
    double x, y;
};

__device__ __forceinline__ Frame load_frame(const int64* __restrict__ frames, int64 k) {
    const double* f = reinterpret_cast<const double*>(frames) + FRAME * k;
    return {{f[0], f[1], f[2]},    {f[3], f[4], f[5]},    {f[6], f[7], f[8]}, {f[9], f[10], f[11]},
            {f[12], f[13], f[14]}, {f[15], f[16], f[17]}, f[18],              f[19]};
}

// One thread for each Gaussian and view: the record, all zeros if the Gaussian is out of sight.
//
// Record: projected mean (x, y); K (xx, xy, yy); g; H; peak for amplitude 1; centre of the support (x, y), its half
// width and height; column of its middle for each row, half width at the centre; 1.
extern "C" __global__ void __launch_bounds__(128, 4)
    project(const float* __restrict__ means, const float* __restrict__ covs, const int64* __restrict__ frames,
            int start, int views, int cone, int exact, int height, int width, double cut, double near, int64 count,
            float* __restrict__ records) {
    const int64 at = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= views * count) return;
    float4* record = reinterpret_cast<float4*>(records) + (VIEW_RECORD / 4) * at;
    for (int j = 0; j < VIEW_RECORD / 4; j++) record[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const int64 i = at % count;
    const Shape g = load_shape(means, covs, i);
    if (!(g.det > 0.0)) return;
    const Frame f = load_frame(frames, start + at / count);
    Vector ray = {means[3 * i], means[3 * i + 1], means[3 * i + 2]};
    double s = 1.0;
    if (cone) {
        ray = mix(1.0, ray, -1.0, f.p);
        s = dot(ray, f.normal);
        const double reach = sqrt(cut * fmax(dot(f.normal, times(g.cov, f.normal)), 0.0));
        if (!(s - reach > near * s)) return;
    }
    const double x0 = dot(ray, f.to_x) / s - f.x, y0 = dot(ray, f.to_y) / s - f.y;
    if (!cone) ray = f.p;
    const Vector a_ray = times(g.adjugate, ray);
    const double b = dot(ray, a_ray), z = s * s / b;
    const Vector f1 = cross(ray, f.u), f2 = cross(ray, f.v), s2 = times(g.cov, f2);
    const double kxx = z * dot(f1, times(g.cov, f1)), kxy = z * dot(f1, s2), kyy = z * dot(f2, s2);
    double gx = 0.0, gy = 0.0, hxx = 0.0, hxy = 0.0, hyy = 0.0, peak = sqrt(6.283185307179586 * g.det / b);
    if (cone && exact) {
        const Vector av = times(g.adjugate, f.v);
        peak *= s;
        gx = s / b * dot(a_ray, f.u);
        gy = s / b * dot(a_ray, f.v);
        hxx = z * dot(f.u, times(g.adjugate, f.u));
        hxy = z * dot(f.u, av);
        hyy = z * dot(f.v, av);
    } else {
        peak *= sqrt(dot(ray, ray));
    }
    if (!(fmin(kxx, kyy) > SMALLEST && fmax(kxx, kyy) < LARGEST && isfinite(x0 + y0))) return;
    // The support is (x, y) M (x, y)^T - 2 cut g.(x, y) <= cut with M = K - cut H.
    const double mxx = kxx - cut * hxx, mxy = kxy - cut * hxy, myy = kyy - cut * hyy;
    const double det = mxx * myy - mxy * mxy;
    if (!(mxx > 0.0 && det > 1e-12 * mxx * myy)) return;
    double ex = cut * (myy * gx - mxy * gy) / det, ey = cut * (mxx * gy - mxy * gx) / det;
    const double r2 = cut * (1.0 + gx * ex + gy * ey);
    ex += x0;
    ey += y0;
    const double hx = sqrt(r2 * myy / det), hy = sqrt(r2 * mxx / det);
    if (!(ex + hx >= 0.0 && ex - hx <= width - 1.0 && ey + hy >= 0.0 && ey - hy <= height - 1.0)) return;
    record[0] = make_float4((float)x0, (float)y0, (float)kxx, (float)kxy);
    record[1] = make_float4((float)kyy, (float)gx, (float)gy, (float)hxx);
    record[2] = make_float4((float)hxy, (float)hyy, (float)peak, (float)ex);
    record[3] = make_float4((float)ey, (float)hx, (float)hy, (float)(-mxy / mxx));
    record[4] = make_float4((float)sqrt(r2 / mxx), 1.0f, 0.0f, 0.0f);
}

struct Shadow {
    float x, y, kxx, kxy, kyy, gx, gy, hxx, hxy, hyy, peak;
    float ex, ey, hx, hy, slope, half;
    bool seen;
};

__device__ __forceinline__ Shadow load_shadow(const float* __restrict__ records, int64 at) {
    const float4* p = reinterpret_cast<const float4*>(records) + (VIEW_RECORD / 4) * at;
    const float4 a = p[0], b = p[1], c = p[2], d = p[3], e = p[4];
    return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w, c.x, c.y, c.z, c.w, d.x, d.y, d.z, d.w, e.x, e.y != 0.0f};
}

struct Row {
    float y, r, r_x, q, q_x;  // offset; r and r q of the row as polynomials of x
    int x0, x1;
};

// What all pixels of a row have in common. Here and below roundings are written out, so that every kernel draws the
// rim alike.
__device__ __forceinline__ Row row_of(const Shadow& s, int row, int width) {
    Row out;
    out.y = (float)row - s.y;
    out.r = fmaf(fmaf(s.hyy, out.y, 2.0f * s.gy), out.y, 1.0f);
    out.r_x = 2.0f * fmaf(s.hxy, out.y, s.gx);
    out.q = s.kyy * out.y * out.y;
    out.q_x = 2.0f * s.kxy * out.y;
    const float off = (float)row - s.ey, share = off / s.hy;
    const float centre = fmaf(s.slope, off, s.ex), half = s.half * sqrtf(fmaxf(1.0f - share * share, 0.0f));
    out.x0 = least_index(centre - half, width);
    out.x1 = greatest_index(centre + half, width);
    return out;
}

// The value of a pixel for peak 1, its q, and r^(-1/2); false outside the support.
__device__ __forceinline__ bool pixel_of(const Shadow& s, const Row& row, int column, float cut, float& x, float& q,
                                         float& root, float& value) {
    x = (float)column - s.x;
    const float r = fmaf(fmaf(s.hxx, x, row.r_x), x, row.r);
    if (!(r > 0.0f)) return false;
    root = rsqrtf(r);
    q = fmaf(fmaf(s.kxx, x, row.q_x), x, row.q) * (root * root);
    if (!(q <= cut)) return false;
    value = root * exp2f(HALF_LOG2E * q);
    return true;
}

// A warp for each Gaussian and view adds its pixels to `out` (n, channels, height, width), which must hold zeros or
// what is added to.
extern "C" __global__ void __launch_bounds__(128)
    splat_views(const float* __restrict__ records, const float* __restrict__ amps, int channels, int amp_start,
                int start, int views, int height, int width, float cut, int64 count, float* __restrict__ out) {
    const int64 at = ((int64)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (at >= views * count) return;
    const Shadow s = load_shadow(records, at);
    if (!s.seen) return;
    const int lane = threadIdx.x % WARP;
    const int64 i = at % count, pixels = (int64)height * width;
    float* image = out + ((start + at / count) * channels + amp_start) * pixels;
    float amp[C];
#pragma unroll
    for (int c = 0; c < C; c++) amp[c] = amps[i * channels + amp_start + c] * s.peak;
    const int y1 = greatest_index(s.ey + s.hy, height);
    for (int y = least_index(s.ey - s.hy, height) + lane / COLUMNS; y <= y1; y += ROWS) {
        const Row row = row_of(s, y, width);
        float* line = image + (int64)y * width;
        for (int column = row.x0 + lane % COLUMNS; column <= row.x1; column += COLUMNS) {
            float x, q, root, value;
            if (!pixel_of(s, row, column, cut, x, q, root, value)) continue;
#pragma unroll
            for (int c = 0; c < C; c++) atomicAdd(line + c * pixels + column, amp[c] * value);
        }
    }
}

struct Tiles {
    int top, bottom, left, right;  // both ends included; empty if bottom < top
};

__device__ __forceinline__ Tiles tiles_of(const Shadow& s, int height, int width) {
    const int y0 = least_index(s.ey - s.hy, height), y1 = greatest_index(s.ey + s.hy, height);
    const int x0 = least_index(s.ex - s.hx, width), x1 = greatest_index(s.ex + s.hx, width);
    Tiles out = {0, -1, 0, -1};
    if (s.seen && y0 <= y1 && x0 <= x1) out = {y0 / TILE, y1 / TILE, x0 / TILE, x1 / TILE};
    return out;
}

// How many tiles each Gaussian touches in each view.
extern "C" __global__ void count_view_tiles(const float* __restrict__ records, int height, int width, int64 pairs,
                                            int64* __restrict__ touched) {
    const int64 at = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= pairs) return;
    const Tiles t = tiles_of(load_shadow(records, at), height, width);
    touched[at] = (int64)(t.bottom - t.top + 1) * (t.right - t.left + 1);
}

// Write the tiles of each pair, and the number of the pair, behind those of the pairs before it.
extern "C" __global__ void list_view_tiles(const float* __restrict__ records, int height, int width, int64 pairs,
                                           int64 count, const int64* __restrict__ ends, int* __restrict__ tiles,
                                           int* __restrict__ owners) {
    const int64 at = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= pairs) return;
    const Tiles t = tiles_of(load_shadow(records, at), height, width);
    const int down = (height + TILE - 1) / TILE, across = (width + TILE - 1) / TILE;
    int64 to = at == 0 ? 0 : ends[at - 1];
    for (int y = t.top; y <= t.bottom; y++) {
        for (int x = t.left; x <= t.right; x++) {
            tiles[to] = ((int)(at / count) * down + y) * across + x;
            owners[to++] = (int)at;
        }
    }
}

// A block for each tile sums the Gaussians on its list, in their order: no atomics, the same bits every time. Every
// pixel of the views is written once.
extern "C" __global__ void __launch_bounds__(TILE* TILE)
    gather_views(const float* __restrict__ records, const float* __restrict__ amps, int channels, int amp_start,
                 int start, int height, int width, float cut, int64 count, const int64* __restrict__ begins,
                 const int* __restrict__ members, float* __restrict__ out) {
    __shared__ float batch[TILE * TILE][10 + C];
    const int down = (height + TILE - 1) / TILE, across = (width + TILE - 1) / TILE;
    const int tile = blockIdx.x, own = threadIdx.x;
    const int k = tile / (down * across);
    const int y = tile / across % down * TILE + own / TILE;
    const int x = tile % across * TILE + own % TILE;
    const int64 end = begins[tile + 1];
    float sum[C];
#pragma unroll
    for (int c = 0; c < C; c++) sum[c] = 0.0f;
    for (int64 next = begins[tile]; next < end; next += TILE * TILE) {
        __syncthreads();  // the batch before this one has been read by all
        if (next + own < end) {
            const int64 at = members[next + own], i = at % count;
            const Shadow s = load_shadow(records, at);
            float* p = batch[own];
            p[0] = s.x;
            p[1] = s.y;
            p[2] = s.kxx;
            p[3] = s.kxy;
            p[4] = s.kyy;
            p[5] = s.gx;
            p[6] = s.gy;
            p[7] = s.hxx;
            p[8] = s.hxy;
            p[9] = s.hyy;
#pragma unroll
            for (int c = 0; c < C; c++) p[10 + c] = amps[i * channels + amp_start + c] * s.peak;
        }
        __syncthreads();
        const int filled = (int)min(end - next, (int64)(TILE * TILE));
        for (int j = 0; j < filled; j++) {
            const float* p = batch[j];
            // Only what the row and the pixel need; the limits of the row are not used.
            const Shadow s = {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], 1.0f, 0.0f, 0.0f, 1.0f, 1.0f,
                              0.0f, 1.0f, true};
            const Row row = row_of(s, y, width);
            float dx, q, root, value;
            if (!pixel_of(s, row, x, cut, dx, q, root, value)) continue;
#pragma unroll
            for (int c = 0; c < C; c++) sum[c] = fmaf(p[10 + c], value, sum[c]);
        }
    }
    if (y >= height || x >= width) return;
    const int64 pixels = (int64)height * width;
    float* p = out + ((int64)(start + k) * channels + amp_start) * pixels + ((int64)y * width + x);
#pragma unroll
    for (int c = 0; c < C; c++) p[c * pixels] = sum[c];
}

// A warp for each Gaussian and view gathers, for peak 1, its sums over pixels of the weights w = value * gradient:
// sum w; sum w / r times x, y, x^2, x y, y^2; sum w (q - 1) / (2 r) times 1, x, y, x^2, x y, y^2; and of each channel.
//
// One writer for each number, so no atomics. `add` is set for the second and later groups of channels.
extern "C" __global__ void __launch_bounds__(128, 5)
    sum_views(const float* __restrict__ records, const float* __restrict__ amps, int channels, int amp_start,
              int start, int views, int height, int width, float cut, int64 count, const float* __restrict__ grad,
              int add, float* __restrict__ sums, float* __restrict__ totals) {
    const int64 at = ((int64)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (at >= views * count) return;
    const Shadow s = load_shadow(records, at);
    if (!s.seen) return;
    const int lane = threadIdx.x % WARP;
    const int64 i = at % count, pixels = (int64)height * width;
    const float* image = grad + ((start + at / count) * channels + amp_start) * pixels;
    float amp[C], total[C];
#pragma unroll
    for (int c = 0; c < C; c++) {
        amp[c] = amps[i * channels + amp_start + c];
        total[c] = 0.0f;
    }
    float w0 = 0.0f, rx = 0.0f, ry = 0.0f, rxx = 0.0f, rxy = 0.0f, ryy = 0.0f;
    float v0 = 0.0f, vx = 0.0f, vy = 0.0f, vxx = 0.0f, vxy = 0.0f, vyy = 0.0f;
    const int y1 = greatest_index(s.ey + s.hy, height);
    for (int y = least_index(s.ey - s.hy, height) + lane / COLUMNS; y <= y1; y += ROWS) {
        const Row row = row_of(s, y, width);
        const float* line = image + (int64)y * width;
        float a0 = 0.0f, a1 = 0.0f, b0 = 0.0f, b1 = 0.0f;
        for (int column = row.x0 + lane % COLUMNS; column <= row.x1; column += COLUMNS) {
            float x, q, root, value;
            if (!pixel_of(s, row, column, cut, x, q, root, value)) continue;
            float w = 0.0f;
#pragma unroll
            for (int c = 0; c < C; c++) {
                const float part = value * line[c * pixels + column];
                total[c] += part;
                w = fmaf(amp[c], part, w);
            }
            const float wr = w * (root * root), wq = wr * fmaf(0.5f, q, -0.5f);
            const float first = wr * x, second = wq * x;
            w0 += w;
            a0 += wr;
            a1 += first;
            rxx = fmaf(first, x, rxx);
            b0 += wq;
            b1 += second;
            vxx = fmaf(second, x, vxx);
        }
        const float a = a0 * row.y, b = b0 * row.y;
        rx += a1;
        ry += a;
        rxy = fmaf(a1, row.y, rxy);
        ryy = fmaf(a, row.y, ryy);
        v0 += b0;
        vx += b1;
        vy += b;
        vxy = fmaf(b1, row.y, vxy);
        vyy = fmaf(b, row.y, vyy);
    }
    float v[16] = {w0, rx, ry, rxx, rxy, ryy, v0, vx, vy, vxx, vxy, vyy};
#pragma unroll
    for (int c = 0; c < C; c++) v[VIEW_SUMS + c] = total[c];
    sum_scattered(v, lane);
    if (lane < VIEW_SUMS) {
        float* p = sums + (VIEW_SUMS * at + lane);
        *p = add ? *p + v[0] : v[0];
    } else if (lane < VIEW_SUMS + C) {
        totals[at * channels + amp_start + lane - VIEW_SUMS] = v[0];
    }
}

// The gradients that one view of a Gaussian gives.
struct Gradient {
    Vector mean;
    Symmetric cov, adjugate;  // of the covariance itself, and of its adjugate as if it were another input
    double log_det;
    Vector p, u, v, normal, to_x, to_y;  // of the frame
    double x, y;
};

__device__ __forceinline__ Gradient pull_back(const Shape& g, const Shadow& s, const Frame& f, const Vector& mean,
                                              const float* __restrict__ sums, int cone, int exact) {
    const double peak = s.peak, w = peak * sums[0], rx = peak * sums[1], ry = peak * sums[2];
    const double kxx = s.kxx, kxy = s.kxy, kyy = s.kyy, gx = s.gx, gy = s.gy, hxx = s.hxx, hxy = s.hxy, hyy = s.hyy;
    const double b_kxx = -0.5 * peak * sums[3], b_kxy = -peak * sums[4], b_kyy = -0.5 * peak * sums[5];
    double b_x = kxx * rx + kxy * ry, b_y = kxy * rx + kyy * ry;
    const Vector none = {0.0, 0.0, 0.0};
    const Vector point = cone ? mix(1.0, mean, -1.0, f.p) : mean, ray = cone ? point : f.p;
    const double depth = cone ? dot(ray, f.normal) : 1.0;
    const Vector a_ray = times(g.adjugate, ray);
    const double ib = 1.0 / dot(ray, a_ray), z = depth * depth * ib, zs = depth * ib;
    const Vector f1 = cross(ray, f.u), f2 = cross(ray, f.v);
    const Vector s1 = times(g.cov, f1), s2 = times(g.cov, f2);

    Gradient d;
    d.cov = {0.0, 0.0, 0.0, 0.0, 0.0, 0.0};
    d.adjugate = d.cov;
    // The gradient of log z, and of log depth where it does not come in by z or by the projected mean.
    double b_z = b_kxx * kxx + b_kxy * kxy + b_kyy * kyy, b_s = 0.0, direct = 0.0;
    Vector of_g = none, of_u = none, of_v = none, q = none;
    if (cone && exact) {
        const double vx = peak * sums[7], vy = peak * sums[8], v0 = peak * sums[6];
        const double b_hxx = peak * sums[9], b_hxy = 2.0 * peak * sums[10], b_hyy = peak * sums[11];
        const double b_gx = 2.0 * vx, b_gy = 2.0 * vy, both = b_gx * gx + b_gy * gy;
        b_x -= 2.0 * (gx * v0 + hxx * vx + hxy * vy);
        b_y -= 2.0 * (gy * v0 + hxy * vx + hyy * vy);
        b_z += b_hxx * hxx + b_hxy * hxy + b_hyy * hyy + both;
        b_s = w - both;
        const Vector au = times(g.adjugate, f.u), av = times(g.adjugate, f.v);
        add_outer(d.adjugate, f.u, mix(z * b_hxx, f.u, 0.5 * z * b_hxy, f.v), f.v,
                  mix(0.5 * z * b_hxy, f.u, z * b_hyy, f.v));
        of_g = mix(zs * b_gx, au, zs * b_gy, av);
        q = mix(zs * b_gx, f.u, zs * b_gy, f.v);
        of_u = mix(1.0, mix(2.0 * z * b_hxx, au, z * b_hxy, av), zs * b_gx, a_ray);
        of_v = mix(1.0, mix(z * b_hxy, au, 2.0 * z * b_hyy, av), zs * b_gy, a_ray);
    } else {
        direct = w / dot(ray, ray);
    }
    const double b_b = -(b_z + 0.5 * w) * ib, is = 1.0 / depth;
    b_s = (b_s + 2.0 * b_z) * is;
    if (cone) b_s -= (b_x * dot(ray, f.to_x) + b_y * dot(ray, f.to_y)) * is * is;
    add_outer(d.cov, f1, mix(z * b_kxx, f1, 0.5 * z * b_kxy, f2), f2, mix(0.5 * z * b_kxy, f1, z * b_kyy, f2));
    // The symmetric part of ray q, by which b and g depend on the adjugate.
    q = mix(1.0, q, b_b, ray);
    add_outer(d.adjugate, mix(0.5, ray, 0.0, none), q, q, mix(0.5, ray, 0.0, none));
    d.log_det = 0.5 * w;
    const Vector d_f1 = mix(2.0 * z * b_kxx, s1, z * b_kxy, s2), d_f2 = mix(z * b_kxy, s1, 2.0 * z * b_kyy, s2);
    Vector d_ray = mix(1.0, cross(f.u, d_f1), 1.0, cross(f.v, d_f2));
    d_ray = mix(1.0, d_ray, 1.0, mix(2.0 * b_b, a_ray, direct, ray));
    d_ray = mix(1.0, d_ray, 1.0, of_g);
    d.mean = mix(b_x * is, f.to_x, b_y * is, f.to_y);
    if (cone) d.mean = mix(1.0, d.mean, 1.0, mix(1.0, d_ray, b_s, f.normal));
    d.p = cone ? mix(-1.0, d.mean, 0.0, none) : d_ray;
    d.u = mix(1.0, cross(d_f1, ray), 1.0, of_u);
    d.v = mix(1.0, cross(d_f2, ray), 1.0, of_v);
    d.normal = mix(cone ? b_s : 0.0, point, 0.0, none);
    d.to_x = mix(b_x * is, point, 0.0, none);
    d.to_y = mix(b_y * is, point, 0.0, none);
    d.x = -b_x;
    d.y = -b_y;
    return d;
}

// One thread for each Gaussian: the gradients of its covariance from the sums of some views, added to what is there.
// Means are a kernel of their own, because both together need more registers than leave room for enough threads.
extern "C" __global__ void __launch_bounds__(128, 4)
    chain_covs(const float* __restrict__ means, const float* __restrict__ covs, const int64* __restrict__ frames,
               const float* __restrict__ records, const float* __restrict__ sums, int start, int views, int cone,
               int exact, int64 count, float* __restrict__ d_covs) {
    const int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float* ds = d_covs + 6 * i;
#pragma unroll 1
    for (int64 at = i; at < views * count; at += count) {
        const Shadow s = load_shadow(records, at);
        if (!s.seen) continue;
        // Loaded anew in each view (which the compiler can not know to be the same), to save registers.
        const int64 j = at % count;
        const Shape g = load_shape(means, covs, j);
        const Symmetric &c = g.cov, &a = g.adjugate;
        const Vector mean = {means[3 * j], means[3 * j + 1], means[3 * j + 2]};
        const Frame f = load_frame(frames, start + at / count);
        const Gradient d = pull_back(g, s, f, mean, sums + VIEW_SUMS * at, cone, exact);
        const Symmetric& b = d.adjugate;
        const double log = d.log_det / g.det;  // the gradient of log det S is the inverse, adjugate / det
        ds[0] += (float)(d.cov.xx + b.yy * c.zz - b.yz * c.yz + b.zz * c.yy + log * a.xx);
        ds[1] += (float)(d.cov.xy - b.xy * c.zz + b.xz * c.yz + b.yz * c.xz - 2.0 * (b.zz * c.xy - log * a.xy));
        ds[2] += (float)(d.cov.xz + b.xy * c.yz - b.xz * c.yy + b.yz * c.xy - 2.0 * (b.yy * c.xz - log * a.xz));
        ds[3] += (float)(d.cov.yy + b.xx * c.zz - b.xz * c.xz + b.zz * c.xx + log * a.yy);
        ds[4] += (float)(d.cov.yz + b.xy * c.xz + b.xz * c.xy - b.yz * c.xx - 2.0 * (b.xx * c.yz - log * a.yz));
        ds[5] += (float)(d.cov.zz + b.xx * c.yy - b.xy * c.xy + b.yy * c.xx + log * a.zz);
    }
}

// One thread for each Gaussian: the gradients of its mean and amplitudes, added to what is there.
extern "C" __global__ void __launch_bounds__(128, 4)
    chain_means(const float* __restrict__ means, const float* __restrict__ covs, const int64* __restrict__ frames,
                const float* __restrict__ records, const float* __restrict__ sums, const float* __restrict__ totals,
                int start, int views, int channels, int cone, int exact, int64 count, float* __restrict__ d_means,
                float* __restrict__ d_amps) {
    const int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float* dm = d_means + 3 * i;
#pragma unroll 1
    for (int64 at = i; at < views * count; at += count) {
        const Shadow s = load_shadow(records, at);
        if (!s.seen) continue;
        const int64 j = at % count;  // as above
        const Vector mean = {means[3 * j], means[3 * j + 1], means[3 * j + 2]};
        const Frame f = load_frame(frames, start + at / count);
        const Gradient d = pull_back(load_shape(means, covs, j), s, f, mean, sums + VIEW_SUMS * at, cone, exact);
        dm[0] += (float)d.mean.x;
        dm[1] += (float)d.mean.y;
        dm[2] += (float)d.mean.z;
        for (int n = 0; n < channels; n++) d_amps[i * channels + n] += s.peak * totals[at * channels + n];
    }
}

// A warp for 32 Gaussians of one view: their share of the gradient of its frame, (views, groups, FRAME). The groups
// are added up by the caller, in their order.
extern "C" __global__ void __launch_bounds__(128, 4)
    chain_frames(const float* __restrict__ means, const float* __restrict__ covs, const int64* __restrict__ frames,
                 const float* __restrict__ records, const float* __restrict__ sums, int start, int views, int cone,
                 int exact, int64 count, float* __restrict__ out) {
    const int64 warp = ((int64)blockIdx.x * blockDim.x + threadIdx.x) / WARP, groups = (count + WARP - 1) / WARP;
    if (warp >= views * groups) return;
    const int lane = threadIdx.x % WARP;
    const int64 k = warp / groups, i = warp % groups * WARP + lane, at = k * count + i;
    float v[FRAME];
#pragma unroll
    for (int j = 0; j < FRAME; j++) v[j] = 0.0f;
    if (i < count && load_shadow(records, at).seen) {
        const Vector mean = {means[3 * i], means[3 * i + 1], means[3 * i + 2]};
        const Gradient d = pull_back(load_shape(means, covs, i), load_shadow(records, at), load_frame(frames, start + k),
                                     mean, sums + VIEW_SUMS * at, cone, exact);
        const Vector parts[6] = {d.p, d.u, d.v, d.normal, d.to_x, d.to_y};
#pragma unroll
        for (int j = 0; j < 6; j++) {
            v[3 * j] = (float)parts[j].x;
            v[3 * j + 1] = (float)parts[j].y;
            v[3 * j + 2] = (float)parts[j].z;
        }
        v[18] = (float)d.x;
        v[19] = (float)d.y;
    }
#pragma unroll
    for (int j = 0; j < FRAME; j++) {
#pragma unroll
        for (int other = WARP / 2; other >= 1; other >>= 1) v[j] += __shfl_xor_sync(ALL_LANES, v[j], other);
        if (lane == 0) out[FRAME * warp + j] = v[j];
    }
}
