// Elementary functions of vectors, to a few units in the last place: what a float32 meta-gradient needs, and float64 too.
// NaN stays NaN.
#pragma once

#include <math.h>

#include "simd.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T>
struct FloatFormat;
template <>
struct FloatFormat<float> {
    static constexpr int mantissa_bits = 23, exponent_bias = 127;
    static constexpr float rounder = 12582912.0f;                // 1.5 * 2^23: adding it rounds to a whole number
    static constexpr float ln2_high = 0.693359375f;              // few bits, so that n * ln2_high is exact
    static constexpr float ln2_low = -2.12194440e-4f;
    static constexpr float least_exp = -110.0f, most_exp = 100.0f;  // exp is 0 or infinite beyond
    static constexpr float tanh_one = 10.0f;                        // tanh is 1 from here
    static constexpr int expm1_terms = 8, log_terms = 6, log1p_terms = 9;
};
template <>
struct FloatFormat<double> {
    static constexpr int mantissa_bits = 52, exponent_bias = 1023;
    static constexpr double rounder = 6755399441055744.0;
    static constexpr double ln2_high = 6.93147180369123816490e-01;
    static constexpr double ln2_low = 1.90821492927058770002e-10;
    static constexpr double least_exp = -750.0, most_exp = 720.0;
    static constexpr double tanh_one = 20.0;
    static constexpr int expm1_terms = 14, log_terms = 12, log1p_terms = 17;
};

template <class T>
MAML_FAST_INLINE Vec<T> clamp(Vec<T> x, T low, T high) {
    x = x < all(low) ? all(low) : x;
    return x > all(high) ? all(high) : x;
}
template <class T>
MAML_FAST_INLINE Vec<T> magnitude(Vec<T> x) {
    return x < Vec<T>{} ? -x : x;
}
template <class T>
MAML_FAST_INLINE Vec<T> positive_part(Vec<T> x) {
    return x < Vec<T>{} ? Vec<T>{} : x;
}

// v where y > 0, else 0; and v where y is NaN
template <class T>
MAML_FAST_INLINE Vec<T> where_positive(Vec<T> y, Vec<T> v) {
    return y <= Vec<T>{} ? Vec<T>{} : v;
}

// 2^n for whole n in the range of normal numbers.
template <class T>
MAML_FAST_INLINE Vec<T> two_to(IntVec<T> n) {
    using F = FloatFormat<T>;
    return reinterpret_cast<Vec<T>>((n + F::exponent_bias) << F::mantissa_bits);
}

// x = n ln 2 + r with |r| <= ln 2 / 2, and e^r - 1.
template <class T>
struct ReducedExp {
    IntVec<T> n;
    Vec<T> expm1_r;
};
template <class T>
MAML_FAST_INLINE ReducedExp<T> reduce_exp(Vec<T> x) {
    using F = FloatFormat<T>;
    const Vec<T> shifted = x * T(1.4426950408889634074) + F::rounder;
    const Vec<T> n = shifted - F::rounder;
    const Vec<T> r = (x - n * F::ln2_high) - n * F::ln2_low;
    // e^r - 1 = r (1 + r/2 (1 + r/3 (1 + ...)))
    Vec<T> series = all(T(1));
    MAML_FAST_UNROLL
    for (int i = F::expm1_terms; i > 1; --i) series = series * r * (T(1) / T(i)) + T(1);
    const IntVec<T> bits = reinterpret_cast<IntVec<T>>(shifted) - reinterpret_cast<IntVec<T>>(all(F::rounder));
    return {bits, series * r};
}

template <class T>
MAML_FAST_INLINE Vec<T> exp(Vec<T> x) {
    using F = FloatFormat<T>;
    const ReducedExp<T> e = reduce_exp<T>(clamp<T>(x, F::least_exp, F::most_exp));
    // in two factors: 2^n alone may be out of range where the result is not
    const IntVec<T> half = e.n >> 1;
    const Vec<T> scale = two_to<T>(half);
    return (scale + scale * e.expm1_r) * two_to<T>(e.n - half);
}

// e^x - 1 for x of moderate size
template <class T>
MAML_FAST_INLINE Vec<T> expm1(Vec<T> x) {
    const ReducedExp<T> e = reduce_exp<T>(x);
    const Vec<T> scale = two_to<T>(e.n);
    return scale * e.expm1_r + (scale - T(1));
}

template <class T>
MAML_FAST_INLINE Vec<T> tanh(Vec<T> x) {
    const Vec<T> size = magnitude<T>(x);
    const Vec<T> e = expm1<T>(T(2) * clamp<T>(size, T(0), FloatFormat<T>::tanh_one));
    // e / (e + 2), beyond one half as 1 - 2 / (e + 2), which keeps the digits next to 1
    const auto near = size < all(T(0.5));
    const Vec<T> q = (near ? e : all(T(2))) / (e + T(2));
    const Vec<T> t = near ? q : T(1) - q;
    return x < Vec<T>{} ? -t : t;
}

template <class T>
MAML_FAST_INLINE Vec<T> sigmoid(Vec<T> x) {
    return T(1) / (T(1) + exp<T>(-x));
}

