// A tile: the tasks that one thread takes through a whole meta-step at once, in memory of its own that stays in cache.
//
//     theta_{k+1} = theta_k - eta_k g_k,  g_k = grad L_support(theta_k)        k = 0 .. S-1, of the plain rule (inner_rule.h)
//     lam = grad L_query(theta_S);  lam = lam - H_k (eta_k lam)                k = S-1 .. 0
//     dloss/deta_k = -<g_k, lam>, with lam as it stands after step k
#pragma once

#include "chain.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T, class Lanes>
class Tile {
   public:
    static constexpr Index L = LANES<T>;
    static constexpr Index most_tasks = Lanes::tasks ? L : 1;
    static constexpr bool begins_with_zeros = false;  // what its memory must hold

    // With an arena that only counts, a tile to ask for sizes.
    Tile(const Program& program, Arena& arena) : chain_(program, arena), program_(program), S(program.steps) {
        for (const Fast& stage : chain_.fast) sum_numbers_ = put_sums<T>(stage.layer, S, sum_numbers_, places_);
        for (const Still& stage : chain_.still) sum_numbers_ = put_sums<T>(stage.layer, S, sum_numbers_, places_);
    }

    // Before the tasks that a thread takes of a call: parameters and rates may have changed.
    void begin_call() {
        for (const Fast& stage : chain_.fast) stage.layer->begin_call();
    }

    // The clock of the thread whose tile it is; null: nothing is measured.
    void measure(Meter* meter) { meter_ = meter; }

    // Tasks first .. first + count - 1; adds what they give to `sums`.
    void run(const TaskData& data, Index first, Index count, const Partial<T>& sums) {
        load(data, first, count);
        lap(DATA, OUTSIDE);
        for (std::size_t i = 0; i < chain_.prelude.size(); ++i)
            for (Index pass : {0, 1}) {
                chain_.prelude[i]->forward(pass);
                lap(parts().prelude(i), pass ? QUERY : INNER);
            }
        for (const Fast& stage : chain_.fast) {
            stage.layer->begin_tile();
            lap(parts().stage(stage.stage), INNER);
        }
        adapt(data, first, count);
        query(data, first, count);
        export_adapted(first, count);
        lap(DATA, OUTSIDE);
        if (program_.gradient) pull_back(data, first, count, sums);
    }

    const Parts& parts() const { return chain_.parts; }
    const std::vector<Place>& places() const { return places_; }
    Index sum_numbers() const { return sum_numbers_; }
    bool replays() const { return false; }
    Index rate_numbers() const { return 2 * S * static_cast<Index>(places_.size()); }

   private:
    using Pass = LossPass<T>;
    using Fast = typename Chain<T, Lanes>::Fast;
    using Still = typename Chain<T, Lanes>::Still;

    // ---- data

    // What fills lane j of a column: a row of one of the tasks. Lanes beyond the last task, or beyond a task's last row, repeat
    // it; `set_weights` sees that they count for nothing.
    struct Row {
        Index task, row;
        bool repeats;
    };
    Row row_at(Index column, Index lane, Index first, Index count, Index rows) const {
        if (Lanes::tasks) return {first + smaller(lane, count - 1), column, lane >= count};
        const Index row = column * L + lane;
        return {first, smaller(row, rows - 1), row >= rows};
    }

