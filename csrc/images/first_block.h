// The first layers that adapt, taken as one: a convolution of the data, batch norm, and what stands behind it. Neither the
// convolution's result nor its cotangents are ever kept: z = W^T a is linear in patches a (patches.h), which are data, so all
// that a batch norm asks of z follows from their mean p and covariance Q; and what enters a gradient is linear in
//     B = sum over units of a dy^T,  s1 = sum dy        (t_B, p1 of t_dy), each of a unit's largest pixel
// With N pixels, w a column of W, v one of the direction V of tangents, r = 1 / sqrt(w^T Q w + eps), E = r Q w, k = gamma r:
//     v_px = k (w^T a - w^T p) + beta                   s2 = r (w^T B - w^T p s1)            a convolution by k w
//     grad w = k (B - p s1 - E s2)                      of the bias 0: the norm takes it away
//     mt = v^T p,  mxt = v^T E,  F = r (Q v - E mxt)    t_v = k v^T a + (t_gamma - k mxt) r (w^T a - w^T p) + t_beta - k mt
//     p2 = r (w^T t_B - w^T p p1),  p3 = r (v^T B - mt s1 - mxt s2)
//     lam_w += t_r (gamma B - N p mu - N E mux) + r (gamma t_B + t_gamma B - N p mtu - N F mux - N E mw)
// with the means of norm.h: N mu = gamma s1, N mux = gamma s2, N mtu = gamma p1 + t_gamma s1,
// N mw = gamma (p2 + p3) + t_gamma s2, t_r = -r^2 mxt. The small matrices [n][K] are in double.
// What the sums over pixels would lose of digits once, w^T Q w loses twice: of filters that take away nearly all of what the
// data vary by (a Laplace filter, of a slope a hundred times its noise), a float32's statistics keep fewer digits than torch's.
#pragma once

#include <math.h>

#include "images/layer_parameters.h"
#include "images/norm_units.h"
#include "images/patches.h"
#include "images/stage.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T, Bend BEND, bool POOL>
class ImageFirstBlock final : public ImageStage<T> {
    using ImageStage<T>::in;
    using ImageStage<T>::out;
    static constexpr Index L = LANES<T>, SIDE = POOL ? 2 : 1;
    static constexpr int PIXELS = Finish<T, BEND, POOL>::PIXELS;
    static constexpr bool CODES = POOL || BEND != Bend::none;
    // Lines of the convolution's result that are at hand.
    static constexpr Index LINE_BYTES = 24 << 10;

   public:
    ImageFirstBlock(const Layer& conv, const Layer& norm, const Program& program, Finish<T, BEND, POOL> finish)
        : filters(conv, program),
          affine(norm, program, conv.out_features, false),
          finish_(finish),
          support_(filters.conv),
          query_(filters.conv),
          n(filters.conv.terms()),
          K(conv.out_features),
          Kp(padded<T>(K)) {}

    ConvParameters<T> filters;
    ChannelParameters<T> affine;

    bool reads_bare() const override { return true; }
    bool keeps_cotangent() const override { return false; }

    void list(std::vector<Adapts<T>>& found) override {
        if (filters.adapts()) found.push_back({&filters});
        if (affine.adapts()) found.push_back({&affine});
    }
    void allocate(Arena& arena, Index kept) override {
        filters.allocate(arena);
        affine.allocate(arena);
        support_.allocate(arena, in->rows, in->shape);
        query_.allocate(arena, in->query_rows, in->shape);
        const Index passes = static_cast<Index>(in->value.size());
        steps_.resize(passes);
        for (Index k = 0; k < passes; ++k) {
            if (k >= kept && k < passes - 1) {
                steps_[k] = steps_[0];
                continue;
            }
            const Index codes = Units<T, POOL>::code_numbers(out->value[k]);
            steps_[k].codes = CODES ? arena.template take<Code>(codes) : nullptr;
            steps_[k].sums = arena.template take<T>(n * Kp);
            steps_[k].moments = arena.template take<double>(MOMENTS * K);
        }
        t_sums_ = arena.template take<T>(n * Kp);
        folded_ = arena.template take<T>(n * Kp);
        zeros_ = arena.template take<T>(n * Kp);
        constant_ = arena.template take<T>(Kp);
        e_ = arena.template take<double>(n * K);
        f_ = arena.template take<double>(n * K);
        small_ = arena.template take<double>(SMALL * K);
        const ImageShape z = filters.conv.result(in->shape);
        line_ = take_image<T>(arena, 1, {K, lines_at_once(z), z.width}, 0);
    }
    void begin_call() override {
        filters.turn_in();
        affine.turn_in();
    }
    void begin_task() override {
        const Index passes = static_cast<Index>(in->value.size());
        if (passes > 1) support_.take(in->value[0], doubles_);
        query_.take(in->value[passes - 1], doubles_);
    }

