// The fast weights of one linear layer in a tile: dense, or factored and never formed.
//
// A is the layer's input, D the cotangent of its output, t_ their tangents, Lam the adjoint; D carries the 1/N of the mean.
//     W_k = W - sum_{j<k} eta_j D_j A_j^T            Lam = D_q A_q^T + sum_{j>=k} (t_D A^T + D t_A^T)_j
// The tangents are taken in direction -eta Lam, so that their sum above has no coefficients. Factored, with the rows R of
// all steps before,
//     W_k X = W X - sum_j eta_j D_j (A_j^T X)        W_k^T D = W^T D - sum_j eta_j A_j (D_j^T D)
// where the products in brackets are small Gram blocks. A bias is a vector of its own in every form.
#pragma once

#include "fast_stage.h"
#include "ops/linear.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T, class Lanes>
class FastLinear : public LinearStage<T, Lanes>, public FastStage<T> {
   public:
    using LinearStage<T, Lanes>::O;
    using LinearStage<T, Lanes>::I;
    using LinearStage<T, Lanes>::layer;
    using LinearStage<T, Lanes>::in;
    using LinearStage<T, Lanes>::out;
    static constexpr Index U = Lanes::unit;

    FastLinear(const Layer& layer, const Program& program, bool first, Workspace<T>& workspace)
        : LinearStage<T, Lanes>(layer),
          FastStage<T>(layer, layer.out_features, layer.in_features),
          first(first),
          goes_below(first && program.goes_below()),
          program(program),
          S(program.steps),
          plain(program.rule.plain() && !layer.weight_by_number),
          workspace(workspace) {}

    void allocate(Arena& arena, Index) override {
        if (layer.learns_rates) lam_x = arena.template view<T>(O, in->columns);
        if (layer.has_bias) bias.allocate(arena, O, program, layer.learns_rates, {layer.bias_by_number});
    }
    void begin_call() override { bias.begin_call(layer.bias_rate_numbers, layer.bias); }

    // Inner step k: W_{k+1} = W_k - eta_k D_k A_k^T, and so each form; here the bias.
    void descend(Index k) override {
        if (layer.has_bias) bias.descend(k, this->bias_rate(k), shared_bias(), column_sums(out->cotangent[k]));
    }
    // Lam = D_q A_q^T
    void begin_adjoint() override {
        if (layer.has_bias) bias.begin_adjoint(column_sums(out->cotangent[S]));
    }
    void turn(Index k) override {
        if (layer.has_bias) bias.turn(k, this->bias_rate(k));
    }
    void pull_back(Index k) override {
        if (layer.has_bias) bias.pull_back(k, column_sums(out->t_cotangent[k]));
    }
    void add_gradient(T* weight, T* bias_sums) override {
        add_weight_gradient(weight);
        if (layer.has_bias) bias.add_gradient(bias_sums);
    }
    Index sum_length() const override { return MAML_FAST_ISA::sum_length<T>(O, I); }
    Index pieces() const override { return sum_pieces<T>(O, I); }
    Piece piece(Index p) const override { return sum_piece<T>(p, I); }

    void forward(Index k) override { times(k, in->value[k], out->value[k], bias_base(k), this->value_gate()); }
    void backward(Index k) override {
        if (!first || (goes_below && k == S)) times_transposed(k, out->cotangent[k], in->cotangent[k], this->cotangent_gate(k));
    }
    // t_z = W_k t_A - eta_k (Lam A_k + lam_b), or whatever direction of a rule that is not plain
    void tangent(Index k) override {
        const View<T>* t_x = first ? nullptr : &in->tangent[k];
        if (has_lam_x()) return tangent_from_lam_x(k, t_x);
        times_both(k, t_x, in->value[k], scale(k), out->tangent[k], adjoint_base(k),
                   this->tangent_gate(k));
    }
    // t_dA = W_k^T t_D - eta_k Lam^T D_k
    void tangent_backward(Index k) override {
        if (!first || goes_below)
            times_both_transposed(k, out->t_cotangent[k], out->cotangent[k], scale(k), in->t_cotangent[k],
                                  this->cotangent_gate(k));
    }

    // g_k = D_k A_k^T, so <g_k, Lam> is sum(D_k * (Lam A_k)).
    void add_rate_gradients(Index k, const RateSums<T>& sums) override {
        if (layer.weight_by_number)
            add_rates_by_number(k, sums.weight);
        else if (layer.weight_adapts)
            *sums.by_weight -= times_adjoint(k);
        if (layer.has_bias) bias.add_rate_gradients(k, column_sums(out->cotangent[k]), sums.by_bias, sums.bias);
    }
    T adapted_bias(Index o, Index unit) const override { return bias.adapted(o, unit, shared_bias()); }

    const bool first;       // nothing below adapts: its input has no tangent;
    const bool goes_below;  // and a cotangent only where something below has a gradient: of the query, and t_D of the steps

