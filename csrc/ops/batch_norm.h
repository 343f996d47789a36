// Batch norm of flat rows, by the statistics of the task's own rows: see norm.h for the rules.
//
// All numbers that share statistics lie in one run of columns. Where rows are lanes, the last column may have lanes without
// a row; they repeat the last row, and must not count: `filled` leaves zeros there.
#pragma once

#include "ops/norm.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T, class Lanes>
class BatchNorm : public NormStage<T, Lanes> {
    using Base_ = NormStage<T, Lanes>;
    using typename Base_::Unit;
    using Base_::F;
    using Base_::first;
    using Base_::in;
    using Base_::L;
    using Base_::out;
    using Base_::U;

   public:
    using Base_::Base_;

    void allocate(Arena& arena, Index kept) override {
        Base_::allocate(arena, kept);
        inverse_ = this->template of_each_pass<Numbers<T>>([&](Index) { return Numbers<T>{arena.template take<T>(F * U)}; });
        t_inverse_ = {arena.template take<T>(F * U)};
    }

    void forward(Index k) override {
        const View<T> x = in->value[k], xhat = this->xhat[k], y = out->value[k];
        const auto gammas = this->gamma_of(k), betas = this->beta_of(k);
        const Gate<T> gate = this->value_gate();
        const Filled filled(this->rows(k));
        const Unit share = filled.share();
        const T eps = static_cast<T>(this->layer.eps);
        T* inverse = inverse_[k].p;
        for (Index f = 0; f < x.features; ++f) {
            const T* from = x.p + f * x.by_feature;
            T *hat = xhat.p + f * xhat.by_feature, *to = y.p + f * y.by_feature;
            Vec<T> sum{}, squares{};
            for (Index n = 0; n < x.columns; ++n) sum += filled(load(from + n * L), n);
            const Vec<T> mean = Lanes::in_lanes(Lanes::over_rows(sum) * share);
            for (Index n = 0; n < x.columns; ++n) {
                const Vec<T> centred = load(from + n * L) - mean;
                store(hat + n * L, centred);
                squares += filled(centred * centred, n);
            }
            const Unit r = one_over_root<T>(Lanes::over_rows(squares) * share + eps);
            Lanes::write(inverse + f * U, r);
            const Vec<T> scale = Lanes::in_lanes(r);
            const Vec<T> gamma = Lanes::in_lanes(gammas(f)), beta = Lanes::in_lanes(betas(f));
            for (Index n = 0; n < x.columns; ++n) {
                const Vec<T> h = load(hat + n * L) * scale;
                store(hat + n * L, h);
                store(to + n * L, gate(h * gamma + beta, f, n));
            }
        }
    }

    // dx = r gamma (dy - m(dy) - xhat m(dy xhat))
    void backward(Index k) override {
        const View<T> dy = out->cotangent[k], xhat = this->xhat[k], dx = first ? View<T>{} : in->cotangent[k];
        const auto gammas = this->gamma_of(k);
        const Gate<T> gate = this->cotangent_gate(k);
        const Filled filled(this->rows(k));
        const Unit share = filled.share();
        T *d_gammas = this->d_gamma[k].p, *d_betas = this->d_beta[k].p, *inverse = inverse_[k].p;
        for (Index f = 0; f < dy.features; ++f) {
            Base_::sum_rows(f, dy, xhat, d_gammas, d_betas);
            if (!dx.p) continue;
            const T *d = dy.p + f * dy.by_feature, *hat = xhat.p + f * xhat.by_feature;
            T* to = dx.p + f * dx.by_feature;
            const Unit d_gamma = Lanes::read(d_gammas + f * U), d_beta = Lanes::read(d_betas + f * U);
            const Vec<T> scale = Lanes::in_lanes(gammas(f) * Lanes::read(inverse + f * U));
            const Vec<T> mean = Lanes::in_lanes(d_beta * share), slope = Lanes::in_lanes(d_gamma * share);
            for (Index n = 0; n < dy.columns; ++n) {
                const Vec<T> v = (load(d + n * L) - mean - load(hat + n * L) * slope) * scale;
                store(to + n * L, gate(filled(v, n), f, n));
            }
        }
    }