// 2 atanh(s) = log((1 + s) / (1 - s)), by so many terms of its series
template <class T, int TERMS>
MAML_FAST_INLINE Vec<T> twice_atanh(Vec<T> s) {
    const Vec<T> square = s * s;
    Vec<T> series = all(T(1) / T(2 * TERMS - 1));
    MAML_FAST_UNROLL
    for (int i = TERMS - 2; i >= 0; --i) series = series * square + T(1) / T(2 * i + 1);
    return T(2) * s * series;
}

// log(1 + u) for u from 0 to 1
template <class T>
MAML_FAST_INLINE Vec<T> log1p(Vec<T> u) {
    return twice_atanh<T, FloatFormat<T>::log1p_terms>(u / (u + T(2)));
}

// log x for normal x > 0
template <class T>
MAML_FAST_INLINE Vec<T> log(Vec<T> x) {
    using F = FloatFormat<T>;
    const IntVec<T> bits = reinterpret_cast<IntVec<T>>(x);
    // x = 2^e m with m from sqrt(1/2) to sqrt(2)
    const IntVec<T> root = reinterpret_cast<IntVec<T>>(all(T(0.70710678118654752440)));
    const IntVec<T> e = (bits - root) >> F::mantissa_bits;
    const Vec<T> m = reinterpret_cast<Vec<T>>(bits - (e << F::mantissa_bits));
    const Vec<T> n = __builtin_convertvector(e, Vec<T>);
    const Vec<T> f = m - T(1);
    const Vec<T> result = n * F::ln2_high + (n * F::ln2_low + twice_atanh<T, F::log_terms>(f / (f + T(2))));
    return x != x ? x : result;
}

// log(1 + e^x)
template <class T>
MAML_FAST_INLINE Vec<T> softplus(Vec<T> x) {
    return positive_part<T>(x) + log1p<T>(exp<T>(-magnitude<T>(x)));
}

// 1 / sqrt(x)
inline float root_of(float x) { return ::sqrtf(x); }
inline double root_of(double x) { return ::sqrt(x); }
template <class T>
MAML_FAST_INLINE T one_over_root(T x) {
    return T(1) / root_of(x);
}
template <class T>
MAML_FAST_INLINE Vec<T> one_over_root(Vec<T> x) {
    T roots[LANES<T>];  // the compiler makes one instruction of it
    store(roots, x);
    for (int j = 0; j < LANES<T>; ++j) roots[j] = root_of(roots[j]);
    return T(1) / load(roots);
}

inline float erf_of(float x) { return ::erff(x); }
inline double erf_of(double x) { return ::erf(x); }
inline float sin_of(float x) { return ::sinf(x); }
inline double sin_of(double x) { return ::sin(x); }
inline float cos_of(float x) { return ::cosf(x); }
inline double cos_of(double x) { return ::cos(x); }

template <class T>
MAML_FAST_INLINE Vec<T> erf(Vec<T> x) {
    for (int j = 0; j < LANES<T>; ++j) x[j] = erf_of(x[j]);
    return x;
}

template <class T>
void sin_cos_by_lane(Vec<T> x, Vec<T>& sine, Vec<T>& cosine) {
    for (int j = 0; j < LANES<T>; ++j) {
        sine[j] = sin_of(x[j]);
        cosine[j] = cos_of(x[j]);
    }
}

template <class T>
MAML_FAST_INLINE void sin_cos(Vec<T> x, Vec<T>& sine, Vec<T>& cosine) {
    sin_cos_by_lane<T>(x, sine, cosine);
}
// x = n pi/2 + r: three parts of pi/2 that n multiplies without rounding while it has at most 13 bits
template <>
MAML_FAST_INLINE void sin_cos<float>(Vec<float> x, Vec<float>& sine, Vec<float>& cosine) {
    bool small = true;
    for (int j = 0; j < LANES<float>; ++j) small &= !(x[j] > 8000.0f || x[j] < -8000.0f);
    if (!small) return sin_cos_by_lane<float>(x, sine, cosine);
    using F = FloatFormat<float>;
    const Vec<float> shifted = x * 0.63661977236758134f + F::rounder, n = shifted - F::rounder;
    const Vec<float> r = ((x - n * 1.5703125f) - n * 4.837512969970703125e-4f) - n * 7.54978995489188216e-8f;
    const Vec<float> s = r * r;
    const Vec<float> odd =
        r + r * s * (-1.f / 6 + s * (1.f / 120 + s * (-1.f / 5040 + s * (1.f / 362880))));
    const Vec<float> even =
        1.f + s * (-0.5f + s * (1.f / 24 + s * (-1.f / 720 + s * (1.f / 40320 + s * (-1.f / 3628800)))));
    const IntVec<float> quarter = reinterpret_cast<IntVec<float>>(shifted);
    const IntVec<float> turned = (quarter & 1) != 0;
    const Vec<float> first = turned ? even : odd, second = turned ? odd : even;
    sine = (quarter & 2) != 0 ? -first : first;
    cosine = ((quarter + 1) & 2) != 0 ? -second : second;
}

}  // namespace maml_fast::MAML_FAST_ISA
