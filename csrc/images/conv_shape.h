// The sizes of a convolution.
#pragma once

#include "images/image.h"

namespace maml_fast::MAML_FAST_ISA {

struct ConvShape {
    Index channels, filters;  // C, K
    Index kernel, stride, padding;

    Index taps() const { return kernel * kernel; }
    Index terms() const { return taps() * channels; }  // of a result
    ImageShape result(ImageShape x) const {
        return {filters, (x.height + 2 * padding - kernel) / stride + 1, (x.width + 2 * padding - kernel) / stride + 1};
    }
    // What `times_turned` reads around the cotangents.
    Index border_out() const { return stride > 1 ? kernel / 2 : larger<Index>(kernel - 1 - padding, 0); }
};

}  // namespace maml_fast::MAML_FAST_ISA
