// Group norm of flat rows, and layer norm, which is one group: see norm.h for the rules.
//
// Each row has statistics of its own: a lane is a row, whichever it is, and one without a row disturbs none.
#pragma once

#include "ops/norm.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T, class Lanes>
class GroupNorm : public NormStage<T, Lanes> {
    using Base_ = NormStage<T, Lanes>;
    using typename Base_::Unit;
    using Base_::F;
    using Base_::first;
    using Base_::in;
    using Base_::L;
    using Base_::out;
    using Base_::U;

   public:
    GroupNorm(const Layer& layer, const Program& program, bool first)
        : Base_(layer, program, first), groups_(layer.groups), size_(F / layer.groups) {}

    void allocate(Arena& arena, Index kept) override {
        Base_::allocate(arena, kept);
        const auto of_groups = [&](Index k) { return arena.template view<T>(groups_, this->columns(k)); };
        inverse_ = this->template of_each_pass<View<T>>(of_groups);
        mean_ = this->template of_each_pass<View<T>>(of_groups);
        slope_ = this->template of_each_pass<View<T>>(of_groups);
        t_inverse_ = of_groups(0);
        const Index most = larger(in->columns, in->query_columns);
        first_ = arena.template take<T>(most * L);
        second_ = arena.template take<T>(most * L);
        parts_ = arena.template take<T>(PARTS * most * L);
    }

    void forward(Index k) override {
        const View<T> x = in->value[k], xhat = this->xhat[k], y = out->value[k];
        const auto gammas = this->gamma_of(k), betas = this->beta_of(k);
        const Gate<T> gate = this->value_gate();
        const T eps = static_cast<T>(this->layer.eps);
        T* const mean = first_;
        for (Index g = 0; g < groups_; ++g) {
            T* const r = run(inverse_[k], g);
            means(g, x.columns, mean, [&](Index f, Index n) { return load(run(x, f) + n); });
            means(g, x.columns, r, [&](Index f, Index n) {
                const Vec<T> centred = load(run(x, f) + n) - load(mean + n);
                store(run(xhat, f) + n, centred);
                return centred * centred;
            });
            for (Index n = 0; n < x.numbers(); n += L) store(r + n, one_over_root<T>(load(r + n) + eps));
            const auto scale = [&](Index f, Index n, Vec<T> gamma, Vec<T> beta) {
                const Vec<T> h = load(run(xhat, f) + n) * load(r + n);
                store(run(xhat, f) + n, h);
                store(run(y, f) + n, gate(h * gamma + beta, f, n / L));
            };
            each(g, x.columns, scale, gammas, betas);
        }
    }

    // dx = r (u - m(u) - xhat m(u xhat))
    void backward(Index k) override {
        const View<T> dy = out->cotangent[k], xhat = this->xhat[k];
        if (this->sums_gradients)
            for (Index f = 0; f < F; ++f) Base_::sum_rows(f, dy, xhat, this->d_gamma[k].p, this->d_beta[k].p);
        if (first) return;
        const View<T> dx = in->cotangent[k];
        const auto gammas = this->gamma_of(k);
        const Gate<T> gate = this->cotangent_gate(k);
        const auto u = [&](Index f, Index n, Vec<T> gamma) { return load(run(dy, f) + n) * gamma; };
        const auto u_xhat = [&](Index f, Index n, Vec<T> gamma) { return u(f, n, gamma) * load(run(xhat, f) + n); };
        for (Index g = 0; g < groups_; ++g) {
            T *const r = run(inverse_[k], g), *const mean = run(mean_[k], g), *const slope = run(slope_[k], g);
            means(g, dy.columns, mean, u, gammas);
            means(g, dy.columns, slope, u_xhat, gammas);
            const auto put = [&](Index f, Index n, Vec<T> gamma) {
                const Vec<T> v = u(f, n, gamma) - load(mean + n) - load(run(xhat, f) + n) * load(slope + n);
                store(run(dx, f) + n, gate(v * load(r + n), f, n / L));
            };
            each(g, dy.columns, put, gammas);
        }
    }

    void tangent(Index k) override {
        const View<T> xhat = this->xhat[k], t_y = out->tangent[k], t_x = first ? View<T>{} : in->tangent[k];
        const auto gammas = this->gamma_of(k), t_gammas = this->t_gamma_of(k), t_betas = this->t_beta_of(k);
        const Gate<T> gate = this->tangent_gate(k);
        const auto put_first = [&](Index f, Index n, Vec<T> t_gamma, Vec<T> t_beta) {
            store(run(t_y, f) + n, gate(load(run(xhat, f) + n) * t_gamma + t_beta, f, n / L));
        };
        for (Index g = 0; g < groups_; ++g) {
            if (first) {
                each(g, t_y.columns, put_first, t_gammas, t_betas);
                continue;
            }
            T *const r = run(inverse_[k], g), *const t_r = run(t_inverse_, g), *const mean = first_, *const slope = second_;
            means(g, t_y.columns, mean, [&](Index f, Index n) { return load(run(t_x, f) + n); });
            means(g, t_y.columns, slope, [&](Index f, Index n) { return load(run(t_x, f) + n) * load(run(xhat, f) + n); });
            for (Index n = 0; n < t_y.numbers(); n += L) store(t_r + n, -load(r + n) * load(r + n) * load(slope + n));
            const auto put = [&](Index f, Index n, Vec<T> gamma, Vec<T> t_gamma, Vec<T> t_beta) {
                const Vec<T> h = load(run(xhat, f) + n);
                const Vec<T> t_h = (load(run(t_x, f) + n) - load(mean + n) - h * load(slope + n)) * load(r + n);
                store(run(t_x, f) + n, t_h);
                store(run(t_y, f) + n, gate(t_h * gamma + (h * t_gamma + t_beta), f, n / L));
            };
            each(g, t_y.columns, put, gammas, t_gammas, t_betas);
        }
    }

