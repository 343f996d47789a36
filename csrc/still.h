// Layers below all that adapts whose parameters get a gradient. They are part of the prelude: all tasks have the same, so each
// runs once, on support rows (pass 0) and query rows (pass 1), and pulls back once what the meta-step above says of them.
#pragma once

#include "learning.h"
#include "ops/linear.h"
#include "ops/norm.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T, class Lanes>
class StillLinear final : public SharedLinear<T, Lanes>, public LearningStage<T> {
   public:
    using LinearStage<T, Lanes>::O;
    using LinearStage<T, Lanes>::I;
    using LinearStage<T, Lanes>::layer;
    using LinearStage<T, Lanes>::in;
    using LinearStage<T, Lanes>::out;

    // `lowest`: nothing below has a gradient.
    StillLinear(const Layer& layer, const Program& program, bool lowest, Workspace<T>& workspace)
        : SharedLinear<T, Lanes>(layer),
          LearningStage<T>(layer, layer.out_features, layer.in_features),
          lowest_(lowest),
          with_support_(program.reaches_support()),
          workspace_(workspace) {}

    void allocate(Arena&, Index) override {
        workspace_.needs(sum_workspace<T>(I, larger(in->columns, in->query_columns)));
    }
    void backward(Index pass) override {
        if (!lowest_) SharedLinear<T, Lanes>::backward(pass);
    }
    Index sum_length() const override { return layer.weight_adapts ? MAML_FAST_ISA::sum_length<T>(O, I) : 0; }
    Index pieces() const override { return layer.weight_adapts ? sum_pieces<T>(O, I) : 0; }
    Piece piece(Index p) const override { return sum_piece<T>(p, I); }
    void add_gradient(T* weight, T* bias) override {
        if (layer.weight_adapts) {
            Run<T> support;
            if (with_support_) support = {out->cotangent[0], in->value[0]};
            add_runs_up<T>({out->cotangent[1], in->value[1]}, support, weight, workspace_);
        }
        if (!layer.bias_adapts) return;
        for (Index o = 0; o < O; ++o) {
            Vec<T> sum = column_sum(out->cotangent[1], o);
            if (with_support_) sum += column_sum(out->cotangent[0], o);
            bias[o] += lane_sum<T>(sum);
        }
    }

   private:
    const bool lowest_, with_support_;
    Workspace<T>& workspace_;
};

// `Rules` is one of the norms of csrc/ops, which sums the gradients of gamma and beta over a task's rows.
template <class T, class Lanes, class Rules>
class StillNorm final : public Rules, public LearningStage<T> {
    static constexpr Index U = Lanes::unit;

   public:
    StillNorm(const Layer& layer, const Program& program, bool lowest)
        : Rules(layer, program, lowest),
          LearningStage<T>(layer, layer.in_features, 1),
          with_support_(program.reaches_support()) {
        this->sums_gradients = true;
    }

    Index sum_length() const override { return Rules::layer.weight_adapts ? this->O : 0; }
    Index pieces() const override { return Rules::layer.weight_adapts; }
    Piece piece(Index) const override { return {0, this->O, 0}; }
    void add_gradient(T* gamma, T* beta) override {
        for (Index pass = with_support_ ? 0 : 1; pass < 2; ++pass) {
            if (Rules::layer.weight_adapts) add_up(this->d_gamma[pass].p, gamma);
            if (Rules::layer.bias_adapts) add_up(this->d_beta[pass].p, beta);
        }
    }

   private:
    void add_up(const T* units, T* sums) const {
        for (Index f = 0; f < this->O; ++f) sums[f] += Lanes::over_tasks(Lanes::read(units + f * U));
    }

    const bool with_support_;
};

}  // namespace maml_fast::MAML_FAST_ISA