    void tangent(Index k) override {
        const View<T> xhat = this->xhat[k], t_y = out->tangent[k], t_x = first ? View<T>{} : in->tangent[k];
        const auto gammas = this->gamma_of(k), t_gammas = this->t_gamma_of(k), t_betas = this->t_beta_of(k);
        const Gate<T> gate = this->tangent_gate(k);
        const Filled filled(this->rows(k));
        const Unit share = filled.share();
        T *inverse = inverse_[k].p, *t_inverse = t_inverse_.p;
        for (Index f = 0; f < t_y.features; ++f) {
            const T* hat = xhat.p + f * xhat.by_feature;
            T* to = t_y.p + f * t_y.by_feature;
            const Vec<T> t_gamma = Lanes::in_lanes(t_gammas(f)), t_beta = Lanes::in_lanes(t_betas(f));
            if (!t_x.p) {
                for (Index n = 0; n < t_y.columns; ++n)
                    store(to + n * L, gate(load(hat + n * L) * t_gamma + t_beta, f, n));
                continue;
            }
            T* t = t_x.p + f * t_x.by_feature;
            Vec<T> sum{}, with_hat{};
            for (Index n = 0; n < t_y.columns; ++n) {
                const Vec<T> v = filled(load(t + n * L), n);
                sum += v;
                with_hat += v * load(hat + n * L);
            }
            const Vec<T> mean = Lanes::in_lanes(Lanes::over_rows(sum) * share);
            const Unit slope = Lanes::over_rows(with_hat) * share, r = Lanes::read(inverse + f * U);
            Lanes::write(t_inverse + f * U, -r * r * slope);
            const Vec<T> scale = Lanes::in_lanes(r), slopes = Lanes::in_lanes(slope), gamma = Lanes::in_lanes(gammas(f));
            for (Index n = 0; n < t_y.columns; ++n) {
                const Vec<T> h = load(hat + n * L), t_h = (load(t + n * L) - mean - h * slopes) * scale;
                store(t + n * L, t_h);
                store(to + n * L, gate(t_h * gamma + (h * t_gamma + t_beta), f, n));
            }
        }
    }

    // With all means over rows taken out of the rule, t_dx is a sum of four vectors and a number.
    void tangent_backward(Index k) override {
        const View<T> dy = out->cotangent[k], t_dy = out->t_cotangent[k], xhat = this->xhat[k];
        const View<T> t_xhat = first ? View<T>{} : in->tangent[k], t_dx = first ? View<T>{} : in->t_cotangent[k];
        const auto gammas = this->gamma_of(k), t_gammas = this->t_gamma_of(k);
        const Gate<T> gate = this->cotangent_gate(k);
        const Filled filled(this->rows(k));
        const Unit share = filled.share();
        const T *d_gammas = this->d_gamma[k].p, *d_betas = this->d_beta[k].p, *inverse = inverse_[k].p;
        T *t_d_gammas = this->t_d_gamma, *t_d_betas = this->t_d_beta, *t_inverse = t_inverse_.p;
        for (Index f = 0; f < dy.features; ++f) {
            Base_::sum_rows(f, t_dy, xhat, dy, t_xhat, t_d_gammas, t_d_betas);
            if (!t_xhat.p) continue;
            const T *d = dy.p + f * dy.by_feature, *t_d = t_dy.p + f * t_dy.by_feature;
            const T *hat = xhat.p + f * xhat.by_feature, *t_hat = t_xhat.p + f * t_xhat.by_feature;
            T* to = t_dx.p + f * t_dx.by_feature;
            const Unit t_d_gamma = Lanes::read(t_d_gammas + f * U), t_d_beta = Lanes::read(t_d_betas + f * U);
            const Unit gamma = gammas(f), r = Lanes::read(inverse + f * U), t_r = Lanes::read(t_inverse + f * U);
            const Unit mean = Lanes::read(d_betas + f * U) * share, slope = Lanes::read(d_gammas + f * U) * share;
            // t_dx = by_d P(dy) + by_t_d P(t_dy), and the rest of P's own tangent
            const Unit by_d = t_r * gamma + r * t_gammas(f), by_t_d = r * gamma;
            const Unit number = by_d * mean + by_t_d * (t_d_beta * share);
            const Unit by_hat = by_d * slope + by_t_d * (t_d_gamma * share), by_t_hat = by_t_d * slope;
            const Vec<T> a = Lanes::in_lanes(by_d), b = Lanes::in_lanes(by_t_d), c = Lanes::in_lanes(number);
            const Vec<T> h = Lanes::in_lanes(by_hat), t_h = Lanes::in_lanes(by_t_hat);
            for (Index n = 0; n < dy.columns; ++n) {
                const Vec<T> v = load(d + n * L) * a + load(t_d + n * L) * b - c - load(hat + n * L) * h -
                                 load(t_hat + n * L) * t_h;
                store(to + n * L, gate(filled(v, n), f, n));
            }
        }
    }

   private:
    // Zeros in lanes without a row, which are in the last column; and what a sum over rows counts for in a mean.
    class Filled {
       public:
        explicit Filled(Index rows) : rows_(rows), last_(Lanes::columns(rows) - 1) {
            for (int j = 0; j < LANES<T>; ++j) has_row_[j] = last_ * LANES<T> + j < rows ? -1 : 0;
        }
        MAML_FAST_INLINE Vec<T> operator()(Vec<T> v, Index column) const {
            if constexpr (!Lanes::tasks)
                if (column == last_) return has_row_ ? v : Vec<T>{};
            return v;
        }
        Unit share() const { return Lanes::same(T(1) / static_cast<T>(rows_)); }

       private:
        Index rows_, last_;
        IntVec<T> has_row_;
    };

    std::vector<Numbers<T>> inverse_;  // [S + 1] of [F] units: r of each pass
    Numbers<T> t_inverse_;             // [F] units, of the step at hand
};

}  // namespace maml_fast::MAML_FAST_ISA
