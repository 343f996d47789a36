// maml_fast._cpu: the only file that sees Python. It converts and calls; the work is elsewhere.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "cpu_features.h"

namespace nb = nanobind;

NB_MODULE(_cpu, m) {
    m.doc() = "The C++ part of maml_fast. Use maml_fast.cpu_features to ask whether it is there.";
    m.def("version", [] { return MAML_FAST_VERSION; }, "The version of maml_fast this was built with.");
    m.def("instruction_sets", &maml_fast::instruction_sets,
          "The instruction sets this processor has, from lowest to highest, beginning with \"baseline\".");
}
