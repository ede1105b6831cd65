// Small launches of every kernel with arrays of exactly the size they need, for the sanitizers.
//
// Compiled behind the kernels' text (prepare.cu, planes.cu with C, shear.cu, and where wanted xray.cu and rgb.cu with C,
// project.cu). Prints "ok" if the two forward passes agree, a transpose is one, and everything is finite.
#include <algorithm>
#include <numeric>

namespace {

using std::vector;

unsigned state = 12345;
float uniform(float low, float high) {
    state = state * 1664525u + 1013904223u;
    return low + (high - low) * (float)(state >> 8) / (float)(1 << 24);
}

void must(bool right, const char* what) {
    if (right) return;
    fprintf(stderr, "wrong: %s\n", what);
    exit(2);
}

void run(const char* error) { must(error == nullptr, error ? error : ""); }

unsigned blocks(size_t threads, unsigned block) { return (unsigned)((threads + block - 1) / block); }

bool finite(const vector<float>& values) {
    return std::all_of(values.begin(), values.end(), [](float x) { return std::isfinite(x); });
}

void planes(int channels) {
    const int n = 21, height = 19, width = 35, m = 3, block = 64;
    const float cut = 9.0f;
    vector<float> means(3 * n), covs(6 * n), amps(n * channels), t = {-1.0f, 2.5f, 4.0f};
    for (int i = 0; i < n; i++) {
        means[3 * i] = uniform(-2, 6);
        means[3 * i + 1] = uniform(-4, 23);
        means[3 * i + 2] = uniform(-4, 39);
        const float k = uniform(-1, 1), tt = uniform(0.3f, 4), l1 = uniform(0.2f, 4), l2 = uniform(0.2f, 4);
        const float s[6] = {tt, k * tt, 0, l1 * l1 + k * k * tt, l1 * k, l2 * l2 + k * k};
        std::copy(s, s + 6, &covs[6 * i]);
        for (int c = 0; c < channels; c++) amps[i * channels + c] = uniform(-1, 1);
    }
    // What is difficult: not a number, infinite, singular, negative, huge, tiny, far away.
    means[1] = NAN;
    covs[6 * 1 + 3] = INFINITY;
    const float singular[6] = {1, 0, 0, 1, 1, 1}, negative[6] = {-1, 0, 0, 1, 0, 1};
    std::copy(singular, singular + 6, &covs[6 * 2]);
    std::copy(negative, negative + 6, &covs[6 * 3]);
    for (int j : {0, 3, 5}) covs[6 * 4 + j] = 1e19f, covs[6 * 5 + j] = 1e-19f;
    covs[6 * 4 + 1] = covs[6 * 4 + 2] = covs[6 * 4 + 4] = 0;
    covs[6 * 5 + 1] = covs[6 * 5 + 2] = covs[6 * 5 + 4] = 0;
    means[3 * 6 + 2] = 1e30f;

    vector<float> records(12 * n), out(m * channels * height * width), tiled(out.size());
    const int64 plane = (int64)channels * height * width, channel = (int64)height * width;
    run(host::launch(blocks(n, block), block, [&] {
        prepare(means.data(), covs.data(), t.data(), m, height, width, cut, n, records.data());
    }));
    vector<int64> touched(n), ends(n);
    run(host::launch(blocks(n, block), block, [&] {
        count_tiles(records.data(), t.data(), 0, m, height, width, cut, n, touched.data());
    }));
    std::partial_sum(touched.begin(), touched.end(), ends.begin());
    const int tiles = m * ((height + TILE - 1) / TILE) * ((width + TILE - 1) / TILE);
    vector<int> keys(ends.back()), owners(ends.back()), order(ends.back()), members(ends.back());
    run(host::launch(blocks(n, block), block, [&] {
        list_tiles(records.data(), t.data(), 0, m, height, width, cut, n, ends.data(), keys.data(), owners.data());
    }));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return keys[a] < keys[b]; });
    vector<int64> begins(tiles + 1);
    for (int key : keys) begins[key + 1]++;
    std::partial_sum(begins.begin(), begins.end(), begins.begin());
    for (size_t i = 0; i < order.size(); i++) members[i] = owners[order[i]];

    vector<float> grad(out.size()), moment(9 * n), d_amps(n * channels), d_means(3 * n), d_covs(6 * n);
    for (float& x : grad) x = uniform(-1, 1);
    for (int start = 0; start < channels; start += C) {
        run(host::launch(blocks(WARP * n, 128), 128, [&] {
            splat(records.data(), amps.data(), channels, start, t.data(), height, width, cut, n, out.data(), plane,
                  channel);
        }));
        run(host::launch(tiles, TILE * TILE, [&] {
            gather(records.data(), amps.data(), channels, start, t.data(), 0, height, width, cut, begins.data(),
                   members.data(), tiled.data(), plane, channel);
        }));
        run(host::launch(blocks(WARP * n, 128), 128, [&] {
            moments(records.data(), amps.data(), channels, start, t.data(), height, width, cut, n, grad.data(),
                    plane, channel, start > 0, moment.data(), d_amps.data());
        }));
    }
    run(host::launch(blocks(n, block), block, [&] {
        chain(records.data(), moment.data(), n, d_means.data(), d_covs.data());
    }));
    float most = 0, apart = 0;
    for (size_t i = 0; i < out.size(); i++) {
        most = std::max(most, std::fabs(out[i]));
        apart = std::max(apart, std::fabs(out[i] - tiled[i]));
    }
    must(most > 0.1f && apart < 1e-5f * most, "the two forward passes differ");
    must(finite(out) && finite(d_means) && finite(d_amps), "something is not finite");
    must(d_means[0] == 0 && d_amps[0] == 0, "a Gaussian that is not usable got a gradient");
}

