// A tile: the tasks that one thread takes through a whole meta-step at once, in memory of its own that stays in cache.
//
//     theta_{k+1} = theta_k - eta_k g_k,  g_k = grad L_support(theta_k)        k = 0 .. S-1
//     lam = grad L_query(theta_S);  lam = lam - H_k (eta_k lam)                k = S-1 .. 0
//     dloss/deta_k = -<g_k, lam>, with lam as it stands after step k
#pragma once

#include <memory>

#include "fast_weights.h"
#include "ops/losses.h"
#include "ops/pointwise.h"
#include "ops/reshape.h"

namespace maml_fast::MAML_FAST_ISA {

// A chunk's sums over its tasks. The places are the same for every chunk of a program.
template <class T>
struct Partial {
    T* numbers;     // of each layer that adapts: weight [O][stride], bias [O]
    double* rates;  // of each layer that adapts: [2, S]
};

template <class T, class Lanes>
class Tile {
   public:
    static constexpr Index L = LANES<T>;
    static constexpr Index most_tasks = Lanes::tasks ? L : 1;

    // With an arena that only counts, a tile to ask for sizes.
    Tile(const Program& program, Arena& arena) : program_(program), S(program.steps) {
        build_stages();
        allocate(arena);
    }

    // Tasks first .. first + count - 1; adds what they give to `sums`.
    void run(const TaskData& data, Index first, Index count, const Partial<T>& sums) {
        load(data, first, count);
        for (const auto& stage : prelude_)
            for (Index pass : {0, 1}) stage->forward(pass);
        for (FastLinear<T, Lanes>* layer : fast_) layer->begin_tile();
        adapt(data, first, count);
        query(data, first, count);
        export_adapted(first, count);
        if (program_.gradient) pull_back(sums);
    }

    // Where a layer's sums lie, in numbers from the start.
    struct Place {
        const FastLinear<T, Lanes>* layer;
        Index weight, bias;
    };
    const std::vector<Place>& places() const { return places_; }
    Index sum_numbers() const { return sum_numbers_; }
    Index rate_numbers() const { return 2 * S * static_cast<Index>(fast_.size()); }

   private:
    using Pass = LossPass<T>;

    // ---- the chain

    void build_stages() {
        const Index columns = Lanes::columns(program_.rows), query_columns = Lanes::columns(program_.query_rows);
        bool adapts = false;
        for (const Layer& layer : program_.layers) (layer.prelude ? prelude_ : stages_).push_back(new_stage(layer, adapts));
        prelude_edges_.resize(prelude_.size() + 1);
        edges_.resize(stages_.size() + 1);
        prelude_edges_[0] = {program_.in_features, columns, query_columns, {}, {}, {}, {}};
        connect(prelude_, prelude_edges_, true);
        edges_[0] = prelude_edges_.back();
        connect(stages_, edges_, false);
    }

    std::unique_ptr<Stage<T>> new_stage(const Layer& layer, bool& adapts) {
        switch (layer.kind) {
            case Kind::pointwise: return std::unique_ptr<Stage<T>>(new_pointwise<T>(layer));
            case Kind::merge_rows: return std::unique_ptr<Stage<T>>(new MergeRows<T>());
            case Kind::split_rows: return std::unique_ptr<Stage<T>>(new SplitRows<T>());
            case Kind::linear: break;
        }
        if (layer.form == Form::shared) return std::unique_ptr<Stage<T>>(new SharedLinear<T, Lanes>(layer));
        FastLinear<T, Lanes>* fast;
        if (layer.form == Form::dense)
            fast = new DenseLinear<T, Lanes>(layer, program_, !adapts, workspace_);
        else if (!adapts)
            fast = new FactoredInput<T, Lanes>(layer, program_, true, workspace_);
        else
            fast = new FactoredLinear<T, Lanes>(layer, program_, false, workspace_);
        adapts = true;
        fast_.push_back(fast);
        return std::unique_ptr<Stage<T>>(fast);
    }