    // With all means over features taken out of the rule, t_dx is a sum of four vectors and a number of the row.
    void tangent_backward(Index k) override {
        const View<T> dy = out->cotangent[k], t_dy = out->t_cotangent[k], xhat = this->xhat[k];
        const View<T> t_xhat = first ? View<T>{} : in->tangent[k];
        if (this->sums_gradients)
            for (Index f = 0; f < F; ++f) Base_::sum_rows(f, t_dy, xhat, dy, t_xhat, this->t_d_gamma, this->t_d_beta);
        if (first) return;
        const View<T> t_dx = in->t_cotangent[k];
        const auto gammas = this->gamma_of(k), t_gammas = this->t_gamma_of(k);
        const Gate<T> gate = this->cotangent_gate(k);
        const auto t_u = [&](Index f, Index n, Vec<T> gamma, Vec<T> t_gamma) {
            return load(run(t_dy, f) + n) * gamma + load(run(dy, f) + n) * t_gamma;
        };
        const auto t_u_xhat = [&](Index f, Index n, Vec<T> gamma, Vec<T> t_gamma) {
            const Vec<T> u = load(run(dy, f) + n) * gamma;
            return t_u(f, n, gamma, t_gamma) * load(run(xhat, f) + n) + u * load(run(t_xhat, f) + n);
        };
        for (Index g = 0; g < groups_; ++g) {
            const T *const r = run(inverse_[k], g), *const t_r = run(t_inverse_, g);
            const T *const mean = run(mean_[k], g), *const slope = run(slope_[k], g);
            T *const number = first_, *const by_hat = second_;
            means(g, dy.columns, number, t_u, gammas, t_gammas);
            means(g, dy.columns, by_hat, t_u_xhat, gammas, t_gammas);
            for (Index n = 0; n < dy.numbers(); n += L) {
                store(number + n, load(number + n) * load(r + n) + load(mean + n) * load(t_r + n));
                store(by_hat + n, load(by_hat + n) * load(r + n) + load(slope + n) * load(t_r + n));
            }
            const auto put = [&](Index f, Index n, Vec<T> gamma, Vec<T> t_gamma) {
                const Vec<T> u = load(run(dy, f) + n) * gamma;
                const Vec<T> with_r = t_u(f, n, gamma, t_gamma) - load(run(t_xhat, f) + n) * load(slope + n);
                const Vec<T> rest = load(number + n) + load(run(xhat, f) + n) * load(by_hat + n);
                store(run(t_dx, f) + n, gate(with_r * load(r + n) + (u * load(t_r + n) - rest), f, n / L));
            };
            each(g, dy.columns, put, gammas, t_gammas);
        }
    }

   private:
    static constexpr Index PARTS = 4;  // sums over features that do not wait for each other

    static MAML_FAST_INLINE T* run(const View<T>& view, Index f) { return view.p + f * view.by_feature; }

    // visit(f, n, ..) for each feature of a group and each column, n numbers on, with the feature's coefficients.
    template <class Visit, class... C>
    MAML_FAST_INLINE void each(Index g, Index columns, Visit visit, C... coefficients) const {
        for (Index f = g * size_, end = f + size_; f < end; ++f)
            each_column(f, columns, visit, Lanes::in_lanes(coefficients(f))...);
    }
    template <class Visit, class... V>
    static MAML_FAST_INLINE void each_column(Index f, Index columns, Visit visit, V... coefficients) {
        for (Index n = 0; n < columns * L; n += L) visit(f, n, coefficients...);
    }
    // Of each column, the mean of value(f, n, ..) over a group's features.
    template <class Value, class... C>
    MAML_FAST_INLINE void means(Index g, Index columns, T* to, Value value, C... coefficients) const {
        const Index numbers = columns * L;
        const T share = T(1) / static_cast<T>(size_);
        T* const parts = parts_;
        std::memset(parts, 0, static_cast<std::size_t>(PARTS * numbers) * sizeof(T));
        const auto add = [&](Index f, Index n, auto... with) {
            T* part = parts + f % PARTS * numbers + n;
            store(part, load(part) + value(f, n, with...));
        };
        each(g, columns, add, coefficients...);
        for (Index n = 0; n < numbers; n += L) {
            const T* p = parts + n;
            store(to + n, ((load(p) + load(p + numbers)) + (load(p + 2 * numbers) + load(p + 3 * numbers))) * share);
        }
    }

    const Index groups_, size_;
    std::vector<View<T>> inverse_;       // [S + 1] of [groups][columns]: r of each pass,
    std::vector<View<T>> mean_, slope_;  // and m(u) and m(u xhat)
    View<T> t_inverse_;                  // [groups][columns], of the step at hand
    T *first_ = nullptr, *second_ = nullptr, *parts_ = nullptr;  // [columns] for the group at hand; [PARTS][columns]
};

}  // namespace maml_fast::MAML_FAST_ISA
