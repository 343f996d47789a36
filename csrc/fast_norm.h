// A norm that adapts: its gamma and beta move as a linear layer's bias does. `Rules` is one of the norms of csrc/ops.
#pragma once

#include "fast_stage.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T, class Lanes, class Rules>
class FastNorm final : public Rules, public FastStage<T> {
    static constexpr Index U = Lanes::unit;

   public:
    FastNorm(const Layer& layer, const Program& program, bool first)
        : Rules(layer, program, first), FastStage<T>(layer, layer.in_features, 1), program_(program), S(program.steps) {
        this->gamma_moves = layer.has_weight;
        this->beta_moves = layer.has_bias;
        this->sums_gradients = true;
    }

    void allocate(Arena& arena, Index kept) override {
        Rules::allocate(arena, kept);
        const bool keeps = FastStage<T>::layer.learns_rates;
        const Layer& layer = FastStage<T>::layer;
        if (this->gamma_moves) this->gamma.allocate(arena, this->O, program_, keeps, {layer.weight_by_number, layer.weight_by_step});
        if (this->beta_moves) this->beta.allocate(arena, this->O, program_, keeps, {layer.bias_by_number, layer.bias_by_step});
    }
    void begin_call() override {
        const Layer& layer = FastStage<T>::layer;
        this->gamma.begin_call(layer.weight_rate_numbers, layer.weight);
        this->beta.begin_call(layer.bias_rate_numbers, layer.bias);
    }

    void descend(Index k) override {
        if (this->gamma_moves)
            this->gamma.descend(k, this->weight_rate(k), this->shared_gamma(), units(this->d_gamma[k].p));
        if (this->beta_moves) this->beta.descend(k, this->bias_rate(k), this->shared_beta(), units(this->d_beta[k].p));
    }
    void begin_adjoint() override {
        if (this->gamma_moves) this->gamma.begin_adjoint(units(this->d_gamma[S].p));
        if (this->beta_moves) this->beta.begin_adjoint(units(this->d_beta[S].p));
    }
    void turn(Index k) override {
        if (this->gamma_moves) this->gamma.turn(k, this->weight_rate(k));
        if (this->beta_moves) this->beta.turn(k, this->bias_rate(k));
    }
    void pull_back(Index k) override {
        if (this->gamma_moves) this->gamma.pull_back(k, units(this->t_d_gamma));
        if (this->beta_moves) this->beta.pull_back(k, units(this->t_d_beta));
    }
    void add_rate_gradients(Index k, const RateSums<T>& sums) override {
        if (this->gamma_moves) this->gamma.add_rate_gradients(k, units(this->d_gamma[k].p), sums.by_weight, sums.weight);
        if (this->beta_moves) this->beta.add_rate_gradients(k, units(this->d_beta[k].p), sums.by_bias, sums.bias);
    }
    Index sum_length() const override { return this->gamma_moves ? this->O : 0; }
    Index pieces() const override { return this->gamma_moves; }
    Piece piece(Index) const override { return {0, this->O, 0}; }
    void add_gradient(T* gamma, T* beta) override {
        if (this->gamma_moves) this->gamma.add_gradient(gamma);
        if (this->beta_moves) this->beta.add_gradient(beta);
    }
    void adapted_row(Index f, T* row) override {
        for (Index unit = 0; unit < U; ++unit) row[unit] = this->gamma.adapted(f, unit, this->shared_gamma());
    }
    T adapted_bias(Index f, Index unit) const override { return this->beta.adapted(f, unit, this->shared_beta()); }

   private:
    // o -> unit o of `p`
    static auto units(const T* p) {
        return [p](Index o) { return Lanes::read(p + o * U); };
    }

    const Program& program_;
    const Index S;
};

}  // namespace maml_fast::MAML_FAST_ISA