    void forward(Index k) override {
        const Patches<T>& patches = patches_of(k);
        const T *w = filters.weight.value(k), *g = affine.gamma(k), *b = affine.beta(k);
        double *mean = moment(k, MEAN), *r = moment(k, R);
        times_mean(patches, w, mean);
        times_covariance(patches, w, e_);
        column_products(w, e_, K, r);
        for (Index o = 0; o < K; ++o) {
            r[o] = 1 / ::sqrt(larger(r[o], 0.0) + affine.layer.eps);
            constant_[o] = static_cast<T>(b[o] - g[o] * r[o] * mean[o]);
        }
        fold([&](Index i, Index o) { return g[o] * r[o] * w[i * Kp + o]; });
        const Image<T>& y = out->value[k];
        each_lines(k, [&](Index row, const Span& span) {
            convolve_lines(patches, row, span);
            each_unit(y, row, span, [&](const Unit& u, Index line) {
                Vec<T> v[PIXELS];
                MAML_FAST_UNROLL
                for (int j = 0; j < PIXELS; ++j) v[j] = load(line_.p + line + pixel(j));
                IntVec<T> code;
                store(y.p + u.out, finish_(v, code));
                if (CODES) store_codes<T>(steps_[k].codes + u.code, code);
            });
        });
    }

    void backward(Index k) override {
        const Patches<T>& patches = patches_of(k);
        const T *w = filters.weight.value(k), *g = affine.gamma(k), *sums = steps_[k].sums;
        double *mean = moment(k, MEAN), *r = moment(k, R), *s1 = moment(k, S1), *s2 = moment(k, S2);
        sum_units(k, out->cotangent[k], steps_[k].sums, s1);
        column_products(w, sums, Kp, s2);
        for (Index o = 0; o < K; ++o) s2[o] = r[o] * (s2[o] - mean[o] * s1[o]);
        put(affine.weight, k, [&](Index o) { return s2[o]; });
        put(affine.bias, k, [&](Index o) { return s1[o]; });
        put(filters.bias, k, [&](Index) { return 0.0; });
        if (!filters.weight.adapts()) return;
        times_covariance(patches, w, e_);
        T* to = filters.weight.gradient(k);
        for (Index i = 0; i < n; ++i)
            for (Index o = 0; o < K; ++o)
                to[i * Kp + o] = static_cast<T>(
                    g[o] * r[o] * (sums[i * Kp + o] - patches.mean[i] * s1[o] - r[o] * e_[i * K + o] * s2[o]));
    }

    void tangent(Index k) override {
        filters.aim(k);
        affine.aim(k);
        const Patches<T>& patches = patches_of(k);
        const T *w = filters.weight.value(k), *v = direction(), *g = affine.gamma(k);
        const T *t_gamma = affine.t_gamma(), *t_beta = affine.t_beta();
        double *mean = moment(k, MEAN), *r = moment(k, R), *mt = moment(k, MT), *mxt = moment(k, MXT), *by_xhat = small(0);
        times_mean(patches, v, mt);
        times_covariance(patches, w, e_);
        column_products(v, e_, K, mxt);
        for (Index o = 0; o < K; ++o) {
            mxt[o] *= r[o];
            by_xhat[o] = t_gamma[o] - g[o] * r[o] * mxt[o];
            constant_[o] = static_cast<T>(t_beta[o] - g[o] * r[o] * mt[o] - by_xhat[o] * r[o] * mean[o]);
        }
        fold([&](Index i, Index o) { return r[o] * (g[o] * v[i * Kp + o] + by_xhat[o] * w[i * Kp + o]); });
        const Image<T>& t_y = out->tangent[k];
        each_lines(k, [&](Index row, const Span& span) {
            convolve_lines(patches, row, span);
            each_unit(t_y, row, span, [&](const Unit& u, Index line) {
                const IntVec<T> code = codes(k, u);
                Vec<T> t = load(line_.p + line);
                MAML_FAST_UNROLL
                for (int j = 1; j < PIXELS; ++j) t = (code & 3) == j ? load(line_.p + line + pixel(j)) : t;
                store(t_y.p + u.out, finish_.back((code & FLAT) != 0, t));
            });
        });
    }

