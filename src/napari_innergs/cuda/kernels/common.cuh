// Shared by all kernels: the record of a Gaussian, the planes that cut it, sums over a warp.
//
// A Gaussian cut by the plane at t has, with u the in-plane offset from its centre there,
//     d^2 = (t - m_t)^2 / S_tt + u_r^2 / C_rr + P_cc (u_c + slope u_r)^2
// where C is the Schur complement of S_tt and P its inverse. A sum of squares: nothing cancels in float32,
// however thin or oblique the Gaussian is.
#ifndef INNERGS_COMMON
#define INNERGS_COMMON

#define WARP 32
#define ALL_LANES 0xffffffffu
// Lanes of a warp stand side by side on COLUMNS pixels of WARP / COLUMNS rows.
#define COLUMNS 8
#define ROWS (WARP / COLUMNS)
// exp(-d2 / 2) = exp2(HALF_LOG2E * d2)
#define HALF_LOG2E -0.72134752044448170f
// Pixels by which limits are widened; the squared radius itself decides which pixels count.
#define SLACK 1e-3f

typedef long long int64;

struct Gaussian {
    float t, row, column;    // mean
    float itt;               // 1 / S_tt
    float k_row, k_column;   // shear: in-plane displacement per unit of t
    float slope, pcc, icrr;  // P_cr / P_cc, P_cc, 1 / C_rr
    float reach_column;      // sqrt(C_cc): half width of the unit ellipse
    int first, last;         // planes; none for a Gaussian that is unusable or out of sight
};

#define RECORD 12  // floats

__device__ __forceinline__ Gaussian load_gaussian(const float* __restrict__ records, int64 i) {
    const float4* p = reinterpret_cast<const float4*>(records) + 3 * i;
    const float4 a = p[0], b = p[1], c = p[2];
    Gaussian g;
    g.t = a.x;
    g.row = a.y;
    g.column = a.z;
    g.itt = a.w;
    g.k_row = b.x;
    g.k_column = b.y;
    g.slope = b.z;
    g.pcc = b.w;
    g.icrr = c.x;
    g.reach_column = c.y;
    g.first = __float_as_int(c.z);
    g.last = __float_as_int(c.w);
    return g;
}

// The cut of a Gaussian by one plane.
struct Cut {
    float dt, q;        // offset along t and its share of d^2
    float row, column;  // centre
};

__device__ __forceinline__ Cut cut_gaussian(const Gaussian& g, float t) {
    Cut s;
    s.dt = t - g.t;
    s.q = s.dt * s.dt * g.itt;
    s.row = fmaf(g.k_row, s.dt, g.row);
    s.column = fmaf(g.k_column, s.dt, g.column);
    return s;
}

// Least and greatest index inside [0, size) at or beyond a limit; limits are clamped as floats, because a huge
// Gaussian would overflow an integer.
__device__ __forceinline__ int least_index(float limit, int size) {
    return (int)ceilf(fminf(fmaxf(limit - SLACK, 0.0f), (float)size));
}

__device__ __forceinline__ int greatest_index(float limit, int size) {
    return (int)floorf(fminf(fmaxf(limit + SLACK, -1.0f), (float)(size - 1)));
}

// The share of d^2 of a row: what all columns of the row have in common. One function, with the roundings
// written out, so that every kernel draws the rim alike.
__device__ __forceinline__ float row_distance(float q, float icrr, float dr) { return fmaf(icrr * dr, dr, q); }

__device__ __forceinline__ float pixel_distance(float of_row, float pcc, float dc) {
    return fmaf(pcc * dc, dc, of_row);
}

// Add up 16 numbers over the warp; afterwards v[0] of lane l holds the sum of all v[l % 16]. Each step halves
// what a lane still has to add: 16 shuffles instead of 80.
__device__ __forceinline__ void sum_scattered(float (&v)[16], int lane) {
#pragma unroll
    for (int half = 8; half >= 1; half >>= 1) {
        const bool upper = (lane & half) != 0;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            if (j >= half) continue;
            const float give = upper ? v[j] : v[j + half];
            const float keep = upper ? v[j + half] : v[j];
            v[j] = keep + __shfl_xor_sync(ALL_LANES, give, half);
        }
    }
    v[0] += __shfl_xor_sync(ALL_LANES, v[0], 16);
}
#endif
