// The stages of a tile between their edges, and where in the tile's memory each value lies.
#pragma once

#include <memory>

#include "dense_weights.h"
#include "factored_input.h"
#include "factored_weights.h"
#include "fast_norm.h"
#include "ops/batch_norm.h"
#include "ops/group_norm.h"
#include "ops/losses.h"
#include "ops/pointwise.h"
#include "ops/reshape.h"
#include "still.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T, class Lanes>
class Chain {
   public:
    // With an arena that only counts, a chain to ask for sizes.
    Chain(const Program& program, Arena& arena) : program(program), S(program.steps), goes_below(program.goes_below()), turns(program.turns()) {
        build_stages();
        allocate(arena);
    }

    bool second_order() const { return program.gradient && !program.first_order; }
    Index last() const { return static_cast<Index>(stages.size()); }

    using Stages = std::vector<std::unique_ptr<Stage<T>>>;
    struct Fast {
        FastStage<T>* layer;
    };
    struct Still {
        LearningStage<T>* layer;
    };

    const Program& program;
    const Index S;
    const bool goes_below;      // whether the prelude or the data have gradients
    const bool turns;           // see Program
    Stages prelude, stages;     // what runs once, and what adapts or lies behind
    std::vector<Fast> fast;     // those of the stages that adapt
    std::vector<Fast> fast_at;  // by stage, null where it does not
    std::vector<Still> still;   // those of the prelude that have a gradient,
    Index lowest = 0;           // and the first of it that cotangents reach
    std::vector<Edge<T>> prelude_edges, edges;
    std::unique_ptr<Loss<T>> loss;
    std::vector<LossPass<T>> passes;  // [S + 1]
    T* row = nullptr;                 // of adapted weights, [I] units, where they are wanted

   private:
    using Pass = LossPass<T>;

    // ---- stages

    void build_stages() {
        const Index columns = Lanes::columns(program.rows), query_columns = Lanes::columns(program.query_rows);
        bool adapts = false;
        for (const Layer& layer : program.layers) (layer.prelude ? prelude : stages).push_back(new_stage(layer, adapts));
        if (still.empty() && !program.inputs) lowest = static_cast<Index>(prelude.size());
        prelude_edges.resize(prelude.size() + 1);
        edges.resize(stages.size() + 1);
        prelude_edges[0] = {program.in_features, columns, query_columns, {}, {}, {}, {}};
        connect(prelude, prelude_edges, true);
        edges[0] = prelude_edges.back();
        connect(stages, edges, false);
    }

    std::unique_ptr<Stage<T>> new_stage(const Layer& layer, bool& adapts) {
        switch (layer.kind) {
            case Kind::pointwise: return std::unique_ptr<Stage<T>>(new_pointwise<T>(layer));
            case Kind::merge_rows: return std::unique_ptr<Stage<T>>(new MergeRows<T>(layer.positions));
            case Kind::split_rows: return std::unique_ptr<Stage<T>>(new SplitRows<T>(layer.positions));
            case Kind::norm: return std::unique_ptr<Stage<T>>(new_norm(layer, adapts));
            case Kind::linear: return std::unique_ptr<Stage<T>>(new_linear(layer, adapts));
            default: return nullptr;  // of images, which have a chain of their own
        }
    }
    Stage<T>* new_linear(const Layer& layer, bool& adapts) {
        if (layer.learns) return learning(new StillLinear<T, Lanes>(layer, program, is_lowest(), workspace_));
        if (layer.form == Form::shared) return new SharedLinear<T, Lanes>(layer);
        FastLinear<T, Lanes>* made;
        if (!layer.weight_adapts)
            made = new BiasLinear<T, Lanes>(layer, program, !adapts, workspace_);
        else if (layer.form == Form::dense)
            made = new DenseLinear<T, Lanes>(layer, program, !adapts, workspace_);
        else if (!adapts)
            made = new FactoredInput<T, Lanes>(layer, program, true, workspace_);
        else
            made = new FactoredLinear<T, Lanes>(layer, program, false, workspace_);
        adapts = true;
        fast.push_back({made});
        return made;
    }
    Stage<T>* new_norm(const Layer& layer, bool& adapts) {
        if (layer.norm == NormKind::batch) return new_norm_by<BatchNorm<T, Lanes>>(layer, adapts);
        return new_norm_by<GroupNorm<T, Lanes>>(layer, adapts);
    }
    template <class Rules>
    Stage<T>* new_norm_by(const Layer& layer, bool& adapts) {
        if (layer.learns) return learning(new StillNorm<T, Lanes, Rules>(layer, program, is_lowest()));
        if (layer.form == Form::shared) return new Rules(layer, program, false);
        // Where anything below has a gradient, what enters has a tangent of zeros.
        auto* made = new FastNorm<T, Lanes, Rules>(layer, program, !adapts && !goes_below);
        adapts = true;
        fast.push_back({made});
        return made;
    }