    void tangent_backward(Index k) override {
        const Patches<T>& patches = patches_of(k);
        const T *w = filters.weight.value(k), *v = direction(), *g = affine.gamma(k), *t_gamma = affine.t_gamma();
        const double *mean = moment(k, MEAN), *r = moment(k, R), *s1 = moment(k, S1), *s2 = moment(k, S2);
        const double *mt = moment(k, MT), *mxt = moment(k, MXT);
        const T* sums = steps_[k].sums;
        double *p1 = small(0), *p2 = small(1), *p3 = small(2);
        sum_units(k, out->t_cotangent[k], t_sums_, p1);
        column_products(w, t_sums_, Kp, p2);
        column_products(v, sums, Kp, p3);
        for (Index o = 0; o < K; ++o) {
            p2[o] = r[o] * (p2[o] - mean[o] * p1[o]);
            p3[o] = r[o] * (p3[o] - mt[o] * s1[o] - mxt[o] * s2[o]);
        }
        add(affine.bias, [&](Index o) { return p1[o]; });
        add(affine.weight, [&](Index o) { return p2[o] + p3[o]; });
        if (!filters.weight.adapts()) return;
        times_covariance(patches, w, e_);
        times_covariance(patches, v, f_);
        T* to = filters.weight.adjoint();
        for (Index i = 0; i < n; ++i)
            for (Index o = 0; o < K; ++o) {
                const double p = patches.mean[i], b = sums[i * Kp + o], e = r[o] * e_[i * K + o];
                const double f = r[o] * (f_[i * K + o] - e * mxt[o]), mux = g[o] * s2[o];
                const double moved = -r[o] * mxt[o] * (g[o] * b - p * g[o] * s1[o] - e * mux);
                const double rest = g[o] * t_sums_[i * Kp + o] + t_gamma[o] * b - p * (g[o] * p1[o] + t_gamma[o] * s1[o]);
                const double mw = g[o] * (p2[o] + p3[o]) + t_gamma[o] * s2[o];
                to[i * Kp + o] += static_cast<T>(r[o] * (moved + rest - f * mux - e * mw));
            }
    }

   private:
    enum Moment { MEAN, R, S1, S2, MT, MXT, MOMENTS };
    static constexpr Index SMALL = 3;
    struct Step {
        Code* codes = nullptr;
        T* sums = nullptr;          // B [n][Kp]
        double* moments = nullptr;  // [MOMENTS][K]
    };

    const Patches<T>& patches_of(Index k) const { return k + 1 == static_cast<Index>(in->value.size()) ? query_ : support_; }
    double* moment(Index k, Moment which) const { return steps_[k].moments + which * K; }
    double* small(Index i) const { return small_ + i * K; }
    const T* direction() const { return filters.weight.adapts() ? filters.weight.direction() : zeros_; }

    // ---- small matrices

    // to[o] = w_o^T p
    void times_mean(const Patches<T>& patches, const T* w, double* to) const {
        for (Index o = 0; o < K; ++o) to[o] = 0;
        for (Index i = 0; i < n; ++i)
            for (Index o = 0; o < K; ++o) to[o] += patches.mean[i] * w[i * Kp + o];
    }
    // to[i][o] = (Q w_o)_i
    void times_covariance(const Patches<T>& patches, const T* w, double* to) const {
        for (Index i = 0; i < n; ++i) {
            double* row = to + i * K;
            for (Index o = 0; o < K; ++o) row[o] = 0;
            for (Index j = 0; j < n; ++j) {
                const double q = patches.covariance[i * n + j];
                for (Index o = 0; o < K; ++o) row[o] += q * w[j * Kp + o];
            }
        }
    }
    // to[o] = w_o^T m_o
    template <class M>
    void column_products(const T* w, const M* m, Index by_row, double* to) const {
        for (Index o = 0; o < K; ++o) to[o] = 0;
        for (Index i = 0; i < n; ++i)
            for (Index o = 0; o < K; ++o) to[o] += static_cast<double>(w[i * Kp + o]) * static_cast<double>(m[i * by_row + o]);
    }
    template <class Value>
    void fold(Value value) {
        for (Index i = 0; i < n; ++i)
            for (Index o = 0; o < K; ++o) folded_[i * Kp + o] = static_cast<T>(value(i, o));
    }
    template <class Value>
    void put(const FastParameter<T>& parameter, Index k, Value value) const {
        if (!parameter.adapts()) return;
        for (Index o = 0; o < K; ++o) parameter.gradient(k)[o] = static_cast<T>(value(o));
    }
    template <class Value>
    void add(const FastParameter<T>& parameter, Value value) const {
        if (!parameter.adapts()) return;
        for (Index o = 0; o < K; ++o) parameter.adjoint()[o] += static_cast<T>(value(o));
    }

