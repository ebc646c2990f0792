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
constexpr uint8_t CONVERGED = 1, NON_FINITE = 2, DIVERGED = 3;  // state.Outcome
enum { PREDICTED, RELAXATION, LOWEST, STALLED, HELD, CARRIED };              // state.Carried, and their number
constexpr int64_t CACHED = 64 << 20;   // bytes of history that caches may hold: above those of a desktop processor

}  // namespace

extern "C" {

// Mirrors native_backend._Window, field by field. Pointers as in state.WindowState; H is double, the other
// floating-point fields are of the state's own type; G may be in bfloat16. stride: elements from one row of G or Y to
// the next. row_bytes: of an element of G.
struct Window {
    int64_t batch, window, dim, stride, scaled, adaptive, patience, row_bytes;
    double beta, tol, floor, ridge;
    double progress, far, relaxation_far, relaxation_near, near, smallest_relaxation, largest_relaxation, unpredicted,
        drop_far, drop_near, promise, stall, blow;
    void *G, *Y, *H, *row_residual, *weights, *residual, *outcome, *iterations, *tally, *carried;
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
    T *out, *Y, *row_residual, *weights, *residual;
    R* G;
    double *H, *carried;
    uint8_t* outcome;
    int32_t *iterations, *tally;

    // Row p of x, f and out; sample b of the window.
    Sample(const Window& w, int64_t p, int64_t b, const void* x_, const void* f_, void* out_)
        : x(static_cast<const T*>(x_) + p * w.dim),
          f(static_cast<const T*>(f_) + p * w.dim),
          out(static_cast<T*>(out_) + p * w.dim),
          Y(static_cast<T*>(w.Y) + b * w.window * w.stride),
          row_residual(static_cast<T*>(w.row_residual) + b * w.window),
          weights(static_cast<T*>(w.weights) + b * w.window),
          residual(static_cast<T*>(w.residual) + b),
          G(static_cast<R*>(w.G) + b * w.window * w.stride),
          H(static_cast<double*>(w.H) + b * w.window * w.window),
          carried(static_cast<double*>(w.carried) + 2 * CARRIED * b),
          outcome(static_cast<uint8_t*>(w.outcome) + b),
          iterations(static_cast<int32_t*>(w.iterations) + b),
          tally(static_cast<int32_t*>(w.tally) + 2 * b) {}
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
template <int N, bool FIRST, typename T, typename R>
inline void combine(T* __restrict o, const R* const* rows, const T* a, int64_t n) {
    const R* __restrict r0 = rows[0];
    const R* __restrict r1 = rows[N > 1 ? 1 : 0];
    const R* __restrict r2 = rows[N > 2 ? 2 : 0];
    const R* __restrict r3 = rows[N > 3 ? 3 : 0];
    const T a0 = a[0], a1 = N > 1 ? a[1] : T(0), a2 = N > 2 ? a[2] : T(0), a3 = N > 3 ? a[3] : T(0);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
        T sum = a0 * value(r0[j]);
        if (N > 1) sum += a1 * value(r1[j]);
        if (N > 2) sum += a2 * value(r2[j]);
        if (N > 3) sum += a3 * value(r3[j]);
        o[j] = FIRST ? sum : o[j] + sum;
    }
}

// o (+)= sum_i a[i] rows[i], elements [at, at + n) of the rows, any number of them; FRESH if o holds nothing yet.
template <bool FRESH, typename T, typename R>
inline void combine_all(T* o, const R* const* rows, const T* a, int64_t count, int64_t at, int64_t n) {
    for (int64_t i = 0; i < count; i += 4) {
        const R* four[4];
        const int64_t k = std::min<int64_t>(4, count - i);
        for (int64_t q = 0; q < k; ++q) four[q] = rows[i + q] + at;
        if (FRESH && i == 0) {
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
}

// Launch 1: elements [begin, end). sums[i] += g . g_i for the filled rows i, sums[m] += f . f, and where the window is
// adaptive and full, sums[m + 1] += g . (the row that g takes the place of).
template <typename T, typename R>
void push(const Window& w, const Sample<T, R>& s, int64_t slot, int64_t filled, int64_t begin, int64_t end, double* sums) {
    const T damping = static_cast<T>(1.0 - w.beta);
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
        if (w.beta == 1.0) {
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

// ||g|| / (||f|| + floor) from the squares: the largest number where only f is zero, NaN where either is not finite.
template <typename T>
T relative(double g_squared, double f_squared, double floor) {
    if (!std::isfinite(g_squared) || !std::isfinite(f_squared)) return std::numeric_limits<T>::quiet_NaN();
    const double ratio = std::sqrt(g_squared) / (std::sqrt(f_squared) + floor);
    return static_cast<T>(std::min(ratio, static_cast<double>(std::numeric_limits<T>::max())));
}

// Gauss-Jordan on (S H S + ridge I) w = S over the valid rows of n, in double: alpha, and 1 / the minimum (with the
// ridge's part) in total; false if there is no finite answer.
template <typename T, typename R>
bool solve(const Window& w, const Sample<T, R>& s, int64_t n, const bool* valid, double* alpha, double* total) {
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
    *total = 0.0;
    for (int64_t i = 0; i < n; ++i) *total += alpha[i] = S[i] * A[i][n] / A[i][i];
    bool finite = true;
    for (int64_t i = 0; i < n; ++i) {
        alpha[i] = valid[i] ? alpha[i] / *total : 0.0;
        finite = finite && std::isfinite(alpha[i]);
    }
    return finite;
}

// Between the launches: finishes the Gram row, finds the weights and what beta is multiplied by, keeps the books. False
// if the sample keeps its x. The rules of an adaptive window are those of state.py.
template <typename T, typename R>
bool finish(const Window& w, const Sample<T, R>& s, int64_t slot, int64_t filled, const double* sums, double* factor) {
    const int64_t m = w.window, steps = *s.iterations;
    for (int64_t i = 0; i < filled; ++i) s.H[slot * m + i] = s.H[i * m + slot] = sums[i];
    const T rounded = relative<T>(sums[slot], sums[m], w.floor), infinity = std::numeric_limits<T>::infinity();
    const double residual = rounded;
    const bool finite = std::isfinite(residual);
    *s.residual = rounded;
    *s.iterations += 1;
    s.row_residual[slot] = finite ? rounded : infinity;
    double* const carried = s.carried + CARRIED * (steps % 2);
    double predicted = carried[PREDICTED], relaxation = carried[RELAXATION], lowest = carried[LOWEST],
           stalled = carried[STALLED];

    const int64_t oldest = steps + 1 < m ? 0 : (steps + 1) % m;
    const bool shrinks = finite && sums[slot] < w.progress * w.progress * s.H[oldest * m + oldest];
    if (residual < w.progress * lowest) {
        lowest = residual;
        stalled = 0.0;
    } else {
        stalled += 1.0;
    }
    double held = std::min(carried[HELD] + 1.0, stalled);
    bool valid[MAX_WINDOW], kept[MAX_WINDOW], near[MAX_WINDOW];
    double alpha[MAX_WINDOW], total = 0.0;
    for (int64_t i = 0; i < filled; ++i)
        kept[i] = valid[i] = s.row_residual[i] >= T(0) && s.row_residual[i] < infinity;
    if (w.adaptive) {
        if (held >= w.stall && residual > w.blow * lowest) held = 0.0;
        s.tally[0] += held == w.stall;
        if (held >= w.stall && finite)
            for (int64_t i = 0; i < filled; ++i) kept[i] = valid[i] && i == slot;
        double gain = 0.0;
        for (int64_t i = 0; i < filled; ++i) {
            const double weight = s.weights[i];
            if (weight != 0.0) gain += weight * (i == slot ? sums[m + 1] : sums[i]);
        }
        const double share = std::sqrt(std::min(residual / w.near, 1.0));
        const double best = (w.relaxation_near + (w.relaxation_far - w.relaxation_near) * share) * relaxation *
                            (predicted - gain) / (predicted - 2.0 * gain + sums[slot]);
        if (finite && std::isfinite(best)) relaxation = std::min(std::max(best, w.smallest_relaxation), w.largest_relaxation);
    }
    bool solved = finite && solve(w, s, filled, kept, alpha, &total);
    if (w.adaptive) {
        const double limit = residual > w.far ? w.drop_far * w.drop_far : w.drop_near * w.drop_near;
        bool fewer = false;
        for (int64_t i = 0; i < filled; ++i) {
            near[i] = kept[i] && (i == slot || s.H[i * m + i] <= limit * sums[slot]);
            fewer = fewer || (kept[i] && !near[i]);
        }
        double other[MAX_WINDOW], total_of_fewer = 0.0;
        // No row may leave in a step that is not finite: it may be the one to step back to.
        if (finite && fewer && sums[slot] > w.unpredicted * w.unpredicted * predicted) {
            const bool solved_too = solve(w, s, filled, near, other, &total_of_fewer);
            if (total_of_fewer > w.promise * w.promise * total) {
                solved = finite && solved_too;
                total = total_of_fewer;
                std::copy(other, other + filled, alpha);
                std::copy(near, near + filled, kept);
            }
        }
        for (int64_t i = 0; i < filled; ++i)
            if (valid[i] && !kept[i]) s.row_residual[i] = -s.row_residual[i];
    }
    const int64_t before = (slot + m - 1) % m;
    if (!solved) {
        // The plain damped step: from the newest row, or where f is not finite from the row before it.
        std::fill(alpha, alpha + filled, 0.0);
        const int64_t row = finite ? slot : before;
        if (row < filled && valid[row]) alpha[row] = 1.0;
    }
    for (int64_t i = 0; i < filled; ++i) s.weights[i] = static_cast<T>(alpha[i]);
    *factor = solved ? relaxation : 1.0;
    double* const next = s.carried + CARRIED * ((steps + 1) % 2);
    next[PREDICTED] = solved ? 1.0 / total : std::numeric_limits<double>::infinity();
    next[RELAXATION] = relaxation;
    next[LOWEST] = lowest;
    next[STALLED] = stalled;
    next[HELD] = held;
    const bool recovers = before < filled && valid[before];
    if (rounded <= static_cast<T>(w.tol))
        *s.outcome = CONVERGED;
    else if (!finite && !recovers)
        *s.outcome = NON_FINITE;
    else if (w.patience > 0 && stalled >= static_cast<double>(w.patience) && lowest > w.far &&
             !shrinks)
        *s.outcome = DIVERGED;
    s.tally[1] += !solved && *s.outcome == 0;
    return *s.outcome == 0;
}

// Launch 2: out = sum_i alpha_i (y_i + beta (factor - 1) g_i) over elements [begin, end).
template <typename T, typename R>
void mix(const Window& w, const Sample<T, R>& s, int64_t slot, int64_t filled, double factor, int64_t begin,
         int64_t end) {
    // A row of no weight is not read: it may hold the NaN that took it out.
    const T* rows[MAX_WINDOW];
    const R* residuals[MAX_WINDOW];
    T a[MAX_WINDOW], longer[MAX_WINDOW];
    int64_t count = 0, count_longer = 0;
    const bool large = beyond_the_caches<T>(w);
    T buffer[BLOCK];
    for (int64_t i = 0; i < filled; ++i)
        if (s.weights[i] != T(0)) {
            // With beta = 1 the newest row is f, which the caches still hold (unless f is written to here).
            rows[count] = i == slot && w.beta == 1.0 && s.f != s.out ? s.f : s.Y + i * w.stride;
            a[count++] = s.weights[i];
            const T weight = static_cast<T>(w.beta * (factor - 1.0)) * s.weights[i];
            if (weight == T(0)) continue;
            residuals[count_longer] = s.G + i * w.stride;
            longer[count_longer++] = weight;
        }
    for (int64_t at = begin; at < end; at += BLOCK) {
        const int64_t n = std::min(BLOCK, end - at);
        T* const out = s.out + at;
        T* o = large ? buffer : out;
        combine_all<true>(o, rows, a, count, at, n);
        combine_all<false>(o, residuals, longer, count_longer, at, n);
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
                bool moves = !*s.outcome;
                double factor = 1.0;
                if (moves) {
                    std::fill(partial.begin(), partial.end(), 0.0);
                    for (int64_t p = 0; p < pieces; ++p)
                        push(w, s, slot, filled, p * PIECE, std::min(w.dim, (p + 1) * PIECE), &partial[p * width]);
                    add_pieces<T>(partial, pieces, width, sums.data());
                    moves = finish(w, s, slot, filled, sums.data(), &factor);
                }
                if (moves)
                    mix(w, s, slot, filled, factor, 0, w.dim);
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
        bool moves = !*s.outcome;
        double factor = 1.0;
        if (moves) {
            std::fill(partial.begin(), partial.end(), 0.0);
#pragma omp parallel for num_threads(threads) schedule(static)
            for (int64_t p = 0; p < pieces; ++p)
                push(w, s, slot, filled, p * PIECE, std::min(w.dim, (p + 1) * PIECE), &partial[p * width]);
            add_pieces<T>(partial, pieces, width, sums.data());
            moves = finish(w, s, slot, filled, sums.data(), &factor);
        }
        if (!moves) {
            keep(w, s);
            continue;
        }
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t p = 0; p < pieces; ++p) mix(w, s, slot, filled, factor, p * PIECE, std::min(w.dim, (p + 1) * PIECE));
    }
}

// residual[b] = ||f - x|| / (||f|| + floor), size[b] = ||f - x||.
template <typename T>
void residual_norm(int64_t batch, int64_t dim, const T* x, const T* f, double floor, T* residual, double* size,
                   int threads) {
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
        residual[b] = relative<T>(g_squared, f_squared, floor);
        size[b] = std::sqrt(g_squared);
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

void residual_norm_float(int64_t batch, int64_t dim, const float* x, const float* f, double floor, float* residual,
                         double* size, int32_t threads) {
    residual_norm(batch, dim, x, f, floor, residual, size, threads);
}

void residual_norm_double(int64_t batch, int64_t dim, const double* x, const double* f, double floor, double* residual,
                          double* size, int32_t threads) {
    residual_norm(batch, dim, x, f, floor, residual, size, threads);
}

}  // extern "C"