    void load(const TaskData& data, Index first, Index count) {
        const View<T>&x = chain_.prelude_edges[0].value[0], &q = chain_.prelude_edges[0].value[1];
        load_rows(data.support_x, data.support_weight, x, first, count, program_.rows);
        load_rows(data.query_x, data.query_weight, q, first, count, program_.query_rows);
        if (S) {  // without steps the one pass is the query's
            load_targets(data.support_y, chain_.passes[0], first, count, program_.rows);
            set_weights(data.support_weight, chain_.passes[0].weights, first, count, L, program_.rows);
        }
        load_targets(data.query_y, chain_.passes[S], first, count, program_.query_rows);
        set_weights(data.query_weight, chain_.passes[S].weights, first, count, count, program_.query_rows);
    }
    void load_rows(const RowData& from, const RowData& weights, const View<T>& to, Index first, Index count, Index rows) const {
        for (Index column = 0; column < to.columns; ++column) {
            const T* starts[L];
            for (Index lane = 0; lane < L; ++lane) {
                const Row at = row_at(column, lane, first, count, rows);
                const Index row = counting_row<T>(weights, at.task, at.row, rows);
                starts[lane] = static_cast<const T*>(from.p) + at.task * from.by_task + row * from.by_row;
            }
            load_column<T>(starts, to, column);
        }
    }
    // [T, rows, features]
    void store_rows(const View<T>& from, void* to, Index first, Index count, Index rows) const {
        for (Index column = 0; column < from.columns; ++column) {
            T* starts[L];
            for (Index lane = 0; lane < L; ++lane) {
                const Row at = row_at(column, lane, first, count, rows);
                starts[lane] = at.repeats ? nullptr : static_cast<T*>(to) + (at.task * rows + at.row) * from.features;
            }
            store_column<T>(from, column, starts);
        }
    }
    void load_targets(const RowData& from, const Pass& pass, Index first, Index count, Index rows) const {
        if (!from.p) return;
        if (program_.loss != LossKind::cross_entropy) return load_rows(from, {}, pass.y, first, count, rows);
        const auto* classes = static_cast<const std::int64_t*>(from.p);
        for (Index column = 0; column < pass.y.columns; ++column)
            for (Index lane = 0; lane < L; ++lane) {
                const Row at = row_at(column, lane, first, count, rows);
                pass.y.p[column * L + lane] = static_cast<T>(classes[at.task * from.by_task + at.row * from.by_row]);
            }
    }
    // What rows count, in the lanes of the first `tasks` tasks, and 0 in others; where rows are lanes, in those that are filled.
    void set_weights(const RowData& from, const View<T>& to, Index first, Index count, Index tasks, Index rows) const {
        for (Index lane = 0; lane < most_tasks; ++lane) {
            const RowShares<T> shares(from, row_at(0, lane, first, count, rows).task, rows);
            if (Lanes::tasks)
                for (Index row = 0; row < rows; ++row) to.p[row * L + lane] = lane < tasks ? shares(row) : T(0);
            else
                for (Index i = 0; i < to.numbers(); ++i) to.p[i] = i < rows ? shares(i) : T(0);
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

    // What came since the last lap was this part's.
    void lap(Index part, Phase phase) {
        if (meter_) meter_->lap(part, phase);
    }
    void forward(Index k, Phase phase) {
        for (Index i = 0; i < chain_.last(); ++i) {
            chain_.stages[i]->forward(k);
            lap(parts().stage(i), phase);
        }
    }
    void backward(Index k, Phase phase) {
        for (Index i = chain_.last() - 1; i >= 0; --i) {
            chain_.stages[i]->backward(k);
            lap(parts().stage(i), phase);
        }
    }

    void adapt(const TaskData& data, Index first, Index count) {
        for (Index k = 0; k < S; ++k) {
            forward(k, INNER);
            const Vec<T> losses = chain_.loss->value(chain_.passes[k]);
            put_losses(losses, static_cast<T*>(data.support_losses) + first * S + k, S, count);
            lap(LOSS, INNER);
            backward(k, INNER);
            for (const Fast& stage : chain_.fast) {
                stage.layer->descend(k);
                lap(parts().stage(stage.stage), INNER);
            }
        }
    }

    void query(const TaskData& data, Index first, Index count) {
        forward(S, QUERY);
        store_rows(chain_.edges.back().value[S], data.query_outputs, first, count, program_.query_rows);
        lap(DATA, OUTSIDE);
        if (!data.query_y.p) return;
        put_losses(chain_.loss->value(chain_.passes[S]), static_cast<T*>(data.task_losses) + first, 1, count);
        lap(LOSS, QUERY);
    }

    void pull_back(const TaskData& data, Index first, Index count, const Partial<T>& sums) {
        if (chain_.fast.empty() && !chain_.goes_below) return;
        backward(S, QUERY);
        for (const Fast& stage : chain_.fast) {
            stage.layer->begin_adjoint();
            lap(parts().stage(stage.stage), QUERY);
        }
        if (chain_.goes_below) clear(chain_.prelude_edges.back().cotangent[0]);
        for (Index k = S - 1; k >= 0; --k) {
            add_rate_gradients(k, sums);
            if (chain_.turns)
                for (const Fast& stage : chain_.fast) {
                    stage.layer->turn(k);
                    lap(parts().stage(stage.stage), ADJOINT);
                }
            if (chain_.second_order() && !chain_.fast.empty()) hessian_product(k);
        }
        if (chain_.goes_below) go_below();
        auto place = places_.begin();
        const auto add_gradient = [&](LearningStage<T>* layer) {
            layer->add_gradient(sums.numbers + place->weight, sums.numbers + place->bias);
            ++place;
        };
        for (const Fast& stage : chain_.fast) {
            add_gradient(stage.layer);
            lap(parts().stage(stage.stage), ADJOINT);
        }
        for (const Still& stage : chain_.still) {
            add_gradient(stage.layer);
            lap(parts().prelude(stage.stage), ADJOINT);
        }
        if (program_.inputs) store_by_inputs(data, first, count);
        lap(DATA, OUTSIDE);
    }

    // Back through what runs once, as far as there is a gradient to have.
    void go_below() {
        const Index first_pass = program_.inputs || program_.reaches_support() ? 0 : 1;
        for (Index i = static_cast<Index>(chain_.prelude.size()) - 1; i >= chain_.lowest; --i)
            for (Index pass = first_pass; pass < 2; ++pass) {
                chain_.prelude[i]->backward(pass);
                lap(parts().prelude(i), ADJOINT);
            }
    }

    void add_rate_gradients(Index k, const Partial<T>& sums) {
        for (std::size_t i = 0; i < chain_.fast.size(); ++i) {
            FastStage<T>* layer = chain_.fast[i].layer;
            if (!layer->layer.learns_rates) continue;
            layer->add_rate_gradients(k, places_[i].rates(sums, sums.rates + 2 * S * i, k, S));
            lap(parts().stage(chain_.fast[i].stage), ADJOINT);
        }
    }

    void hessian_product(Index k) {
        if (chain_.goes_below) clear(chain_.edges[0].tangent[k]);
        for (Index i = 0; i < chain_.last(); ++i) {
            chain_.stages[i]->tangent(k);
            lap(parts().stage(i), ADJOINT);
        }
        const Edge<T>& out = chain_.edges.back();
        chain_.loss->tangent(chain_.passes[k], out.tangent[k], out.t_cotangent[k]);
        lap(LOSS, ADJOINT);
        for (Index i = chain_.last() - 1; i >= 0; --i) {
            chain_.stages[i]->tangent_backward(k);
            if (FastStage<T>* layer = chain_.fast_at[i].layer) layer->pull_back(k);
            lap(parts().stage(i), ADJOINT);
        }
        if (chain_.goes_below) {
            add_to(chain_.prelude_edges.back().cotangent[0], chain_.edges[0].t_cotangent[k]);
            lap(DATA, ADJOINT);
        }
    }

    // ---- gradients by the data

    void store_by_inputs(const TaskData& data, Index first, Index count) {
        const std::vector<View<T>>& by_x = chain_.prelude_edges[0].cotangent;
        store_rows(by_x[0], data.by_support_x, first, count, program_.rows);
        store_rows(by_x[1], data.by_query_x, first, count, program_.query_rows);
    }

    // The adapted parameters of each task, for those who asked.
    void export_adapted(Index first, Index count) {
        if (!program_.exports) return;
        for (const Fast& stage : chain_.fast) {
            FastStage<T>* layer = stage.layer;
            const Index O = layer->O, I = layer->I;
            if (T* to = static_cast<T*>(layer->layer.adapted_weight))
                for (Index o = 0; o < O; ++o) {
                    layer->adapted_row(o, chain_.row);
                    for (Index j = 0; j < count; ++j)
                        for (Index i = 0; i < I; ++i) to[((first + j) * O + o) * I + i] = chain_.row[i * Lanes::unit + j];
                }
            if (T* to = static_cast<T*>(layer->layer.adapted_bias))
                for (Index o = 0; o < O; ++o)
                    for (Index j = 0; j < count; ++j) to[(first + j) * O + o] = layer->adapted_bias(o, j);
        }
    }

    Chain<T, Lanes> chain_;
    const Program& program_;
    const Index S;
    std::vector<Place> places_;
    Index sum_numbers_ = 0;
    Meter* meter_ = nullptr;
};

}  // namespace maml_fast::MAML_FAST_ISA
