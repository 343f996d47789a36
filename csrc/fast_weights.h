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
        const View<T>& product = rate_product;
        times_both(k, nullptr, in->value[k], 1, product, {}, {});
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
        const T *shared = static_cast<const T*>(layer.weight), *from = k ? weights[k].p : shared;
        const T rate = this->weight_rate(k);
        if constexpr (Lanes::tasks) {
            const Base<T> base = k ? onto(from) : Base<T>{Base<T>::number, from, I, 1};
            own(outer<T>(out->cotangent[k], in->value[k]), {}, next, -rate, base);
        } else {
            for (Index o = 0; o < O; ++o)
                if (const T* row = from + o * (k ? stride() : I); row != next + o * stride())
                    std::memcpy(next + o * stride(), row, I * sizeof(T));
            outer_by_rows<T>(out->cotangent[k], in->value[k], next, stride(), -rate, true, this->workspace);
        }
    }
    void begin_adjoint() override {
        Base_::begin_adjoint();
        const View<T>&d = out->cotangent[S], &a = in->value[S];
        if constexpr (Lanes::tasks)
            own(outer<T>(d, a), {}, adjoint, 1, {});
        else
            outer_by_rows<T>(d, a, adjoint, stride(), 1, false, this->workspace);
    }
    void pull_back(Index k) override {
        Base_::pull_back(k);
        const View<T>&t_d = out->t_cotangent[k], &a = in->value[k], &d = out->cotangent[k];
        if constexpr (Lanes::tasks) {
            own(outer<T>(t_d, a), this->first ? Sum<T>{} : outer<T>(d, in->tangent[k]), adjoint, 1, onto(adjoint));
        } else {
            outer_by_rows<T>(t_d, a, adjoint, stride(), 1, true, this->workspace);
            if (!this->first) outer_by_rows<T>(d, in->tangent[k], adjoint, stride(), 1, true, this->workspace);
        }
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
                for (Index i = 0; i < I; ++i) weight[o * I + i] += adjoint[o * stride() + i];
        }
    }
    Index sum_length() const override { return O * I; }
    Index sum_place(Index o, Index i) const override { return o * I + i; }
    Index sum_run(Index i) const override { return I - i; }
    void adapted_row(Index o, T* row) override {
        if (S)
            std::memcpy(row, weights[S].p + o * stride() * U, I * U * sizeof(T));
        else
            this->shared_row(o, row);
    }

   protected:
    void times(Index k, const View<T>& x, const View<T>& z, Base<T> base, Gate<T> gate) override {
        this->multiply(weight(k), x, z, base, gate);
    }
    void times_transposed(Index k, const View<T>& d, const View<T>& dx, Gate<T> gate) override {
        this->multiply(transposed(weight(k)), d, dx, {}, gate);
    }
    void times_both(Index k, const View<T>* t, const View<T>& x, T alpha, const View<T>& z, Base<T> base,
                    Gate<T> gate) override {
        both(t ? MAML_FAST_ISA::times<T>(weight(k), *t) : Sum<T>{}, MAML_FAST_ISA::times<T>(own_operand(adjoint), x), alpha, z,
             base, gate);
    }
    void times_both_transposed(Index k, const View<T>& t, const View<T>& d, T alpha, const View<T>& dx,
                               Gate<T> gate) override {
        both(MAML_FAST_ISA::times<T>(transposed(weight(k)), t), MAML_FAST_ISA::times<T>(transposed(own_operand(adjoint)), d),
             alpha, dx, {}, gate);
    }

   private:
    // Units from one row of weights to the next.
    Index stride() const { return Lanes::tasks ? I : padded_features<T>(I); }
    Base<T> onto(const T* weights) const { return {Base<T>::vector, weights, stride() * U, LANES<T>}; }
    Operand<T> own_operand(const T* weights) const { return {weights, stride() * U, U, Lanes::tasks}; }
    Operand<T> weight(Index k) const { return k ? own_operand(weights[k].p) : this->shared_weight(); }
    static Operand<T> transposed(Operand<T> w) { return {w.p, w.by_k, w.by_a, w.vectors}; }

    // z = gate(weight + alpha adjoint + base), in one product if both are of one kind.
    static void both(Sum<T> weight, Sum<T> adjoint, T alpha, const View<T>& z, Base<T> base, Gate<T> gate) {
        Product<T> p;
        p.first = adjoint;
        p.alpha = alpha;
        p.base = base;
        p.gate = gate;
        p.c = z.p;
        p.c_by_a = z.by_feature;
        if (weight.terms && weight.left.vectors != adjoint.left.vectors) {
            Product<T> q;
            q.first = weight;
            q.base = base;
            q.c = z.p;
            q.c_by_a = z.by_feature;
            product<T>(z.features, z.columns, q);
            p.base = MAML_FAST_ISA::onto(z);
        } else {
            p.second = weight;
        }
        product<T>(z.features, z.columns, p);
    }
    // Weights of each task's own: c = alpha * first + second + base.
    void own(Sum<T> first, Sum<T> second, T* c, T alpha, Base<T> base) const {
        Product<T> p;
        p.first = first;
        p.alpha = alpha;
        p.second = second;
        p.base = base;
        p.c = c;
        p.c_by_a = stride() * U;
        product<T>(O, I, p);
    }

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
        add_runs_up<T>(adjoint_recent(1), adjoint_earlier(1), weight, this->workspace);
    }
    void adapted_row(Index o, T* row) override {
        this->shared_row(o, row);
        for (Index k = 0; k < S; ++k)
            add_outer_row<T, Lanes>({out->cotangent[k], in->value[k], -this->weight_rate(k)}, o, row);
    }

   protected:
    void times(Index k, const View<T>& x, const View<T>& z, Base<T> base, Gate<T> gate) override {
        begin_terms();
        add_moved(k, x, false);
        finish(this->shared_weight(), x, z, base, gate);
    }
    void times_transposed(Index k, const View<T>& d, const View<T>& dx, Gate<T> gate) override {
        begin_terms();
        add_moved(k, d, true);
        finish(this->shared_transposed(), d, dx, {}, gate);
    }
    void times_both(Index k, const View<T>* t, const View<T>& x, T alpha, const View<T>& z, Base<T> base,
                    Gate<T> gate) override {
        begin_terms();
        if (t) add_moved(k, *t, false);
        add_adjoint(x, alpha, false);
        if (t) return finish(this->shared_weight(), *t, z, base, gate);
        for (std::size_t i = 0; i < terms.size(); ++i)
            add_term(i, z, i ? MAML_FAST_ISA::onto(z) : base, gate);
    }
    void times_both_transposed(Index k, const View<T>& t, const View<T>& d, T alpha, const View<T>& dx,
                               Gate<T> gate) override {
        begin_terms();
        add_moved(k, t, true);
        add_adjoint(d, alpha, true);
        finish(this->shared_transposed(), t, dx, {}, gate);
    }

   private:
    // A run, and what it is multiplied with.
    struct Term {
        Run<T> run;
        View<T> x;
    };

    void begin_terms() { terms.clear(); }
    // W_k - W, a term for each run of steps that have one rate.
    void add_moved(Index k, const View<T>& x, bool transposed) {
        for (Index j = 0; j < k;) {
            Index end = j + 1;
            while (end < k && this->weight_rate(end) == this->weight_rate(j)) ++end;
            const Run<T> run{joined(out->cotangent, j, end), joined(in->value, j, end), -this->weight_rate(j)};
            terms.push_back({transposed ? run.transposed() : run, x});
            j = end;
        }
    }
    void add_adjoint(const View<T>& x, T alpha, bool transposed) {
        for (const Run<T>& run : {adjoint_recent(alpha), adjoint_earlier(alpha)})
            if (run.l.columns) terms.push_back({transposed ? run.transposed() : run, x});
    }
    // Lam is the sum of two runs: (t_D, A) of the steps gone back through and, behind them, the query's D and A;
    Run<T> adjoint_recent(T alpha) const {
        const Index columns = (S - since) * in->columns + in->query_columns;
        View<T> l = since < S ? out->t_cotangent[since] : out->cotangent[S], r = in->value[since];
        l.columns = r.columns = columns;
        return {l, r, alpha};
    }
    // and (D, t_A) of those steps.
    Run<T> adjoint_earlier(T alpha) const {
        if (since == S) return {};
        return {joined(out->cotangent, since, S), joined(in->tangent, since, S), alpha};
    }
    static View<T> joined(const std::vector<View<T>>& steps, Index begin, Index end) {
        View<T> view = steps[begin];
        view.columns *= end - begin;
        return view;
    }

    // z = gate(shared x + base + all terms)
    void finish(Operand<T> shared, const View<T>& x, const View<T>& z, Base<T> base, Gate<T> gate) const {
        this->multiply(shared, x, z, base, terms.empty() ? gate : Gate<T>{});
        for (std::size_t i = 0; i < terms.size(); ++i) add_term(i, z, MAML_FAST_ISA::onto(z), gate);
    }
    void add_term(std::size_t i, const View<T>& z, Base<T> base, Gate<T> gate) const {
        add_run<T, Lanes>(terms[i].run, terms[i].x, z, this->workspace, i + 1 == terms.size() ? gate : Gate<T>{}, base);
    }

    std::vector<Term> terms;
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
        if (S > 1) this->multiply(this->shared_weight(), x, base, {}, {});
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
        Run<T> summed;
        if (t_sum.columns) summed = {t_sum, in->value[0], 1};
        add_runs_up<T>({out->cotangent[S], in->value[S], 1}, summed, weight, this->workspace);
    }
    void adapted_row(Index o, T* row) override {
        this->shared_row(o, row);
        if (S) add_outer_row<T, Lanes>({moved, in->value[0], 1}, o, row);
    }

   protected:
    void times(Index k, const View<T>& x, const View<T>& z, Base<T> bias, Gate<T> gate) override {
        const Gate<T> first_gate = k ? Gate<T>{} : gate;
        if (k < S && S > 1)
            add_to_rows(base, bias, z, first_gate);
        else
            this->multiply(this->shared_weight(), x, z, bias, first_gate);
        if (k) add_applied(moved, k < S ? support_support : support_query, 1, z, MAML_FAST_ISA::onto(z), gate);
    }
    void times_both(Index, const View<T>*, const View<T>&, T alpha, const View<T>& z, Base<T> bias, Gate<T> gate) override {
        const bool more = t_sum.columns > 0;
        add_applied(out->cotangent[S], query_support, alpha, z, bias, more ? Gate<T>{} : gate);
        if (more) add_applied(t_sum, support_support, alpha, z, MAML_FAST_ISA::onto(z), gate);
    }
    // Nothing adapts below.
    void times_transposed(Index, const View<T>&, const View<T>&, Gate<T>) override {}
    void times_both_transposed(Index, const View<T>&, const View<T>&, T, const View<T>&, Gate<T>) override {}

   private:
    static void add_applied(const View<T>& l, const View<T>& g, T alpha, const View<T>& z, Base<T> base, Gate<T> gate) {
        Product<T> p;
        p.first = applied<T, Lanes>(l, g);
        p.alpha = alpha;
        p.base = base;
        p.gate = gate;
        p.c = z.p;
        p.c_by_a = z.by_feature;
        product<T>(z.features, z.columns, p);
    }
    static void add_scaled(const View<T>& from, const View<T>& to, T scale, bool add) {
        for (Index o = 0; o < from.features; ++o)
            for (Index n = 0; n < from.numbers(); n += LANES<T>) {
                T* at = to.p + o * to.by_feature + n;
                const Vec<T> v = load(from.p + o * from.by_feature + n) * scale;
                store(at, add ? load(at) + v : v);
            }
    }
    static void add_to_rows(const View<T>& x, const Base<T>& bias, const View<T>& z, Gate<T> gate) {
        for (Index o = 0; o < z.features; ++o) {
            const T* p = bias.p + o * bias.by_a;
            const Vec<T> b = bias.kind == Base<T>::nothing ? Vec<T>{} : bias.kind == Base<T>::vector ? load(p) : all(*p);
            for (Index n = 0; n < z.columns; ++n) {
                const Index at = n * LANES<T>;
                store(z.p + o * z.by_feature + at, gate(load(x.p + o * x.by_feature + at) + b, o, n));
            }
        }
    }

    View<T> moved, t_sum, base;
    View<T> support_support, support_query, query_support;  // Gram blocks [rows of the first][rows of the second]
};

}  // namespace maml_fast::MAML_FAST_ISA
