// A task of images in a thread: the whole meta-step of ../tile.h, in memory of its own.
//
//     theta_{k+1} = theta_k - eta_k g_k,  g_k = grad L_support(theta_k)        k = 0 .. S-1
//     lam = grad L_query(theta_S);  lam = lam - H_k (eta_k lam)                k = S-1 .. 0
//     dloss/deta_k = -<g_k, lam>, with lam as it stands after step k
#pragma once

#include "images/chain.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T>
class ImageTile {
   public:
    static constexpr Index most_tasks = 1;
    // What its memory must hold: borders, and lanes beyond the last channel, are never written with anything else.
    static constexpr bool begins_with_zeros = true;

    // With an arena that only counts, a tile to ask for sizes.
    ImageTile(const Program& program, Arena& arena) : chain_(program, arena), program_(program), S(program.steps), turns_(program.turns()) {
        for (const auto& fast : chain_.fast) sum_numbers_ = put_sums<T>(fast.layer, S, sum_numbers_, places_);
        for (const auto& still : chain_.still) sum_numbers_ = put_sums<T>(still.layer, S, sum_numbers_, places_);
    }

    // Before the tasks that a thread takes of a call: parameters may have changed.
    void begin_call() {
        for (auto* list : {&chain_.prelude, &chain_.stages})
            for (const auto& stage : *list) stage->begin_call();
    }

    // The clock of the thread whose tile it is; null: nothing is measured.
    void measure(Meter* meter) { meter_ = meter; }

    // The task `first`; adds what it gives to `sums`.
    void run(const TaskData& data, Index first, Index, const Partial<T>& sums) {
        load(data, first);
        lap(DATA, OUTSIDE);
        for (std::size_t i = 0; i < chain_.prelude.size(); ++i)
            for (Index pass : {0, 1}) {
                chain_.prelude[i]->forward(pass);
                lap(parts().prelude(i), pass ? QUERY : INNER);
            }
        for (Index i = 0; i < chain_.last(); ++i) {
            chain_.stages[i]->begin_task();
            lap(parts().stage(i), INNER);
        }
        adapt(data, first);
        query(data, first);
        if (program_.exports)
            for (const auto& fast : chain_.fast) fast.layer->export_adapted(first);
        lap(DATA, OUTSIDE);
        if (program_.gradient) pull_back(data, first, sums);
    }

    const Parts& parts() const { return chain_.parts; }
    const std::vector<Place>& places() const { return places_; }
    Index sum_numbers() const { return sum_numbers_; }
    bool replays() const { return chain_.replays; }
    Index rate_numbers() const { return 2 * S * static_cast<Index>(places_.size()); }

   private:
    using Pass = LossPass<T>;

    // ---- data

