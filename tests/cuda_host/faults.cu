// Faults on purpose, each of which a check must find; `fault` chooses it, 0 is none.
extern "C" __global__ void out_of_bounds(const float* __restrict__ values, int count, int fault,
                                         float* __restrict__ out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count + fault) out[i] = 2.0f * values[i];
}

// A sum over a block through shared memory; with the fault, the barrier between writing and reading is missing.
extern "C" __global__ void missing_barrier(const float* __restrict__ values, int count, int fault,
                                           float* __restrict__ out) {
    __shared__ float shared[64];
    const int i = threadIdx.x;
    shared[i] = i < count ? values[i] : 0.0f;
    if (!fault) __syncthreads();
    out[i] = shared[(i + 1) % blockDim.x];
}

// With the fault, only some of the threads come to the barrier.
extern "C" __global__ void divergent_barrier(const float* __restrict__ values, int count, int fault,
                                             float* __restrict__ out) {
    const int i = threadIdx.x;
    if (!fault || i < 40) __syncthreads();
    if (i < count) out[i] = values[i];
}

// With the fault, some lanes leave before a shuffle that names them.
extern "C" __global__ void divergent_shuffle(const float* __restrict__ values, int count, int fault,
                                             float* __restrict__ out) {
    const int i = threadIdx.x;
    if (fault && i >= 60) return;
    const float other = __shfl_xor_sync(0xffffffffu, i < count ? values[i] : 0.0f, 1);
    if (i < count) out[i] = other;
}

// With the fault, an offset is computed in 32 bits where 64 are needed.
extern "C" __global__ void overflow(const float* __restrict__ values, int count, int fault,
                                    float* __restrict__ out) {
    const int i = threadIdx.x;
    const int stride = fault ? 1 << 30 : 1;
    const int offset = (i + 2) * stride;
    if (i < count) out[i] = offset == -1 ? 0.0f : values[i];
}
