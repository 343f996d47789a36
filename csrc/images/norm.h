// Normalisation of images, with what stands behind it in the chain: an activation of two straight pieces, and 2x2 maximum
// pooling. Each rule goes over the images twice, for sums and for the result, and nothing is kept but the input.
//
// m(.) is the mean over the numbers of a statistic, v = gamma xhat + beta what the activation a sees, y what is pooled of a(v).
// dy and t_dy below have gone back through pooling and a.
//     xhat = r (z - m(z)),  r = 1 / sqrt(m((z - m(z))^2) + eps)         s1 = sum dy,  s2 = sum dy xhat
//     dz = r (u - m(u) - xhat m(u xhat)),  u = gamma dy                 grad gamma = s2, grad beta = s1
//     t_xhat = r (t_z - m(t_z) - xhat m(xhat t_z)),  t_v = gamma t_xhat + t_gamma xhat + t_beta,  t_r = -r^2 m(xhat t_z)
//     t_dz = t_r (u - m(u) - xhat m(u xhat)) + r (t_u - m(t_u) - t_xhat m(u xhat) - xhat m(t_u xhat + u t_xhat))
//     lam_gamma += sum(t_dy xhat + dy t_xhat), lam_beta += sum t_dy     t_u = gamma t_dy + t_gamma dy
// The passes give sums and take results with single coefficients of z - m(z), t_z, dy and t_dy; what is done with each channel's
// sums in between is in double, and there it is told what the passes' m(z), rounded to T, is off by.
#pragma once

#include <math.h>

#include "images/layer_parameters.h"
#include "images/norm_passes.h"
#include "images/stage.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T, Bend BEND, bool POOL>
class ImageNorm final : public ImageStage<T> {
    using ImageStage<T>::in;
    using ImageStage<T>::out;

   public:
    // `first`: its input is the data, which no tangent and no cotangent concerns. `bare`: without gamma and beta.
    ImageNorm(const Layer& layer, const Program& program, ImageShape shape, bool first, bool bare,
              Finish<T, BEND, POOL> finish)
        : parameters(layer, program, shape.channels, bare),
          first_(first),
          shape_(shape),
          sets_(NormSets::make(layer, shape)),
          C(shape.channels),
          Cp(padded<T>(C)) {
        passes_.finish = finish;
    }

    ChannelParameters<T> parameters;

    bool works_in_place() const override { return true; }
    bool restores_cotangent() const override { return true; }

    void allocate(Arena& arena, Index kept) override {
        parameters.allocate(arena);
        const Index passes = static_cast<Index>(in->value.size());
        keeps_steps_ = kept > 1;
        steps_.resize(passes);
        for (Index k = 0; k < passes; ++k) {
            if (k >= kept && k < passes - 1) {
                steps_[k] = steps_[0];
                continue;
            }
            const Image<T>&z = in->value[k], &y = out->value[k];
            steps_[k].moments = arena.template take<double>(sets_.count(z.rows, shape_) * MOMENTS * Cp);
            steps_[k].codes = POOL ? arena.template take<Code>(Units<T, POOL>::code_numbers(y)) : nullptr;
        }
        parts_ = arena.template take<double>(2 * larger(in->rows, in->query_rows) * Cp);
        sums_ = arena.template take<double>(5 * Cp);
        passes_.coefficients = arena.template take<T>(COEFFICIENTS * Cp);
        passes_.Cp = Cp;
    }
    void list(std::vector<Adapts<T>>& found) override {
        if (parameters.adapts()) found.push_back({&parameters});
    }
    void begin_call() override { parameters.turn_in(); }

    void forward(Index k) override {
        each_set(k, [&](const Span& span, double* const* m) {
            measure(in->value[k], span, m[MEAN], m[R]);
            put_value(k, m);
            passes_.apply(in->value[k], out->value[k], steps_[k].codes, span);
        });
    }

