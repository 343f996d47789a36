// The stages of a tile of images, and the edges between them.
#pragma once

#include <memory>

#include "images/conv.h"
#include "images/first_block.h"
#include "images/norm.h"
#include "images/pointwise.h"
#include "images/pool.h"
#include "images/rearrange.h"
#include "images/scale_shift.h"
#include "meter.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T>
class ImageStages {
   public:
    explicit ImageStages(const Program& program) : program(program), goes_below(program.goes_below()) {
        prelude_edges.push_back(edge_of(shape_of(program.shape), program.rows, program.query_rows));
        const std::vector<Layer>& layers = program.layers;
        for (std::size_t i = 0; i < layers.size();) {
            const std::size_t once = prelude.size(), others = stages.size(), count = add(layers, i);
            for (std::size_t j = once; j < prelude.size(); ++j) parts.add(true, i, count);
            for (std::size_t j = others; j < stages.size(); ++j) parts.add(false, i, count);
            i += count;
        }
        if (edges.empty()) edges.push_back(prelude_edges.back());
        if (is_lowest()) lowest = static_cast<Index>(prelude.size());
        connect(prelude, prelude_edges);
        connect(stages, edges);
        // The data of what adapts are the last values of the prelude.
        prelude_edges.back().border = larger(prelude_edges.back().border, edges[0].border);
    }

    // Whether the data lie without filled-up lanes.
    bool reads_bare() const {
        const auto& first = prelude.empty() ? stages : prelude;
        return !first.empty() && first.front()->reads_bare();
    }

    const Program& program;
    const bool goes_below;  // whether the prelude or the data have gradients
    std::vector<std::unique_ptr<ImageStage<T>>> prelude, stages;  // what runs once, and what adapts or lies behind
    std::vector<Adapts<T>> fast, still;  // what adapts; and what of the prelude has a gradient,
    Index lowest = 0;                    // of which this is the first stage that cotangents reach
    std::vector<ImageEdge<T>> prelude_edges, edges;
    Workspace<T> workspace;
    Parts parts;

   private:
    // Adds the stage of layer i, or the stages, and of what is done with it; returns how many layers those are.
    std::size_t add(const std::vector<Layer>& layers, std::size_t i) {
        const Layer& layer = layers[i];
        const ImageEdge<T> x = source(layer);
        switch (layer.kind) {
            case Kind::linear:
            case Kind::conv: {
                if (const std::size_t count = add_first_block(layers, i)) return count;
                const bool first = is_first(layer), goes_on = layer.prelude ? !is_lowest() : !first || goes_below;
                auto* conv = new ImageConv<T>(layer, program, first, goes_on, workspace);
                push(conv, layer.prelude, x, conv->conv.result(x.shape));
                return 1;
            }
            case Kind::norm: return add_norm(layers, i);
            case Kind::pointwise: push(new_pointwise(layer), layer.prelude, x, x.shape); return 1;
            case Kind::max_pool: push(new ImageMaxPool<T>(), layer.prelude, x, halved(x.shape)); return 1;
            case Kind::average_pool: {
                ImageShape shape = x.shape;
                shape.height = (shape.height - layer.window[0]) / layer.step[0] + 1;
                shape.width = (shape.width - layer.window[1]) / layer.step[1] + 1;
                push(new ImageAveragePool<T>(layer), layer.prelude, x, shape);
                return 1;
            }
            case Kind::rearrange: push(new ImageRearrange<T>(), layer.prelude, x, shape_of(layer.shape)); return 1;
            case Kind::merge_rows:
            case Kind::split_rows: break;  // of the other layouts
        }
        return 1;
    }

    // ---- a norm, with the activation and the pooling behind it

    struct Behind {
        const Layer *bend = nullptr, *pool = nullptr;
        Index layers() const { return (bend ? 1 : 0) + (pool ? 1 : 0); }
    };
    static Behind behind(const std::vector<Layer>& layers, std::size_t i) {
        const auto next = [&](std::size_t at) {
            return at < layers.size() && layers[at].prelude == layers[i].prelude ? &layers[at] : nullptr;
        };
        Behind found;
        const Layer* layer = next(i + 1);
        if (layer && layer->kind == Kind::pointwise &&
            (layer->activation == Activation::relu || layer->activation == Activation::leaky_relu)) {
            found.bend = layer;
            layer = next(i + 2);
        }
        if (layer && layer->kind == Kind::max_pool) found.pool = layer;
        return found;
    }
    // Calls make(Finish) with the type of what stands behind a norm.
    template <class Make>
    static ImageStage<T>* with_finish(const Behind& behind, Make make) {
        const auto pooled = [&](auto bend) -> ImageStage<T>* {
            constexpr Bend BEND = decltype(bend)::value;
            if (behind.pool) return make(Finish<T, BEND, true>{slope(behind)});
            return make(Finish<T, BEND, false>{slope(behind)});
        };
        if (!behind.bend) return pooled(BendOf<Bend::none>());
        if (behind.bend->activation == Activation::relu) return pooled(BendOf<Bend::relu>());
        return pooled(BendOf<Bend::leaky>());
    }
    template <Bend BEND>
    struct BendOf {
        static constexpr Bend value = BEND;
    };
    static T slope(const Behind& behind) { return behind.bend ? static_cast<T>(behind.bend->constants[0]) : T(1); }

