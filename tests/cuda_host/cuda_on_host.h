// Runs unchanged CUDA kernel text on the CPU: test equipment, never a product path.
//
//     g++ -std=c++20 -include cuda_on_host.h kernels.cpp
//
// A block's threads are fibers on one core, switched by a few instructions, or by ucontext with -DHOST_UCONTEXT
// (which the address sanitizer follows). A scheduler runs every fiber until it ends or waits at a barrier or a
// warp operation, and lets a group go on only when all whom it needs wait at the same line. Whatever is stuck
// then is a divergent barrier, and is reported. With -DHOST_THREADS the threads are real ones, one block at a
// time, so that the thread sanitizer sees races in shared memory that a missing barrier leaves.
//
// Not covered: rounding of approximate instructions, weak memory order, warp operations with part of the lanes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#ifdef HOST_THREADS
#include <pthread.h>
#include <thread>
#elif !defined(__x86_64__) && !defined(HOST_UCONTEXT)
#define HOST_UCONTEXT
#endif
#ifdef HOST_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#ifdef HOST_THREADS
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

struct alignas(16) float4 {
    float x, y, z, w;
};
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static inline float __int_as_float(int value) {
    float out;
    memcpy(&out, &value, sizeof out);
    return out;
}
static inline int __float_as_int(float value) {
    int out;
    memcpy(&out, &value, sizeof out);
    return out;
}

static inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }

using std::isfinite;
template <class T>
static inline T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
static inline T max(T a, T b) {
    return a < b ? b : a;
}