    void backward(Index k) override {
        const Image<T>&z = in->value[k], &dy = out->cotangent[k];
        for (const FastParameter<T>* p : {&parameters.weight, &parameters.bias})
            if (p->adapts()) std::memset(p->gradient(k), 0, static_cast<std::size_t>(Cp) * sizeof(T));
        each_set(k, [&](const Span& span, double* const* m) {
            put_value(k, m);
            passes_.sum_cotangents(z, dy, steps_[k].codes, span, m[S1], m[S2]);
            for (Index c = 0; c < C; ++c) m[S2][c] = m[R][c] * (m[S2][c] - off(m, c) * m[S1][c]);
            if (parameters.weight.adapts()) add_to(parameters.weight.gradient(k), m[S2]);
            if (parameters.bias.adapts()) add_to(parameters.bias.gradient(k), m[S1]);
            if (first_) return;
            const T* g = parameters.gamma(k);
            average(span, m[MU], [&](Index c) { return g[c] * m[S1][c]; });
            average(span, m[MUX], [&](Index c) { return g[c] * m[S2][c]; });
            spread(k, span, m);
        });
    }

    void tangent(Index k) override {
        const Image<T>&z = in->value[k], &t_z = in->tangent[k];
        parameters.aim(k);
        each_set(k, [&](const Span& span, double* const* m) {
            put_value(k, m);
            passes_.sum_tangents(z, t_z, span, sums_, sums_ + Cp);
            average(span, m[MT], [&](Index c) { return sums_[c]; });
            average(span, m[MXT], [&](Index c) { return m[R][c] * (sums_[Cp + c] - off(m, c) * sums_[c]); });
            const T *g = parameters.gamma(k), *t_gamma = parameters.t_gamma(), *t_beta = parameters.t_beta();
            put_by_z(
                m, [&](Index c) { return t_beta[c] - g[c] * m[R][c] * m[MT][c]; },
                [&](Index c) { return (t_gamma[c] - g[c] * m[R][c] * m[MXT][c]) * m[R][c]; });
            passes_.apply_tangents(z, t_z, steps_[k].codes, span, out->tangent[k]);
        });
    }

    void tangent_backward(Index k) override {
        const Image<T>&z = in->value[k], &t_z = in->tangent[k], &dy = out->cotangent[k], &t_dy = out->t_cotangent[k];
        double *p1 = sums_, *p2 = sums_ + Cp, *p3 = sums_ + 2 * Cp, *mtu = sums_ + 3 * Cp, *mw = sums_ + 4 * Cp;
        each_set(k, [&](const Span& span, double* const* m) {
            const T *g = parameters.gamma(k), *t_gamma = parameters.t_gamma();
            put_value(k, m);
            if (!first_ && keeps_steps_ && k + 2 < static_cast<Index>(in->value.size()))
                spread(k, span, m);  // that of the last step is there
            put(BY_T, [&](Index c) { return m[MT][c]; });
            passes_.sum_t_cotangents(z, t_z, dy, t_dy, steps_[k].codes, span, p1, p2, p3);
            for (Index c = 0; c < C; ++c) {
                p2[c] = m[R][c] * (p2[c] - off(m, c) * p1[c]);
                p3[c] = m[R][c] * (p3[c] - m[MXT][c] * m[S2][c]);  // now sum dy t_xhat
            }
            if (parameters.bias.adapts()) add_to(parameters.bias.adjoint(), p1);
            if (parameters.weight.adapts()) add_to(parameters.weight.adjoint(), p2);
            if (parameters.weight.adapts()) add_to(parameters.weight.adjoint(), p3);
            if (first_) return;
            average(span, mtu, [&](Index c) { return g[c] * p1[c] + t_gamma[c] * m[S1][c]; });
            average(span, mw, [&](Index c) { return g[c] * (p2[c] + p3[c]) + t_gamma[c] * m[S2][c]; });
            put_by_z(
                m, [&](Index c) { return m[R][c] * (m[R][c] * (m[MXT][c] * m[MU][c] + m[MUX][c] * m[MT][c]) - mtu[c]); },
                [&](Index c) { return m[R][c] * m[R][c] * (2 * m[R][c] * m[MUX][c] * m[MXT][c] - mw[c]); });
            put(BY_T, [&](Index c) { return -m[R][c] * m[R][c] * m[MUX][c]; });
            put(BY_DY, [&](Index c) { return m[R][c] * (t_gamma[c] - m[R][c] * m[MXT][c] * g[c]); });
            passes_.spread_t_cotangents(z, t_z, dy, t_dy, steps_[k].codes, span, in->t_cotangent[k]);
        });
    }