    // ---- lines of images

    Index lines_at_once(ImageShape z) const {
        const Index bytes = z.width * Kp * static_cast<Index>(sizeof(T));
        return smaller(larger<Index>(LINE_BYTES / bytes / 2, 1) * 2, z.height + z.height % 2);
    }
    Index pixel(int j) const { return (j & 1) * line_.by_pixel + (j >> 1) * line_.by_line; }
    IntVec<T> codes(Index k, const Unit& u) const { return CODES ? load_codes<T>(steps_[k].codes + u.code) : IntVec<T>{}; }

    // Calls visit(row, lines of the convolution's result that units are of), some lines at a time.
    template <class Visit>
    void each_lines(Index k, Visit visit) const {
        const Index rows = out->value[k].rows, lines = SIDE * out->shape.height;
        for (Index row = 0; row < rows; ++row)
            for (Index y = 0; y < lines; y += line_.shape.height) visit(row, Span{row, 1, y, smaller(line_.shape.height, lines - y)});
    }
    // Calls visit(unit, its first pixel's offset in the lines at hand).
    template <class Visit>
    void each_unit(const Image<T>& y, Index row, const Span& span, Visit visit) const {
        const Units<T, POOL> units{line_, y};
        for (Index v = 0; v < Kp; v += L)
            units.each(row, span, v, [&](const Unit& u) { visit(u, u.in - row * line_.by_row - span.line * line_.by_line); });
    }
    // The lines' inputs, and their results: of the pixels that units have.
    Image<T> inputs(const Patches<T>& patches, Index row, const Span& span) const {
        Image<T> x = patches.centred;
        x.p = x.at(row, span.line * filters.conv.stride, 0);
        x.rows = 1;
        return x;
    }
    Image<T> results(const Span& span) const {
        Image<T> z = line_;
        z.shape.height = span.lines;
        z.shape.width = SIDE * out->shape.width;
        return z;
    }
    // The lines at hand, by the folded weights.
    void convolve_lines(const Patches<T>& patches, Index row, const Span& span) {
        const ConvTerm<T> term{folded_, inputs(patches, row, span)};
        convolve(filters.conv, &term, 1, constant_, results(span), segments_);
    }
    // sums [n][Kp] = sum over units of a d^T, and total[o] that of d.
    void sum_units(Index k, const Image<T>& dy, T* sums, double* total) {
        const Patches<T>& patches = patches_of(k);
        for (Index o = 0; o < K; ++o) total[o] = 0;
        bool begun = false;
        each_lines(k, [&](Index row, const Span& span) {
            for (Index v = 0; v < Kp; v += L) {
                const Units<T, POOL> units{line_, dy};
                Vec<T> sum[1];
                units.sum_each(row, span, v, sum, [&](const Unit& u, Vec<T>(&part)[1]) {
                    const Index line = u.in - row * line_.by_row - span.line * line_.by_line;
                    const IntVec<T> code = codes(k, u);
                    const Vec<T> d = finish_.back((code & FLAT) != 0, load(dy.p + u.out));
                    part[0] += d;
                    MAML_FAST_UNROLL
                    for (int j = 0; j < PIXELS; ++j)
                        store(line_.p + line + pixel(j), POOL ? ((code & 3) == j ? d : Vec<T>{}) : d);
                });
                for (Index o = v; o < smaller(v + L, K); ++o) total[o] += static_cast<double>(sum[0][o - v]);
            }
            convolve_outer(filters.conv, inputs(patches, row, span), results(span), sums, begun, segments_);
            begun = true;
        });
        if (!begun) std::memset(sums, 0, static_cast<std::size_t>(n * Kp) * sizeof(T));
    }

    const Finish<T, BEND, POOL> finish_;
    Patches<T> support_, query_;
    const Index n, K, Kp;
    std::vector<Step> steps_;  // [passes]
    T *t_sums_ = nullptr, *folded_ = nullptr, *zeros_ = nullptr, *constant_ = nullptr;
    double *e_ = nullptr, *f_ = nullptr, *small_ = nullptr;  // [n][K], [SMALL][K]
    Image<T> line_;
    SegmentList<T> segments_;
    SegmentList<double> doubles_;
};

}  // namespace maml_fast::MAML_FAST_ISA