void shear() {
    const int n = 70, channels = 3, block = 32;
    vector<float> k(2 * n), through(n), cholesky(3 * n), amplitude(n * channels), weight(n);
    for (vector<float>* one : {&k, &through, &cholesky, &amplitude, &weight})
        for (float& x : *one) x = uniform(-1, 1);
    vector<float> covs(6 * n), out(n * (channels + 1)), first(2 * n), second(2 * n);
    vector<float> dk(2 * n), dt(n), dl(3 * n), da(n * channels), dw(n);
    run(host::launch(blocks(n, block), block, [&] {
        shear_forward(k.data(), through.data(), cholesky.data(), amplitude.data(), weight.data(), channels, n,
                      covs.data(), out.data());
    }));
    run(host::launch(blocks(n, block), block, [&] {
        shear_backward(k.data(), through.data(), cholesky.data(), amplitude.data(), weight.data(), covs.data(),
                       out.data(), channels, n, dk.data(), dt.data(), dl.data(), da.data(), dw.data());
    }));
    run(host::launch(blocks(2 * n, block), block, [&] {
        adam(k.data(), dk.data(), first.data(), second.data(), 0.9f, 0.99f, 0.1f, 1e-12f, 2 * n);
    }));
    must(finite(covs) && finite(dk) && finite(dt) && finite(dl) && finite(da) && finite(dw) && finite(k), "shear");
}

#ifdef VIEW_SUMS
// One view and few Gaussians where each thread is a real one, which takes long.
#ifdef HOST_THREADS
const int VIEWS = 1, SHADOWS = 13;
#else
const int VIEWS = 2, SHADOWS = 37;
#endif