    void connect(std::vector<std::unique_ptr<Stage<T>>>& stages, std::vector<Edge<T>>& edges, bool prelude) {
        Index i = 0;
        for (const Layer& layer : program_.layers) {
            if (layer.prelude != prelude) continue;
            const Edge<T>& in = edges[i];
            Edge<T>& out = edges[i + 1];
            out.features = layer.kind == Kind::linear       ? layer.out_features
                           : layer.kind == Kind::merge_rows ? in.features / layer.positions
                           : layer.kind == Kind::split_rows ? in.features * layer.positions
                                                            : in.features;
            const Index more = layer.kind == Kind::merge_rows ? layer.positions : 1;
            const Index fewer = layer.kind == Kind::split_rows ? layer.positions : 1;
            out.columns = in.columns * more / fewer;
            out.query_columns = in.query_columns * more / fewer;
            stages[i]->in = &edges[i];
            stages[i]->out = &edges[i + 1];
            ++i;
        }
    }

    // ---- memory

    // What is kept of each inner step: all that the adjoint reads, or else only what the next step overwrites.
    bool keeps_steps() const {
        if (!program_.gradient) return false;
        if (!program_.first_order) return true;
        for (const FastLinear<T, Lanes>* layer : fast_)
            if (layer->layer.learns_rates) return true;
        return false;
    }
    bool second_order() const { return program_.gradient && !program_.first_order; }

    void allocate(Arena& arena) {
        for (const auto& stage : stages_) fast_at_.push_back({dynamic_cast<FastLinear<T, Lanes>*>(stage.get())});
        kept_ = keeps_steps() ? S : smaller<Index>(S, 1);
        fuse();
        allocate_prelude(arena);
        allocate_values(arena);
        allocate_cotangents(arena);
        if (second_order()) {
            allocate_tangents(arena);
            allocate_t_cotangents(arena);
        }
        for (const auto& stage : stages_)
            if (auto* pointwise = as_pointwise(stage.get())) pointwise->allocate(arena, kept_);
        for (FastLinear<T, Lanes>* layer : fast_) {
            layer->allocate(arena);
            Place place{layer, sum_numbers_, 0};
            place.bias = place.weight + ceil_div(layer->sum_length(), L) * L;
            sum_numbers_ = place.bias + ceil_div(layer->O, L) * L;
            places_.push_back(place);
        }
        allocate_loss(arena);
        if (program_.exports) {
            Index longest = 0;
            for (FastLinear<T, Lanes>* layer : fast_) longest = larger(longest, layer->I);
            row_ = arena.template take<T>(longest * Lanes::unit);
        }
        workspace_.allocate(arena);
    }

    // A ReLU that works in place is done by the products of the linear layers beside it.
    void fuse() {
        for (Index i = 1; i < last(); ++i) {
            auto* relu = dynamic_cast<Pointwise<T, Relu<T>>*>(stages_[i].get());
            if (!relu || !stays_in_place(i)) continue;
            if (auto* before = linear_at(i - 1)) before->relu_behind = relu->forward_is_done = true;
            if (auto* behind = linear_at(i + 1)) behind->relu_before = relu->backward_is_done = true;
        }
    }

    void allocate_prelude(Arena& arena) {
        for (Edge<T>& edge : prelude_edges_)
            edge.value = {arena.template view<T>(edge.features, edge.columns),
                          arena.template view<T>(edge.features, edge.query_columns)};
        for (const auto& stage : prelude_)
            if (auto* pointwise = as_pointwise(stage.get())) pointwise->allocate(arena, 1);
    }

    // A view for each step that is kept, shared by the others, and one for the query.
    std::vector<View<T>> own(Arena& arena, const Edge<T>& edge, bool query) {
        std::vector<View<T>> views(S + 1);
        for (Index k = 0; k < S; ++k)
            views[k] = k < kept_ ? arena.template view<T>(edge.features, edge.columns) : views[0];
        if (query) views[S] = arena.template view<T>(edge.features, edge.query_columns);
        return views;
    }
    // One view for all steps: what lives only within one of them.
    std::vector<View<T>> passing(Arena& arena, const Edge<T>& edge) {
        const View<T> view = arena.template view<T>(edge.features, edge.columns);
        std::vector<View<T>> views(S);
        for (Index k = 0; k < S; ++k) views[k] = view;
        return views;
    }
    // All steps' columns side by side, and the query's behind them: a run of rows, as factored weights read them.
    std::vector<View<T>> history(Arena& arena, const Edge<T>& edge, bool query) {
        const Index all = S * edge.columns + (query ? edge.query_columns : 0);
        const View<T> run = arena.template view<T>(edge.features, all);
        std::vector<View<T>> views(S + query);
        for (Index k = 0; k < S; ++k) views[k] = run.columns_from(k * edge.columns, edge.columns);
        if (query) views[S] = run.columns_from(S * edge.columns, edge.query_columns);
        return views;
    }