    std::size_t add_norm(const std::vector<Layer>& layers, std::size_t i) {
        const Layer& layer = layers[i];
        const ImageEdge<T> x = source(layer);
        if (layer.norm == NormKind::layer && (x.shape.positions() > 1 || layer.out_features != x.shape.channels)) {
            // Of what are not the channels alone: in two stages, of which the one without parameters runs once if nothing below adapts.
            const bool first = is_first(layer);
            push(new ImageNorm<T, Bend::none, false>(layer, program, x.shape, false, true, {}), layer.prelude || first, x, x.shape);
            if (layer.has_weight || layer.has_bias)
                push(new ImageScaleShift<T>(layer, program, x.shape, ends_here(layer)), layer.prelude, x, x.shape);
            return 1;
        }
        if (layer.norm == NormKind::batch && i > 0 && layers[i - 1].prelude == layer.prelude)
            if (auto* conv = dynamic_cast<ImageConv<T>*>((layer.prelude ? prelude : stages).back().get())) conv->bias_is_lost = true;
        const Behind found = behind(layers, i);
        auto* stage = with_finish(found, [&](auto finish) -> ImageStage<T>* {
            using F = decltype(finish);
            return new ImageNorm<T, F::BENDS, F::POOLS>(layer, program, x.shape, ends_here(layer), false, finish);
        });
        push(stage, layer.prelude, x, found.pool ? halved(x.shape) : x.shape);
        return 1 + static_cast<std::size_t>(found.layers());
    }
    // The first convolution that adapts, of the data, with the batch norm behind it; 0 if that is not what comes.
    std::size_t add_first_block(const std::vector<Layer>& layers, std::size_t i) {
        const Layer& layer = layers[i];
        if (!is_first(layer) || goes_below || layer.kind != Kind::conv) return 0;
        if (layer.in_features * layer.kernel * layer.kernel > MOST_PATCH) return 0;
        if (i + 1 >= layers.size() || layers[i + 1].kind != Kind::norm || layers[i + 1].norm != NormKind::batch) return 0;
        const ImageEdge<T> x = source(layer);
        const Behind found = behind(layers, i + 1);
        ImageShape shape;
        auto* stage = with_finish(found, [&](auto finish) -> ImageStage<T>* {
            using F = decltype(finish);
            auto* block = new ImageFirstBlock<T, F::BENDS, F::POOLS>(layer, layers[i + 1], program, finish);
            shape = block->filters.conv.result(x.shape);
            return block;
        });
        push(stage, false, x, found.pool ? halved(shape) : shape);
        return 2 + static_cast<std::size_t>(found.layers());
    }
    static ImageShape halved(ImageShape shape) { return {shape.channels, shape.height / 2, shape.width / 2}; }

    static ImageStage<T>* new_pointwise(const Layer& layer) {
        return with_activation<T>(layer.activation, [&](auto of) -> ImageStage<T>* {
            return new ImagePointwise<T, typename decltype(of)::type>(layer);
        });
    }

    // ---- edges

    // Where a layer's input comes from, and whether nothing below it adapts, but it does.
    const ImageEdge<T>& source(const Layer& layer) const {
        return layer.prelude || edges.empty() ? prelude_edges.back() : edges.back();
    }
    bool is_first(const Layer& layer) const { return !layer.prelude && edges.empty(); }
    // Of the prelude's next stage: whether nothing below has a gradient.
    bool is_lowest() const { return still.empty() && !program.inputs; }
    // Whether no cotangent of a layer's input is wanted. Where one is and nothing below adapts, there is a tangent of zeros.
    bool ends_here(const Layer& layer) const { return layer.prelude ? is_lowest() : is_first(layer) && !goes_below; }

    void push(ImageStage<T>* stage, bool in_prelude, const ImageEdge<T>& x, ImageShape shape) {
        if (!in_prelude && edges.empty()) edges.push_back(x);
        (in_prelude ? prelude : stages).emplace_back(stage);
        const Index before = x.shape.numbers(), after = shape.numbers();
        const bool rearranges = dynamic_cast<ImageRearrange<T>*>(stage);  // which may make rows of positions
        (in_prelude ? prelude_edges : edges)
            .push_back(edge_of(shape, rearranges ? x.rows * before / after : x.rows,
                               rearranges ? x.query_rows * before / after : x.query_rows));
        const bool was_lowest = is_lowest();
        std::vector<Adapts<T>>& listed = in_prelude ? still : fast;
        const std::size_t before_it = listed.size();
        stage->list(listed);
        for (std::size_t j = before_it; j < listed.size(); ++j)
            listed[j].stage = static_cast<Index>((in_prelude ? prelude : stages).size()) - 1;
        if (was_lowest && !is_lowest()) lowest = static_cast<Index>(prelude.size()) - 1;
    }
    static ImageEdge<T> edge_of(ImageShape shape, Index rows, Index query_rows) {
        ImageEdge<T> edge;
        edge.shape = shape;
        edge.rows = rows;
        edge.query_rows = query_rows;
        return edge;
    }
    static void connect(std::vector<std::unique_ptr<ImageStage<T>>>& stages, std::vector<ImageEdge<T>>& edges) {
        for (std::size_t i = 0; i < stages.size(); ++i) {
            stages[i]->in = &edges[i];
            stages[i]->out = &edges[i + 1];
            edges[i].border = larger(edges[i].border, stages[i]->border_in());
            edges[i + 1].border = larger(edges[i + 1].border, stages[i]->border_out());
        }
    }
    // A row's first axis is its channels, its last one the width.
    static ImageShape shape_of(const std::vector<std::int64_t>& axes) {
        ImageShape shape;
        if (axes.size() > 0) shape.channels = axes[0];
        if (axes.size() > 1) shape.width = axes[axes.size() - 1];
        for (std::size_t i = 1; i + 1 < axes.size(); ++i) shape.height *= axes[i];
        return shape;
    }
};

}  // namespace maml_fast::MAML_FAST_ISA
