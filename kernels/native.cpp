// The Anderson update on a CPU: one call an iteration, each row of the history read once.
//
// For every sample that is not frozen: residual row, mixed row, new Gram row and norms; the m x m system; the mix.
// Symbols and fallbacks are those of AndersonWindow (window.py). Sums are taken in
// double over BLOCK elements at a time, in one order that depends neither on the number of threads nor on the batch: the
// same input gives the same bits.
//
// Compiled by native_backend.py with -fassociative-math, so that sums vectorise, but without -ffinite-math-only: what
// is not finite must stay recognisable.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#ifdef __AVX__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t BLOCK = 2048;        // elements whose residual stays in the L1 cache while the rows pass by
constexpr int64_t PIECE = 16 * BLOCK;  // elements of one unit of work where there are fewer samples than threads
constexpr int64_t MAX_WINDOW = 64;
constexpr int64_t CACHED = 64 << 20;   // bytes of history that caches may hold: above those of a desktop processor

}  // namespace

extern "C" {

// Mirrors native_backend._Window, field by field. Pointers as in kernels.state.WindowState; H is double, the other
// floating-point fields are of the state's own type; G may be in bfloat16. stride: elements from one row of G or Y to
// the next. row_bytes: of an element of G.
struct Window {
    int64_t batch, window, dim, stride, scaled, adaptive, row_bytes;
    double beta, tol, ridge;
    double over_relaxation, largest_relaxation, far, drop_far, drop_near, unpredicted;
    void *G, *Y, *H, *row_residual, *weights, *residual, *frozen, *iterations, *row_beta, *relaxation, *combined;
};

}  // extern "C"

namespace {

// Whether a row that is written now will have left the caches by the time it is read.
template <typename T>
bool beyond_the_caches(const Window& w) {
    return w.batch * w.window * w.dim * (static_cast<int64_t>(sizeof(T)) + w.row_bytes) > CACHED;
}

// How an element of G is stored: as it is, or as the upper half of a float.
struct bfloat16 {
    uint16_t bits;
};

inline float value(float stored) { return stored; }
inline double value(double stored) { return stored; }
inline float value(bfloat16 stored) {
    const uint32_t bits = static_cast<uint32_t>(stored.bits) << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

template <typename R>
inline R stored(double number) {
    return static_cast<R>(number);
}
// To the nearest, ties to even; what is not finite stays so.
template <>
inline bfloat16 stored<bfloat16>(double number) {
    const float narrow = static_cast<float>(number);
    uint32_t bits;
    std::memcpy(&bits, &narrow, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const uint32_t not_a_number = (bits >> 16) | 0x40;
    return {static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? not_a_number : rounded)};
}

// Copies n elements past the caches: a plain store reads each line from memory before it overwrites it. Other threads
// see them after `streamed`.
template <typename T>
inline void stream(const T* source, T* target, int64_t n) {
#ifdef __AVX__
    constexpr int64_t LANES = 32 / sizeof(T);
    int64_t j = 0;
    for (; j < n && reinterpret_cast<uintptr_t>(target + j) % 32 != 0; ++j) target[j] = source[j];
    for (; j + LANES <= n; j += LANES)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(target + j),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + j)));
    for (; j < n; ++j) target[j] = source[j];
#else
    std::copy(source, source + n, target);
#endif
}

inline void streamed() {
#ifdef __AVX__
    _mm_sfence();
#endif
}

// T: type of the state. R: how an element of G is stored.
template <typename T, typename R>
struct Sample {
    const T *x, *f;
    T *out, *Y, *row_residual, *weights, *residual, *row_beta;
    R* G;
    double *H, *relaxation, *combined;
    uint8_t* frozen;
    int32_t* iterations;

    // Row p of x, f and out; sample b of the window.
    Sample(const Window& w, int64_t p, int64_t b, const void* x_, const void* f_, void* out_)
        : x(static_cast<const T*>(x_) + p * w.dim),
          f(static_cast<const T*>(f_) + p * w.dim),
          out(static_cast<T*>(out_) + p * w.dim),
          Y(static_cast<T*>(w.Y) + b * w.window * w.stride),
          row_residual(static_cast<T*>(w.row_residual) + b * w.window),
          weights(static_cast<T*>(w.weights) + b * w.window),
          residual(static_cast<T*>(w.residual) + b),
          row_beta(static_cast<T*>(w.row_beta) + b * w.window),
          G(static_cast<R*>(w.G) + b * w.window * w.stride),
          H(static_cast<double*>(w.H) + b * w.window * w.window),
          relaxation(static_cast<double*>(w.relaxation) + b),
          combined(static_cast<double*>(w.combined) + 2 * b),
          frozen(static_cast<uint8_t*>(w.frozen) + b),
          iterations(static_cast<int32_t*>(w.iterations) + b) {}
};

