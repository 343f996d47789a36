// What a ReLU beside a layer becomes: a gate that the layer's own results go through, instead of a pass over memory.
#pragma once

#include "product.h"
#include "stage.h"

namespace maml_fast::MAML_FAST_ISA {

// Masks a result like that of a ReLU whose output is y.
template <class T>
Gate<T> mask_by(const View<T>& y) {
    return {Gate<T>::mask, y.p, y.by_feature};
}

// A stage that does the work of the ReLUs before and behind it, where it is told that there are.
template <class T>
class GatedStage : public Stage<T> {
   public:
    bool relu_before = false, relu_behind = false;

   protected:
    Gate<T> value_gate() const { return relu_behind ? Gate<T>{Gate<T>::rectify, nullptr, 0} : Gate<T>{}; }
    Gate<T> tangent_gate(Index k) const { return relu_behind ? mask_by(this->out->value[k]) : Gate<T>{}; }
    Gate<T> cotangent_gate(Index k) const { return relu_before ? mask_by(this->in->value[k]) : Gate<T>{}; }
};

}  // namespace maml_fast::MAML_FAST_ISA