void xray(int channels, int cone, int exact) {
    const int n = SHADOWS, height = 19, width = 35, m = VIEWS, block = 64;
    const float cut = 9.0f;
    vector<float> means(3 * n), covs(6 * n), amps(n * channels);
    for (float& x : means) x = uniform(-9, 9);
    for (float& x : amps) x = uniform(-1, 1);
    for (int i = 0; i < n; i++) {
        const float k = uniform(-1, 1), a = uniform(0.3f, 4), b = uniform(0.2f, 4), c = uniform(0.2f, 4);
        const float s[6] = {a, k * a, 0, b + k * k * a, 0, c};
        std::copy(s, s + 6, &covs[6 * i]);
    }
    // Not a number, infinite, singular, negative, huge, tiny, far away, at the source.
    means[1] = NAN;
    covs[6 * 1 + 3] = INFINITY;
    const float singular[6] = {1, 0, 0, 1, 1, 1}, negative[6] = {-1, 0, 0, 1, 0, 1};
    std::copy(singular, singular + 6, &covs[6 * 2]);
    std::copy(negative, negative + 6, &covs[6 * 3]);
    for (int j = 0; j < 6; j++) {
        covs[6 * 4 + j] = j == 0 || j == 3 || j == 5 ? 1e19f : 0;
        covs[6 * 5 + j] = covs[6 * 4 + j] * 1e-38f;
    }
    means[3 * 6 + 2] = 1e30f;
    means[3 * 7] = 0, means[3 * 7 + 1] = -40, means[3 * 7 + 2] = 0;
    // Two views along the axis 1: source or direction, u, v, normal, to column, to row, column and row of (0, 0).
    vector<double> frames;
    for (int k = 0; k < m; k++) {
        const double f[FRAME] = {0, cone ? -40.0 : 1.0, 0, 0, 0.1 * k, 1, 1, 0, 0, 0, 1.0 / 60, 0, 0, 0, 1, 1, 0, 0, -17, -9};
        frames.insert(frames.end(), f, f + FRAME);
    }
    vector<int64> words(frames.size());
    memcpy(words.data(), frames.data(), 8 * frames.size());
    const int pairs = m * n, down = (height + TILE - 1) / TILE, across = (width + TILE - 1) / TILE;
    vector<float> records(VIEW_RECORD * pairs), out(m * channels * height * width), tiled(out.size());
    run(host::launch(blocks(pairs, block), block, [&] {
        project(means.data(), covs.data(), words.data(), 0, m, cone, exact, height, width, cut, 0.01, n, records.data());
    }));
    vector<int64> touched(pairs), ends(pairs);
    run(host::launch(blocks(pairs, block), block,
                     [&] { count_view_tiles(records.data(), height, width, pairs, touched.data()); }));
    std::partial_sum(touched.begin(), touched.end(), ends.begin());
    vector<int> keys(ends.back()), owners(ends.back()), order(ends.back()), members(ends.back());
    run(host::launch(blocks(pairs, block), block, [&] {
        list_view_tiles(records.data(), height, width, pairs, n, ends.data(), keys.data(), owners.data());
    }));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return keys[a] < keys[b]; });
    vector<int64> begins(m * down * across + 1);
    for (int key : keys) begins[key + 1]++;
    std::partial_sum(begins.begin(), begins.end(), begins.begin());
    for (size_t i = 0; i < order.size(); i++) members[i] = owners[order[i]];

    vector<float> grad(out.size()), sums(VIEW_SUMS * pairs), totals(channels * pairs), d_means(3 * n), d_covs(6 * n);
    vector<float> d_amps(n * channels), parts(FRAME * m * ((n + 31) / 32));
    for (float& x : grad) x = uniform(-1, 1);
    for (int start = 0; start < channels; start += C) {
        run(host::launch(blocks(WARP * pairs, 128), 128, [&] {
            splat_views(records.data(), amps.data(), channels, start, 0, m, height, width, cut, n, out.data());
        }));
        run(host::launch(m * down * across, TILE * TILE, [&] {
            gather_views(records.data(), amps.data(), channels, start, 0, height, width, cut, n, begins.data(),
                         members.data(), tiled.data());
        }));
        run(host::launch(blocks(WARP * pairs, 128), 128, [&] {
            sum_views(records.data(), amps.data(), channels, start, 0, m, height, width, cut, n, grad.data(), start > 0,
                      sums.data(), totals.data());
        }));
    }
    run(host::launch(blocks(n, block), block, [&] {
        chain_covs(means.data(), covs.data(), words.data(), records.data(), sums.data(), 0, m, cone, exact, n,
                   d_covs.data());
    }));
    run(host::launch(blocks(n, block), block, [&] {
        chain_means(means.data(), covs.data(), words.data(), records.data(), sums.data(), totals.data(), 0, m, channels,
                    cone, exact, n, d_means.data(), d_amps.data());
    }));
    run(host::launch(blocks(parts.size() / FRAME * WARP, 128), 128, [&] {
        chain_frames(means.data(), covs.data(), words.data(), records.data(), sums.data(), 0, m, cone, exact, n,
                     parts.data());
    }));
    float most = 0, apart = 0;
    for (size_t i = 0; i < out.size(); i++) {
        most = std::max(most, std::fabs(out[i]));
        apart = std::max(apart, std::fabs(out[i] - tiled[i]));
    }
    must(most > 0.001f && apart < 1e-5f * most, "the two ways to draw views differ");
    must(finite(out) && finite(d_means) && finite(d_covs) && finite(d_amps) && finite(parts), "xray: not finite");
    must(d_means[0] == 0 && d_covs[6] == 0 && d_amps[0] == 0, "a Gaussian that is not usable got a gradient");
}
#endif

#ifdef SPLAT_SUMS
// One tile and two batches where each thread is a real one, which takes long.
#ifdef HOST_THREADS
const int SPLATS = 44, DOWN = 11, ACROSS = 14;
#else
const int SPLATS = 700, DOWN = 19, ACROSS = 35;
#endif