    // Of the stage that is added next: whether nothing below has a gradient.
    bool is_lowest() const { return still.empty() && !program.inputs; }
    template <class S>
    S* learning(S* made) {
        if (is_lowest()) lowest = static_cast<Index>(prelude.size());
        still.push_back({made});
        return made;
    }

    void connect(const Stages& stages, std::vector<Edge<T>>& edges, bool prelude) {
        Index i = 0;
        for (const Layer& layer : program.layers) {
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
        if (!program.gradient) return false;
        if (!program.first_order) return true;
        for (const Fast& stage : fast)
            if (stage.layer->layer.learns_rates) return true;
        return false;
    }
    void allocate(Arena& arena) {
        for (const auto& stage : stages) fast_at.push_back({dynamic_cast<FastStage<T>*>(stage.get())});
        kept_ = keeps_steps() ? S : smaller<Index>(S, 1);
        fuse(prelude);
        fuse(stages);
        allocate_prelude(arena);
        allocate_values(arena);
        if (goes_below) allocate_below(arena);
        allocate_cotangents(arena);
        if (second_order()) {
            allocate_tangents(arena);
            allocate_t_cotangents(arena);
        }
        for (const auto& stage : stages) stage->allocate(arena, kept_);
        allocate_loss(arena);
        if (program.exports) {
            Index longest = 0;
            for (const Fast& stage : fast) longest = larger(longest, stage.layer->I);
            row = arena.template take<T>(longest * Lanes::unit);
        }
        workspace_.allocate(arena);
    }

    // A ReLU that works in place is done by the layers beside it. A norm works in place unless an activation reads what it
    // would overwrite, or the steps share it.
    static void fuse(const Stages& stages) {
        const Index count = static_cast<Index>(stages.size());
        for (Index i = 1; i < count; ++i) {
            auto* relu = dynamic_cast<Pointwise<T, Relu<T>>*>(stages[i].get());
            if (!relu || !stays_in_place(stages, i)) continue;
            if (auto* before = gated_at(stages, i - 1)) before->relu_behind = relu->forward_is_done = true;
            if (auto* behind = gated_at(stages, i + 1)) behind->relu_before = relu->backward_is_done = true;
        }
        for (Index i = 0; i < count; ++i)
            if (auto* norm = dynamic_cast<NormStage<T, Lanes>*>(stages[i].get())) {
                const auto* before = pointwise_at(stages, i - 1);
                norm->in_place = i > 0 && !(before && before->traits().from_output);
            }
    }

    void allocate_prelude(Arena& arena) {
        for (Index e = static_cast<Index>(prelude.size()); e >= 0; --e)
            prelude_edges[e].value = e > 0 && stays_in_place(prelude, e) ? prelude_edges[e + 1].value : both(arena, prelude_edges[e]);
        for (const auto& stage : prelude) stage->allocate(arena, 1);
    }

    // Of the support and the query.
    std::vector<View<T>> both(Arena& arena, const Edge<T>& edge) {
        return {arena.template view<T>(edge.features, edge.columns), arena.template view<T>(edge.features, edge.query_columns)};
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
        const Edge<T>& data = prelude_edges.back();
        for (Index e = last(); e > 0; --e) {
            Edge<T>& edge = edges[e];
            if (stays_in_place(stages, e))
                edge.value = edges[e + 1].value;
            else
                edge.value = is_factored(e) ? history(arena, edge, true) : own(arena, edge, true);
        }
        edges[0].value.assign(S + 1, data.value[0]);
        edges[0].value[S] = data.value[1];
    }
    // Whether an activation may write its result over its input, behind edge e: unless that is what another one reads.
    static bool stays_in_place(const Stages& stages, Index e) {
        const auto *next = pointwise_at(stages, e), *previous = pointwise_at(stages, e - 1);
        return next && next->traits().from_output && !(previous && previous->traits().from_output);
    }

    // Of what runs once: the query's cotangent, and in the support's place the sum of what the steps add to it.
    void allocate_below(Arena& arena) {
        const Index end = static_cast<Index>(prelude_edges.size()), begin = program.inputs ? 0 : smaller(lowest + 1, end - 1);
        for (Index e = begin; e < end; ++e) {
            const auto* pointwise = pointwise_at(prelude, e - 1);
            const bool in_place = e > begin && pointwise && !pointwise->traits().curved;
            prelude_edges[e].cotangent = in_place ? prelude_edges[e - 1].cotangent : both(arena, prelude_edges[e]);
        }
        edges[0].cotangent = edges[0].t_cotangent = passing(arena, edges[0]);
        edges[0].cotangent.push_back(prelude_edges.back().cotangent[1]);
        if (second_order()) edges[0].tangent = passing(arena, edges[0]);
    }
    void allocate_cotangents(Arena& arena) {
        for (Index e = 1; e <= last(); ++e) {
            Edge<T>& edge = edges[e];
            const auto* pointwise = pointwise_at(stages, e - 1);
            if (is_factored(e - 1)) {
                edge.cotangent = history(arena, edge, false);
                // D_q stands behind the steps' t_D
                auto behind = history_behind(arena, edge);
                edge.cotangent.push_back(behind.back());
                behind.pop_back();
                edge.t_cotangent = behind;
            } else if (pointwise && !pointwise->traits().curved && e > 1) {
                edge.cotangent = edges[e - 1].cotangent;
            } else {
                edge.cotangent = own(arena, edge, program.gradient);
            }
        }
    }
    std::vector<View<T>> history_behind(Arena& arena, const Edge<T>& edge) {
        if (second_order()) return history(arena, edge, true);
        return {arena.template view<T>(edge.features, edge.query_columns)};
    }

    void allocate_tangents(Arena& arena) {
        for (Index e = last(); e > 0; --e) {
            Edge<T>& edge = edges[e];
            const auto* pointwise = pointwise_at(stages, e);
            if (pointwise && !pointwise->traits().curved)
                edge.tangent = edges[e + 1].tangent;
            else
                edge.tangent = is_factored(e) ? history(arena, edge, false) : passing(arena, edge);
        }
    }
    void allocate_t_cotangents(Arena& arena) {
        for (Index e = 1; e <= last(); ++e) {
            Edge<T>& edge = edges[e];
            if (is_factored(e - 1)) continue;  // done, with D_q
            if (pointwise_at(stages, e - 1) && e > 1)
                edge.t_cotangent = edges[e - 1].t_cotangent;
            else
                edge.t_cotangent = passing(arena, edge);
        }
    }

    void allocate_loss(Arena& arena) {
        loss.reset(new_loss<T>(program.loss));
        const Edge<T>& out = edges.back();
        const Index y_features = program.loss == LossKind::cross_entropy ? 1 : out.features;
        const View<T> y = arena.template view<T>(y_features, out.columns);
        const View<T> y_query = arena.template view<T>(y_features, out.query_columns);
        const View<T> weights = arena.template view<T>(1, out.columns);
        const View<T> query_weights = arena.template view<T>(1, out.query_columns);
        passes.resize(S + 1);
        for (Index k = 0; k <= S; ++k) {
            const bool query = k == S;
            const Index columns = query ? out.query_columns : out.columns;
            Pass& pass = passes[k];
            pass.z = out.value[k];
            pass.y = query ? y_query : y;
            pass.weights = query ? query_weights : weights;
            pass.state = query || k < kept_ ? arena.template view<T>(out.features, columns) : passes[0].state;
            if (!out.cotangent.empty() && (!query || program.gradient)) pass.d = out.cotangent[k];
        }
    }

    template <class Kind>
    static Kind* as(const Stages& stages, Index i) {
        return i < 0 || i >= static_cast<Index>(stages.size()) ? nullptr : dynamic_cast<Kind*>(stages[i].get());
    }
    static const PointwiseStage<T>* pointwise_at(const Stages& stages, Index i) { return as<PointwiseStage<T>>(stages, i); }
    static GatedStage<T>* gated_at(const Stages& stages, Index i) { return as<GatedStage<T>>(stages, i); }
    bool is_factored(Index i) const {
        return as<FactoredLinear<T, Lanes>>(stages, i) != nullptr;
    }

    Workspace<T> workspace_;
    Index kept_ = 0;
};

}  // namespace maml_fast::MAML_FAST_ISA
