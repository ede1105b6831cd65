// Sorted alpha compositing of 2D Gaussians, and its adjoint.
//
// Passed in as macros: C, the channels, and TILE. A Gaussian's opacity at a pixel is
//     2^(peak + ax x^2 + ay t^2),  t = y + slope x,
// with (x, y) the offset from its centre: nothing cancels. A block of threads does a tile, each warp a patch of 8 by 4
// pixels, for the Gaussians on the tile's list from front to back. Backward goes from front to back as well: what is
// still to come of the sum over Gaussians of weight times gradient is the whole sum, known from the image, less what
// has been met, so the light that comes through is made by the same operations as in forward and every decision falls
// alike. Each tile writes its sums to places of its own: no atomics, and the same bits every time.
#include "common.cuh"

#define SPLAT_RECORD 12  // floats
#define SPLAT_SUMS 16    // six sums, then the channels
#define WARPS (TILE * TILE / WARP)
#define FIELDS (8 + C)  // of a Gaussian in shared memory
#define SPLAT_WIDENED 1e-3  // by which the squared radius is widened; the opacity itself decides which pixels count
#if C + 6 > SPLAT_SUMS
#error "more channels than a Gaussian's sums have room for"
#endif

// One thread for each Gaussian: the record, all zeros if the Gaussian is out of sight.
//
// Splats: column, row, ixx, slope, pyy, opacity. Record: column, row; ax; slope; ay; peak; half width and height of the
// support; 1.
extern "C" __global__ void prepare_splats(const float* __restrict__ splats, int height, int width, float least,
                                          int64 count, float* __restrict__ records) {
    const int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const float* s = splats + 6 * i;
    float4* record = reinterpret_cast<float4*>(records) + (SPLAT_RECORD / 4) * i;
    for (int j = 0; j < SPLAT_RECORD / 4; j++) record[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const double x = s[0], y = s[1], ixx = s[2], slope = s[3], pyy = s[4], opacity = s[5];
    if (!(opacity >= least && isfinite(x + y + slope + opacity))) return;
    if (!(fmin(ixx, pyy) > 1e-30 && fmax(ixx, pyy) < 1e30)) return;
    const double cut = 2.0 * log(opacity / least) + SPLAT_WIDENED;
    const double hx = sqrt(cut / ixx), hy = sqrt(cut * (1.0 / pyy + slope * slope / ixx));
    if (!(x + hx >= 0.0 && x - hx <= width - 1.0 && y + hy >= 0.0 && y - hy <= height - 1.0)) return;
    record[0] = make_float4((float)x, (float)y, HALF_LOG2E * (float)ixx, (float)slope);
    record[1] = make_float4(HALF_LOG2E * (float)pyy, (float)log2(opacity), (float)hx, (float)hy);
    record[2] = make_float4(1.0f, 0.0f, 0.0f, 0.0f);
}

struct SplatTiles {
    int top, bottom, left, right;  // both ends included; empty if bottom < top
};

__device__ __forceinline__ SplatTiles splat_tiles(const float* __restrict__ records, int64 i, int height, int width) {
    const float4* p = reinterpret_cast<const float4*>(records) + (SPLAT_RECORD / 4) * i;
    const float4 a = p[0], b = p[1];
    const int y0 = least_index(a.y - b.w, height), y1 = greatest_index(a.y + b.w, height);
    const int x0 = least_index(a.x - b.z, width), x1 = greatest_index(a.x + b.z, width);
    SplatTiles out = {0, -1, 0, -1};
    if (p[2].x != 0.0f && y0 <= y1 && x0 <= x1) out = {y0 / TILE, y1 / TILE, x0 / TILE, x1 / TILE};
    return out;
}

// How many tiles each Gaussian touches, from front to back.
extern "C" __global__ void count_splat_tiles(const float* __restrict__ records, const int64* __restrict__ order,
                                             int height, int width, int64 count, int64* __restrict__ touched) {
    const int64 j = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= count) return;
    const SplatTiles t = splat_tiles(records, order[j], height, width);
    touched[j] = (int64)(t.bottom - t.top + 1) * (t.right - t.left + 1);
}

// Write the tiles of each Gaussian, and its number, behind those of the Gaussians in front of it.
extern "C" __global__ void list_splat_tiles(const float* __restrict__ records, const int64* __restrict__ order,
                                            int height, int width, int64 count, const int64* __restrict__ ends,
                                            int* __restrict__ tiles, int* __restrict__ owners) {
    const int64 j = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= count) return;
    const int64 i = order[j];
    const SplatTiles t = splat_tiles(records, i, height, width);
    const int across = (width + TILE - 1) / TILE;
    int64 to = j == 0 ? 0 : ends[j - 1];
    for (int y = t.top; y <= t.bottom; y++) {
        for (int x = t.left; x <= t.right; x++) {
            tiles[to] = y * across + x;
            owners[to++] = (int)i;
        }
    }
}

