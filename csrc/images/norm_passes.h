// The passes of a norm over images; the formulas are in images/norm.h, which turns sums into coefficients.
//
// With d = z - BASE, v = SCALE d + SHIFT is what the activation sees; b(.) multiplies by its slope there, or at the largest
// pixel of a window.
#pragma once

#include "images/norm_units.h"

namespace maml_fast::MAML_FAST_ISA {

// Numbers of each channel.
enum Coefficient { BASE, SCALE, SHIFT, CONSTANT, BY_Z, BY_T, BY_DY, COEFFICIENTS };

template <class T, Bend BEND, bool POOL>
class NormPasses {
    static constexpr Index L = LANES<T>;
    static constexpr int PIXELS = Finish<T, BEND, POOL>::PIXELS;
    using V = Vec<T>;

   public:
    T* coefficients = nullptr;  // [COEFFICIENTS][Cp]
    Index Cp = 0;
    Finish<T, BEND, POOL> finish;

    // y = pooled a(v), and the codes.
    void apply(const Image<T>& z, const Image<T>& y, Code* codes, const Span& span) const {
        const Units<T, POOL> units{z, y};
        each(span, [&](Index row, Index c) {
            const V base = get(BASE, c), scale = get(SCALE, c), shift = get(SHIFT, c);
            units.each(row, span, c, [&](const Unit& u) {
                V v[PIXELS];
                MAML_FAST_UNROLL
                for (int j = 0; j < PIXELS; ++j) v[j] = (load(z.p + u.in + units.pixel(j)) - base) * scale + shift;
                IntVec<T> code;
                store(y.p + u.out, finish(v, code));
                if (POOL) store_codes<T>(codes + u.code, code);
            });
        });
    }
    // Sums of b(dy) and b(dy) d, in double.
    void sum_cotangents(const Image<T>& z, const Image<T>& dy, const Code* codes, const Span& span, double* s1,
                        double* s2) const {
        const Units<T, POOL> units{z, dy};
        clear(s1, s2);
        each(span, [&](Index row, Index c) {
            V total[2];
            units.sum_each(row, span, c, total, [&](const Unit& u, V(&sums)[2]) {
                const At at = look(units, z, codes, u, c);
                const V d = back(at, load(dy.p + u.out));
                sums[0] += d;
                sums[1] += d * at.d;
            });
            add_lanes<T>(s1 + c, total[0]);
            add_lanes<T>(s2 + c, total[1]);
        });
    }
    // dz = CONSTANT + BY_Z d, and SCALE b(dy) where that goes. `dz` may be `z`.
    void spread_cotangents(const Image<T>& z, const Image<T>& dy, const Code* codes, const Span& span,
                           const Image<T>& dz) const {
        const Units<T, POOL> units{z, dy};
        each(span, [&](Index row, Index c) {
            const V base = get(BASE, c), scale = get(SCALE, c), constant = get(CONSTANT, c), by_z = get(BY_Z, c);
            units.each(row, span, c, [&](const Unit& u) {
                const At at = look(units, z, codes, u, c);
                const V d = back(at, load(dy.p + u.out)) * scale;
                MAML_FAST_UNROLL
                for (int j = 0; j < PIXELS; ++j) {
                    const Index i = u.in + units.pixel(j);
                    const V even = (load(z.p + i) - base) * by_z + constant;
                    store(dz.p + i, even + (POOL ? ((at.codes & 3) == j ? d : V{}) : d));
                }
            });
            units.each_left(row, c, [&](Index i) { store(dz.p + i, (load(z.p + i) - base) * by_z + constant); });
        });
    }
    // Sums of t_z and t_z d.
    void sum_tangents(const Image<T>& z, const Image<T>& t_z, const Span& span, double* q1, double* q2) const {
        const Units<T, POOL> units{z, z};
        clear(q1, q2);
        each(span, [&](Index row, Index c) {
            const V base = get(BASE, c);
            V total[2];
            units.sum(row, span, c, total, [&](Index i, V(&part)[2]) {
                const V t = load(t_z.p + i);
                part[0] += t;
                part[1] += t * (load(z.p + i) - base);
            });
            add_lanes<T>(q1 + c, total[0]);
            add_lanes<T>(q2 + c, total[1]);
        });
    }
    // t_y = b(CONSTANT + BY_Z d + SCALE t_z)
    void apply_tangents(const Image<T>& z, const Image<T>& t_z, const Code* codes, const Span& span,
                        const Image<T>& t_y) const {
        const Units<T, POOL> units{z, t_y};
        each(span, [&](Index row, Index c) {
            const V scale = get(SCALE, c), constant = get(CONSTANT, c), by_z = get(BY_Z, c);
            units.each(row, span, c, [&](const Unit& u) {
                const At at = look(units, z, codes, u, c);
                store(t_y.p + u.out, back(at, units.chosen(t_z.p, u, at.codes) * scale + (at.d * by_z + constant)));
            });
        });
    }
    // Sums of b(t_dy), b(t_dy) d and b(dy) (t_z - BY_T).
    void sum_t_cotangents(const Image<T>& z, const Image<T>& t_z, const Image<T>& dy, const Image<T>& t_dy, const Code* codes,
                          const Span& span, double* p1, double* p2, double* p3) const {
        const Units<T, POOL> units{z, dy};
        clear(p1, p2);
        clear(p3, p3);
        each(span, [&](Index row, Index c) {
            const V middle = get(BY_T, c);
            V total[3];
            units.sum_each(row, span, c, total, [&](const Unit& u, V(&sums)[3]) {
                const At at = look(units, z, codes, u, c);
                const V t_d = back(at, load(t_dy.p + u.out)), d = back(at, load(dy.p + u.out));
                sums[0] += t_d;
                sums[1] += t_d * at.d;
                sums[2] += d * (units.chosen(t_z.p, u, at.codes) - middle);
            });
            add_lanes<T>(p1 + c, total[0]);
            add_lanes<T>(p2 + c, total[1]);
            add_lanes<T>(p3 + c, total[2]);
        });
    }
    // t_dz = CONSTANT + BY_Z d + BY_T t_z, and BY_DY b(dy) + SCALE b(t_dy) where those go. `t_dz` may be `t_z`.
    void spread_t_cotangents(const Image<T>& z, const Image<T>& t_z, const Image<T>& dy, const Image<T>& t_dy,
                             const Code* codes, const Span& span, const Image<T>& t_dz) const {
        const Units<T, POOL> units{z, dy};
        each(span, [&](Index row, Index c) {
            const V base = get(BASE, c), constant = get(CONSTANT, c), by_z = get(BY_Z, c), by_t = get(BY_T, c);
            const V scale = get(SCALE, c), by_dy = get(BY_DY, c);
            const auto even = [&](Index i) {
                return (load(z.p + i) - base) * by_z + (load(t_z.p + i) * by_t + constant);
            };
            units.each(row, span, c, [&](const Unit& u) {
                const At at = look(units, z, codes, u, c);
                const V d = back(at, load(dy.p + u.out) * by_dy + load(t_dy.p + u.out) * scale);
                MAML_FAST_UNROLL
                for (int j = 0; j < PIXELS; ++j) {
                    const Index i = u.in + units.pixel(j);
                    store(t_dz.p + i, even(i) + (POOL ? ((at.codes & 3) == j ? d : V{}) : d));
                }
            });
            units.each_left(row, c, [&](Index i) { store(t_dz.p + i, even(i)); });
        });
    }
    // Each row's mean, and the sum of squares about it: [rows][Cp][2].
    void measure(const Image<T>& z, const Span& span, double* parts) const {
        const Units<T, POOL> units{z, z};
        const double count = static_cast<double>(span.lines * z.shape.width);
        const T share = T(1) / static_cast<T>(count);
        each(span, [&](Index row, Index c) {
            V sum[1], squares[2];
            units.sum(row, span, c, sum, [&](Index i, V(&part)[1]) { part[0] += load(z.p + i); });
            const V mean = sum[0] * share;
            units.sum(row, span, c, squares, [&](Index i, V(&part)[2]) {
                const V d = load(z.p + i) - mean;
                part[0] += d * d;
                part[1] += d;
            });
            double* to = parts + 2 * ((row - span.row) * Cp + c);
            for (int j = 0; j < L; ++j) {  // what the mean was off by, where it is large beside the rest
                const double rest = static_cast<double>(squares[1][j]);
                to[2 * j] = static_cast<double>(mean[j]) + rest / count;
                to[2 * j + 1] = larger(static_cast<double>(squares[0][j]) - rest * rest / count, 0.0);
            }
        });
    }