   protected:
    // z = gate(W_k x + base); dx = gate(W_k^T d)
    virtual void times(Index k, const View<T>& x, const View<T>& z, Base<T> base, Gate<T> gate) = 0;
    virtual void times_transposed(Index k, const View<T>& d, const View<T>& dx, Gate<T> gate) = 0;
    // z = gate(W_k t + alpha Lam x + base), t null for zero; dx = gate(W_k^T t + alpha Lam^T d). Where the rule is not
    // plain, the direction -v stands in for alpha Lam.
    virtual void times_both(Index k, const View<T>* t, const View<T>& x, T alpha, const View<T>& z, Base<T> base,
                            Gate<T> gate) = 0;
    virtual void times_both_transposed(Index k, const View<T>& t, const View<T>& d, T alpha, const View<T>& dx,
                                       Gate<T> gate) = 0;
    virtual void add_weight_gradient(T* weight) = 0;
    virtual void add_rates_by_number(Index, T*) {}  // of dense weights alone
    // <g_k, Lam>, of a plain rule
    virtual double times_adjoint(Index k) {
        const View<T>& d = out->cotangent[k];
        times_both(k, nullptr, in->value[k], 1, lam_x, {}, {});
        double total = 0;
        for (Index o = 0; o < O; ++o) {
            Vec<T> sum{};
            for (Index n = 0; n < d.numbers(); n += LANES<T>)
                sum += load(d.p + o * d.by_feature + n) * load(lam_x.p + o * lam_x.by_feature + n);
            total += static_cast<double>(lane_sum<T>(sum));
        }
        return total;
    }
    // Whether `times_adjoint` has left Lam A_k for the tangents of step k.
    bool has_lam_x() const { return layer.learns_rates && plain && layer.weight_adapts; }
    void tangent_from_lam_x(Index k, const View<T>* t_x) {
        const Base<T> base = adjoint_base(k);
        const T alpha = scale(k);
        const View<T> z = t_x ? lam_x : out->tangent[k];
        const Gate<T> gate = this->tangent_gate(k), last = t_x ? Gate<T>{} : gate;
        for (Index o = 0; o < O; ++o) {
            const T* b = base.p + o * base.by_a;
            const Vec<T> along = base.kind == Base<T>::nothing  ? Vec<T>{}
                                 : base.kind == Base<T>::vector ? load(b) * base.beta
                                                                : all(*b * base.beta);
            for (Index n = 0; n < lam_x.columns; ++n) {
                const Vec<T> moved = load(lam_x.p + o * lam_x.by_feature + n * LANES<T>) * alpha + along;
                store(z.p + o * z.by_feature + n * LANES<T>, last(moved, o, n));
            }
        }
        if (t_x) times(k, *t_x, out->tangent[k], MAML_FAST_ISA::onto(lam_x), gate);
    }
    // Of Lam in a plain rule's direction; other rules' has its own numbers.
    T scale(Index k) const { return plain ? -this->weight_rate(k) : T(1); }

    Base<T> bias_base(Index k) const {
        if (!layer.has_bias || k == 0) return this->shared_bias_base();
        return per_task(bias.own(k), 1);
    }
    Base<T> adjoint_base(Index k) const {
        return layer.has_bias ? per_task(bias.along(), bias.scale(this->bias_rate(k))) : Base<T>{};
    }
    static Base<T> per_task(const T* p, T beta) {
        return {Lanes::tasks ? Base<T>::vector : Base<T>::number, p, U, 0, beta};
    }
    const T* shared_bias() const { return static_cast<const T*>(layer.bias); }
    // o -> the sum of a task's rows of d[o]
    static auto column_sums(const View<T>& d) {
        return [&d](Index o) { return Lanes::over_rows(column_sum(d, o)); };
    }
    // Row o of the weights before any step, for each task.
    void shared_row(Index o, T* row) const {
        const T* shared = static_cast<const T*>(layer.weight) + o * I;
        for (Index i = 0; i < I * U; ++i) row[i] = shared[i / U];
    }

    const Program& program;
    const Index S;
    const bool plain;  // what a weight's step does
    Workspace<T>& workspace;
    FastVector<T, Lanes> bias;
    View<T> lam_x;  // Lam A_k
};

// Only the bias adapts; the weight stays the one that the tasks share.
template <class T, class Lanes>
class BiasLinear final : public FastLinear<T, Lanes> {
    using Base_ = FastLinear<T, Lanes>;

   public:
    using Base_::Base_;

    Index sum_length() const override { return 0; }
    Index pieces() const override { return 0; }
    void adapted_row(Index o, T* row) override { this->shared_row(o, row); }

   protected:
    void add_weight_gradient(T*) override {}
    void times(Index, const View<T>& x, const View<T>& z, Base<T> base, Gate<T> gate) override {
        this->multiply(this->shared_weight(), x, z, base, gate);
    }
    void times_transposed(Index, const View<T>& d, const View<T>& dx, Gate<T> gate) override {
        this->multiply(this->shared_transposed(), d, dx, {}, gate);
    }
    // Of Lam there is the bias's part alone, and that is in the base.
    void times_both(Index, const View<T>* t, const View<T>&, T, const View<T>& z, Base<T> base, Gate<T> gate) override {
        Product<T> p = into(z, base, gate);
        if (t)
            p.first = MAML_FAST_ISA::times<T>(this->shared_weight(), *t);
        else
            p.first.right.by_b = LANES<T>;  // no terms
        product<T>(z.features, z.columns, p);
    }
    void times_both_transposed(Index k, const View<T>& t, const View<T>&, T, const View<T>& dx, Gate<T> gate) override {
        times_transposed(k, t, dx, gate);
    }
};

}  // namespace maml_fast::MAML_FAST_ISA
