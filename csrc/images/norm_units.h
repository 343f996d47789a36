// What a norm takes together, and how it goes over images with the activation and the pooling behind it.
#pragma once

#include "images/image.h"
#include "program.h"

namespace maml_fast::MAML_FAST_ISA {

// Some lines of some rows: those whose numbers share a mean and a variance.
struct Span {
    Index row, rows, line, lines;
};

// The numbers of a statistic: those of a channel, or of a group of channels, in one span.
struct NormSets {
    enum Of { all_rows, row, line } of = all_rows;
    Index group = 1;  // channels together

    static NormSets make(const Layer& layer, ImageShape shape) {
        if (layer.norm == NormKind::batch) return {all_rows, 1};
        if (layer.norm == NormKind::group) return {row, shape.channels / layer.groups};
        if (layer.out_features == shape.numbers()) return {row, shape.channels};
        return {layer.out_features == shape.positions() ? row : line, 1};
    }
    Index count(Index rows, ImageShape shape) const { return of == all_rows ? 1 : of == row ? rows : rows * shape.height; }
    Span span(Index set, Index rows, ImageShape shape) const {
        if (of == all_rows) return {0, rows, 0, shape.height};
        if (of == row) return {set, 1, 0, shape.height};
        return {set / shape.height, 1, set % shape.height, 1};
    }
    // Each channel's sum becomes that of its group.
    void combine(double* sums, Index channels) const {
        if (group == 1) return;
        for (Index c = 0; c < channels; c += group) {
            double total = 0;
            for (Index j = 0; j < group; ++j) total += sums[c + j];
            for (Index j = 0; j < group; ++j) sums[c + j] = total;
        }
    }
};

// Of a window of 2x2, in the order of its pixels: which was the largest, in the lowest two bits, and FLAT where that is below
// the bend of the activation.
using Code = std::int8_t;
constexpr int FLAT = 4;

template <class T>
struct CodesOf {
    typedef Code type __attribute__((vector_size(LANES<T>)));
    typedef Code unaligned __attribute__((vector_size(LANES<T>), aligned(1), may_alias));
};
template <class T>
MAML_FAST_INLINE IntVec<T> load_codes(const Code* p) {
    const typename CodesOf<T>::type codes = *reinterpret_cast<const typename CodesOf<T>::unaligned*>(p);
    return __builtin_convertvector(codes, IntVec<T>);
}
template <class T>
MAML_FAST_INLINE void store_codes(Code* p, IntVec<T> codes) {
    *reinterpret_cast<typename CodesOf<T>::unaligned*>(p) = __builtin_convertvector(codes, typename CodesOf<T>::type);
}

// The activation behind a norm: nothing, or slope 1 above 0 and `slope` below, which is 0 of a ReLU.
enum class Bend { none, relu, leaky };

// What stands behind a norm, for one pixel of the result.
template <class T, Bend BEND, bool POOL>
struct Finish {
    static constexpr Bend BENDS = BEND;
    static constexpr bool POOLS = POOL;
    static constexpr int PIXELS = POOL ? 4 : 1;
    T slope = 0;

    // y from the values v of a unit's pixels, and its code.
    MAML_FAST_INLINE Vec<T> operator()(const Vec<T> (&v)[PIXELS], IntVec<T>& code) const {
        Vec<T> at = v[0], best = BEND == Bend::leaky ? bent(at) : at;  // a ReLU can wait: it changes no order
        code = IntVec<T>{};
        MAML_FAST_UNROLL
        for (int j = 1; j < PIXELS; ++j) {
            const Vec<T> found = BEND == Bend::leaky ? bent(v[j]) : v[j];
            const auto takes = (found > best) | (found != found);
            best = takes ? found : best;
            at = takes ? v[j] : at;
            code = takes ? IntVec<T>{} + j : code;
        }
        if (BEND != Bend::none) code |= at <= Vec<T>{} ? IntVec<T>{} + FLAT : IntVec<T>{};
        return BEND == Bend::relu ? bent(best) : best;
    }
    // A cotangent or tangent through the activation, `flat` where that is below its bend.
    MAML_FAST_INLINE Vec<T> back(IntVec<T> flat, Vec<T> d) const {
        if (BEND == Bend::none) return d;
        return flat ? (BEND == Bend::relu ? Vec<T>{} : d * slope) : d;
    }
    MAML_FAST_INLINE Vec<T> bent(Vec<T> v) const { return back(v <= Vec<T>{}, v); }
};

// A pixel of the result: offsets in images like the norm's input, in images like the result, and in codes.
struct Unit {
    Index in, out, code;
};

// The result's pixels, and with POOL the windows of 2x2 pixels of the input that they stand for.
template <class T, bool POOL>
struct Units {
    Image<T> in, out;  // of which only the shapes and strides count