   private:
    // A unit's d at its largest pixel, and whether the activation is flat there.
    struct At {
        V d;
        IntVec<T> codes, flat;
    };
    MAML_FAST_INLINE At look(const Units<T, POOL>& units, const Image<T>& z, const Code* codes, const Unit& u, Index c) const {
        At at{};
        if constexpr (POOL) {
            at.codes = load_codes<T>(codes + u.code);
            at.flat = (at.codes & FLAT) != 0;
        }
        at.d = units.chosen(z.p, u, at.codes) - get(BASE, c);
        if (!POOL && BEND != Bend::none) at.flat = at.d * get(SCALE, c) + get(SHIFT, c) <= V{};
        return at;
    }
    MAML_FAST_INLINE V back(const At& at, V d) const { return finish.back(at.flat, d); }

    MAML_FAST_INLINE V get(Coefficient which, Index c) const { return load(coefficients + which * Cp + c); }
    void clear(double* a, double* b) const {
        for (double* p : {a, b})
            for (Index c = 0; c < Cp; ++c) p[c] = 0;
    }
    // Row by row, for each vector of channels: a row stays near while its vectors are gone through.
    template <class Visit>
    MAML_FAST_INLINE void each(const Span& span, Visit visit) const {
        for (Index row = span.row; row < span.row + span.rows; ++row)
            for (Index c = 0; c < Cp; c += L) visit(row, c);
    }
};

}  // namespace maml_fast::MAML_FAST_ISA
