// Norms of flat rows: y = gamma xhat + beta with xhat = r (x - m(x)), r = 1 / sqrt(m((x - m(x))^2) + eps), and m the mean
// over the numbers that share their statistics: a task's rows of one feature (batch_norm.h), or the features of one group in
// one row (group_norm.h; layer norm is a single group).
//
// With u = gamma dy, P(v) = v - m(v) - xhat m(v xhat), and t_u = gamma t_dy + t_gamma dy:
//     dx      = r P(u)                      gradients: of gamma the sum over rows of dy xhat, of beta that of dy
//     t_xhat  = r P(t_x)                    t_r = -r^2 m(xhat t_x)
//     t_y     = gamma t_xhat + t_gamma xhat + t_beta
//     t_dx    = t_r P(u) + r (t_u - m(t_u) - t_xhat m(u xhat) - xhat m(t_u xhat + u t_xhat))
// and the tangents of the gradients are the sums of t_dy xhat + dy t_xhat, and of t_dy. t_xhat takes the place of t_x, which
// no other stage reads.
#pragma once

#include "fast_stage.h"
#include "gated.h"

namespace maml_fast::MAML_FAST_ISA {

// What both kinds of norm have: gamma and beta, and what is kept of each pass. F features, U numbers a unit.
template <class T, class Lanes>
class NormStage : public GatedStage<T> {
   public:
    using Unit = typename Lanes::Unit;
    static constexpr Index L = LANES<T>, U = Lanes::unit;

    // `first`: its input is the data, which no tangent and no cotangent concerns.
    NormStage(const Layer& layer, const Program& program, bool first)
        : layer(layer), F(layer.in_features), first(first), rows_(program.rows), query_rows_(program.query_rows) {}

    void allocate(Arena& arena, Index kept) override {
        query_ = static_cast<Index>(this->in->value.size()) - 1;
        kept_ = kept;
        xhat = of_each_pass<View<T>>([&](Index k) {
            return in_place ? this->in->value[k] : arena.template view<T>(F, columns(k));
        });
        d_gamma = of_each_pass<Numbers<T>>([&](Index) { return Numbers<T>{arena.template take<T>(F * U)}; });
        d_beta = of_each_pass<Numbers<T>>([&](Index) { return Numbers<T>{arena.template take<T>(F * U)}; });
        t_d_gamma = arena.template take<T>(F * U);
        t_d_beta = arena.template take<T>(F * U);
    }

    const Layer& layer;
    const Index F;
    const bool first;
    bool in_place = false;                         // whether xhat takes the place of x
    FastVector<T, Lanes> gamma, beta;              // where they adapt:
    bool gamma_moves = false, beta_moves = false;  // else all tasks share them, or there are none
    bool sums_gradients = false;                   // whether d_gamma and d_beta are wanted

   protected:
    // Made anew for each pass that is kept; the others have the first step's.
    template <class V, class Make>
    std::vector<V> of_each_pass(Make make) const {
        std::vector<V> found(query_ + 1);
        for (Index k = 0; k <= query_; ++k) found[k] = k < kept_ || k == query_ ? make(k) : found[0];
        return found;
    }
    Index columns(Index k) const { return k == query_ ? this->in->query_columns : this->in->columns; }
    Index rows(Index k) const { return k == query_ ? query_rows_ : rows_; }

    // gamma, beta, or the direction of their tangents, as -eta_k Lam: a unit for each feature. To be copied out of the stage
    // before a loop: for all that the compiler knows, a store of a vector might change what a stage points to.
    class Coefficients {
       public:
        explicit Coefficients(T constant) : scale_(constant) {}
        Coefficients(const T* own, const T* shared, T scale) : p_(own ? own : shared), own_(own), scale_(scale) {}
        MAML_FAST_INLINE Unit operator()(Index f) const {
            if (!p_) return Lanes::same(scale_);
            return own_ ? Lanes::read(p_ + f * U) * scale_ : Lanes::same(p_[f]);
        }

       private:
        const T* p_ = nullptr;
        bool own_ = false;
        T scale_;
    };
    Coefficients gamma_of(Index k) const { return coefficients(gamma, gamma_moves, shared_gamma(), k, 1); }
    Coefficients beta_of(Index k) const { return coefficients(beta, beta_moves, shared_beta(), k, 0); }
    Coefficients t_gamma_of(Index k) const { return direction(gamma, gamma_moves, layer.weight_rates, k); }
    Coefficients t_beta_of(Index k) const { return direction(beta, beta_moves, layer.bias_rates, k); }

    // The gradients of feature f: the sums over rows of dy xhat and of dy. Lanes without a row have dy = 0.
    static MAML_FAST_INLINE void sum_rows(Index f, const View<T>& dy, const View<T>& xhat, T* d_gammas, T* d_betas) {
        const T *d = dy.p + f * dy.by_feature, *hat = xhat.p + f * xhat.by_feature;
        Vec<T> sum{}, with_hat{};
        for (Index at = 0; at < dy.numbers(); at += L) {
            sum += load(d + at);
            with_hat += load(d + at) * load(hat + at);
        }
        Lanes::write(d_betas + f * U, Lanes::over_rows(sum));
        Lanes::write(d_gammas + f * U, Lanes::over_rows(with_hat));
    }
    // And their tangents: what t_dy leaves as dy does, and dy t_xhat, where that is not zero.
    static MAML_FAST_INLINE void sum_rows(Index f, const View<T>& t_dy, const View<T>& xhat, const View<T>& dy,
                                          const View<T>& t_xhat, T* t_d_gammas, T* t_d_betas) {
        sum_rows(f, t_dy, xhat, t_d_gammas, t_d_betas);
        if (!t_xhat.p) return;
        const T *d = dy.p + f * dy.by_feature, *t_hat = t_xhat.p + f * t_xhat.by_feature;
        Vec<T> sum{};
        for (Index at = 0; at < dy.numbers(); at += L) sum += load(d + at) * load(t_hat + at);
        Lanes::write(t_d_gammas + f * U, Lanes::read(t_d_gammas + f * U) + Lanes::over_rows(sum));
    }

    const T* shared_gamma() const { return static_cast<const T*>(layer.weight); }
    const T* shared_beta() const { return static_cast<const T*>(layer.bias); }

    std::vector<View<T>> xhat;                    // [S + 1]
    std::vector<Numbers<T>> d_gamma, d_beta;      // [S + 1] of [F] units: the gradients of each pass
    T *t_d_gamma = nullptr, *t_d_beta = nullptr;  // [F] units: their tangents, of the step at hand

   private:
    using Vector = FastVector<T, Lanes>;
    static Coefficients coefficients(const Vector& v, bool moves, const T* shared, Index k, T missing) {
        if (!shared) return Coefficients(missing);
        return Coefficients(moves && k ? v.own(k) : nullptr, shared, 1);
    }
    static Coefficients direction(const Vector& v, bool moves, const std::vector<double>& rates, Index k) {
        if (!moves || rates.empty()) return Coefficients(0);
        return Coefficients(v.along(), nullptr, v.scale(static_cast<T>(rates[k])));
    }

    const Index rows_, query_rows_;
    Index query_ = 0, kept_ = 0;
};

}  // namespace maml_fast::MAML_FAST_ISA