// sums[k] += g . rows[k], for N rows at a time: N independent chains of multiply-adds.
template <int N, typename T, typename R>
inline void dot(const T* __restrict g, const R* const* rows, int64_t n, double* const* sums) {
    const R* __restrict r0 = rows[0];
    const R* __restrict r1 = rows[N > 1 ? 1 : 0];
    const R* __restrict r2 = rows[N > 2 ? 2 : 0];
    const R* __restrict r3 = rows[N > 3 ? 3 : 0];
    double s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t j = 0; j < n; ++j) {
        const double gj = g[j];
        s0 += gj * value(r0[j]);
        if (N > 1) s1 += gj * value(r1[j]);
        if (N > 2) s2 += gj * value(r2[j]);
        if (N > 3) s3 += gj * value(r3[j]);
    }
    *sums[0] += s0;
    if (N > 1) *sums[1] += s1;
    if (N > 2) *sums[2] += s2;
    if (N > 3) *sums[3] += s3;
}

// o[j] (+)= sum_k a[k] rows[k][j], for N rows at a time.
template <int N, bool FIRST, typename T>
inline void combine(T* __restrict o, const T* const* rows, const T* a, int64_t n) {
    const T* __restrict r0 = rows[0];
    const T* __restrict r1 = rows[N > 1 ? 1 : 0];
    const T* __restrict r2 = rows[N > 2 ? 2 : 0];
    const T* __restrict r3 = rows[N > 3 ? 3 : 0];
    const T a0 = a[0], a1 = N > 1 ? a[1] : T(0), a2 = N > 2 ? a[2] : T(0), a3 = N > 3 ? a[3] : T(0);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
        T sum = a0 * r0[j];
        if (N > 1) sum += a1 * r1[j];
        if (N > 2) sum += a2 * r2[j];
        if (N > 3) sum += a3 * r3[j];
        o[j] = FIRST ? sum : o[j] + sum;
    }
}

// The mixing parameter of the row that is pushed now.
template <typename T, typename R>
inline double beta_of(const Window& w, const Sample<T, R>& s) {
    return w.beta * *s.relaxation;
}

// Launch 1: elements [begin, end). sums[i] += g . g_i for the filled rows i, sums[m] += f . f, and where the window is
// adaptive and full, sums[m + 1] += g . (the row that g takes the place of).
template <typename T, typename R>
void push(const Window& w, const Sample<T, R>& s, int64_t slot, int64_t filled, int64_t begin, int64_t end, double* sums) {
    const double beta = beta_of(w, s);
    const T damping = static_cast<T>(1.0 - beta);
    const bool large = beyond_the_caches<T>(w), outlives = w.adaptive && *s.iterations >= w.window;
    const bool in_place = std::is_same<T, R>::value && !large && !outlives;
    T buffer[BLOCK];
    R row[std::is_same<T, R>::value ? 1 : BLOCK];
    for (int64_t at = begin; at < end; at += BLOCK) {
        const int64_t n = std::min(BLOCK, end - at);
        const T* __restrict x = s.x + at;
        const T* __restrict f = s.f + at;
        R* const g_row = s.G + slot * w.stride + at;
        T* __restrict g = in_place ? reinterpret_cast<T*>(g_row) : buffer;
        T* __restrict y = s.Y + slot * w.stride + at;
        // The norms in double: squares of 1e-20 are zero in float, and a residual of zero would pass for converged.
        double gg = 0, ff = 0;
#pragma omp simd reduction(+ : gg, ff)
        for (int64_t j = 0; j < n; ++j) {
            // The Gram matrix belongs to the rows as they are stored: round first, then multiply.
            T r = f[j] - x[j];
            if constexpr (!std::is_same<T, R>::value) r = value(row[j] = stored<R>(r));
            g[j] = r;
            gg += static_cast<double>(r) * static_cast<double>(r);
            ff += static_cast<double>(f[j]) * static_cast<double>(f[j]);
        }
        // y = x + beta g written so that beta = 1 stores f itself, without rounding.
        if (beta == 1.0) {
            if (large)
                stream(f, y, n);
            else
                std::copy(f, f + n, y);
        } else {
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) y[j] = f[j] - damping * g[j];
        }
        sums[slot] += gg;
        sums[w.window] += ff;

        const R* rows[4];
        double* into[4];
        int k = 0;
        for (int64_t i = 0; i < filled; ++i) {
            if (i == slot && !outlives) continue;
            rows[k] = s.G + i * w.stride + at;
            into[k++] = sums + (i == slot ? w.window + 1 : i);
            if (k == 4) {
                dot<4>(g, rows, n, into);
                k = 0;
            }
        }
        if (k == 3) dot<3>(g, rows, n, into);
        if (k == 2) dot<2>(g, rows, n, into);
        if (k == 1) dot<1>(g, rows, n, into);
        if constexpr (!std::is_same<T, R>::value)
            std::copy(row, row + n, g_row);
        else if (large)
            stream(g, g_row, n);
        else if (!in_place)
            std::copy(g, g + n, g_row);
    }
    if (large) streamed();
}