void rgb() {
    const int n = SPLATS, height = DOWN, width = ACROSS, block = 64;
    const float least = 1.0f / 255, most = 0.99f, dark = 1e-4f;
    vector<float> splats(6 * n), colours(C * n);
    for (float& x : colours) x = uniform(0, 1);
    vector<int64> order(n);
    std::iota(order.rbegin(), order.rend(), 0);
    for (int i = 0; i < n; i++) {
        const float s[6] = {uniform(-3, width + 3), uniform(-3, height + 3), uniform(0.05f, 2), uniform(-2, 2),
                            uniform(0.05f, 2), uniform(0, 1)};
        std::copy(s, s + 6, &splats[6 * i]);
    }
    // Not a number, infinite, no width, huge, faint, far away.
    splats[6 * 1] = NAN;
    splats[6 * 2 + 3] = INFINITY;
    splats[6 * 3 + 2] = INFINITY;
    splats[6 * 4 + 2] = splats[6 * 4 + 4] = 1e-25f;
    splats[6 * 5 + 5] = 0.003f;
    splats[6 * 6] = 1e30f;
    const int across = (width + TILE - 1) / TILE, tiles = (height + TILE - 1) / TILE * across;
    vector<float> records(SPLAT_RECORD * n);
    run(host::launch(blocks(n, block), block,
                     [&] { prepare_splats(splats.data(), height, width, least, n, records.data()); }));
    vector<int64> touched(n), ends(n);
    run(host::launch(blocks(n, block), block, [&] {
        count_splat_tiles(records.data(), order.data(), height, width, n, touched.data());
    }));
    std::partial_sum(touched.begin(), touched.end(), ends.begin());
    vector<int> keys(ends.back()), owners(ends.back()), members(ends.back());
    run(host::launch(blocks(n, block), block, [&] {
        list_splat_tiles(records.data(), order.data(), height, width, n, ends.data(), keys.data(), owners.data());
    }));
    vector<int64> places(ends.back()), begins(tiles + 1), used(tiles);
    std::iota(places.begin(), places.end(), 0);
    std::stable_sort(places.begin(), places.end(), [&](int64 a, int64 b) { return keys[a] < keys[b]; });
    for (int key : keys) begins[key + 1]++;
    std::partial_sum(begins.begin(), begins.end(), begins.begin());
    for (size_t i = 0; i < places.size(); i++) members[i] = owners[places[i]];

    vector<float> out((C + 1) * height * width), grad(out.size()), sums(SPLAT_SUMS * places.size());
    vector<float> d_splats(6 * n), d_colours(C * n);
    for (float& x : grad) x = uniform(-1, 1);
    run(host::launch(tiles, TILE * TILE, [&] {
        draw_tiles(records.data(), colours.data(), height, width, least, most, dark, begins.data(), members.data(),
                   out.data(), used.data());
    }));
    run(host::launch(tiles, TILE * TILE, [&] {
        sum_tiles(records.data(), colours.data(), height, width, least, most, dark, begins.data(), members.data(),
                  used.data(), places.data(), out.data(), grad.data(), sums.data());
    }));
    run(host::launch(blocks(n, block), block, [&] {
        chain_splats(splats.data(), order.data(), ends.data(), sums.data(), n, d_splats.data(), d_colours.data());
    }));
    must(*std::max_element(out.begin(), out.end()) > 0.3f, "nothing was drawn");
    must(finite(out) && finite(d_splats) && finite(d_colours), "rgb: not finite");
    for (int i : {1, 2, 3, 5, 6})
        must(d_splats[6 * i + 5] == 0 && d_colours[C * i] == 0, "a Gaussian that is not usable got a gradient");
}
#endif

