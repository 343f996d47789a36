// Convolutions 3x3 of stride 1 by Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray 2016): 16 multiplications for a tile
// of 2x2 results instead of 36. With x the 4x4 inputs of a tile, d its 2x2 cotangents, and a product of matrices [C][K] for each
// of 16 planes in place of each multiplication:
//     z = A^T [ (G w G^T) (B^T x B) ] A            and dx by the same from d, with turned weights and the taps about
//     dw = G^T [ sum over tiles of (B^T x B) (A d A^T) ] G
//     B^T = [1 0 -1 0; 0 1 1 0; 0 -1 1 0; 0 1 0 -1]   G = [1 0 0; .5 .5 .5; .5 -.5 .5; 0 0 1]   A^T = [1 1 1 0; 0 1 -1 -1]
// These matrices hold 0, 1 and 1/2, so results are about as exact as plain sums. Some tiles are taken at a time, so that all
// stays in cache.
#pragma once

#include "images/conv_products.h"
#include "images/winograd_tiles.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T>
class Winograd {
    static constexpr Index L = LANES<T>;
    // What the planes of the tiles at hand may take, and at least so many tiles.
    static constexpr Index TILE_BYTES = 192 << 10, LEAST_TILES = 12;

   public:
    // Whether it takes fewer cycles than plain sums, for rows of results.
    static bool pays(const ConvShape& conv, Index rows, ImageShape result) {
        if (conv.kernel != 3 || conv.stride != 1 || conv.channels < L || conv.filters < L) return false;
        const Index C = conv.channels, Cv = ceil_div(C, L), Kv = ceil_div(conv.filters, L);
        const Index tiles = TileWalk::count(rows, result), pixels = rows * result.positions();
        const Index planes = tiles * (8 * C * Kv + 24 * Cv + 16 * Kv) + 80 * C * Kv;
        return planes < pixels * C * Kv * 9 / 2;
    }
    static void ask_for(const ConvShape& conv, Workspace<T>& workspace) {
        const Index Cp = padded<T>(conv.channels), Kp = padded<T>(conv.filters), most = larger(Cp, Kp);
        const Index tiles = larger(tiles_at_once(2 * most, most), LEAST_TILES);
        workspace.needs(PLANES * (2 * plane(most, most) + 3 * plane(tiles_at_once(Cp, Kp), most) + 3 * plane(tiles, most)));
    }

    Winograd(const ConvShape& conv, const Workspace<T>& workspace, SegmentList<T>& list)
        : conv_(conv), memory_(workspace.numbers()), list_(list) {}

    void convolve(const ConvTerm<T>* terms, Index count, const T* base, const Image<T>& z) {
        convolve(terms, count, conv_.channels, conv_.padding, false, base, z);
    }
    void convolve_turned(const ConvTerm<T>* terms, Index count, const Image<T>& dx) {
        convolve(terms, count, conv_.filters, 2 - conv_.padding, true, nullptr, dx);
    }
    // dw = the sum of the pairs' products, or added to it.
    struct Pair {
        Image<T> x, d;
    };
    void outer(const Pair* pairs, Index count, T* dw, bool add) {
        const Index C = conv_.channels, Cp = padded<T>(C), Kp = padded<T>(conv_.filters), at_once = tiles_at_once(Cp, Kp);
        const Index by_x = plane(at_once, Cp), by_d = plane(at_once, Kp), by_sum = plane(C, Kp);
        T *x = memory_, *d = x + PLANES * by_x, *sums = d + PLANES * by_d;
        bool begun = false;
        for (const Pair* pair = pairs; pair < pairs + count; ++pair) {
            TileWalk at{pair->d.shape};
            for (Index left = TileWalk::count(pair->d.rows, at.shape); left > 0; left -= at_once) {
                const Index tiles = smaller(left, at_once);
                for (Index i = 0; i < tiles; ++i, at.next()) {
                    transform_input(pair->x, at, conv_.padding, x + i * Cp, by_x);
                    transform_cotangent(pair->d, at, d + i * Kp, by_d);
                }
                for (Index f = 0; f < PLANES; ++f) {
                    list_.clear();
                    add_segments<T>(list_, {0, d + f * by_d, tiles}, Cp, Kp);
                    sum_rows<false>(x + f * by_x, 1, sums + f * by_sum, C, Cp, Kp, begun ? Begin::result : Begin::zero);
                }
                begun = true;
            }
        }
        transform_gradient(sums, by_sum, C * Kp, add, dw);
    }

   private:
    static Index tiles_at_once(Index Cp, Index Kp) {
        return larger(LEAST_TILES, TILE_BYTES / (PLANES * (Cp + Kp) * static_cast<Index>(sizeof(T))));
    }
    // Numbers from one plane to the next: a cache line more, lest all planes of a tile fall to the same cache sets.
    static constexpr Index plane(Index rows, Index numbers) { return rows * numbers + 64 / static_cast<Index>(sizeof(T)); }

    // z = base + the terms' sums, over C channels of x, by weights [tap][C][K].
    void convolve(const ConvTerm<T>* terms, Index count, Index C, Index padding, bool about, const T* base, const Image<T>& z) {
        const Index Cp = padded<T>(C), Kp = padded<T>(z.shape.channels), at_once = tiles_at_once(count * Cp, Kp);
        const Index by_w = plane(C, Kp), by_x = plane(at_once, Cp), by_z = plane(at_once, Kp);
        T *w = memory_, *x = w + count * PLANES * by_w, *sums = x + count * PLANES * by_x;
        for (Index t = 0; t < count; ++t)
            transform_weights(terms[t].weight, C * Kp, about, w + t * PLANES * by_w, by_w);
        TileWalk in{z.shape}, out = in;
        for (Index left = TileWalk::count(z.rows, z.shape); left > 0; left -= at_once) {
            const Index tiles = smaller(left, at_once);
            for (Index i = 0; i < tiles; ++i, in.next())
                for (Index t = 0; t < count; ++t)
                    transform_input(terms[t].x, in, padding, x + t * PLANES * by_x + i * Cp, by_x);
            for (Index f = 0; f < PLANES; ++f) {
                list_.clear();
                for (Index t = 0; t < count; ++t)
                    add_segments<T>(list_, {t * PLANES * by_x, w + (t * PLANES + f) * by_w, C}, 1, Kp);
                sum_rows<true>(x + f * by_x, Cp, sums + f * by_z, tiles, 1, Kp, Begin::zero);
            }
            for (Index i = 0; i < tiles; ++i, out.next()) transform_result(sums + i * Kp, by_z, base, z, out);
        }
    }
    // The segments' sums for so many rows c of K, which begin at x, `apart` numbers from one to the next.
    template <bool UNIT>
    void sum_rows(const T* x, Index apart, T* c, Index rows, Index by_x, Index Kp, Begin begin) {
        const Segments<T> segments{list_.data(), static_cast<Index>(list_.size()), by_x, Kp};
        sum_all<T, UNIT>(rows, Kp / L, segments, begin, static_cast<const T*>(nullptr), [&] {
            return [x, c, apart, Kp](const T*& start, T*& sum) mutable {
                start = x;
                sum = c;
                x += apart;
                c += Kp;
            };
        });
    }

    const ConvShape& conv_;
    T* const memory_;
    SegmentList<T>& list_;
};

}  // namespace maml_fast::MAML_FAST_ISA