// ||g|| / ||f|| from the squares: the largest number where only f is zero, NaN where either is not finite.
template <typename T>
T relative(double g_squared, double f_squared) {
    if (!std::isfinite(g_squared) || !std::isfinite(f_squared)) return std::numeric_limits<T>::quiet_NaN();
    const double ratio = std::sqrt(g_squared) / (std::sqrt(f_squared) + std::numeric_limits<double>::min());
    return static_cast<T>(std::min(ratio, static_cast<double>(std::numeric_limits<T>::max())));
}

// Gauss-Jordan on (S H S + ridge I) w = S over the valid rows; false if there is no finite answer. n rows, in double.
template <typename T, typename R>
bool solve(const Window& w, const Sample<T, R>& s, int64_t n, const bool* valid, double* alpha) {
    double A[MAX_WINDOW][MAX_WINDOW + 1], S[MAX_WINDOW];
    for (int64_t i = 0; i < n; ++i) {
        const double diagonal = s.H[i * w.window + i];
        S[i] = !valid[i] ? 0.0 : w.scaled ? 1.0 / std::sqrt(diagonal) : 1.0;
    }
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j)
            A[i][j] = valid[i] && valid[j] ? S[i] * s.H[i * w.window + j] * S[j] : 0.0;
        A[i][i] += valid[i] ? w.ridge : 1.0;
        A[i][n] = S[i];
    }
    for (int64_t k = 0; k < n; ++k)
        for (int64_t i = 0; i < n; ++i) {
            if (i == k) continue;
            const double factor = A[i][k] / A[k][k];
            for (int64_t j = k; j <= n; ++j) A[i][j] -= factor * A[k][j];
        }
    double total = 0.0;
    for (int64_t i = 0; i < n; ++i) total += alpha[i] = S[i] * A[i][n] / A[i][i];
    bool finite = true;
    for (int64_t i = 0; i < n; ++i) {
        alpha[i] = valid[i] ? alpha[i] / total : 0.0;
        finite = finite && std::isfinite(alpha[i]);
    }
    return finite;
}

// The rules of an adaptive window (state.py), once the newest row of H is there: rows that no longer fit leave, and the
// next row's mixing parameter follows the gain of the last step. s.weights are still those of that step.
template <typename T, typename R>
void adapt(const Window& w, const Sample<T, R>& s, int64_t slot, int64_t filled, int64_t steps, bool finite,
           const double* sums) {
    const int64_t m = w.window;
    const double combined = s.combined[steps % 2], newest = sums[slot], relaxation = *s.relaxation;
    s.row_beta[slot] = static_cast<T>(beta_of(w, s));
    if (finite && newest > w.unpredicted * w.unpredicted * combined) {
        const double limit = *s.residual > static_cast<T>(w.far) ? w.drop_far : w.drop_near;
        for (int64_t i = 0; i < filled; ++i)
            if (i != slot && s.H[i * m + i] > limit * limit * newest)
                s.row_residual[i] = std::numeric_limits<T>::infinity();
    }
    double product = 0.0;
    for (int64_t i = 0; i < filled; ++i) {
        const double weight = s.weights[i];
        if (weight != 0.0) product += weight * (i == slot ? sums[m + 1] : sums[i]);
    }
    const double best =
        w.over_relaxation * relaxation * (combined - product) / (combined - 2.0 * product + newest);
    if (std::isfinite(best))
        *s.relaxation = std::sqrt(relaxation * std::min(std::max(best, 1.0), w.largest_relaxation));
}

