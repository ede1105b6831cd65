// What does not depend on the number of channels: records, lists of tiles, and the chain rule.
//
// Passed in as macros: MIN_PIVOT, SMALLEST and LARGEST (the rules by which a Gaussian is usable) and TILE.
#include "common.cuh"

// One thread for each Gaussian: invert the covariance in double precision and find the planes that it meets.
extern "C" __global__ void prepare(const float* __restrict__ means, const float* __restrict__ covs,
                                   const float* __restrict__ t, int planes, int height, int width, double cut,
                                   int64 count, float* __restrict__ records) {
    const int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const float mt = means[3 * i], mr = means[3 * i + 1], mc = means[3 * i + 2];
    const double tt = covs[6 * i], tr = covs[6 * i + 1], tc = covs[6 * i + 2];
    const double rr = covs[6 * i + 3], rc = covs[6 * i + 4], cc = covs[6 * i + 5];
    float4* record = reinterpret_cast<float4*>(records) + 3 * i;
    // No planes, unless all is well; the bits of 0.0f are those of 0.
    for (int j = 0; j < 3; j++) record[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);

    // A sum is finite only if all of its terms are. The comparisons are false for what is not a number.
    const double total = tt + tr + tc + rr + rc + cc + mt + mr + mc;
    const double least = fmin(tt, fmin(rr, cc)), most = fmax(tt, fmax(rr, cc));
    if (!(isfinite(total) && least > SMALLEST && most < LARGEST)) return;
    const double k_row = tr / tt, k_column = tc / tt;
    const double crr = rr - k_row * tr, crc = rc - k_row * tc, ccc = cc - k_column * tc;
    const double det = crr * ccc - crc * crc;
    if (!(crr > MIN_PIVOT * rr && det > MIN_PIVOT * crr * cc)) return;

    const double reach_r = sqrt(cut * rr), reach_c = sqrt(cut * cc);
    if (mr + reach_r < 0.0 || mr - reach_r > height - 1.0) return;
    if (mc + reach_c < 0.0 || mc - reach_c > width - 1.0) return;
    const double reach_t = sqrt(cut * tt);
    const float lowest = (float)(mt - reach_t), highest = (float)(mt + reach_t);
    int first = 0, last = planes;  // first plane at or above the lowest position
    while (first < last) {
        const int middle = (first + last) / 2;
        if (t[middle] < lowest)
            first = middle + 1;
        else
            last = middle;
    }
    int end = planes;  // first plane above the highest position
    last = first;
    while (last < end) {
        const int middle = (last + end) / 2;
        if (t[middle] <= highest)
            last = middle + 1;
        else
            end = middle;
    }
    record[0] = make_float4(mt, mr, mc, (float)(1.0 / tt));
    record[1] = make_float4((float)k_row, (float)k_column, (float)(-crc / crr), (float)(crr / det));
    record[2] = make_float4((float)(1.0 / crr), (float)sqrt(ccc), __int_as_float(first), __int_as_float(last));
}

struct Box {
    int top, bottom, left, right;  // tiles, both ends included; empty if bottom < top
};

__device__ __forceinline__ Box tiles_of(const Gaussian& g, float t, float cut, int height, int width) {
    const Cut s = cut_gaussian(g, t);
    const float radius = sqrtf(fmaxf(cut - s.q, 0.0f));
    const float tall = radius * sqrtf(1.0f / g.icrr), wide = radius * g.reach_column;
    const int y0 = least_index(s.row - tall, height), y1 = greatest_index(s.row + tall, height);
    const int x0 = least_index(s.column - wide, width), x1 = greatest_index(s.column + wide, width);
    Box box = {0, -1, 0, -1};
    if (s.q <= cut && y0 <= y1 && x0 <= x1) box = {y0 / TILE, y1 / TILE, x0 / TILE, x1 / TILE};
    return box;
}

// How many tiles of the planes [start, stop) each Gaussian touches.
extern "C" __global__ void count_tiles(const float* __restrict__ records, const float* __restrict__ t, int start,
                                       int stop, int height, int width, float cut, int64 count,
                                       int64* __restrict__ touched) {
    const int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const Gaussian g = load_gaussian(records, i);
    int64 sum = 0;
    for (int k = max(g.first, start); k < min(g.last, stop); k++) {
        const Box box = tiles_of(g, t[k], cut, height, width);
        sum += (int64)(box.bottom - box.top + 1) * (box.right - box.left + 1);
    }
    touched[i] = sum;
}

// Write the tiles of each Gaussian, and which Gaussian it is, behind those of the Gaussians before it.
extern "C" __global__ void list_tiles(const float* __restrict__ records, const float* __restrict__ t, int start,
                                      int stop, int height, int width, float cut, int64 count,
                                      const int64* __restrict__ ends, int* __restrict__ tiles,
                                      int* __restrict__ owners) {
    const int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const Gaussian g = load_gaussian(records, i);
    const int down = (height + TILE - 1) / TILE, across = (width + TILE - 1) / TILE;
    int64 at = i == 0 ? 0 : ends[i - 1];
    for (int k = max(g.first, start); k < min(g.last, stop); k++) {
        const Box box = tiles_of(g, t[k], cut, height, width);
        for (int y = box.top; y <= box.bottom; y++) {
            for (int x = box.left; x <= box.right; x++) {
                tiles[at] = ((k - start) * down + y) * across + x;
                owners[at++] = (int)i;
            }
        }
    }
}

// One thread for each Gaussian: the gradients from the nine moments of the weights.
//
// With d = (t, r, c) - m and e = U d = (d_t, d_r - k_r d_t, u_c + slope u_r), d^2 = e^T D e with D diagonal, so
// dm = U^T D (sum w e) and dS = U^T D (sum w e e^T) D U / 2; off-diagonal entries count both of their places.
extern "C" __global__ void chain(const float* __restrict__ records, const float* __restrict__ moments,
                                 int64 count, float* __restrict__ d_means, float* __restrict__ d_covs) {
    const int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const Gaussian g = load_gaussian(records, i);
    float* dm = d_means + 3 * i;
    float* ds = d_covs + 6 * i;
    if (g.first >= g.last) {
        for (int j = 0; j < 3; j++) dm[j] = 0.0f;
        for (int j = 0; j < 6; j++) ds[j] = 0.0f;
        return;
    }
    const float* m = moments + 9 * i;
    const float k = g.k_row, s = g.slope, h = fmaf(g.slope, g.k_row, g.k_column);
    const float vt = m[0] * g.itt, vr = m[1] * g.icrr, vc = m[2] * g.pcc;
    dm[0] = vt - k * vr - h * vc;
    dm[1] = vr + s * vc;
    dm[2] = vc;
    const float ntt = m[3] * g.itt * g.itt, ntr = m[4] * g.itt * g.icrr, ntc = m[5] * g.itt * g.pcc;
    const float nrr = m[6] * g.icrr * g.icrr, nrc = m[7] * g.icrr * g.pcc, ncc = m[8] * g.pcc * g.pcc;
    // X = N U, then U^T X.
    const float xtt = ntt - k * ntr - h * ntc, xtr = ntr + s * ntc;
    const float xrt = ntr - k * nrr - h * nrc, xrr = nrr + s * nrc;
    const float xct = ntc - k * nrc - h * ncc, xcr = nrc + s * ncc;
    ds[0] = 0.5f * (xtt - k * xrt - h * xct);
    ds[1] = xtr - k * xrr - h * xcr;
    ds[2] = xct;
    ds[3] = 0.5f * (xrr + s * xcr);
    ds[4] = xcr;
    ds[5] = 0.5f * ncc;
}