// Where a thread stands: its pixel, and the first pixel of its warp's patch.
struct Stand {
    int x, y, patch_x, patch_y;
};

__device__ __forceinline__ Stand stand_of(int tile, int own, int width) {
    const int across = (width + TILE - 1) / TILE, warp = own / WARP, lane = own % WARP;
    Stand out;
    out.patch_x = tile % across * TILE + warp % (TILE / COLUMNS) * COLUMNS;
    out.patch_y = tile / across * TILE + warp / (TILE / COLUMNS) * ROWS;
    out.x = out.patch_x + lane % COLUMNS;
    out.y = out.patch_y + lane / COLUMNS;
    return out;
}

__device__ __forceinline__ void fetch(const float* __restrict__ records, const float* __restrict__ colours, int64 i,
                                      float* field) {
    const float4* p = reinterpret_cast<const float4*>(records) + (SPLAT_RECORD / 4) * i;
    const float4 a = p[0], b = p[1];
    field[0] = a.x;
    field[1] = a.y;
    field[2] = a.z;
    field[3] = a.w;
    field[4] = b.x;
    field[5] = b.y;
    field[6] = b.z;
    field[7] = b.w;
#pragma unroll
    for (int c = 0; c < C; c++) field[8 + c] = colours[i * C + c];
}

// Whether the box around a Gaussian's support meets a patch: the same for all lanes of a warp.
__device__ __forceinline__ bool meets(const float* field, const Stand& at) {
    const float x = field[0] - (float)at.patch_x, y = field[1] - (float)at.patch_y;
    return x + field[6] >= -SLACK && x - field[6] <= (float)(COLUMNS - 1) + SLACK && y + field[7] >= -SLACK &&
           y - field[7] <= (float)(ROWS - 1) + SLACK;
}

// The opacity before it is limited. Roundings are written out, so that every kernel decides alike.
__device__ __forceinline__ float opacity_at(const float* field, const Stand& at, float& x, float& t) {
    x = (float)at.x - field[0];
    t = fmaf(field[3], x, (float)at.y - field[1]);
    return exp2f(fmaf(field[2] * x, x, fmaf(field[4] * t, t, field[5])));
}

// Whether any lane of a warp says so.
__device__ __forceinline__ bool any_lane(bool own) {
    int out = own;
#pragma unroll
    for (int other = WARP / 2; other >= 1; other >>= 1) out |= __shfl_xor_sync(ALL_LANES, out, other);
    return out != 0;
}

// A block for each tile: the channels and the opacity of the sum, (C + 1, height, width), and where on its list a tile
// had no light left. Every pixel is written once.
extern "C" __global__ void __launch_bounds__(TILE* TILE)
    draw_tiles(const float* __restrict__ records, const float* __restrict__ colours, int height, int width, float least,
               float most, float dark, const int64* __restrict__ begins, const int* __restrict__ members,
               float* __restrict__ out, int64* __restrict__ used) {
    __shared__ float batch[TILE * TILE][FIELDS];
    __shared__ int lit[WARPS];
    const int tile = blockIdx.x, own = threadIdx.x;
    const Stand at = stand_of(tile, own, width);
    const bool inside = at.y < height && at.x < width;
    const int64 end = begins[tile + 1];
    int64 next = begins[tile];
    float through = inside ? 1.0f : 0.0f, sum[C];
#pragma unroll
    for (int c = 0; c < C; c++) sum[c] = 0.0f;
    for (; next < end; next += TILE * TILE) {
        const bool mine = any_lane(through >= dark);
        if (own % WARP == 0) lit[own / WARP] = mine;
        __syncthreads();  // the batch before this one has been read by all, too
        bool any = false;
#pragma unroll
        for (int w = 0; w < WARPS; w++) any |= lit[w] != 0;
        if (!any) break;
        if (next + own < end) fetch(records, colours, members[next + own], batch[own]);
        __syncthreads();
        if (!mine) continue;
        const int filled = (int)min(end - next, (int64)(TILE * TILE));
        for (int j = 0; j < filled; j++) {
            const float* field = batch[j];
            if (!meets(field, at)) continue;
            float x, t;
            const float full = opacity_at(field, at, x, t);
            if (!(full >= least && through >= dark)) continue;
            const float w = fminf(full, most) * through;
            through -= w;
#pragma unroll
            for (int c = 0; c < C; c++) sum[c] = fmaf(field[8 + c], w, sum[c]);
        }
    }
    if (own == 0) used[tile] = min(next, end);
    if (!inside) return;
    const int64 pixels = (int64)height * width;
    float* p = out + ((int64)at.y * width + at.x);
#pragma unroll
    for (int c = 0; c < C; c++) p[c * pixels] = sum[c];
    p[C * pixels] = 1.0f - through;
}

