// What one instruction set's engine is made of; images.cpp has the part for images.
#include "meta_step.h"

#include "probes.h"
#include "session.h"
#include "tile.h"

namespace maml_fast::MAML_FAST_ISA {

Session* open_images(const Program& program, bool doubles);

namespace {

template <class T>
Session* open_of(const Program& program) {
    if (program.layout == Layout::tasks_in_lanes) return new ProgramSession<T, Tile<T, TasksInLanes<T>>>(program);
    return new ProgramSession<T, Tile<T, RowsInLanes<T>>>(program);
}
Session* open(const Program& program, bool doubles) {
    if (program.layout == Layout::channels_in_lanes) return open_images(program, doubles);
    return doubles ? open_of<double>(program) : open_of<float>(program);
}

}  // namespace

// The name as text.
#define MAML_FAST_TEXT(x) #x
#define MAML_FAST_NAME(x) MAML_FAST_TEXT(x)
const Engine engine = {MAML_FAST_NAME(MAML_FAST_ISA), VECTOR_BYTES, open, activation, peak};

}  // namespace maml_fast::MAML_FAST_ISA
