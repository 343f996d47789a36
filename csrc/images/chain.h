// Where in a tile's memory each value of its images lies.
#pragma once

#include "images/stages.h"
#include "ops/losses.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T>
class ImageChain : public ImageStages<T> {
   public:
    using ImageStages<T>::edges;
    using ImageStages<T>::goes_below;
    using ImageStages<T>::parts;
    using ImageStages<T>::prelude;
    using ImageStages<T>::prelude_edges;
    using ImageStages<T>::program;
    using ImageStages<T>::stages;

    // With an arena that only counts, a chain to ask for sizes.
    ImageChain(const Program& program, Arena& arena) : ImageStages<T>(program), S(program.steps) {
        if (second_order() && S > 1) {
            Arena counted;
            allocate(counted);
            replays = counted.used() > MOST_KEPT;
        }
        allocate(arena);
    }

    bool second_order() const { return program.gradient && !program.first_order; }
    Index last() const { return static_cast<Index>(stages.size()); }
    ImageEdge<T>& data() { return prelude_edges.front(); }

    const Index S;
    // Whether the adjoint finds nothing of the inner steps but the fast weights, and computes a step's values again.
    bool replays = false;
    std::unique_ptr<Loss<T>> loss;
    std::vector<LossPass<T>> passes;  // [S + 1], on rows in lanes
    View<T> t_z, t_d;                 // of the loss

   private:
    // From so much memory on, a step's values are not kept: of a tile, with all steps'. Below, it stays in caches.
    static constexpr Index MOST_KEPT = Index{8} << 20;