// A block for each tile gathers each Gaussian's sums over the tile's pixels: of the weights opacity times gradient of
// the opacity times 1, x, t, x^2, x t, t^2, and of weight times gradient of each channel. `places` says where they go.
extern "C" __global__ void __launch_bounds__(TILE* TILE)
    sum_tiles(const float* __restrict__ records, const float* __restrict__ colours, int height, int width, float least,
              float most, float dark, const int64* __restrict__ begins, const int* __restrict__ members,
              const int64* __restrict__ used, const int64* __restrict__ places, const float* __restrict__ out,
              const float* __restrict__ grad, float* __restrict__ sums) {
    __shared__ float batch[WARP][FIELDS];
    __shared__ float partial[WARPS][WARP][SPLAT_SUMS];
    const int tile = blockIdx.x, own = threadIdx.x, warp = own / WARP, lane = own % WARP;
    const Stand at = stand_of(tile, own, width);
    const bool inside = at.y < height && at.x < width;
    const int64 end = used[tile], pixels = (int64)height * width, pixel = (int64)at.y * width + at.x;
    // Light that comes through; gradients of the opacity and the channels; what is still to come of the whole sum.
    float through = inside ? 1.0f : 0.0f, of_sum = inside ? grad[C * pixels + pixel] : 0.0f, of_colour[C];
    float rest = inside ? of_sum * out[C * pixels + pixel] : 0.0f;
#pragma unroll
    for (int c = 0; c < C; c++) {
        of_colour[c] = inside ? grad[c * pixels + pixel] : 0.0f;
        if (inside) rest = fmaf(of_colour[c], out[c * pixels + pixel], rest);
    }
    for (int64 next = begins[tile]; next < end; next += WARP) {
        const bool mine = any_lane(through >= dark);
        __syncthreads();  // batch and partial sums before these have been read by all
        if (own < WARP && next + own < end) fetch(records, colours, members[next + own], batch[own]);
        __syncthreads();
        const int filled = (int)min(end - next, (int64)WARP);
        for (int j = 0; j < filled; j++) {
            const float* field = batch[j];
            if (!mine || !meets(field, at)) {
                if (lane < SPLAT_SUMS) partial[warp][j][lane] = 0.0f;
                continue;
            }
            float x, t, v[SPLAT_SUMS];
            const float full = opacity_at(field, at, x, t);
            const float a = full >= least && through >= dark ? fminf(full, most) : 0.0f, w = a * through;
            through -= w;
            float dot = of_sum;
#pragma unroll
            for (int c = 0; c < C; c++) {
                dot = fmaf(field[8 + c], of_colour[c], dot);
                v[6 + c] = w * of_colour[c];
            }
#pragma unroll
            for (int c = 6 + C; c < SPLAT_SUMS; c++) v[c] = 0.0f;
            dot *= w;
            rest -= dot;
            // Where the opacity is held at its limit it does not change.
            const float weight = full <= most ? dot - rest * (a / (1.0f - a)) : 0.0f;
            v[0] = weight;
            v[1] = weight * x;
            v[2] = weight * t;
            v[3] = v[1] * x;
            v[4] = v[1] * t;
            v[5] = v[2] * t;
            sum_scattered(v, lane);
            if (lane < SPLAT_SUMS) partial[warp][j][lane] = v[0];
        }
        __syncthreads();
        for (int k = own; k < filled * SPLAT_SUMS; k += TILE * TILE) {
            float total = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) total += partial[w][k / SPLAT_SUMS][k % SPLAT_SUMS];
            sums[SPLAT_SUMS * places[next + k / SPLAT_SUMS] + k % SPLAT_SUMS] = total;
        }
    }
}

// One thread for each Gaussian, from front to back: its gradients from its sums in all tiles.
extern "C" __global__ void chain_splats(const float* __restrict__ splats, const int64* __restrict__ order,
                                        const int64* __restrict__ ends, const float* __restrict__ sums, int64 count,
                                        float* __restrict__ d_splats, float* __restrict__ d_colours) {
    const int64 j = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= count) return;
    const int64 i = order[j], first = j == 0 ? 0 : ends[j - 1], last = ends[j];
    float v[6 + C];
#pragma unroll
    for (int k = 0; k < 6 + C; k++) v[k] = 0.0f;
    for (int64 at = first; at < last; at++) {
#pragma unroll
        for (int k = 0; k < 6 + C; k++) v[k] += sums[SPLAT_SUMS * at + k];
    }
    float* d = d_splats + 6 * i;
    if (first == last) {
        for (int k = 0; k < 6; k++) d[k] = 0.0f;
        for (int c = 0; c < C; c++) d_colours[i * C + c] = 0.0f;
        return;
    }
    const float* s = splats + 6 * i;
    const float down = s[4] * v[2];
    d[0] = fmaf(s[2], v[1], s[3] * down);
    d[1] = down;
    d[2] = -0.5f * v[3];
    d[3] = -s[4] * v[4];
    d[4] = -0.5f * v[5];
    d[5] = v[0] / s[5];
#pragma unroll
    for (int c = 0; c < C; c++) d_colours[i * C + c] = v[6 + c];
}
