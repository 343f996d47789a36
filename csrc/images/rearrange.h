// Rows of another shape: the same numbers in torch's order, [row][channel][y][x], which is not that of an image.
#pragma once

#include "images/stage.h"

namespace maml_fast::MAML_FAST_ISA {

// An image's numbers in torch's order.
template <class T>
class InTorchOrder {
   public:
    explicit InTorchOrder(const Image<T>& image) : image_(image) {}

    T& next() {
        T& found = image_.at(row_, y_, x_)[channel_];
        if (++x_ == image_.shape.width) {
            x_ = 0;
            if (++y_ == image_.shape.height) {
                y_ = 0;
                if (++channel_ == image_.shape.channels) {
                    channel_ = 0;
                    ++row_;
                }
            }
        }
        return found;
    }

   private:
    const Image<T>& image_;
    Index row_ = 0, channel_ = 0, y_ = 0, x_ = 0;
};

// A permutation: its transpose is its inverse, and it is its own tangent.
template <class T>
class ImageRearrange final : public ImageStage<T> {
    using ImageStage<T>::in;
    using ImageStage<T>::out;

   public:
    bool keeps_cotangent() const override { return false; }

    void forward(Index k) override { copy(in->value[k], out->value[k]); }
    void backward(Index k) override { copy(out->cotangent[k], in->cotangent[k]); }
    void tangent(Index k) override { copy(in->tangent[k], out->tangent[k]); }
    void tangent_backward(Index k) override { copy(out->t_cotangent[k], in->t_cotangent[k]); }

   private:
    static void copy(const Image<T>& from, const Image<T>& to) {
        InTorchOrder<T> source(from), target(to);
        for (Index n = from.rows * from.shape.numbers(); n > 0; --n) target.next() = source.next();
    }
};

}  // namespace maml_fast::MAML_FAST_ISA