   private:
    enum Moment { MEAN, R, S1, S2, MU, MUX, MT, MXT, MOMENTS };
    struct Step {
        double* moments = nullptr;  // [statistics][MOMENTS][Cp]
        Code* codes = nullptr;
    };

    // dz, from the means of u.
    void spread(Index k, const Span& span, double* const* m) {
        put_by_z(
            m, [&](Index c) { return -m[R][c] * m[MU][c]; }, [&](Index c) { return -m[R][c] * m[R][c] * m[MUX][c]; });
        passes_.spread_cotangents(in->value[k], out->cotangent[k], steps_[k].codes, span, in->cotangent[k]);
    }

    // Calls visit(span, moments) for the numbers of each statistic.
    template <class Visit>
    void each_set(Index k, Visit visit) {
        const Index rows = in->value[k].rows, sets = sets_.count(rows, shape_);
        for (Index s = 0; s < sets; ++s) {
            double* m[MOMENTS];
            for (Index i = 0; i < MOMENTS; ++i) m[i] = steps_[k].moments + (s * MOMENTS + i) * Cp;
            visit(sets_.span(s, rows, shape_), m);
        }
    }
    // Mean and 1 / deviation, from each row's own mean and squares about it.
    void measure(const Image<T>& z, const Span& span, double* mean, double* r) {
        passes_.measure(z, span, parts_);
        const double apart = static_cast<double>(span.rows * sets_.group), each = numbers(span) / apart;
        for (Index c = 0; c < C; ++c) {
            mean[c] = 0;
            for (Index i = 0; i < span.rows; ++i) mean[c] += parts_[2 * (i * Cp + c)];
        }
        sets_.combine(mean, C);
        for (Index c = 0; c < C; ++c) {
            mean[c] /= apart;
            r[c] = 0;
            for (Index i = 0; i < span.rows; ++i) {
                const double *part = parts_ + 2 * (i * Cp + c), off = part[0] - mean[c];
                r[c] += part[1] + each * off * off;
            }
        }
        sets_.combine(r, C);
        for (Index c = 0; c < C; ++c) r[c] = 1 / ::sqrt(r[c] / numbers(span) + parameters.layer.eps);
    }
    double numbers(const Span& span) const {
        return static_cast<double>(span.rows * span.lines * shape_.width * sets_.group);
    }
    template <class Value>
    void average(const Span& span, double* to, Value value) const {
        for (Index c = 0; c < C; ++c) to[c] = value(c);
        sets_.combine(to, C);
        for (Index c = 0; c < C; ++c) to[c] /= numbers(span);
    }
    void add_to(T* to, const double* from) const {
        for (Index c = 0; c < C; ++c) to[c] += static_cast<T>(from[c]);
    }
    template <class Value>
    void put(Coefficient which, Value value) {
        T* to = passes_.coefficients + which * Cp;
        for (Index c = 0; c < Cp; ++c) to[c] = c < C ? static_cast<T>(value(c)) : T(0);
    }
    void put_value(Index k, double* const* m) {
        const T *g = parameters.gamma(k), *b = parameters.beta(k);
        put(BASE, [&](Index c) { return m[MEAN][c]; });
        put(SCALE, [&](Index c) { return g[c] * m[R][c]; });
        put(SHIFT, [&](Index c) { return b[c] - g[c] * m[R][c] * off(m, c); });
    }
    // A constant, and what is multiplied by z less its mean.
    template <class Constant, class Value>
    void put_by_z(double* const* m, Constant constant, Value by_z) {
        put(CONSTANT, [&](Index c) { return constant(c) - off(m, c) * by_z(c); });
        put(BY_Z, by_z);
    }
    // The mean less the one that the passes take away.
    static double off(double* const* m, Index c) { return m[MEAN][c] - static_cast<double>(static_cast<T>(m[MEAN][c])); }

    const bool first_;
    const ImageShape shape_;
    const NormSets sets_;
    const Index C, Cp;
    NormPasses<T, BEND, POOL> passes_;
    bool keeps_steps_ = false;
    std::vector<Step> steps_;                    // [passes]
    double *parts_ = nullptr, *sums_ = nullptr;  // [rows][Cp][2], [5][Cp]
};

}  // namespace maml_fast::MAML_FAST_ISA
