// The three products of a convolution, each a sum of segments (sums.h) that reads images where they lie: nothing is gathered.
//
//     z[y][x] = b + sum over taps of W[tap]^T x[s y + ky - p][s x + kx - p]                      s stride, p padding
//     dx[y][x] = sum over taps of W[tap] d[(y + p - ky) / s][(x + p - kx) / s]                   where that is whole
//     dW[tap] = sum over pixels of x[s y + ky - p][s x + kx - p] d[y][x]^T
// Weights are [tap][C][K], K filling vectors; turned ones are [tap][K][C].
#pragma once

#include <vector>

#include "images/conv_shape.h"
#include "images/sums.h"

namespace maml_fast::MAML_FAST_ISA {

// Segments are few, or as many as lines of images: memory that grows once.
template <class T>
using SegmentList = std::vector<Segment<T>>;

// Appends `count` terms, in segments that are not too long.
template <class T>
void add_segments(SegmentList<T>& list, Segment<T> all, Index by_x, Index by_y) {
    for (Index pieces = ceil_div(all.count, MOST_TERMS); pieces > 0; --pieces) {
        const Index count = ceil_div(all.count, pieces);
        list.push_back({all.x, all.y, count});
        all.x += count * by_x;
        all.y += count * by_y;
        all.count -= count;
    }
}

// ---- blocks of pixels

template <class T, int V, bool UNIT, int... A>
void sum_starts(Index count, const Segments<T>& segments, const Starts<T>& starts, Index v0, Begin begin, const T* base,
                Ints<A...>) {
    using Block = void (*)(const Segments<T>&, const Starts<T>&, Index, Begin, const T*);
    static constexpr Block blocks[] = {sum_block<T, A + 1, V, UNIT>...};
    blocks[count - 1](segments, starts, v0, begin, base);
}
template <class T, bool UNIT>
void sum_starts(Index count, Index vectors, const Segments<T>& segments, const Starts<T>& starts, Index v0, Begin begin,
                const T* base) {
    if constexpr (MOST_VECTORS > 2) {
        if (vectors == 4)
            return sum_starts<T, 4, UNIT>(count, segments, starts, v0, begin, base, typename CountTo<most_starts(4)>::type{});
        if (vectors == 3)
            return sum_starts<T, 3, UNIT>(count, segments, starts, v0, begin, base, typename CountTo<most_starts(3)>::type{});
    }
    if (vectors == 2)
        return sum_starts<T, 2, UNIT>(count, segments, starts, v0, begin, base, typename CountTo<most_starts(2)>::type{});
    sum_starts<T, 1, UNIT>(count, segments, starts, v0, begin, base, typename CountTo<most_starts(1)>::type{});
}

// All of `count` starts, in blocks of even size, for all vectors. `new_starts` gives what names the starts in order.
template <class T, bool UNIT, class NewStarts>
void sum_all(Index count, Index vectors, const Segments<T>& segments, Begin begin, const T* base, NewStarts new_starts) {
    for (Index v = 0, blocks = ceil_div(vectors, MOST_VECTORS); blocks > 0; --blocks) {
        const Index block = ceil_div(vectors - v, blocks), v0 = v * LANES<T>;
        auto next = new_starts();
        Index left = count;
        for (Index n = ceil_div(count, most_starts(static_cast<int>(block))); n > 0; --n) {
            const Index a = ceil_div(left, n);
            Starts<T> starts;
            for (Index i = 0; i < a; ++i) next(starts.x[i], starts.c[i]);
            sum_starts<T, UNIT>(a, block, segments, starts, v0, begin, base ? base + v0 : nullptr);
            left -= a;
        }
        v += block;
    }
}

// The pixels of z in order, each with where its sum begins in x: at `first`, and s pixels on for each pixel of z.
template <class T>
class PixelWalk {
   public:
    PixelWalk(const T* first, const Image<T>& x, Index s, const Image<T>& z)
        : x_row_(first), x_line_(first), x_(first), z_row_(z.p), z_line_(z.p), z_at_(z.p), x_image_(x), s_(s), z_(z) {}

    MAML_FAST_INLINE void operator()(const T*& x, T*& z) {
        x = x_;
        z = z_at_;
        x_ += s_ * x_image_.by_pixel;
        z_at_ += z_.by_pixel;
        if (++column_ < z_.shape.width) return;
        column_ = 0;
        x_ = x_line_ += s_ * x_image_.by_line;
        z_at_ = z_line_ += z_.by_line;
        if (++line_ < z_.shape.height) return;
        line_ = 0;
        x_ = x_line_ = x_row_ += x_image_.by_row;
        z_at_ = z_line_ = z_row_ += z_.by_row;
    }