    void allocate_values(Arena& arena) {
        const Edge<T>& data = prelude_edges_.back();
        for (Index e = last(); e > 0; --e) {
            Edge<T>& edge = edges_[e];
            if (stays_in_place(e))
                edge.value = edges_[e + 1].value;
            else
                edge.value = is_factored(e) ? history(arena, edge, true) : own(arena, edge, true);
        }
        edges_[0].value.assign(S + 1, data.value[0]);
        edges_[0].value[S] = data.value[1];
    }
    // Whether an activation may write its result over its input, behind edge e: unless that is what another one reads.
    bool stays_in_place(Index e) const {
        const auto *next = pointwise_at(e), *previous = pointwise_at(e - 1);
        return next && next->traits().from_output && !(previous && previous->traits().from_output);
    }

    void allocate_cotangents(Arena& arena) {
        for (Index e = 1; e <= last(); ++e) {
            Edge<T>& edge = edges_[e];
            const auto* pointwise = pointwise_at(e - 1);
            if (is_factored(e - 1)) {
                edge.cotangent = history(arena, edge, false);
                // D_q stands behind the steps' t_D
                auto behind = history_behind(arena, edge);
                edge.cotangent.push_back(behind.back());
                behind.pop_back();
                edge.t_cotangent = behind;
            } else if (pointwise && !pointwise->traits().curved && e > 1) {
                edge.cotangent = edges_[e - 1].cotangent;
            } else {
                edge.cotangent = own(arena, edge, program_.gradient);
            }
        }
    }
    std::vector<View<T>> history_behind(Arena& arena, const Edge<T>& edge) {
        if (second_order()) return history(arena, edge, true);
        return {arena.template view<T>(edge.features, edge.query_columns)};
    }

    void allocate_tangents(Arena& arena) {
        for (Index e = last(); e > 0; --e) {
            Edge<T>& edge = edges_[e];
            const auto* pointwise = pointwise_at(e);
            if (pointwise && !pointwise->traits().curved)
                edge.tangent = edges_[e + 1].tangent;
            else
                edge.tangent = is_factored(e) ? history(arena, edge, false) : passing(arena, edge);
        }
    }
    void allocate_t_cotangents(Arena& arena) {
        for (Index e = 1; e <= last(); ++e) {
            Edge<T>& edge = edges_[e];
            if (is_factored(e - 1)) continue;  // done, with D_q
            if (pointwise_at(e - 1) && e > 1)
                edge.t_cotangent = edges_[e - 1].t_cotangent;
            else
                edge.t_cotangent = passing(arena, edge);
        }
    }

    void allocate_loss(Arena& arena) {
        loss_.reset(new_loss<T>(program_.loss));
        const Edge<T>& out = edges_.back();
        const Index y_features = program_.loss == LossKind::cross_entropy ? 1 : out.features;
        const View<T> y = arena.template view<T>(y_features, out.columns);
        const View<T> y_query = arena.template view<T>(y_features, out.query_columns);
        const View<T> weights = arena.template view<T>(1, out.columns);
        const View<T> query_weights = arena.template view<T>(1, out.query_columns);
        passes_.resize(S + 1);
        for (Index k = 0; k <= S; ++k) {
            const bool query = k == S;
            const Index columns = query ? out.query_columns : out.columns;
            Pass& pass = passes_[k];
            pass.z = out.value[k];
            pass.y = query ? y_query : y;
            pass.weights = query ? query_weights : weights;
            pass.state = query || k < kept_ ? arena.template view<T>(out.features, columns) : passes_[0].state;
            if (!stages_.empty() && (!query || program_.gradient)) pass.d = out.cotangent[k];
        }
    }