static inline float atomicAdd(float* address, float value) {
    uint32_t* word = reinterpret_cast<uint32_t*>(address);
    uint32_t seen = __atomic_load_n(word, __ATOMIC_RELAXED), wanted;
    float old, sum;
    do {
        memcpy(&old, &seen, sizeof old);
        sum = old + value;
        memcpy(&wanted, &sum, sizeof wanted);
    } while (!__atomic_compare_exchange_n(word, &seen, wanted, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}

namespace host {

const int LANES = 32;
const size_t STACK = 64 << 10;

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

struct Context {
#ifdef HOST_UCONTEXT
    ucontext_t state;
#else
    void* stack_pointer = nullptr;
#endif
};

enum Wait { NONE, BLOCK, LANES_OF_WARP, ENDED };

struct Thread {
    Index index;
    int warp = 0, lane = 0;
    unsigned operations = 0;  // of the warp so far: says which of two slots is in use
    Wait wait = NONE;
    int line = 0;
    unsigned mask = 0;
    Context context;
};

struct Warp {
    uint64_t slots[2][LANES];
#ifdef HOST_THREADS
    pthread_barrier_t barrier;
#endif
};

#ifdef HOST_THREADS
static thread_local Thread* current;
static Index block, blocks, block_size;
static std::vector<Warp>* warps;
static pthread_barrier_t block_barrier;
#else
static thread_local Thread* current;
static thread_local Index block, blocks, block_size;
static thread_local std::vector<Warp>* warps;
static thread_local Context scheduler;
static thread_local void (*kernel)(void*);
static thread_local void* arguments;
#endif

static thread_local std::string failure;

// ---------------------------------------------------------------------------------------------- waiting
#ifdef HOST_THREADS

static inline void wait_for_block(int) { pthread_barrier_wait(&block_barrier); }
static inline void wait_for_warp(unsigned, int) { pthread_barrier_wait(&(*warps)[current->warp].barrier); }

#else

#ifdef HOST_UCONTEXT
static inline void change(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
#else
// Registers that a function must keep go on the stack, and the stack is exchanged.
extern "C" void host_change(void** save, void* to);
asm(R"(
.text
.local host_change
host_change:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");
static inline void change(Context& from, Context& to) { host_change(&from.stack_pointer, to.stack_pointer); }
#endif

static inline void pause(Wait reason, unsigned mask, int line) {
    Thread* own = current;
    own->wait = reason;
    own->mask = mask;
    own->line = line;
    change(own->context, scheduler);
}

static inline void wait_for_block(int line) { pause(BLOCK, 0, line); }
static inline void wait_for_warp(unsigned mask, int line) { pause(LANES_OF_WARP, mask, line); }

static void begin() {
    kernel(arguments);
    current->wait = ENDED;
    change(current->context, scheduler);
}

static void make_fiber(Context& context, char* stack) {
#ifdef HOST_UCONTEXT
    getcontext(&context.state);
    context.state.uc_stack.ss_sp = stack;
    context.state.uc_stack.ss_size = STACK;
    context.state.uc_link = nullptr;
    makecontext(&context.state, begin, 0);
#else
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + STACK) & ~uintptr_t(15));
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(begin);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    context.stack_pointer = top;
#endif
}

static void report(const std::vector<Thread>& threads, const char* what) {
    int waiting = 0, ended = 0, line = 0;
    for (const Thread& one : threads) {
        if (one.wait == ENDED) ended++;
        if (one.wait == BLOCK || one.wait == LANES_OF_WARP) {
            waiting++;
            line = one.line;
        }
    }
    failure = std::string(what) + " at line " + std::to_string(line) + ", block " + std::to_string(block.x) +
              ": " + std::to_string(waiting) + " threads wait, " + std::to_string(ended) + " have ended";
}

// Let the lanes of a warp go on if every lane that the operation names waits for the same one.
static bool release_warp(Thread* lanes, int count) {
    int first = -1;
    for (int i = 0; i < count && first < 0; i++)
        if (lanes[i].wait == LANES_OF_WARP) first = i;
    if (first < 0) return false;
    const unsigned mask = lanes[first].mask;
    for (int i = 0; i < LANES; i++) {
        if (!(mask >> i & 1)) continue;
        if (i >= count || lanes[i].wait != LANES_OF_WARP) return false;
        if (lanes[i].mask != mask || lanes[i].line != lanes[first].line) return false;
    }
    for (int i = 0; i < count; i++)
        if (mask >> i & 1) lanes[i].wait = NONE;
    return true;
}

// Let the block go on if all of its threads wait at the same line.
static bool release_block(std::vector<Thread>& threads) {
    for (const Thread& one : threads)
        if (one.wait != BLOCK || one.line != threads[0].line) return false;
    for (Thread& one : threads) one.wait = NONE;
    return true;
}

static bool run_block(std::vector<Thread>& threads) {
    const int count = (int)threads.size();
    for (;;) {
        for (int start = 0; start < count; start += LANES) {
            const int lanes = min(LANES, count - start);
            do {
                for (int i = start; i < start + lanes; i++) {
                    if (threads[i].wait != NONE) continue;
                    current = &threads[i];
                    change(scheduler, threads[i].context);
                }
            } while (release_warp(&threads[start], lanes));
        }
        bool ended = true;
        for (const Thread& one : threads) ended = ended && one.wait == ENDED;
        if (ended) return true;
        if (!release_block(threads)) {
            report(threads, "divergent barrier or warp operation");
            return false;
        }
    }
}
#endif

// ---------------------------------------------------------------------------------------------- launching
template <class Body>
const char* launch(unsigned grid, unsigned size, Body body) {
    failure.clear();
    blocks = {grid, 1, 1};
    block_size = {size, 1, 1};
    std::vector<Warp> memory((size + LANES - 1) / LANES);
    warps = &memory;
    std::vector<Thread> threads(size);
#ifdef HOST_THREADS
    pthread_barrier_init(&block_barrier, nullptr, size);
    for (size_t w = 0; w < memory.size(); w++)
        pthread_barrier_init(&memory[w].barrier, nullptr, min<size_t>(LANES, size - LANES * w));
#else
    std::vector<char> stacks(STACK * size);
    arguments = &body;
    kernel = [](void* one) { (*static_cast<Body*>(one))(); };
#endif
    for (unsigned b = 0; b < grid; b++) {
        block = {b, 0, 0};
        for (unsigned i = 0; i < size; i++) {
            threads[i] = Thread();
            threads[i].index = {i, 0, 0};
            threads[i].warp = i / LANES;
            threads[i].lane = i % LANES;
        }
#ifdef HOST_THREADS
        std::vector<std::thread> running;
        for (unsigned i = 0; i < size; i++)
            running.emplace_back([&, i] {
                current = &threads[i];
                body();
            });
        for (std::thread& one : running) one.join();
#else
#ifdef __SANITIZE_ADDRESS__
        // fibers end by being left, which leaves marks of their frames
        __asan_unpoison_memory_region(stacks.data(), stacks.size());
#endif
        for (unsigned i = 0; i < size; i++) make_fiber(threads[i].context, &stacks[STACK * i]);
        if (!run_block(threads)) return failure.c_str();
#endif
    }
    return nullptr;
}

template <class T>
static inline T exchange(unsigned mask, T value, int source, int line) {
    static_assert(sizeof(T) <= 8);
    Thread* own = current;
    uint64_t* slots = (*warps)[own->warp].slots[own->operations++ % 2];
    uint64_t word = 0;
    memcpy(&word, &value, sizeof value);
    slots[own->lane] = word;
    wait_for_warp(mask, line);
    word = slots[source];
    memcpy(&value, &word, sizeof value);
    return value;
}

}  // namespace host

#define threadIdx (host::current->index)
#define blockIdx host::block
#define blockDim host::block_size
#define gridDim host::blocks
#define __syncthreads() host::wait_for_block(__LINE__)
#define __syncwarp() host::wait_for_warp(0xffffffffu, __LINE__)
#define __shfl_xor_sync(mask, value, other) \
    host::exchange(mask, value, (host::current->lane ^ (other)) & (host::LANES - 1), __LINE__)