    void load(const TaskData& data, Index task) {
        load_rows(data.support_x, data.support_weight, chain_.data().value[0], task);
        load_rows(data.query_x, data.query_weight, chain_.data().value[1], task);
        // Without steps the one pass is the query's.
        if (S) load_targets(data.support_y, data.support_weight, chain_.passes[0], program_.rows, task);
        load_targets(data.query_y, data.query_weight, chain_.passes[S], program_.query_rows, task);
    }
    static void load_rows(const RowData& from, const RowData& weights, const Image<T>& to, Index task) {
        const Index area = to.shape.positions(), C = to.shape.channels;
        for (Index r = 0; r < to.rows; ++r) {
            const Index row = counting_row<T>(weights, task, r, to.rows);
            const T* p = static_cast<const T*>(from.p) + task * from.by_task + row * from.by_row;
            for (Index y = 0; y < to.shape.height; ++y) {
                T* line = to.at(r, y, 0);
                for (Index x = 0; x < to.shape.width; ++x)
                    for (Index c = 0; c < C; ++c) line[x * to.by_pixel + c] = p[c * area + y * to.shape.width + x];
            }
        }
    }
    void load_targets(const RowData& from, const RowData& weights, const Pass& pass, Index rows, Index task) const {
        const RowShares<T> shares(weights, task, rows);
        for (Index i = 0; i < pass.weights.numbers(); ++i) pass.weights.p[i] = i < rows ? shares(i) : T(0);
        if (!from.p) return;
        // Lanes beyond the last row repeat it, and have weight 0.
        for (Index i = 0; i < pass.y.numbers(); ++i) {
            const Index at = task * from.by_task + smaller(i, rows - 1) * from.by_row;
            for (Index f = 0; f < pass.y.features; ++f)
                pass.y.p[f * pass.y.by_feature + i] = program_.loss == LossKind::cross_entropy
                                                          ? static_cast<T>(static_cast<const std::int64_t*>(from.p)[at])
                                                          : static_cast<const T*>(from.p)[at + f];
        }
    }
    static void store_rows(const Image<T>& from, void* to, Index task) {
        const Index count = from.rows * from.shape.numbers();
        InTorchOrder<T> numbers(from);
        T* start = static_cast<T*>(to) + task * count;
        for (Index i = 0; i < count; ++i) start[i] = numbers.next();
    }
    // An image's rows in the lanes of a view, and back; the features are in torch's order.
    static void to_lanes(const Image<T>& image, const View<T>& view) {
        InTorchOrder<T> numbers(image);
        for (Index r = 0; r < image.rows; ++r)
            for (Index f = 0; f < view.features; ++f) view.p[f * view.by_feature + r] = numbers.next();
        for (Index r = image.rows; r < view.numbers(); ++r)
            for (Index f = 0; f < view.features; ++f) view.p[f * view.by_feature + r] = view.p[f * view.by_feature + image.rows - 1];
    }
    static void from_lanes(const View<T>& view, const Image<T>& image) {
        InTorchOrder<T> numbers(image);
        for (Index r = 0; r < image.rows; ++r)
            for (Index f = 0; f < view.features; ++f) numbers.next() = view.p[f * view.by_feature + r];
    }

    // ---- the meta-step

    const ImageEdge<T>& output() const { return chain_.edges.back(); }
    // What came since the last lap was this part's.
    void lap(Index part, Phase phase) {
        if (meter_) meter_->lap(part, phase);
    }
    void forward(Index k, Phase phase) {
        for (Index i = 0; i < chain_.last(); ++i) {
            chain_.stages[i]->forward(k);
            lap(parts().stage(i), phase);
        }
        to_lanes(output().value[k], chain_.passes[k].z);
    }
    T loss(Index k) const { return lane_sum<T>(chain_.loss->value(chain_.passes[k])); }
    void backward(Index k, Phase phase) {
        if (chain_.stages.empty() && !chain_.goes_below) return;
        from_lanes(chain_.passes[k].d, output().cotangent[k]);
        lap(LOSS, phase);
        for (Index i = chain_.last() - 1; i >= 0; --i) {
            chain_.stages[i]->backward(k);
            lap(parts().stage(i), phase);
        }
    }

    void adapt(const TaskData& data, Index task) {
        for (Index k = 0; k < S; ++k) {
            forward(k, INNER);
            static_cast<T*>(data.support_losses)[task * S + k] = loss(k);
            lap(LOSS, INNER);
            if (chain_.fast.empty()) continue;
            backward(k, INNER);
            for (const auto& fast : chain_.fast) {
                fast.layer->descend(k);
                lap(parts().stage(fast.stage), INNER);
            }
        }
    }
    void query(const TaskData& data, Index task) {
        forward(S, QUERY);
        lap(LOSS, QUERY);
        store_rows(output().value[S], data.query_outputs, task);
        lap(DATA, OUTSIDE);
        if (data.query_y.p) static_cast<T*>(data.task_losses)[task] = loss(S);
        lap(LOSS, QUERY);
    }

