// The transforms of winograd.h: tiles of an image, and 3x3 weights, to 16 planes and back.
#pragma once

#include "images/image.h"

namespace maml_fast::MAML_FAST_ISA {

constexpr Index PLANES = 16;

// The tiles of 2x2 of an image, in order; the last ones hang over the edge where a side is odd.
struct TileWalk {
    ImageShape shape;
    Index row = 0, y = 0, x = 0;

    static Index count(Index rows, ImageShape shape) { return rows * ((shape.height + 1) / 2) * ((shape.width + 1) / 2); }
    void next() {
        if ((x += 2) < shape.width) return;
        x = 0;
        if ((y += 2) < shape.height) return;
        y = 0;
        ++row;
    }
};

// ---- in one dimension

template <class V>
MAML_FAST_INLINE void by_b(V& x0, V& x1, V& x2, V& x3) {
    const V y0 = x0 - x2, y1 = x1 + x2, y2 = x2 - x1;
    x3 = x1 - x3;
    x0 = y0;
    x1 = y1;
    x2 = y2;
}
template <class V>
MAML_FAST_INLINE void by_a_transposed(V& x0, V& x1, V& x2, V& x3) {
    const V sum = x1 + x2, difference = x1 - x2;
    x0 += sum;
    x1 = difference - x3;
}
template <class V>
MAML_FAST_INLINE void by_a(V& x0, V& x1, V& x2, V& x3) {
    const V d0 = x0, d1 = x1;
    x1 = d0 + d1;
    x2 = d0 - d1;
    x3 = -d1;
}
template <class V>
MAML_FAST_INLINE void by_g(V& x0, V& x1, V& x2, V& x3) {
    const V half = V{} + 0.5f, outer = (x0 + x2) * half, inner = x1 * half;
    x3 = x2;
    x1 = outer + inner;
    x2 = outer - inner;
}
template <class V>
MAML_FAST_INLINE void by_g_transposed(V& x0, V& x1, V& x2, V& x3) {
    const V half = V{} + 0.5f, sum = (x1 + x2) * half;
    x1 = (x1 - x2) * half;
    x0 += sum;
    x2 = sum + x3;
}

// The lines of a tile, and then its columns; from `from` lines and columns to `to` of them.
#define MAML_FAST_BOTH_WAYS(transform, from, to)                                \
    MAML_FAST_UNROLL                                                            \
    for (int i = 0; i < (from); ++i) transform(t[i][0], t[i][1], t[i][2], t[i][3]); \
    MAML_FAST_UNROLL                                                            \
    for (int j = 0; j < (to); ++j) transform(t[0][j], t[1][j], t[2][j], t[3][j]);

// ---- in two

template <class T>
MAML_FAST_INLINE void store_planes(const Vec<T> (&t)[4][4], T* to, Index by_plane) {
    MAML_FAST_UNROLL
    for (int f = 0; f < PLANES; ++f) store(to + f * by_plane, t[f / 4][f % 4]);
}
template <class T>
MAML_FAST_INLINE void load_planes(Vec<T> (&t)[4][4], const T* from, Index by_plane) {
    MAML_FAST_UNROLL
    for (int f = 0; f < PLANES; ++f) t[f / 4][f % 4] = load(from + f * by_plane);
}
// N x N pixels from (y, x) on; zeros further out than the border.
template <class T, int N>
MAML_FAST_INLINE void load_pixels(Vec<T> (&t)[4][4], const T* p, const Image<T>& image, Index y, Index x, Index border) {
    const Index bottom = image.shape.height + border - y, right = image.shape.width + border - x;
    if (bottom >= N && right >= N) {
        MAML_FAST_UNROLL
        for (int i = 0; i < N * N; ++i) t[i / N][i % N] = load(p + i / N * image.by_line + i % N * image.by_pixel);
    } else {
        MAML_FAST_UNROLL
        for (int i = 0; i < N * N; ++i)
            t[i / N][i % N] = i / N < bottom && i % N < right ? load(p + i / N * image.by_line + i % N * image.by_pixel) : Vec<T>{};
    }
}

// B^T x B of the 4x4 inputs of a tile of results.
template <class T>
void transform_input(const Image<T>& image, const TileWalk& at, Index padding, T* to, Index by_plane) {
    const Index y = at.y - padding, x = at.x - padding;
    const T* p = image.at(at.row, y, x);
    for (Index v = 0; v < image.vectors() * LANES<T>; v += LANES<T>) {
        Vec<T> t[4][4];
        for (int i = 0; i < 4; ++i)  // what the next tile reads besides
            for (int j = 4; j < 6; ++j) __builtin_prefetch(p + v + i * image.by_line + j * image.by_pixel);
        load_pixels<T, 4>(t, p + v, image, y, x, padding);
        MAML_FAST_BOTH_WAYS(by_b, 4, 4)
        store_planes<T>(t, to + v, by_plane);
    }
}
// A d A^T of a tile of 2x2.
template <class T>
void transform_cotangent(const Image<T>& image, const TileWalk& at, T* to, Index by_plane) {
    const T* p = image.at(at.row, at.y, at.x);
    for (Index v = 0; v < image.vectors() * LANES<T>; v += LANES<T>) {
        Vec<T> t[4][4];
        load_pixels<T, 2>(t, p + v, image, at.y, at.x, 0);
        MAML_FAST_BOTH_WAYS(by_a, 2, 4)
        store_planes<T>(t, to + v, by_plane);
    }
}
// A^T m A, a tile of 2x2 results, onto base.
template <class T>
void transform_result(const T* from, Index by_plane, const T* base, const Image<T>& image, const TileWalk& at) {
    T* p = image.at(at.row, at.y, at.x);
    const bool below = at.y + 1 < image.shape.height, beside = at.x + 1 < image.shape.width;
    for (Index v = 0; v < image.vectors() * LANES<T>; v += LANES<T>, p += LANES<T>) {
        Vec<T> t[4][4];
        load_planes<T>(t, from + v, by_plane);
        MAML_FAST_BOTH_WAYS(by_a_transposed, 4, 2)
        const Vec<T> b = base ? load(base + v) : Vec<T>{};
        store(p, t[0][0] + b);
        if (beside) store(p + image.by_pixel, t[0][1] + b);
        if (below) store(p + image.by_line, t[1][0] + b);
        if (below && beside) store(p + image.by_line + image.by_pixel, t[1][1] + b);
    }
}
// G w G^T of weights [tap][numbers], whose taps may be turned about.
template <class T>
void transform_weights(const T* w, Index numbers, bool about, T* to, Index by_plane) {
    for (Index n = 0; n < numbers; n += LANES<T>) {
        Vec<T> t[4][4];
        MAML_FAST_UNROLL
        for (int tap = 0; tap < 9; ++tap) t[tap / 3][tap % 3] = load(w + (about ? 8 - tap : tap) * numbers + n);
        MAML_FAST_BOTH_WAYS(by_g, 3, 4)
        store_planes<T>(t, to + n, by_plane);
    }
}
// G^T m G, the gradient of weights [tap][numbers]; or added to it.
template <class T>
void transform_gradient(const T* from, Index by_plane, Index numbers, bool add, T* dw) {
    for (Index n = 0; n < numbers; n += LANES<T>) {
        Vec<T> t[4][4];
        load_planes<T>(t, from + n, by_plane);
        MAML_FAST_BOTH_WAYS(by_g_transposed, 4, 3)
        MAML_FAST_UNROLL
        for (int tap = 0; tap < 9; ++tap) {
            T* p = dw + tap * numbers + n;
            store(p, add ? load(p) + t[tap / 3][tap % 3] : t[tap / 3][tap % 3]);
        }
    }
}
#undef MAML_FAST_BOTH_WAYS

}  // namespace maml_fast::MAML_FAST_ISA