    Index last() const { return static_cast<Index>(stages_.size()); }
    static PointwiseStage<T>* as_pointwise(Stage<T>* stage) { return dynamic_cast<PointwiseStage<T>*>(stage); }
    const PointwiseStage<T>* pointwise_at(Index i) const {
        return i < 0 || i >= last() ? nullptr : as_pointwise(stages_[i].get());
    }
    LinearStage<T, Lanes>* linear_at(Index i) const {
        return i < 0 || i >= last() ? nullptr : dynamic_cast<LinearStage<T, Lanes>*>(stages_[i].get());
    }
    bool is_factored(Index i) const {
        return i >= 0 && i < last() && dynamic_cast<FactoredLinear<T, Lanes>*>(stages_[i].get());
    }
    // ---- data

    // What fills lane j of a column: a row of one of the tasks. Lanes beyond the last task repeat it, with weight 0 in the
    // query, so that nothing of them is counted; lanes beyond a task's last row stay empty.
    struct Row {
        Index task, row;  // row -1: none
    };
    Row row_at(Index column, Index lane, Index first, Index count, Index rows) const {
        if (Lanes::tasks) return {first + smaller(lane, count - 1), column};
        const Index row = column * L + lane;
        return {first, row < rows ? row : -1};
    }

    void load(const TaskData& data, Index first, Index count) {
        const View<T>&x = prelude_edges_[0].value[0], &q = prelude_edges_[0].value[1];
        load_rows(data.support_x, x, first, count, program_.rows);
        load_rows(data.query_x, q, first, count, program_.query_rows);
        if (S) {  // without steps the one pass is the query's
            load_targets(data.support_y, passes_[0], first, count, program_.rows);
            set_weights(passes_[0].weights, L, program_.rows);
        }
        load_targets(data.query_y, passes_[S], first, count, program_.query_rows);
        set_weights(passes_[S].weights, Lanes::tasks ? count : L, program_.query_rows);
    }
    void load_rows(const RowData& from, const View<T>& to, Index first, Index count, Index rows) const {
        for (Index column = 0; column < to.columns; ++column) {
            const T* starts[L];
            for (Index lane = 0; lane < L; ++lane) {
                const Row at = row_at(column, lane, first, count, rows);
                const T* start = static_cast<const T*>(from.p) + at.task * from.by_task;
                starts[lane] = at.row < 0 ? nullptr : start + at.row * from.by_row;
            }
            load_column<T>(starts, to, column);
        }
    }
    void load_targets(const RowData& from, const Pass& pass, Index first, Index count, Index rows) const {
        if (!from.p) return;
        if (program_.loss != LossKind::cross_entropy) return load_rows(from, pass.y, first, count, rows);
        const auto* classes = static_cast<const std::int64_t*>(from.p);
        for (Index column = 0; column < pass.y.columns; ++column)
            for (Index lane = 0; lane < L; ++lane) {
                const Row at = row_at(column, lane, first, count, rows);
                const bool none = at.row < 0;
                pass.y.p[column * L + lane] =
                    none ? T(0) : static_cast<T>(classes[at.task * from.by_task + at.row * from.by_row]);
            }
    }
    // 1 / rows in the lanes that count.
    static void set_weights(const View<T>& weights, Index lanes, Index rows) {
        for (Index i = 0; i < weights.numbers(); ++i) {
            const bool counts = Lanes::tasks ? i % L < lanes : i < rows;
            weights.p[i] = counts ? T(1) / T(rows) : T(0);
        }
    }
    static void put_losses(Vec<T> sums, T* to, Index stride, Index count) {
        if (!Lanes::tasks) {
            *to = lane_sum<T>(sums);
            return;
        }
        for (Index j = 0; j < count; ++j) to[j * stride] = sums[j];
    }

    // ---- the meta-step

    void forward(Index k) {
        for (const auto& stage : stages_) stage->forward(k);
    }
    void backward(Index k) {
        for (Index i = last() - 1; i > 0; --i) stages_[i]->backward(k);  // nothing adapts below the first
    }

