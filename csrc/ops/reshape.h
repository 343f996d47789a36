// Rows of another shape. Flatten, reshape and squeeze keep the order of a row's features, so they are nothing here; what
// moves numbers is a linear layer on several positions of a row: [P * features][columns] <-> [features][P * columns].
#pragma once

#include "program.h"
#include "stage.h"

namespace maml_fast::MAML_FAST_ISA {

template <class T>
void merge_rows(const View<T>& apart, const View<T>& merged, Index positions) {
    const Index features = merged.features, length = apart.numbers();
    for (Index p = 0; p < positions; ++p)
        for (Index f = 0; f < features; ++f)
            std::memcpy(merged.p + f * merged.by_feature + p * length, apart.p + (p * features + f) * apart.by_feature,
                        length * sizeof(T));
}
template <class T>
void split_rows(const View<T>& merged, const View<T>& apart, Index positions) {
    const Index features = merged.features, length = apart.numbers();
    for (Index p = 0; p < positions; ++p)
        for (Index f = 0; f < features; ++f)
            std::memcpy(apart.p + (p * features + f) * apart.by_feature, merged.p + f * merged.by_feature + p * length,
                        length * sizeof(T));
}

// Both are permutations, so each is the other's transpose, and its own tangent.
template <class T>
class MergeRows final : public Stage<T> {
   public:
    explicit MergeRows(Index positions) : positions(positions) {}
    void forward(Index k) override { merge_rows(this->in->value[k], this->out->value[k], positions); }
    void backward(Index k) override { split_rows(this->out->cotangent[k], this->in->cotangent[k], positions); }
    void tangent(Index k) override { merge_rows(this->in->tangent[k], this->out->tangent[k], positions); }
    void tangent_backward(Index k) override { split_rows(this->out->t_cotangent[k], this->in->t_cotangent[k], positions); }

   private:
    const Index positions;
};

template <class T>
class SplitRows final : public Stage<T> {
   public:
    explicit SplitRows(Index positions) : positions(positions) {}
    void forward(Index k) override { split_rows(this->in->value[k], this->out->value[k], positions); }
    void backward(Index k) override { merge_rows(this->out->cotangent[k], this->in->cotangent[k], positions); }
    void tangent(Index k) override { split_rows(this->in->tangent[k], this->out->tangent[k], positions); }
    void tangent_backward(Index k) override { merge_rows(this->out->t_cotangent[k], this->in->t_cotangent[k], positions); }

   private:
    const Index positions;
};

}  // namespace maml_fast::MAML_FAST_ISA
