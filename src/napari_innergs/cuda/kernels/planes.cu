// Sums of 3D Gaussians on parallel planes, and their adjoint: the kernels behind slices and voxels.
//
// Passed in as macros: C, the channels handled at once (from `amp_start` on), and TILE. Channels lie
// `channel_stride` apart in `out` and `grad`, planes `plane_stride`, so one text serves (planes, C, H, W) and
// (C, planes, H, W). The sum has no order, so nothing is sorted by depth, and backward keeps nothing for each
// pixel.
#include "common.cuh"

#define MOMENTS 9
#if C + MOMENTS > 16
#error "more channels than sum_scattered has room for"
#endif

// A warp for each Gaussian adds its pixels to `out`, which must hold zeros or what is added to.
//
// Each row of lanes walks along a row of pixels of its own, from where the ellipse begins on it to where it ends.
extern "C" __global__ void __launch_bounds__(128)
    splat(const float* __restrict__ records, const float* __restrict__ amps, int amp_stride, int amp_start,
          const float* __restrict__ t, int height, int width, float cut, int64 count, float* __restrict__ out,
          int64 plane_stride, int64 channel_stride) {
    const int64 i = ((int64)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (i >= count) return;
    const int lane = threadIdx.x % WARP;
    const Gaussian g = load_gaussian(records, i);
    if (g.first >= g.last) return;
    const float tall = sqrtf(1.0f / g.icrr), wide = sqrtf(1.0f / g.pcc);
    float amp[C];
#pragma unroll
    for (int c = 0; c < C; c++) amp[c] = amps[i * amp_stride + amp_start + c];
    for (int k = g.first; k < g.last; k++) {
        const Cut s = cut_gaussian(g, t[k]);
        if (s.q > cut) continue;
        const float radius = sqrtf(cut - s.q);
        const int y1 = greatest_index(s.row + radius * tall, height);
        for (int y = least_index(s.row - radius * tall, height) + lane / COLUMNS; y <= y1; y += ROWS) {
            const float dr = (float)y - s.row;
            const float of_row = row_distance(s.q, g.icrr, dr);
            const float centre = fmaf(-g.slope, dr, s.column);
            const float half = sqrtf(fmaxf(cut - of_row, 0.0f)) * wide;
            const int x1 = greatest_index(centre + half, width);
            float* line = out + (amp_start * channel_stride + k * plane_stride + (int64)y * width);
            for (int x = least_index(centre - half, width) + lane % COLUMNS; x <= x1; x += COLUMNS) {
                const float d2 = pixel_distance(of_row, g.pcc, (float)x - centre);
                if (d2 > cut) continue;
                const float e = exp2f(HALF_LOG2E * d2);
#pragma unroll
                for (int c = 0; c < C; c++) atomicAdd(line + c * channel_stride + x, amp[c] * e);
            }
        }
    }
}

// A block for each tile of TILE x TILE pixels of a plane sums the Gaussians on its list, in their order: no
// atomics, the same bits every time. Tiles are counted from the plane `start`; every pixel is written once.
extern "C" __global__ void __launch_bounds__(TILE* TILE)
    gather(const float* __restrict__ records, const float* __restrict__ amps, int amp_stride, int amp_start,
           const float* __restrict__ t, int start, int height, int width, float cut,
           const int64* __restrict__ begins, const int* __restrict__ members, float* __restrict__ out,
           int64 plane_stride, int64 channel_stride) {
    __shared__ float batch[TILE * TILE][6 + C];
    const int down = (height + TILE - 1) / TILE, across = (width + TILE - 1) / TILE;
    const int tile = blockIdx.x, own = threadIdx.x;
    const int k = start + tile / (down * across);
    const int y = tile / across % down * TILE + own / TILE;
    const int x = tile % across * TILE + own % TILE;
    const float at = t[k];
    const int64 end = begins[tile + 1];
    float sum[C];
#pragma unroll
    for (int c = 0; c < C; c++) sum[c] = 0.0f;
    for (int64 next = begins[tile]; next < end; next += TILE * TILE) {
        __syncthreads();  // the batch before this one has been read by all
        if (next + own < end) {
            const int64 i = members[next + own];
            const Gaussian g = load_gaussian(records, i);
            const Cut s = cut_gaussian(g, at);
            float* p = batch[own];
            p[0] = s.q;
            p[1] = s.row;
            p[2] = s.column;
            p[3] = g.slope;
            p[4] = g.icrr;
            p[5] = g.pcc;
#pragma unroll
            for (int c = 0; c < C; c++) p[6 + c] = amps[i * amp_stride + amp_start + c];
        }
        __syncthreads();
        const int filled = (int)min(end - next, (int64)(TILE * TILE));
        for (int j = 0; j < filled; j++) {
            const float* p = batch[j];
            const float dr = (float)y - p[1];
            const float of_row = row_distance(p[0], p[4], dr);
            const float centre = fmaf(-p[3], dr, p[2]);
            const float d2 = pixel_distance(of_row, p[5], (float)x - centre);
            if (d2 > cut) continue;
            const float e = exp2f(HALF_LOG2E * d2);
#pragma unroll
            for (int c = 0; c < C; c++) sum[c] = fmaf(p[6 + c], e, sum[c]);
        }
    }
    if (y >= height || x >= width) return;
    float* p = out + (amp_start * channel_stride + k * plane_stride + (int64)y * width + x);
#pragma unroll
    for (int c = 0; c < C; c++) p[c * channel_stride] = sum[c];
}

// A warp for each Gaussian gathers the moments of its weights w = value * gradient over all of its planes:
// sum w e (3 numbers) and sum w e e^T (6), with e as in `chain`, and the gradients of its amplitudes.
//
// One writer for each number, so no atomics. `add` is set for the second and later groups of channels.
//
// Five blocks to a multiprocessor leave room for 96 registers; left alone, the compiler stops at 64 and spills.
extern "C" __global__ void __launch_bounds__(128, 5)
    moments(const float* __restrict__ records, const float* __restrict__ amps, int amp_stride, int amp_start,
            const float* __restrict__ t, int height, int width, float cut, int64 count,
            const float* __restrict__ grad, int64 plane_stride, int64 channel_stride, int add,
            float* __restrict__ out, float* __restrict__ d_amps) {
    const int64 i = ((int64)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (i >= count) return;
    const int lane = threadIdx.x % WARP;
    const Gaussian g = load_gaussian(records, i);
    const float tall = sqrtf(1.0f / g.icrr), wide = sqrtf(1.0f / g.pcc);
    float amp[C], total[C];
#pragma unroll
    for (int c = 0; c < C; c++) {
        amp[c] = amps[i * amp_stride + amp_start + c];
        total[c] = 0.0f;
    }
    float vt = 0.0f, vr = 0.0f, vc = 0.0f;
    float mtt = 0.0f, mtr = 0.0f, mtc = 0.0f, mrr = 0.0f, mrc = 0.0f, mcc = 0.0f;
    for (int k = g.first; k < g.last; k++) {
        const Cut s = cut_gaussian(g, t[k]);
        if (s.q > cut) continue;
        const float radius = sqrtf(cut - s.q);
        const int y1 = greatest_index(s.row + radius * tall, height);
        float s0 = 0.0f, sr = 0.0f, sc = 0.0f;
        for (int y = least_index(s.row - radius * tall, height) + lane / COLUMNS; y <= y1; y += ROWS) {
            const float dr = (float)y - s.row;
            const float of_row = row_distance(s.q, g.icrr, dr);
            const float centre = fmaf(-g.slope, dr, s.column);
            const float half = sqrtf(fmaxf(cut - of_row, 0.0f)) * wide;
            const int x1 = greatest_index(centre + half, width);
            const float* line = grad + (amp_start * channel_stride + k * plane_stride + (int64)y * width);
            float r0 = 0.0f, r1 = 0.0f, r2 = 0.0f;
            for (int x = least_index(centre - half, width) + lane % COLUMNS; x <= x1; x += COLUMNS) {
                const float dc = (float)x - centre;
                const float d2 = pixel_distance(of_row, g.pcc, dc);
                if (d2 > cut) continue;
                const float e = exp2f(HALF_LOG2E * d2);
#if C == 1
                // The amplitude is a factor of everything: it comes in at the end.
                const float w = e * line[x];
#else
                float w = 0.0f;
#pragma unroll
                for (int c = 0; c < C; c++) {
                    const float part = e * line[c * channel_stride + x];
                    total[c] += part;
                    w = fmaf(amp[c], part, w);
                }
#endif
                const float first = w * dc;
                r0 += w;
                r1 += first;
                r2 = fmaf(first, dc, r2);
            }
            const float tilt = r0 * dr;
            s0 += r0;
            sr += tilt;
            sc += r1;
            mrr = fmaf(tilt, dr, mrr);
            mrc = fmaf(r1, dr, mrc);
            mcc += r2;
        }
        const float along = s0 * s.dt;
#if C == 1
        total[0] += s0;
#endif
        vt += along;
        vr += sr;
        vc += sc;
        mtt = fmaf(along, s.dt, mtt);
        mtr = fmaf(sr, s.dt, mtr);
        mtc = fmaf(sc, s.dt, mtc);
    }
    float v[16] = {vt, vr, vc, mtt, mtr, mtc, mrr, mrc, mcc};
#pragma unroll
    for (int c = 0; c < C; c++) v[MOMENTS + c] = total[c];
    sum_scattered(v, lane);
    if (lane < MOMENTS) {
        float* p = out + (MOMENTS * i + lane);
#if C == 1
        v[0] *= amp[0];
#endif
        *p = add ? *p + v[0] : v[0];
    } else if (lane < MOMENTS + C) {
        d_amps[i * amp_stride + amp_start + lane - MOMENTS] = v[0];
    }
}
