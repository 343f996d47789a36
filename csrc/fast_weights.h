// The fast weights of one linear layer in a tile: dense, or factored and never formed.
//
// A is the layer's input, D the cotangent of its output, t_ their tangents, Lam the adjoint; D carries the 1/N of the mean.
//     W_k = W - sum_{j<k} eta_j D_j A_j^T            Lam = D_q A_q^T + sum_{j>=k} (t_D A^T + D t_A^T)_j
// The tangents are taken in direction -eta Lam, so that their sum above has no coefficients. Factored, with the rows R of
// all steps before,
//     W_k X = W X - sum_j eta_j D_j (A_j^T X)        W_k^T D = W^T D - sum_j eta_j A_j (D_j^T D)
// where the products in brackets are small Gram blocks. A bias is a vector of its own in every form.
#pragma once

#include "ops/linear.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T, class Lanes>
class FastLinear : public LinearStage<T, Lanes> {
   public:
    using LinearStage<T, Lanes>::O;
    using LinearStage<T, Lanes>::I;
    using LinearStage<T, Lanes>::layer;
    using LinearStage<T, Lanes>::in;
    using LinearStage<T, Lanes>::out;
    static constexpr Index U = Lanes::unit;

    FastLinear(const Layer& layer, const Program& program, bool first, Workspace<T>& workspace)
        : LinearStage<T, Lanes>(layer), first(first), S(program.steps), workspace(workspace) {}

    // Memory of the layer's own, once the edges are known.
    virtual void allocate(Arena& arena) {
        if (layer.learns_rates) rate_product = arena.template view<T>(O, in->columns);
        if (!layer.has_bias) return;
        biases.resize(S + 1);
        for (Index k = 1; k <= S; ++k) biases[k] = {arena.template take<T>(O * U)};
        bias_adjoint = arena.template take<T>(O * U);
    }
    virtual void begin_tile() {}

    // Inner step k: W_{k+1} = W_k - eta_k D_k A_k^T.
    virtual void descend(Index k) = 0;
    // Lam = D_q A_q^T, the gradient of the query loss at the adapted weights.
    virtual void begin_adjoint() {
        if (layer.has_bias) column_sums<T, Lanes>(out->cotangent[S], bias_adjoint, false);
    }
    // Lam = Lam - H_k (eta_k Lam), from the tangents of step k.
    virtual void pull_back(Index k) {
        if (layer.has_bias) column_sums<T, Lanes>(out->t_cotangent[k], bias_adjoint, true);
    }
    // Adds the layer's adjoint, summed over the tile's tasks, to `weight` and `bias` [O]; weight (o, i) is at
    // weight[sum_place(o, i)].
    virtual void add_gradient(T* weight, T* bias) = 0;
    virtual Index sum_length() const { return MAML_FAST_ISA::sum_length<T>(O, I); }
    virtual Index sum_place(Index o, Index i) const { return MAML_FAST_ISA::sum_place<T>(o, i, I); }
    // From (o, i) on, so many lie one after another.
    virtual Index sum_run(Index i) const { return turns_rows<T>(I) ? I - i : smaller<Index>(I - i, DOT_B - i % DOT_B); }
    // Row o of the adapted weights: [I] units.
    virtual void adapted_row(Index o, T* row) = 0;

    void forward(Index k) override { times(k, in->value[k], out->value[k], bias(k), this->value_gate()); }
    void backward(Index k) override {
        if (!first) times_transposed(k, out->cotangent[k], in->cotangent[k], this->cotangent_gate(k));
    }
    // t_z = W_k t_A - eta_k (Lam A_k + lam_b)
    void tangent(Index k) override {
        const View<T>* t_x = first ? nullptr : &in->tangent[k];
        times_both(k, t_x, in->value[k], -weight_rate(k), out->tangent[k], adjoint_bias(-bias_rate(k)),
                   this->tangent_gate(k));
    }
    // t_dA = W_k^T t_D - eta_k Lam^T D_k
    void tangent_backward(Index k) override {
        if (!first)
            times_both_transposed(k, out->t_cotangent[k], out->cotangent[k], -weight_rate(k), in->t_cotangent[k],
                                  this->cotangent_gate(k));
    }