    // May be called again.
    void allocate(Arena& arena) {
        // What is kept of each inner step: all that the adjoint reads, or else only what the next step overwrites.
        kept_ = keeps_steps() ? S : smaller<Index>(S, 1);
        const bool bare = this->reads_bare();
        parts.forget_bytes();
        for (ImageEdge<T>& edge : prelude_edges) {
            const bool is_data = &edge == &prelude_edges.front();
            charge(arena, true, &edge - prelude_edges.data());
            edge.value.clear();
            for (Index rows : {edge.rows, edge.query_rows})
                edge.value.push_back(take_image<T>(arena, rows, edge.shape, edge.border, is_data && bare));
        }
        edges[0].value.assign(S + 1, prelude_edges.back().value[0]);
        edges[0].value[S] = prelude_edges.back().value[1];
        edges[0].border = prelude_edges.back().border;
        for (Index e = 1; e <= last(); ++e) {
            charge(arena, false, e);
            edges[e].value = own(arena, edges[e], kept_, true);
        }
        if (program.gradient || S > 0) allocate_cotangents(arena);
        if (second_order() && S > 0) allocate_tangents(arena);
        if (goes_below) allocate_below(arena);
        for (std::size_t i = 0; i < prelude.size(); ++i) {
            arena.charge(parts.at(parts.prelude(i)).own);
            prelude[i]->allocate(arena, 1);
        }
        for (Index i = 0; i < last(); ++i) {
            arena.charge(parts.at(parts.stage(i)).own);
            stages[i]->allocate(arena, kept_);
        }
        arena.charge(parts.at(LOSS).values);
        allocate_loss(arena);
        arena.charge(parts.at(WORKSPACE).own);
        this->workspace.allocate(arena);
    }
    // What is taken now is of the values behind so many stages.
    void charge(Arena& arena, bool prelude, Index stages) { arena.charge(parts.behind(prelude, stages).values); }
    // Whether steps' values are still read when the query's have been written.
    bool keeps_steps() const { return second_order() && !replays; }
    Image<T> image(Arena& arena, const ImageEdge<T>& edge, Index rows) const {
        return take_image<T>(arena, rows, edge.shape, edge.border);
    }
    // An image for each step that is kept, shared by the others, and one for the query, which may take the place of the steps'.
    std::vector<Image<T>> own(Arena& arena, const ImageEdge<T>& edge, Index kept, bool query) {
        std::vector<Image<T>> images(S + 1);
        if (query && !keeps_steps()) {
            images.assign(S + 1, image(arena, edge, larger(S ? edge.rows : 0, edge.query_rows)));
            for (Index k = 0; k <= S; ++k) images[k].rows = k < S ? edge.rows : edge.query_rows;
            return images;
        }
        for (Index k = 0; k < S; ++k) images[k] = k < kept ? image(arena, edge, edge.rows) : images[0];
        if (query) images[S] = image(arena, edge, edge.query_rows);
        return images;
    }
    void allocate_cotangents(Arena& arena) {
        for (Index e = 1; e <= last(); ++e) {
            ImageEdge<T>& edge = edges[e];
            charge(arena, false, e);
            const bool in_place = e < last() && stages[e]->works_in_place() && !stages[e - 1]->keeps_result();
            const bool restored = e < last() && stages[e]->restores_cotangent();
            const Index kept = stages[e - 1]->keeps_cotangent() && !restored ? kept_ : smaller<Index>(S, 1);
            edge.cotangent = own(arena, edge, kept, program.gradient && !in_place);
            if (in_place) edge.cotangent[S] = edge.value[S];
        }
    }
    void allocate_tangents(Arena& arena) {
        for (Index e = 0; e <= last(); ++e) {
            ImageEdge<T>& edge = edges[e];
            if (e == 0 && (stages.empty() || stages[0]->reads_bare())) continue;
            charge(arena, false, e);
            edge.tangent.assign(S, image(arena, edge, edge.rows));  // of the data: zeros
            const bool in_place = e < last() && stages[e]->works_in_place();
            if (e > 0) edge.t_cotangent = in_place ? edge.tangent : std::vector<Image<T>>(S, image(arena, edge, edge.rows));
        }
    }
    // Of what runs once: the query's cotangent, and in the support's place the sum of what the steps add to it.
    void allocate_below(Arena& arena) {
        const Index end = static_cast<Index>(prelude_edges.size());
        for (Index e = program.inputs ? 0 : smaller(this->lowest + 1, end - 1); e < end; ++e) {
            ImageEdge<T>& edge = prelude_edges[e];
            charge(arena, true, e);
            edge.cotangent = {image(arena, edge, edge.rows), image(arena, edge, edge.query_rows)};
        }
        ImageEdge<T>& edge = edges[0];
        charge(arena, false, 0);
        edge.t_cotangent.assign(S, image(arena, edge, edge.rows));
        edge.cotangent = edge.t_cotangent;
        edge.cotangent.push_back(prelude_edges.back().cotangent[1]);
    }
    void allocate_loss(Arena& arena) {
        loss.reset(new_loss<T>(program.loss));
        const ImageEdge<T>& out = edges.back();
        // The loss sees the rows of the data: a row's channels, or all of its numbers.
        const Index rows = program.rows, query_rows = program.query_rows;
        const Index features = out.shape.numbers() * out.rows / rows;
        const Index y_features = program.loss == LossKind::cross_entropy ? 1 : features;
        const Index columns = ceil_div(rows, LANES<T>), query_columns = ceil_div(query_rows, LANES<T>);
        LossPass<T> support, query;
        for (LossPass<T>* pass : {&support, &query}) {
            const Index n = pass == &query ? query_columns : columns;
            pass->y = arena.template view<T>(y_features, n);
            pass->weights = arena.template view<T>(1, n);
            pass->z = arena.template view<T>(features, n);
            if (!stages.empty() || goes_below) pass->d = arena.template view<T>(features, n);
        }
        passes.assign(S + 1, support);
        passes[S] = query;
        for (Index k = 0; k <= S; ++k) {
            const bool own = k == S || k < larger<Index>(kept_, 1);
            passes[k].state = own ? arena.template view<T>(features, k == S ? query_columns : columns) : passes[0].state;
        }
        t_z = arena.template view<T>(features, columns);
        t_d = arena.template view<T>(features, columns);
    }

    Index kept_ = 0;
};

}  // namespace maml_fast::MAML_FAST_ISA