// Between the launches: finishes the Gram row, finds the weights, keeps the books. False if the sample keeps its x.
template <typename T, typename R>
bool finish(const Window& w, const Sample<T, R>& s, int64_t slot, int64_t filled, const double* sums) {
    const int64_t m = w.window;
    for (int64_t i = 0; i < filled; ++i) s.H[slot * m + i] = s.H[i * m + slot] = sums[i];
    const T residual = relative<T>(sums[slot], sums[m]);
    const bool finite = std::isfinite(residual);
    const T infinity = std::numeric_limits<T>::infinity();
    *s.residual = residual;
    *s.iterations += 1;
    s.row_residual[slot] = finite ? residual : infinity;

    const int64_t steps = *s.iterations - 1;
    if (w.adaptive) adapt(w, s, slot, filled, steps, finite, sums);
    bool valid[MAX_WINDOW];
    double alpha[MAX_WINDOW];
    for (int64_t i = 0; i < filled; ++i) valid[i] = s.row_residual[i] < infinity;
    const bool solved = finite && solve(w, s, filled, valid, alpha);
    const int64_t before = (slot + m - 1) % m;
    if (!solved) {
        // The plain damped step: from the newest row, or where f is not finite from the row before it.
        std::fill(alpha, alpha + filled, 0.0);
        const int64_t row = finite ? slot : before;
        if (row < filled && valid[row]) alpha[row] = 1.0;
    }
    for (int64_t i = 0; i < filled; ++i) s.weights[i] = static_cast<T>(alpha[i]);
    if (w.adaptive) {
        double combined = 0.0;
        for (int64_t i = 0; i < filled; ++i)
            for (int64_t j = 0; j < filled; ++j)
                if (valid[i] && valid[j]) combined += alpha[i] * s.H[i * m + j] * alpha[j];
        s.combined[(steps + 1) % 2] = std::max(combined, 0.0);
    }
    const bool recovers = before < filled && valid[before];
    const bool stays = residual <= static_cast<T>(w.tol) || (!finite && !recovers);
    if (stays) *s.frozen = 1;
    return !stays;
}

// Launch 2: out = sum_i alpha_i y_i over elements [begin, end).
template <typename T, typename R>
void mix(const Window& w, const Sample<T, R>& s, int64_t slot, int64_t filled, int64_t begin, int64_t end) {
    // A row of no weight is not read: it may hold the NaN that took it out.
    const T* rows[MAX_WINDOW];
    T a[MAX_WINDOW];
    int64_t count = 0;
    const bool large = beyond_the_caches<T>(w);
    T buffer[BLOCK];
    for (int64_t i = 0; i < filled; ++i)
        if (s.weights[i] != T(0)) {
            // With beta = 1 the newest row is f, which the caches still hold (unless f is written to here).
            rows[count] =
                i == slot && w.beta == 1.0 && !w.adaptive && s.f != s.out ? s.f : s.Y + i * w.stride;
            a[count++] = s.weights[i];
        }
    for (int64_t at = begin; at < end; at += BLOCK) {
        const int64_t n = std::min(BLOCK, end - at);
        T* const out = s.out + at;
        T* o = large ? buffer : out;
        for (int64_t i = 0; i < count; i += 4) {
            const T* four[4];
            const int64_t k = std::min<int64_t>(4, count - i);
            for (int64_t q = 0; q < k; ++q) four[q] = rows[i + q] + at;
            if (i == 0) {
                if (k == 4) combine<4, true>(o, four, a, n);
                if (k == 3) combine<3, true>(o, four, a, n);
                if (k == 2) combine<2, true>(o, four, a, n);
                if (k == 1) combine<1, true>(o, four, a, n);
            } else {
                if (k == 4) combine<4, false>(o, four, a + i, n);
                if (k == 3) combine<3, false>(o, four, a + i, n);
                if (k == 2) combine<2, false>(o, four, a + i, n);
                if (k == 1) combine<1, false>(o, four, a + i, n);
            }
        }
        if (large) stream(o, out, n);
    }
    if (large) streamed();
}

template <typename T, typename R>
void keep(const Window& w, const Sample<T, R>& s) {
    if (s.out != s.x) std::copy(s.x, s.x + w.dim, s.out);
}

// Elements of one sample, in pieces whose sums are added up in order.
template <typename T>
void add_pieces(const std::vector<double>& partial, int64_t pieces, int64_t width, double* sums) {
    std::fill(sums, sums + width, 0.0);
    for (int64_t p = 0; p < pieces; ++p)
        for (int64_t i = 0; i < width; ++i) sums[i] += partial[p * width + i];
}

