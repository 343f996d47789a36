// Where in the memory of a tile of flat rows each value lies.
#pragma once

#include "ops/losses.h"
#include "stages.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T, class Lanes>
class Chain : public FlatStages<T, Lanes> {
    using Base_ = FlatStages<T, Lanes>;

   public:
    using typename Base_::Fast;
    using typename Base_::Stages;
    using Base_::edges;
    using Base_::fast;
    using Base_::goes_below;
    using Base_::parts;
    using Base_::prelude;
    using Base_::prelude_edges;
    using Base_::program;
    using Base_::S;
    using Base_::stages;

    // With an arena that only counts, a chain to ask for sizes.
    Chain(const Program& program, Arena& arena) : Base_(program) { allocate(arena); }

    bool second_order() const { return program.gradient && !program.first_order; }
    Index last() const { return static_cast<Index>(stages.size()); }

    std::vector<Fast> fast_at;  // by stage, null where it does not adapt
    std::unique_ptr<Loss<T>> loss;
    std::vector<LossPass<T>> passes;  // [S + 1]
    T* row = nullptr;                 // of adapted weights, [I] units, where they are wanted

   private:
    using Pass = LossPass<T>;

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
        fuse(prelude, true);
        fuse(stages, false);
        allocate_prelude(arena);
        allocate_values(arena);
        if (goes_below) allocate_below(arena);
        allocate_cotangents(arena);
        if (second_order()) {
            allocate_tangents(arena);
            allocate_t_cotangents(arena);
        }
        for (Index i = 0; i < last(); ++i) {
            arena.charge(parts.at(parts.stage(i)).own);
            stages[i]->allocate(arena, kept_);
        }
        arena.charge(parts.at(LOSS).values);
        allocate_loss(arena);
        if (program.exports) {
            arena.charge(parts.at(DATA).own);
            Index longest = 0;
            for (const Fast& stage : fast) longest = larger(longest, stage.layer->I);
            row = arena.template take<T>(longest * Lanes::unit);
        }
        arena.charge(parts.at(WORKSPACE).own);
        this->workspace.allocate(arena);
    }
    // What is taken now is of the values behind so many stages.
    void charge(Arena& arena, bool prelude, Index stages) { arena.charge(parts.behind(prelude, stages).values); }

    // A ReLU that works in place is done by the layers beside it. A norm works in place unless an activation reads what it
    // would overwrite, or the steps share it.
    void fuse(const Stages& stages, bool prelude) {
        const Index count = static_cast<Index>(stages.size());
        for (Index i = 1; i < count; ++i) {
            auto* relu = dynamic_cast<Pointwise<T, Relu<T>>*>(stages[i].get());
            if (!relu || !stays_in_place(stages, i)) continue;
            if (auto* before = gated_at(stages, i - 1)) before->relu_behind = relu->forward_is_done = true;
            if (auto* behind = gated_at(stages, i + 1)) behind->relu_before = relu->backward_is_done = true;
            parts.at(prelude ? parts.prelude(i) : parts.stage(i)).elsewhere = relu->forward_is_done || relu->backward_is_done;
        }
        for (Index i = 0; i < count; ++i)
            if (auto* norm = dynamic_cast<NormStage<T, Lanes>*>(stages[i].get())) {
                const auto* before = pointwise_at(stages, i - 1);
                norm->in_place = i > 0 && !(before && before->traits().from_output);
            }
    }

    void allocate_prelude(Arena& arena) {
        const Index end = static_cast<Index>(prelude.size());
        for (Index e = end; e >= 0; --e) {
            charge(arena, true, e);
            prelude_edges[e].value = e > 0 && stays_in_place(prelude, e) ? prelude_edges[e + 1].value : both(arena, prelude_edges[e]);
        }
        for (Index i = 0; i < end; ++i) {
            arena.charge(parts.at(parts.prelude(i)).own);
            prelude[i]->allocate(arena, 1);
        }
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
            charge(arena, false, e);
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
        const Index end = static_cast<Index>(prelude_edges.size()), begin = program.inputs ? 0 : smaller(this->lowest + 1, end - 1);
        for (Index e = begin; e < end; ++e) {
            const auto* pointwise = pointwise_at(prelude, e - 1);
            charge(arena, true, e);
            const bool in_place = e > begin && pointwise && !pointwise->traits().curved;
            prelude_edges[e].cotangent = in_place ? prelude_edges[e - 1].cotangent : both(arena, prelude_edges[e]);
        }
        charge(arena, false, 0);
        edges[0].cotangent = edges[0].t_cotangent = passing(arena, edges[0]);
        edges[0].cotangent.push_back(prelude_edges.back().cotangent[1]);
        if (second_order()) edges[0].tangent = passing(arena, edges[0]);
    }
    void allocate_cotangents(Arena& arena) {
        for (Index e = 1; e <= last(); ++e) {
            Edge<T>& edge = edges[e];
            const auto* pointwise = pointwise_at(stages, e - 1);
            charge(arena, false, e);
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
            charge(arena, false, e);
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
            charge(arena, false, e);
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

    Index kept_ = 0;
};

}  // namespace maml_fast::MAML_FAST_ISA