   private:
    const T *x_row_, *x_line_, *x_;
    T *z_row_, *z_line_, *z_at_;
    const Image<T>& x_image_;
    const Index s_;
    const Image<T>& z_;
    Index column_ = 0, line_ = 0;
};

// ---- z and dx

// A sum for a product: weights, and an image of the same memory layout as the product's first one.
template <class T>
struct ConvTerm {
    const T* weight;
    Image<T> x;
};

// z = base + the terms' sums.
template <class T>
void convolve(const ConvShape& conv, const ConvTerm<T>* terms, Index count, const T* base, const Image<T>& z,
              SegmentList<T>& list) {
    const Index Kp = padded<T>(conv.filters), C = conv.channels;
    list.clear();
    for (Index t = 0; t < count; ++t) {
        const Image<T>& x = terms[t].x;
        const Index apart = x.p - terms[0].x.p;
        const bool runs = x.by_pixel == C;  // the taps of a line lie one behind the other
        for (Index ky = 0; ky < conv.kernel; ++ky)
            for (Index kx = 0; kx < (runs ? 1 : conv.kernel); ++kx)
                add_segments<T>(list,
                                {apart + ky * x.by_line + kx * x.by_pixel,
                                 terms[t].weight + (ky * conv.kernel + kx) * C * Kp, runs ? conv.kernel * C : C},
                                1, Kp);
    }
    const Segments<T> segments{list.data(), static_cast<Index>(list.size()), 1, Kp};
    const Image<T> none = z, &x = count ? terms[0].x : none;
    const T* first = count ? x.p - conv.padding * (x.by_line + x.by_pixel) : z.p;
    sum_all<T, true>(z.pixels(), z.vectors(), segments, base ? Begin::vectors : Begin::zero, base,
                     [&] { return PixelWalk<T>(first, x, conv.stride, z); });
}

// dx = the terms' sums, by turned weights.
template <class T>
void convolve_turned(const ConvShape& conv, const ConvTerm<T>* terms, Index count, const Image<T>& dx,
                     SegmentList<T>& list) {
    const Index Cp = padded<T>(conv.channels), K = conv.filters, s = conv.stride;
    const Image<T>& d = terms[0].x;
    // Pixels of dx that the same taps reach: all, or one in s both ways.
    for (Index py = 0; py < smaller(s, dx.shape.height); ++py)
        for (Index px = 0; px < smaller(s, dx.shape.width); ++px) {
            Image<T> some = dx;
            some.p = dx.at(0, py, px);
            some.shape.height = ceil_div(dx.shape.height - py, s);
            some.shape.width = ceil_div(dx.shape.width - px, s);
            some.by_pixel *= s;
            some.by_line *= s;
            list.clear();
            for (Index t = 0; t < count; ++t)
                for (Index ky = 0; ky < conv.kernel; ++ky)
                    for (Index kx = 0; kx < conv.kernel; ++kx) {
                        const Index y = py + conv.padding - ky, x = px + conv.padding - kx;
                        if (y % s || x % s) continue;
                        add_segments<T>(list,
                                        {terms[t].x.p - d.p + y / s * d.by_line + x / s * d.by_pixel,
                                         terms[t].weight + (ky * conv.kernel + kx) * K * Cp, K},
                                        1, Cp);
                    }
            const Segments<T> segments{list.data(), static_cast<Index>(list.size()), 1, Cp};
            sum_all<T, true>(some.pixels(), dx.vectors(), segments, Begin::zero, nullptr,
                             [&] { return PixelWalk<T>(d.p, d, 1, some); });
        }
}

// ---- dW

// Bytes of cotangents that are gone through at once.
constexpr Index OUTER_BYTES = 96 << 10;

// dW = sum over pixels, or added to it.
template <class T>
void convolve_outer(const ConvShape& conv, const Image<T>& x, const Image<T>& d, T* dw, bool add, SegmentList<T>& list) {
    const Index Kp = padded<T>(conv.filters), C = conv.channels;
    const bool single = d.shape.positions() == 1;  // lines of one pixel: take the rows as the pixels of one line
    const Index lines = single ? 1 : d.rows * d.shape.height, width = single ? d.rows : d.shape.width;
    const Index by_x = single ? x.by_row : conv.stride * x.by_pixel, by_y = single ? d.by_row : d.by_pixel;
    const Index at_once = larger<Index>(1, OUTER_BYTES / (width * d.by_pixel * static_cast<Index>(sizeof(T))));
    const T* first = x.p - conv.padding * (x.by_line + x.by_pixel);
    for (Index line = 0; line < lines; line += at_once) {
        list.clear();
        for (Index l = line; l < smaller(line + at_once, lines); ++l) {
            const Index r = l / d.shape.height, y = l % d.shape.height;
            add_segments<T>(list, {r * x.by_row + y * conv.stride * x.by_line, d.at(r, y, 0), width}, by_x, by_y);
        }
        const Segments<T> segments{list.data(), static_cast<Index>(list.size()), by_x, by_y};
        const Begin begin = add || line ? Begin::result : Begin::zero;
        sum_all<T, false>(conv.taps() * C, ceil_div(conv.filters, LANES<T>), segments, begin, static_cast<const T*>(nullptr), [&] {
            Index ky = 0, kx = 0, c = 0;
            T* to = dw;
            return [&conv, &x, first, Kp, C, ky, kx, c, to](const T*& start, T*& sum) mutable {
                start = first + ky * x.by_line + kx * x.by_pixel + c;
                sum = to;
                to += Kp;
                if (++c < C) return;
                c = 0;
                if (++kx < conv.kernel) return;
                kx = 0;
                ++ky;
            };
        });
    }
}

// [tap][C][K] -> [tap][K][C]
template <class T>
void turn_weights(const ConvShape& conv, const T* w, T* turned) {
    constexpr Index L = LANES<T>;
    const Index Kp = padded<T>(conv.filters), Cp = padded<T>(conv.channels);
    for (Index tap = 0; tap < conv.taps(); ++tap, w += conv.channels * Kp, turned += conv.filters * Cp)
        for (Index c = 0; c < conv.channels; c += L)
            for (Index k = 0; k < conv.filters; k += L) {
                Vec<T> v[L];
                MAML_FAST_UNROLL
                for (Index j = 0; j < L; ++j) v[j] = c + j < conv.channels ? load(w + (c + j) * Kp + k) : Vec<T>{};
                transpose<T>(v);
                MAML_FAST_UNROLL
                for (Index j = 0; j < L; ++j)
                    if (k + j < conv.filters) store(turned + (k + j) * Cp + c, v[j]);
            }
}

}  // namespace maml_fast::MAML_FAST_ISA