    static constexpr Index SIDE = POOL ? 2 : 1;
    MAML_FAST_INLINE Index pixel(int j) const { return (j & 1) * in.by_pixel + (j >> 1) * in.by_line; }
    static Index code_numbers(const Image<T>& out) { return out.pixels() * padded<T>(out.shape.channels); }

    // The units of some lines of a row's input, for one vector of channels.
    template <class Visit>
    MAML_FAST_INLINE void each(Index row, const Span& span, Index v, Visit visit) const {
        each(row, span, v, visit, [] {});
    }
    template <class Visit, class EndLine>
    MAML_FAST_INLINE void each(Index row, const Span& span, Index v, Visit visit, EndLine end_line) const {
        const Index by_code = padded<T>(out.shape.channels);
        for (Index y = span.line / SIDE; y < (span.line + span.lines) / SIDE; ++y) {
            Unit u{row * in.by_row + SIDE * y * in.by_line + v, row * out.by_row + y * out.by_line + v,
                   (row * out.shape.height + y) * out.shape.width * by_code + v};
            for (Index x = 0; x < out.shape.width; ++x) {
                visit(u);
                u.in += SIDE * in.by_pixel;
                u.out += out.by_pixel;
                u.code += by_code;
            }
            end_line();
        }
    }
    // N sums over units: of each line, and then of the lines.
    template <int N, class Visit>
    MAML_FAST_INLINE void sum_each(Index row, const Span& span, Index v, Vec<T> (&total)[N], Visit visit) const {
        Vec<T> line[N]{};
        MAML_FAST_UNROLL
        for (int n = 0; n < N; ++n) total[n] = Vec<T>{};
        each(
            row, span, v, [&](const Unit& u) { visit(u, line); },
            [&] {
                MAML_FAST_UNROLL
                for (int n = 0; n < N; ++n) {
                    total[n] += line[n];
                    line[n] = Vec<T>{};
                }
            });
    }
    // The pixels of a row's input that no window has.
    template <class Visit>
    MAML_FAST_INLINE void each_left(Index row, Index v, Visit visit) const {
        if (!POOL) return;
        for (Index y = 0; y < in.shape.height; ++y)
            for (Index x = y < 2 * out.shape.height ? 2 * out.shape.width : 0; x < in.shape.width; ++x)
                visit(row * in.by_row + y * in.by_line + x * in.by_pixel + v);
    }
    // N sums over pixels: of each line in four parts, so that no addition waits for the one before, and then of the lines.
    template <int N, class Visit>
    MAML_FAST_INLINE void sum(Index row, const Span& span, Index v, Vec<T> (&total)[N], Visit visit) const {
        MAML_FAST_UNROLL
        for (int n = 0; n < N; ++n) total[n] = Vec<T>{};
        for (Index y = span.line; y < span.line + span.lines; ++y) {
            Vec<T> part[4][N]{};
            Index at = row * in.by_row + y * in.by_line + v, x = 0;
            for (; x + 4 <= in.shape.width; x += 4, at += 4 * in.by_pixel) {
                MAML_FAST_UNROLL
                for (int j = 0; j < 4; ++j) visit(at + j * in.by_pixel, part[j]);
            }
            for (; x < in.shape.width; ++x, at += in.by_pixel) visit(at, part[0]);
            MAML_FAST_UNROLL
            for (int n = 0; n < N; ++n) total[n] += (part[0][n] + part[1][n]) + (part[2][n] + part[3][n]);
        }
    }
    // The number at a unit's largest pixel.
    MAML_FAST_INLINE Vec<T> chosen(const T* p, const Unit& u, IntVec<T> codes) const {
        Vec<T> v = load(p + u.in);
        if constexpr (POOL) {
            const IntVec<T> which = codes & 3;
            MAML_FAST_UNROLL
            for (int j = 1; j < 4; ++j) v = which == j ? load(p + u.in + pixel(j)) : v;
        }
        return v;
    }
};

// Adds a vector to as many doubles.
template <class T>
MAML_FAST_INLINE void add_lanes(double* to, Vec<T> v) {
    for (int j = 0; j < LANES<T>; ++j) to[j] += static_cast<double>(v[j]);
}

}  // namespace maml_fast::MAML_FAST_ISA