    void pull_back(const TaskData& data, Index task, const Partial<T>& sums) {
        if (chain_.fast.empty() && !chain_.goes_below) return;
        backward(S, QUERY);
        take_step(S, sums);
        lap(LOSS, QUERY);
        if (chain_.goes_below) clear(entering()[0]);
        for (Index k = S - 1; k >= 0; --k) {
            for (std::size_t i = 0; i < chain_.fast.size(); ++i) {
                auto* layer = chain_.fast[i].layer;
                if (layer->layer.learns_rates) layer->add_rate_gradients(k, places_[i].rates(sums, sums.rates + 2 * S * i, k, S));
                if (turns_) layer->turn(k);
                lap(parts().stage(chain_.fast[i].stage), ADJOINT);
            }
            if (chain_.second_order() && !chain_.fast.empty()) {
                hessian_product(k);
                take_step(k, sums);
                lap(LOSS, ADJOINT);
            }
        }
        if (chain_.goes_below) go_below();
        for (std::size_t i = 0; i < places_.size(); ++i) {
            const Place& place = places_[i];
            parameters_at(place)->add_gradient(sums.numbers + place.weight, sums.numbers + place.bias);
            const std::size_t fast = chain_.fast.size();
            lap(i < fast ? parts().stage(chain_.fast[i].stage) : parts().prelude(chain_.still[i - fast].stage), ADJOINT);
        }
        if (program_.inputs) store_by_inputs(data, task);
        lap(DATA, OUTSIDE);
    }
    // Back through what runs once, as far as there is a gradient to have.
    void go_below() {
        const bool with_support = program_.reaches_support();
        for (Index i = static_cast<Index>(chain_.prelude.size()) - 1; i >= chain_.lowest; --i)
            for (Index pass = program_.inputs || with_support ? 0 : 1; pass < 2; ++pass) {
                chain_.prelude[i]->backward(pass);
                lap(parts().prelude(i), ADJOINT);
            }
        if (!with_support) return;
        for (const auto& still : chain_.still) {
            still.layer->join_passes();
            lap(parts().prelude(still.stage), ADJOINT);
        }
    }
    static const LayerParameters<T>* parameters_at(const Place& place) {
        return static_cast<const LayerParameters<T>*>(place.layer);
    }
    void take_step(Index k, const Partial<T>& sums) {
        for (const Place& place : places_)
            parameters_at(place)->take_step(k, sums.numbers + place.weight, sums.numbers + place.bias);
    }
    // What step k has computed and others have overwritten.
    void replay(Index k) {
        forward(k, ADJOINT);
        loss(k);
        from_lanes(chain_.passes[k].d, output().cotangent[k]);
        lap(LOSS, ADJOINT);
        for (Index i = chain_.last() - 1; i >= 0; --i) {
            chain_.stages[i]->replay_backward(k);
            lap(parts().stage(i), ADJOINT);
        }
    }
    void hessian_product(Index k) {
        if (chain_.replays) replay(k);
        for (Index i = 0; i < chain_.last(); ++i) {
            chain_.stages[i]->tangent(k);
            lap(parts().stage(i), ADJOINT);
        }
        to_lanes(output().tangent[k], chain_.t_z);
        chain_.loss->tangent(chain_.passes[k], chain_.t_z, chain_.t_d);
        from_lanes(chain_.t_d, output().t_cotangent[k]);
        lap(LOSS, ADJOINT);
        for (Index i = chain_.last() - 1; i >= 0; --i) {
            chain_.stages[i]->tangent_backward(k);
            lap(parts().stage(i), ADJOINT);
        }
        if (!chain_.goes_below) return;
        add_to(entering()[0], chain_.edges[0].t_cotangent[k]);
        lap(DATA, ADJOINT);
    }

    // ---- gradients by the data

    // Of support and query, by what enters the stages.
    const std::vector<Image<T>>& entering() const { return chain_.prelude_edges.back().cotangent; }
    void store_by_inputs(const TaskData& data, Index task) {
        const std::vector<Image<T>>& by_x = chain_.prelude_edges.front().cotangent;
        store_rows(by_x[0], data.by_support_x, task);
        store_rows(by_x[1], data.by_query_x, task);
    }

    ImageChain<T> chain_;
    const Program& program_;
    const Index S;
    const bool turns_;  // see Program
    std::vector<Place> places_;
    Index sum_numbers_ = 0;
    Meter* meter_ = nullptr;
};

}  // namespace maml_fast::MAML_FAST_ISA
