// The stages of a tile, of flat rows, and the edges between them.
#pragma once

#include <memory>

#include "dense_weights.h"
#include "factored_input.h"
#include "factored_weights.h"
#include "fast_norm.h"
#include "meter.h"
#include "ops/batch_norm.h"
#include "ops/group_norm.h"
#include "ops/pointwise.h"
#include "ops/reshape.h"
#include "still.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T, class Lanes>
class FlatStages {
   public:
    explicit FlatStages(const Program& program)
        : program(program), S(program.steps), goes_below(program.goes_below()), turns(program.turns()) {
        const Index columns = Lanes::columns(program.rows), query_columns = Lanes::columns(program.query_rows);
        bool adapts = false;
        Index at = 0;
        for (const Layer& layer : program.layers) {
            (layer.prelude ? prelude : stages).push_back(new_stage(layer, adapts));
            parts.add(layer.prelude, at++, 1);
        }
        if (still.empty() && !program.inputs) lowest = static_cast<Index>(prelude.size());
        prelude_edges.resize(prelude.size() + 1);
        edges.resize(stages.size() + 1);
        prelude_edges[0] = {program.in_features, columns, query_columns, {}, {}, {}, {}};
        connect(prelude, prelude_edges, true);
        edges[0] = prelude_edges.back();
        connect(stages, edges, false);
    }

    using Stages = std::vector<std::unique_ptr<Stage<T>>>;
    struct Fast {
        FastStage<T>* layer;
        Index stage = 0;  // its place among the stages
    };
    struct Still {
        LearningStage<T>* layer;
        Index stage = 0;  // of the prelude
    };

    const Program& program;
    const Index S;
    const bool goes_below;     // whether the prelude or the data have gradients
    const bool turns;          // see Program
    Stages prelude, stages;    // what runs once, and what adapts or lies behind
    std::vector<Fast> fast;    // those of the stages that adapt
    std::vector<Still> still;  // those of the prelude that have a gradient,
    Index lowest = 0;          // and the first of it that cotangents reach
    std::vector<Edge<T>> prelude_edges, edges;
    Workspace<T> workspace;
    Parts parts;

   private:
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
        if (layer.learns) return learning(new StillLinear<T, Lanes>(layer, program, is_lowest(), workspace));
        if (layer.form == Form::shared) return new SharedLinear<T, Lanes>(layer);
        FastLinear<T, Lanes>* made;
        if (!layer.weight_adapts)
            made = new BiasLinear<T, Lanes>(layer, program, !adapts, workspace);
        else if (layer.form == Form::dense)
            made = new DenseLinear<T, Lanes>(layer, program, !adapts, workspace);
        else if (!adapts)
            made = new FactoredInput<T, Lanes>(layer, program, true, workspace);
        else
            made = new FactoredLinear<T, Lanes>(layer, program, false, workspace);
        adapts = true;
        fast.push_back({made, static_cast<Index>(stages.size())});
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
        fast.push_back({made, static_cast<Index>(stages.size())});
        return made;
    }

    // Of the stage that is added next: whether nothing below has a gradient.
    bool is_lowest() const { return still.empty() && !program.inputs; }
    template <class S>
    S* learning(S* made) {
        if (is_lowest()) lowest = static_cast<Index>(prelude.size());
        still.push_back({made, static_cast<Index>(prelude.size())});
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
};

}  // namespace maml_fast::MAML_FAST_ISA