#ifdef TRACK
// A panel seen from `far` voxels away, or in a parallel beam; very close, planes lie behind the source.
void project_voxels(int cone, double far) {
    const int depth = 5, height = 7, width = 9, rows = 6, columns = 8, views = 3, block = 64;
    const double squares[6] = {1, 0.1, 0, 1.2, 0, 0.8};
    vector<double> frames;
    vector<float> glances(GLANCE * views);
    for (int k = 0; k < views; k++) {
        const double c = cos(0.4 + k), s = sin(0.4 + k), t = 1.3;
        const double middle[3] = {2, 3, 4}, right[3] = {0.1, t * c, -t * s}, down[3] = {t, 0, 0.05 * t};
        const double out[3] = {0, s, c};
        double frame[12];
        for (int i = 0; i < 3; i++) {
            frame[i] = cone ? middle[i] - far * out[i] : out[i];
            frame[3 + i] = middle[i] + 6 * out[i] - 3.5 * right[i] - 2.5 * down[i];
            frame[6 + i] = right[i];
            frame[9 + i] = down[i];
        }
        frames.insert(frames.end(), frame, frame + 12);
        float* m = &glances[GLANCE * k];
        // what is not a number: every pixel is tried
        std::fill(m, m + 12, NAN);
        if (k > 0) {
            // rows of the inverse of (right, down, ray), from its minors
            double a[3][3], inverse[3][3];
            for (int i = 0; i < 3; i++) {
                a[i][0] = right[i], a[i][1] = down[i];
                a[i][2] = cone ? frame[3 + i] - frame[i] : frame[i];
            }
            double det = 0;
            for (int i = 0; i < 3; i++)
                for (int j = 0; j < 3; j++)
                    inverse[j][i] = a[(i + 1) % 3][(j + 1) % 3] * a[(i + 2) % 3][(j + 2) % 3] -
                                    a[(i + 1) % 3][(j + 2) % 3] * a[(i + 2) % 3][(j + 1) % 3];
            for (int i = 0; i < 3; i++) det += a[i][0] * inverse[0][i];
            for (int j = 0; j < 3; j++) {
                double constant = 0;
                for (int i = 0; i < 3; i++) {
                    m[4 * j + i] = (float)(inverse[j][i] / det);
                    constant += inverse[j][i] / det * (middle[i] - (cone ? frame[i] : frame[3 + i]));
                }
                m[4 * j + 3] = (float)constant;
            }
            if (!cone) m[8] = m[9] = m[10] = 0, m[11] = 1;
        }
        for (int i = 0; i < 3; i++) m[12 + i] = (float)(cone ? frame[i] - middle[i] : frame[i]);
        m[15] = (float)cone;
    }
    vector<int64> words(frames.size()), squared(6);
    memcpy(words.data(), frames.data(), sizeof(double) * frames.size());
    memcpy(squared.data(), squares, sizeof squares);
    const int64 rays = views * rows * columns, voxels = depth * height * width;
    vector<float> volume(voxels), data(rays), out(rays), tracks(TRACK * rays), back(voxels), seen(voxels);
    for (float& x : volume) x = uniform(0, 1);
    for (float& x : data) x = uniform(0, 1);
    run(host::launch(blocks(rays, block), block, [&] {
        integrate_rays(volume.data(), depth, height, width, words.data(), squared.data(), cone, rows, columns, rays,
                       out.data());
    }));
    run(host::launch(blocks(rays, block), block, [&] {
        trace_rays(depth, height, width, words.data(), squared.data(), cone, 0, rows, columns, rays, tracks.data());
    }));
    run(host::launch(blocks(voxels, block), block, [&] {
        collect_rays(data.data(), tracks.data(), glances.data(), 0, views, rows, columns, depth, height, width, voxels,
                     back.data());
    }));
    double left = 0, right = 0;
    for (int64 i = 0; i < rays; i++) left += (double)out[i] * data[i];
    for (int64 i = 0; i < voxels; i++) right += (double)volume[i] * back[i];
    must(left > 1 && fabs(left - right) < 1e-5 * left, "collect_rays is not the transpose of integrate_rays");
    // for the last kernel: pixels from the middle of the panel, and a factor
    for (int k = 0; k < views; k++) {
        float* m = &glances[GLANCE * k];
        for (int i = 0; i < 4; i++) m[i] -= 3.5f * m[8 + i], m[4 + i] -= 2.5f * m[8 + i];
        m[12] = 1;
    }
    run(host::launch(blocks(voxels, block), block, [&] {
        look_back(data.data(), glances.data(), views, rows, columns, 0, depth, height, width, voxels, seen.data());
    }));
    must(finite(seen) && *std::max_element(seen.begin(), seen.end()) > 0, "nothing is seen");
}
#endif

}  // namespace

int main() {
    planes(C);
    planes(C + 1 > 2 ? 2 * C : 2);
    shear();
#ifdef VIEW_SUMS
    xray(C, 1, 1);
#ifndef HOST_THREADS
    xray(2 * C, 0, 1);
#endif
#endif
#ifdef SPLAT_SUMS
    rgb();
#endif
#ifdef TRACK
    project_voxels(1, 3.6);
#ifndef HOST_THREADS
    project_voxels(0, 0.0);
    project_voxels(1, 30.0);
#endif
#endif
    puts("ok");
}