    void adapt(const TaskData& data, Index first, Index count) {
        for (Index k = 0; k < S; ++k) {
            forward(k);
            const Vec<T> losses = loss_->value(passes_[k]);
            put_losses(losses, static_cast<T*>(data.support_losses) + first * S + k, S, count);
            backward(k);
            for (FastLinear<T, Lanes>* layer : fast_) layer->descend(k);
        }
    }

    void query(const TaskData& data, Index first, Index count) {
        forward(S);
        const View<T>& z = edges_.back().value[S];
        const Index rows = program_.query_rows;
        T* outputs = static_cast<T*>(data.query_outputs);
        for (Index column = 0; column < z.columns; ++column) {
            T* starts[L];
            for (Index lane = 0; lane < L; ++lane) {
                const Row at = row_at(column, lane, first, count, rows);
                const bool none = at.row < 0 || (Lanes::tasks && lane >= count);
                starts[lane] = none ? nullptr : outputs + (at.task * rows + at.row) * z.features;
            }
            store_column<T>(z, column, starts);
        }
        if (!data.query_y.p) return;
        put_losses(loss_->value(passes_[S]), static_cast<T*>(data.task_losses) + first, 1, count);
    }

    void pull_back(const Partial<T>& sums) {
        backward(S);
        for (FastLinear<T, Lanes>* layer : fast_) layer->begin_adjoint();
        for (Index k = S - 1; k >= 0; --k) {
            add_rate_gradients(k, sums.rates);
            if (second_order()) hessian_product(k);
        }
        for (std::size_t i = 0; i < fast_.size(); ++i)
            fast_[i]->add_gradient(sums.numbers + places_[i].weight, sums.numbers + places_[i].bias);
    }

    void add_rate_gradients(Index k, double* rates) {
        for (FastLinear<T, Lanes>* layer : fast_) {
            if (layer->layer.learns_rates) layer->add_rate_gradients(k, rates, rates + S);
            rates += 2 * S;
        }
    }

    void hessian_product(Index k) {
        for (const auto& stage : stages_) stage->tangent(k);
        const Edge<T>& out = edges_.back();
        loss_->tangent(passes_[k], out.tangent[k], out.t_cotangent[k]);
        for (Index i = last() - 1; i >= 0; --i) {
            stages_[i]->tangent_backward(k);
            if (FastLinear<T, Lanes>* layer = fast_at_[i].layer) layer->pull_back(k);
        }
    }

    // The adapted parameters of each task, for those who asked.
    void export_adapted(Index first, Index count) {
        if (!program_.exports) return;
        for (FastLinear<T, Lanes>* layer : fast_) {
            const Index O = layer->O, I = layer->I;
            if (T* to = static_cast<T*>(layer->layer.adapted_weight))
                for (Index o = 0; o < O; ++o) {
                    layer->adapted_row(o, row_);
                    for (Index j = 0; j < count; ++j)
                        for (Index i = 0; i < I; ++i) to[((first + j) * O + o) * I + i] = row_[i * Lanes::unit + j];
                }
            if (T* to = static_cast<T*>(layer->layer.adapted_bias))
                for (Index o = 0; o < O; ++o)
                    for (Index j = 0; j < count; ++j)
                        to[(first + j) * O + o] = layer->adapted_bias(o, j);
        }
    }

    const Program& program_;
    const Index S;
    Workspace<T> workspace_;
    std::vector<std::unique_ptr<Stage<T>>> prelude_, stages_;
    struct Fast {
        FastLinear<T, Lanes>* layer;
    };
    std::vector<FastLinear<T, Lanes>*> fast_;  // those of stages_ that adapt
    std::vector<Fast> fast_at_;                // by stage, null where it does not
    std::vector<Edge<T>> prelude_edges_, edges_;
    std::unique_ptr<Loss<T>> loss_;
    std::vector<Pass> passes_;  // [S + 1]
    std::vector<Place> places_;
    Index sum_numbers_ = 0, kept_ = 0;
    T* row_ = nullptr;
};

}  // namespace maml_fast::MAML_FAST_ISA
