// Sheared Gaussians from their parameters, and Adam, each in one pass over the Gaussians.
#include "common.cuh"

// S_tt = s^2, S_ut = s^2 k, S_uu = L L^T + s^2 k k^T; channels (w a, w).
extern "C" __global__ void shear_forward(const float* __restrict__ shear, const float* __restrict__ log_through,
                                         const float* __restrict__ cholesky, const float* __restrict__ amplitude,
                                         const float* __restrict__ log_weight, int channels, int64 count,
                                         float* __restrict__ covs, float* __restrict__ out) {
    const int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const float kr = shear[2 * i], kc = shear[2 * i + 1];
    const float tt = expf(2.0f * log_through[i]);
    const float l11 = expf(cholesky[3 * i]), l21 = cholesky[3 * i + 1], l22 = expf(cholesky[3 * i + 2]);
    float* s = covs + 6 * i;
    s[0] = tt;
    s[1] = kr * tt;
    s[2] = kc * tt;
    s[3] = l11 * l11 + kr * kr * tt;
    s[4] = l11 * l21 + kr * kc * tt;
    s[5] = l21 * l21 + l22 * l22 + kc * kc * tt;
    const float weight = expf(log_weight[i]);
    float* row = out + i * (channels + 1);
    for (int c = 0; c < channels; c++) row[c] = weight * amplitude[i * channels + c];
    row[channels] = weight;
}

extern "C" __global__ void shear_backward(
    const float* __restrict__ shear, const float* __restrict__ log_through, const float* __restrict__ cholesky,
    const float* __restrict__ amplitude, const float* __restrict__ log_weight,
    const float* __restrict__ grad_covs, const float* __restrict__ grad_out, int channels, int64 count,
    float* __restrict__ d_shear, float* __restrict__ d_through, float* __restrict__ d_cholesky,
    float* __restrict__ d_amplitude, float* __restrict__ d_weight) {
    const int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const float kr = shear[2 * i], kc = shear[2 * i + 1];
    const float tt = expf(2.0f * log_through[i]);
    const float l11 = expf(cholesky[3 * i]), l21 = cholesky[3 * i + 1], l22 = expf(cholesky[3 * i + 2]);
    const float* g = grad_covs + 6 * i;
    const float along = g[0] + kr * g[1] + kc * g[2] + kr * kr * g[3] + kr * kc * g[4] + kc * kc * g[5];
    d_through[i] = 2.0f * tt * along;
    d_shear[2 * i] = tt * (g[1] + 2.0f * kr * g[3] + kc * g[4]);
    d_shear[2 * i + 1] = tt * (g[2] + kr * g[4] + 2.0f * kc * g[5]);
    d_cholesky[3 * i] = l11 * (2.0f * l11 * g[3] + l21 * g[4]);
    d_cholesky[3 * i + 1] = l11 * g[4] + 2.0f * l21 * g[5];
    d_cholesky[3 * i + 2] = 2.0f * l22 * l22 * g[5];
    const float weight = expf(log_weight[i]);
    const float* row = grad_out + i * (channels + 1);
    float total = row[channels];
    for (int c = 0; c < channels; c++) {
        total += amplitude[i * channels + c] * row[c];
        d_amplitude[i * channels + c] = weight * row[c];
    }
    d_weight[i] = weight * total;
}

// One step of Adam (Kingma and Ba 2015) in place; `rate` holds the bias correction.
extern "C" __global__ void adam(float* __restrict__ value, const float* __restrict__ gradient,
                                float* __restrict__ first, float* __restrict__ second, float beta1, float beta2,
                                float rate, float tiny, int64 count) {
    const int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const float g = gradient[i];
    const float a = first[i] + (1.0f - beta1) * (g - first[i]);
    const float b = second[i] + (1.0f - beta2) * (g * g - second[i]);
    first[i] = a;
    second[i] = b;
    value[i] -= rate * a / (sqrtf(b) + tiny);
}
