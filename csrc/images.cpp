// The part of an instruction set's engine that is for images.
#include "images/tile.h"
#include "session.h"

namespace maml_fast::MAML_FAST_ISA {

Session* open_images(const Program& program, bool doubles) {
    if (doubles) return new ProgramSession<double, ImageTile<double>>(program);
    return new ProgramSession<float, ImageTile<float>>(program);
}

}  // namespace maml_fast::MAML_FAST_ISA
