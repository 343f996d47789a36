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
    // Adds the layer's adjoint, summed over the tile's tasks, to `weight` [O][weight_stride] and `bias` [O].
    virtual void add_gradient(T* weight, T* bias) = 0;
    virtual Index weight_stride() const { return padded_features<T>(I); }
    // Row o of the adapted weights: [I] units.
    virtual void adapted_row(Index o, T* row) = 0;

    void forward(Index k) override { times(k, in->value[k], out->value[k], bias(k)); }
    void backward(Index k) override {
        if (!first) times_transposed(k, out->cotangent[k], in->cotangent[k]);
    }
    // t_z = W_k t_A - eta_k (Lam A_k + lam_b)
    void tangent(Index k) override {
        const View<T>& t_z = out->tangent[k];
        const Base<T> lam_b = adjoint_bias(-bias_rate(k));
        if (first) return times_adjoint(in->value[k], t_z, -weight_rate(k), lam_b);
        times(k, in->tangent[k], t_z, lam_b);
        times_adjoint(in->value[k], t_z, -weight_rate(k), onto(t_z));
    }
    // t_dA = W_k^T t_D - eta_k Lam^T D_k
    void tangent_backward(Index k) override {
        if (first) return;
        const View<T>& t_dx = in->t_cotangent[k];
        times_transposed(k, out->t_cotangent[k], t_dx);
        add_adjoint_transposed(out->cotangent[k], t_dx, -weight_rate(k));
    }

    // dloss/deta_k = -<g_k, Lam>, of weight and bias: g_k = D_k A_k^T, so it is sum(D_k * (Lam A_k)).
    void add_rate_gradients(Index k, double* by_weight, double* by_bias) {
        const View<T>& d = out->cotangent[k];
        const View<T>& product = rate_product;
        times_adjoint(in->value[k], product, 1, {});
        for (Index o = 0; o < O; ++o) {
            Vec<T> sum{};
            for (Index n = 0; n < d.numbers(); n += LANES<T>)
                sum += load(d.p + o * d.by_feature + n) * load(product.p + o * product.by_feature + n);
            by_weight[k] -= lanes_in_double(sum);
        }
        if (!layer.has_bias) return;
        T* sums = product.p;
        column_sums<T, Lanes>(d, sums, false);
        for (Index i = 0; i < O * U; ++i) by_bias[k] -= static_cast<double>(sums[i]) * bias_adjoint[i];
    }

    const T* adapted_bias() const { return biases[S].p; }

    const bool first;  // its input is the data, which no tangent and no cotangent concerns

   protected:
    virtual void times(Index k, const View<T>& x, const View<T>& z, Base<T> base) = 0;
    virtual void times_transposed(Index k, const View<T>& d, const View<T>& dx) = 0;
    virtual void times_adjoint(const View<T>& x, const View<T>& z, T alpha, Base<T> base) = 0;
    virtual void add_adjoint_transposed(const View<T>& d, const View<T>& dx, T alpha) = 0;

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
        column_sums<T, Lanes>(out->cotangent[k], next, false);
        const T rate = bias_rate(k), *shared = static_cast<const T*>(layer.bias);
        for (Index o = 0; o < O; ++o)
            for (Index u = 0; u < U; ++u) {
                T& b = next[o * U + u];
                b = (k ? biases[k].p[o * U + u] : shared[o]) - rate * b;
            }
    }
    void add_bias_gradient(T* sums) {
        if (!layer.has_bias) return;
        for (Index o = 0; o < O; ++o)
            for (Index u = 0; u < U; ++u) sums[o] += bias_adjoint[o * U + u];
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

// Weights [O][I] of units, formed at every step but the first, where all tasks share them.
template <class T, class Lanes>
class DenseLinear final : public FastLinear<T, Lanes> {
    using Base_ = FastLinear<T, Lanes>;
    using Base_::I;
    using Base_::in;
    using Base_::layer;
    using Base_::O;
    using Base_::out;
    using Base_::S;
    using Base_::U;

   public:
    DenseLinear(const Layer& layer, const Program& program, bool first, Workspace<T>& workspace)
        : Base_(layer, program, first, workspace), keeps_steps(program.gradient) {}

    void allocate(Arena& arena) override {
        Base_::allocate(arena);
        weights.resize(S + 1);
        for (Index k = 1; k <= S; ++k) {
            if (k == 1 || keeps_steps)
                weights[k] = {arena.template take<T>(O * stride() * U)};
            else
                weights[k] = weights[1];
        }
        if (keeps_steps) adjoint = arena.template take<T>(O * stride() * U);
        this->workspace.needs(outer_workspace<T, Lanes>(I, larger(in->columns, in->query_columns)));
    }

    void descend(Index k) override {
        this->descend_bias(k);
        T* next = weights[k + 1].p;
        const T* shared = static_cast<const T*>(layer.weight);
        if constexpr (Lanes::tasks) {
            const Base<T> base = k ? Base<T>{Base<T>::vector, weights[k].p, stride() * U, U}
                                   : Base<T>{Base<T>::number, shared, I, 1};
            outer<T, Lanes>(out->cotangent[k], in->value[k], next, stride(), -this->weight_rate(k), base, this->workspace);
        } else {
            for (Index o = 0; o < O; ++o)
                if (const T* from = k ? weights[k].p + o * stride() : shared + o * I; from != next + o * stride())
                    std::memcpy(next + o * stride(), from, I * sizeof(T));
            outer<T, Lanes>(out->cotangent[k], in->value[k], next, stride(), -this->weight_rate(k), onto_weights(next),
                            this->workspace);
        }
    }
    void begin_adjoint() override {
        Base_::begin_adjoint();
        outer<T, Lanes>(out->cotangent[S], in->value[S], adjoint, stride(), 1, {}, this->workspace);
    }
    void pull_back(Index k) override {
        Base_::pull_back(k);
        outer<T, Lanes>(out->t_cotangent[k], in->value[k], adjoint, stride(), 1, onto_weights(adjoint), this->workspace);
        if (!this->first)
            outer<T, Lanes>(out->cotangent[k], in->tangent[k], adjoint, stride(), 1, onto_weights(adjoint), this->workspace);
    }
    void add_gradient(T* weight, T* bias) override {
        this->add_bias_gradient(bias);
        if constexpr (Lanes::tasks) {
            constexpr Index L = LANES<T>;
            const Index count = O * I;
            Index i = 0;
            for (; i + L <= count; i += L) {
                Vec<T> v[L];
                MAML_FAST_UNROLL
                for (Index j = 0; j < L; ++j) v[j] = load(adjoint + (i + j) * L);
                store(weight + i, load(weight + i) + lane_sums<T>(v));
            }
            for (; i < count; ++i) weight[i] += lane_sum<T>(load(adjoint + i * L));
        } else {
            for (Index o = 0; o < O; ++o)
                for (Index i = 0; i < I; ++i) weight[o * stride() + i] += adjoint[o * stride() + i];
        }
    }
    Index weight_stride() const override { return stride(); }
    void adapted_row(Index o, T* row) override { std::memcpy(row, weights[S].p + o * stride() * U, I * U * sizeof(T)); }

   protected:
    void times(Index k, const View<T>& x, const View<T>& z, Base<T> base) override {
        if (k == 0) return this->times_shared(x, z, base);
        product<T>(O, x.columns, I, {weights[k].p, stride() * U, U, Lanes::tasks}, columns_of(x), z.p, z.by_feature, 1, base);
    }
    void times_transposed(Index k, const View<T>& d, const View<T>& dx) override {
        if (k == 0) return this->times_shared_transposed(d, dx);
        product<T>(I, d.columns, O, {weights[k].p, U, stride() * U, Lanes::tasks}, columns_of(d), dx.p, dx.by_feature);
    }
    void times_adjoint(const View<T>& x, const View<T>& z, T alpha, Base<T> base) override {
        product<T>(O, x.columns, I, {adjoint, stride() * U, U, Lanes::tasks}, columns_of(x), z.p, z.by_feature, alpha, base);
    }
    void add_adjoint_transposed(const View<T>& d, const View<T>& dx, T alpha) override {
        product<T>(I, d.columns, O, {adjoint, U, stride() * U, Lanes::tasks}, columns_of(d), dx.p, dx.by_feature, alpha,
                   onto(dx));
    }

   private:
    // Units from one row of weights to the next.
    Index stride() const { return Lanes::tasks ? I : padded_features<T>(I); }
    Base<T> onto_weights(const T* weights) const { return {Base<T>::vector, weights, stride() * U, LANES<T>}; }

    const bool keeps_steps;
    std::vector<Numbers<T>> weights;  // [S + 1]; the first is the shared one, and not kept here
    T* adjoint = nullptr;
};

// Rows instead of weights. The tile lays the edges out so that each kind of row is one run over the steps:
//     values A_0 .. A_{S-1}, A_q   tangents t_A   cotangents D_0 .. D_{S-1}   t_cotangents t_D, and D_q behind them
template <class T, class Lanes>
class FactoredLinear final : public FastLinear<T, Lanes> {
    using Base_ = FastLinear<T, Lanes>;
    using Base_::I;
    using Base_::in;
    using Base_::O;
    using Base_::out;
    using Base_::S;

   public:
    using Base_::Base_;

    void allocate(Arena& arena) override {
        Base_::allocate(arena);
        const Index history = S * in->columns + in->query_columns;
        this->workspace.needs(Lanes::units(history) * spread<T>(larger(in->columns, in->query_columns)));
        this->workspace.needs(sum_workspace<T>(I, history));
    }
    void begin_tile() override { since = S; }
    void descend(Index k) override { this->descend_bias(k); }
    void begin_adjoint() override {
        Base_::begin_adjoint();
        since = S;
    }
    void pull_back(Index k) override {
        Base_::pull_back(k);
        since = k;
    }
    void add_gradient(T* weight, T* bias) override {
        this->add_bias_gradient(bias);
        for (const Run& run : adjoint())
            if (run.left.columns) add_sums<T>(run.left, run.right, weight, this->weight_stride(), this->workspace);
    }
    void adapted_row(Index o, T* row) override {
        const T* shared = static_cast<const T*>(this->layer.weight) + o * I;
        for (Index i = 0; i < I * Lanes::unit; ++i) row[i] = shared[i / Lanes::unit];
        for (Index k = 0; k < S; ++k) add_outer_row<T, Lanes>(out->cotangent[k], o, in->value[k], row, -this->weight_rate(k));
    }

   protected:
    void times(Index k, const View<T>& x, const View<T>& z, Base<T> base) override {
        this->times_shared(x, z, base);
        for (Index j = 0; j < k;) {
            const Index end = same_rate(j, k);
            through<T, Lanes>(run(out->cotangent, j, end), run(in->value, j, end), x, z, -this->weight_rate(j),
                              this->workspace);
            j = end;
        }
    }
    void times_transposed(Index k, const View<T>& d, const View<T>& dx) override {
        this->times_shared_transposed(d, dx);
        for (Index j = 0; j < k;) {
            const Index end = same_rate(j, k);
            through<T, Lanes>(run(in->value, j, end), run(out->cotangent, j, end), d, dx, -this->weight_rate(j),
                              this->workspace);
            j = end;
        }
    }
    void times_adjoint(const View<T>& x, const View<T>& z, T alpha, Base<T> base) override {
        for (const Run& run : adjoint()) {
            if (!run.left.columns) continue;
            through<T, Lanes>(run.left, run.right, x, z, alpha, this->workspace, base);
            base = onto(z);
        }
    }
    void add_adjoint_transposed(const View<T>& d, const View<T>& dx, T alpha) override {
        for (const Run& run : adjoint())
            if (run.left.columns) through<T, Lanes>(run.right, run.left, d, dx, alpha, this->workspace);
    }

   private:
    struct Run {
        View<T> left, right;
    };
    struct Runs {
        Run runs[2];
        const Run* begin() const { return runs; }
        const Run* end() const { return runs + 2; }
    };
    // Lam = the sum of left right^T over both runs
    Runs adjoint() const {
        const Index columns = in->columns, steps = S - since;
        const Index all = steps * columns + in->query_columns;
        const View<T>& t_d = steps ? out->t_cotangent[since] : out->cotangent[S];
        View<T> left = t_d, right = in->value[since];
        left.columns = right.columns = all;
        Runs found{{{left, right}, {}}};
        if (steps) found.runs[1] = {run(out->cotangent, since, S), run(in->tangent, since, S)};
        return found;
    }
    View<T> run(const std::vector<View<T>>& steps, Index begin, Index end) const {
        View<T> view = steps[begin];
        view.columns *= end - begin;
        return view;
    }
    // The end of the run of steps from j that have one rate.
    Index same_rate(Index j, Index k) const {
        Index end = j + 1;
        while (end < k && this->weight_rate(end) == this->weight_rate(j)) ++end;
        return end;
    }

    Index since = 0;  // the first step whose tangents are part of the adjoint
};

// The first layer that adapts, factored: its input is the data at every step. So W X and the Gram blocks of the data are
// made once, all steps' updates add up beside the one X, and so do all steps' t_D:
//     W_k = W + moved_k X^T, moved_k = -sum eta_j D_j         Lam = D_q X_q^T + (sum t_D) X^T
template <class T, class Lanes>
class FactoredInput final : public FastLinear<T, Lanes> {
    using Base_ = FastLinear<T, Lanes>;
    using Base_::I;
    using Base_::in;
    using Base_::O;
    using Base_::out;
    using Base_::S;
    using Base_::U;

   public:
    using Base_::Base_;

    void allocate(Arena& arena) override {
        Base_::allocate(arena);
        const Index columns = in->columns, query_columns = in->query_columns;
        moved = arena.template view<T>(O, columns);
        t_sum = arena.template view<T>(O, columns);
        if (S > 1) base = arena.template view<T>(O, columns);
        support_support = arena.template view<T>(Lanes::units(columns), columns);
        support_query = arena.template view<T>(Lanes::units(columns), query_columns);
        query_support = arena.template view<T>(Lanes::units(query_columns), columns);
        this->workspace.needs(sum_workspace<T>(I, larger(columns, query_columns)));
    }
    void begin_tile() override {
        t_sum.columns = 0;
        if (!S) return;
        const View<T>&x = in->value[0], &q = in->value[S];
        gram<T, Lanes>(x, x, support_support, 1);
        gram<T, Lanes>(x, q, support_query, 1);
        gram<T, Lanes>(q, x, query_support, 1);
        if (S > 1) this->times_shared(x, base, {});
    }
    void descend(Index k) override {
        this->descend_bias(k);
        add_scaled(out->cotangent[k], moved, -this->weight_rate(k), k > 0);
    }
    void pull_back(Index k) override {
        Base_::pull_back(k);
        add_scaled(out->t_cotangent[k], t_sum, 1, t_sum.columns > 0);
        t_sum.columns = in->columns;
    }
    void add_gradient(T* weight, T* bias) override {
        this->add_bias_gradient(bias);
        add_sums<T>(out->cotangent[S], in->value[S], weight, this->weight_stride(), this->workspace);
        if (t_sum.columns) add_sums<T>(t_sum, in->value[0], weight, this->weight_stride(), this->workspace);
    }
    void adapted_row(Index o, T* row) override {
        const T* shared = static_cast<const T*>(this->layer.weight) + o * I;
        for (Index i = 0; i < I * U; ++i) row[i] = shared[i / U];
        if (S) add_outer_row<T, Lanes>(moved, o, in->value[0], row, 1);
    }

   protected:
    void times(Index k, const View<T>& x, const View<T>& z, Base<T> bias) override {
        if (k < S && S > 1) {
            if (k)
                apply<T, Lanes>(moved, support_support, z, 1, onto(base));
            else
                add_scaled(base, z, 1, false);
            add_to_rows(z, bias);
        } else {
            this->times_shared(x, z, bias);
            if (k) apply<T, Lanes>(moved, support_query, z, 1, onto(z));
        }
    }
    void times_transposed(Index, const View<T>&, const View<T>&) override {}  // nothing adapts below
    void times_adjoint(const View<T>&, const View<T>& z, T alpha, Base<T> bias) override {
        apply<T, Lanes>(out->cotangent[S], query_support, z, alpha, bias);
        if (t_sum.columns) apply<T, Lanes>(t_sum, support_support, z, alpha, onto(z));
    }
    void add_adjoint_transposed(const View<T>&, const View<T>&, T) override {}

   private:
    static void add_scaled(const View<T>& from, const View<T>& to, T scale, bool add) {
        for (Index o = 0; o < from.features; ++o)
            for (Index n = 0; n < from.numbers(); n += LANES<T>) {
                T* at = to.p + o * to.by_feature + n;
                const Vec<T> v = load(from.p + o * from.by_feature + n) * scale;
                store(at, add ? load(at) + v : v);
            }
    }
    static void add_to_rows(const View<T>& z, const Base<T>& bias) {
        if (bias.kind == Base<T>::nothing) return;
        for (Index o = 0; o < z.features; ++o) {
            const T* p = bias.p + o * bias.by_a;
            const Vec<T> b = bias.kind == Base<T>::vector ? load(p) : all(*p);
            for (Index n = 0; n < z.numbers(); n += LANES<T>)
                store(z.p + o * z.by_feature + n, load(z.p + o * z.by_feature + n) + b);
        }
    }

    View<T> moved, t_sum, base;
    View<T> support_support, support_query, query_support;  // Gram blocks [rows of the first][rows of the second]
};

}  // namespace maml_fast::MAML_FAST_ISA