    // dloss/deta_k = -<g_k, Lam>, of weight and bias: g_k = D_k A_k^T, so it is sum(D_k * (Lam A_k)).
    void add_rate_gradients(Index k, double* by_weight, double* by_bias) {
        const View<T>& d = out->cotangent[k];
        if (layer.weight_adapts) {
            const View<T>& lam_x = rate_product;
            times_both(k, nullptr, in->value[k], 1, lam_x, {}, {});
            for (Index o = 0; o < O; ++o) {
                Vec<T> sum{};
                for (Index n = 0; n < d.numbers(); n += LANES<T>)
                    sum += load(d.p + o * d.by_feature + n) * load(lam_x.p + o * lam_x.by_feature + n);
                by_weight[k] -= lanes_in_double(sum);
            }
        }
        if (!layer.has_bias) return;
        T* sums = rate_product.p;
        column_sums<T, Lanes>(d, sums, false);
        for (Index i = 0; i < O * U; ++i) by_bias[k] -= static_cast<double>(sums[i]) * bias_adjoint[i];
    }

    T adapted_bias(Index o, Index unit) const {
        return S ? biases[S].p[o * U + unit] : static_cast<const T*>(layer.bias)[o];
    }

    const bool first;  // its input is the data, which no tangent and no cotangent concerns

   protected:
    // z = gate(W_k x + base); dx = gate(W_k^T d)
    virtual void times(Index k, const View<T>& x, const View<T>& z, Base<T> base, Gate<T> gate) = 0;
    virtual void times_transposed(Index k, const View<T>& d, const View<T>& dx, Gate<T> gate) = 0;
    // z = gate(W_k t + alpha Lam x + base), t null for zero; dx = gate(W_k^T t + alpha Lam^T d)
    virtual void times_both(Index k, const View<T>* t, const View<T>& x, T alpha, const View<T>& z, Base<T> base,
                            Gate<T> gate) = 0;
    virtual void times_both_transposed(Index k, const View<T>& t, const View<T>& d, T alpha, const View<T>& dx,
                                       Gate<T> gate) = 0;

    T weight_rate(Index k) const { return layer.weight_rates.empty() ? T(0) : static_cast<T>(layer.weight_rates[k]); }
    T bias_rate(Index k) const { return layer.bias_rates.empty() ? T(0) : static_cast<T>(layer.bias_rates[k]); }

    Base<T> bias(Index k) const {
        if (!layer.has_bias || k == 0) return this->shared_bias();
        return per_task(biases[k].p, 1);
    }
    Base<T> adjoint_bias(T beta) const { return layer.has_bias ? per_task(bias_adjoint, beta) : Base<T>{}; }
    static Base<T> per_task(const T* p, T beta) {
        return {Lanes::tasks ? Base<T>::vector : Base<T>::number, p, U, 0, beta};
    }

    void descend_bias(Index k) {
        if (!layer.has_bias) return;
        T* next = biases[k + 1].p;
        const T rate = bias_rate(k), *shared = static_cast<const T*>(layer.bias);
        for (Index o = 0; o < O; ++o) {
            const Vec<T> sum = column_sum(out->cotangent[k], o);
            if constexpr (Lanes::tasks)
                store(next + o * U, (k ? load(biases[k].p + o * U) : all(shared[o])) - rate * sum);
            else
                next[o] = (k ? biases[k].p[o] : shared[o]) - rate * lane_sum<T>(sum);
        }
    }
    void add_bias_gradient(T* sums) {
        if (!layer.has_bias) return;
        for (Index o = 0; o < O; ++o) {
            if constexpr (Lanes::tasks)
                sums[o] += lane_sum<T>(load(bias_adjoint + o * U));
            else
                sums[o] += bias_adjoint[o];
        }
    }
    // Row o of the weights before any step, for each task.
    void shared_row(Index o, T* row) const {
        const T* shared = static_cast<const T*>(layer.weight) + o * I;
        for (Index i = 0; i < I * U; ++i) row[i] = shared[i / U];
    }
    static double lanes_in_double(Vec<T> v) {
        double sum = 0;
        for (int j = 0; j < LANES<T>; ++j) sum += v[j];
        return sum;
    }

    const Index S;
    Workspace<T>& workspace;
    std::vector<Numbers<T>> biases;  // [S + 1] of [O] units; the first is the shared one, and not kept here
    T* bias_adjoint = nullptr;
    View<T> rate_product;
};

// Only the bias adapts; the weight stays the one that the tasks share.
template <class T, class Lanes>
class BiasLinear final : public FastLinear<T, Lanes> {
    using Base_ = FastLinear<T, Lanes>;

   public:
    using Base_::Base_;

    void descend(Index k) override { this->descend_bias(k); }
    void add_gradient(T*, T* bias) override { this->add_bias_gradient(bias); }
    Index sum_length() const override { return 0; }
    void adapted_row(Index o, T* row) override { this->shared_row(o, row); }

   protected:
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