template <typename T, typename R>
void step(const Window& w, const void* x, const void* f, void* out, const int64_t* index, int64_t count, int threads) {
    const int64_t width = w.window + 2, pieces = (w.dim + PIECE - 1) / PIECE;
    const bool by_sample = count >= 2 * threads || pieces == 1;
    if (by_sample) {
#pragma omp parallel num_threads(threads) if (threads > 1 && count > 1)
        {
            std::vector<double> partial(pieces * width), sums(width);
            const auto advance = [&](int64_t row) {
                const Sample<T, R> s(w, row, index ? index[row] : row, x, f, out);
                // A sample's own steps say which row of its ring is next.
                const int64_t slot = *s.iterations % w.window, filled = std::min<int64_t>(*s.iterations + 1, w.window);
                bool moves = !*s.frozen;
                if (moves) {
                    std::fill(partial.begin(), partial.end(), 0.0);
                    for (int64_t p = 0; p < pieces; ++p)
                        push(w, s, slot, filled, p * PIECE, std::min(w.dim, (p + 1) * PIECE), &partial[p * width]);
                    add_pieces<T>(partial, pieces, width, sums.data());
                    moves = finish(w, s, slot, filled, sums.data());
                }
                if (moves)
                    mix(w, s, slot, filled, 0, w.dim);
                else
                    keep(w, s);
            };
            if (beyond_the_caches<T>(w)) {
#pragma omp for schedule(dynamic, 1)
                for (int64_t row = 0; row < count; ++row) advance(row);
            } else {
                // A sample stays with one thread, in whose cache its history is; neighbours, whose books share cache
                // lines, stay together.
#pragma omp for schedule(static)
                for (int64_t row = 0; row < count; ++row) advance(row);
            }
        }
        return;
    }
    // Few samples: the threads share each one.
    std::vector<double> partial(pieces * width), sums(width);
    for (int64_t row = 0; row < count; ++row) {
        const Sample<T, R> s(w, row, index ? index[row] : row, x, f, out);
        const int64_t slot = *s.iterations % w.window, filled = std::min<int64_t>(*s.iterations + 1, w.window);
        bool moves = !*s.frozen;
        if (moves) {
            std::fill(partial.begin(), partial.end(), 0.0);
#pragma omp parallel for num_threads(threads) schedule(static)
            for (int64_t p = 0; p < pieces; ++p)
                push(w, s, slot, filled, p * PIECE, std::min(w.dim, (p + 1) * PIECE), &partial[p * width]);
            add_pieces<T>(partial, pieces, width, sums.data());
            moves = finish(w, s, slot, filled, sums.data());
        }
        if (!moves) {
            keep(w, s);
            continue;
        }
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t p = 0; p < pieces; ++p) mix(w, s, slot, filled, p * PIECE, std::min(w.dim, (p + 1) * PIECE));
    }
}

// residual[b] = ||f - x|| / ||f||.
template <typename T>
void residual_norm(int64_t batch, int64_t dim, const T* x, const T* f, T* residual, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && batch > 1)
    for (int64_t b = 0; b < batch; ++b) {
        double g_squared = 0.0, f_squared = 0.0;
        for (int64_t at = 0; at < dim; at += BLOCK) {
            const int64_t n = std::min(BLOCK, dim - at);
            const T* __restrict xs = x + b * dim + at;
            const T* __restrict fs = f + b * dim + at;
            double gg = 0, ff = 0;
#pragma omp simd reduction(+ : gg, ff)
            for (int64_t j = 0; j < n; ++j) {
                const double r = static_cast<double>(fs[j] - xs[j]);
                gg += r * r;
                ff += static_cast<double>(fs[j]) * static_cast<double>(fs[j]);
            }
            g_squared += gg;
            f_squared += ff;
        }
        residual[b] = relative<T>(g_squared, f_squared);
    }
}

}  // namespace

extern "C" {

// x, f, out: `count` rows, that of sample index[row], or of sample `row` where index is null.
void anderson_step_float(const Window* w, const void* x, const void* f, void* out, const int64_t* index, int64_t count,
                         int32_t threads) {
    if (w->row_bytes == sizeof(bfloat16))
        step<float, bfloat16>(*w, x, f, out, index, count, threads);
    else
        step<float, float>(*w, x, f, out, index, count, threads);
}

void anderson_step_double(const Window* w, const void* x, const void* f, void* out, const int64_t* index,
                          int64_t count, int32_t threads) {
    step<double, double>(*w, x, f, out, index, count, threads);
}

void residual_norm_float(int64_t batch, int64_t dim, const float* x, const float* f, float* residual, int32_t threads) {
    residual_norm(batch, dim, x, f, residual, threads);
}

void residual_norm_double(int64_t batch, int64_t dim, const double* x, const double* f, double* residual,
                          int32_t threads) {
    residual_norm(batch, dim, x, f, residual, threads);
}

}  // extern "C"
