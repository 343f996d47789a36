// maml_fast._cpu: the only file that sees Python. It converts and calls; the work is elsewhere.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "binding_profile.h"
#include "cpu_features.h"
#include "prepared.h"

namespace nb = nanobind;
using namespace maml_fast;

namespace {

using Address = std::uintptr_t;  // of a tensor's first number; 0: none
using Rates = std::vector<double>;

template <class E>
struct Named {
    const char* name;
    E value;
};

constexpr Named<Activation> ACTIVATIONS[] = {
    {"relu", Activation::relu},         {"leaky_relu", Activation::leaky_relu}, {"tanh", Activation::tanh},
    {"sigmoid", Activation::sigmoid},   {"silu", Activation::silu},             {"gelu", Activation::gelu},
    {"gelu_tanh", Activation::gelu_tanh}, {"softplus", Activation::softplus},   {"sine", Activation::sine},
    {"scale", Activation::scale},
};
constexpr Named<LossKind> LOSSES[] = {
    {"mse", LossKind::mse},
    {"cross_entropy", LossKind::cross_entropy},
    {"bce_with_logits", LossKind::bce_with_logits},
    {"huber", LossKind::huber},
};
constexpr Named<Form> FORMS[] = {{"shared", Form::shared}, {"factored", Form::factored}, {"dense", Form::dense}};
constexpr Named<Layout> LAYOUTS[] = {
    {"tasks_in_lanes", Layout::tasks_in_lanes},
    {"rows_in_lanes", Layout::rows_in_lanes},
    {"channels_in_lanes", Layout::channels_in_lanes},
};
constexpr Named<NormKind> NORMS[] = {{"batch", NormKind::batch}, {"group", NormKind::group}, {"layer", NormKind::layer}};

template <class E, std::size_t N>
E named(const Named<E> (&list)[N], const std::string& name, const char* what) {
    for (const Named<E>& entry : list)
        if (name == entry.name) return entry.value;
    throw std::invalid_argument(std::string(what) + " \"" + name + "\" is not known to this build");
}

template <class T = const void>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

Layer activation_layer(const std::string& name, const std::vector<double>& constants, bool prelude) {
    Layer layer;
    layer.kind = Kind::pointwise;
    layer.activation = named(ACTIVATIONS, name, "activation");
    layer.prelude = prelude;
    for (std::size_t i = 0; i < constants.size() && i < 2; ++i) layer.constants[i] = constants[i];
    return layer;
}

using Shape = std::vector<std::int64_t>;

// What layers with parameters have in common.
struct Parameters {
    bool has_weight, has_bias, weight_adapts, bias_adapts, learns, learns_rates, weight_by_number, bias_by_number;
    bool weight_by_step, bias_by_step;
    std::string form;
    bool prelude;
};

// Builds a program layer by layer; `prepare` makes it ready to run.
struct Builder {
    Program program;

    Builder(const std::string& loss, const std::string& layout, std::int64_t steps, std::int64_t rows, std::int64_t query_rows,
            const Shape& shape, bool first_order, bool gradient, bool exports, bool inputs,
            double momentum, bool nesterov, double weight_decay) {
        program.loss = named(LOSSES, loss, "loss");
        program.layout = named(LAYOUTS, layout, "layout");
        program.steps = steps;
        program.rows = rows;
        program.query_rows = query_rows;
        program.shape = shape;
        for (const std::int64_t n : shape) program.in_features *= n;
        program.first_order = first_order;
        program.gradient = gradient;
        program.exports = exports;
        program.inputs = inputs;
        program.rule = {momentum, weight_decay, nesterov};
    }
    void linear(std::int64_t in_features, std::int64_t out_features, const Parameters& parameters) {
        add(Kind::linear, in_features, out_features, parameters);
    }
    void conv(std::int64_t in_channels, std::int64_t out_channels, std::int64_t kernel, std::int64_t stride,
              std::int64_t padding, const Parameters& parameters) {
        Layer& layer = add(Kind::conv, in_channels, out_channels, parameters);
        layer.kernel = kernel;
        layer.stride = stride;
        layer.padding = padding;
    }
    void norm(const std::string& kind, std::int64_t features, std::int64_t length, std::int64_t groups, double eps,
              const Parameters& parameters) {
        Layer& layer = add(Kind::norm, features, length, parameters);
        layer.norm = named(NORMS, kind, "norm");
        layer.groups = groups;
        layer.eps = eps;
    }
    void pointwise(const std::string& name, const std::vector<double>& constants, bool prelude) {
        program.layers.push_back(activation_layer(name, constants, prelude));
    }
    void max_pool(bool prelude) { add(Kind::max_pool, prelude); }
    void average_pool(std::pair<std::int64_t, std::int64_t> window, std::pair<std::int64_t, std::int64_t> step, bool prelude) {
        Layer& layer = add(Kind::average_pool, prelude);
        layer.window[0] = window.first;
        layer.window[1] = window.second;
        layer.step[0] = step.first;
        layer.step[1] = step.second;
    }
    void rearrange(const Shape& shape, bool prelude) { add(Kind::rearrange, prelude).shape = shape; }
    void reshape(bool merge, std::int64_t positions, bool prelude) {
        add(merge ? Kind::merge_rows : Kind::split_rows, prelude).positions = positions;
    }
    Prepared* prepare(const std::string& instruction_set, bool doubles) const {
        return new Prepared(program, instruction_set, doubles);
    }

   private:
    Layer& add(Kind kind, bool prelude) {
        Layer layer;
        layer.kind = kind;
        layer.prelude = prelude;
        program.layers.push_back(layer);
        return program.layers.back();
    }
    Layer& add(Kind kind, std::int64_t in_features, std::int64_t out_features, const Parameters& parameters) {
        Layer& layer = add(kind, parameters.prelude);
        layer.in_features = in_features;
        layer.out_features = out_features;
        layer.has_weight = parameters.has_weight;
        layer.has_bias = parameters.has_bias;
        layer.weight_adapts = parameters.weight_adapts;
        layer.bias_adapts = parameters.bias_adapts;
        layer.learns = parameters.learns;
        layer.learns_rates = parameters.learns_rates;
        layer.weight_by_number = parameters.weight_by_number;
        layer.bias_by_number = parameters.bias_by_number;
        layer.weight_by_step = parameters.weight_by_step;
        layer.bias_by_step = parameters.bias_by_step;
        layer.form = named(FORMS, parameters.form, "form");
        return layer;
    }
};

// Addresses: of support_x, support_y, query_x, query_y, support_weight, query_weight each with the numbers from task to task
// and from row to row; then task_losses, support_losses, query_outputs, by_support_x, by_query_x; then of each layer with
// parameters weight, bias, weight_gradient, bias_gradient, rate_gradients, adapted_weight, adapted_bias, and of rates by number
// weight_rate_numbers, bias_rate_numbers, weight_rate_gradients, bias_rate_gradients. Rates: of each such layer its weight's
// and its bias's, empty for what does not adapt.
constexpr std::size_t OF_DATA = 23, OF_LAYER = 11;

bool run_with(Prepared& prepared, std::int64_t tasks, const std::vector<Address>& addresses,
              const std::vector<std::pair<Rates, Rates>>& rates, int threads, Profile* profile) {
    const std::size_t layers = prepared.layers_with_parameters();
    if (addresses.size() != OF_DATA + OF_LAYER * layers || rates.size() != layers)
        throw std::invalid_argument("addresses or rates do not fit the number of layers with parameters");
    TaskData data;
    data.tasks = tasks;
    RowData* const rows[] = {&data.support_x, &data.support_y,      &data.query_x,
                             &data.query_y,   &data.support_weight, &data.query_weight};
    for (std::size_t i = 0; i < 6; ++i)
        *rows[i] = {at(addresses[3 * i]), static_cast<std::int64_t>(addresses[3 * i + 1]),
                    static_cast<std::int64_t>(addresses[3 * i + 2])};
    data.task_losses = at<void>(addresses[18]);
    data.support_losses = at<void>(addresses[19]);
    data.query_outputs = at<void>(addresses[20]);
    data.by_support_x = at<void>(addresses[21]);
    data.by_query_x = at<void>(addresses[22]);
    const auto fill = [&](std::vector<Layer>& layers) {
        const Address* a = addresses.data() + OF_DATA;
        auto rate = rates.begin();
        for (Layer& layer : layers) {
            if (!layer.has_parameters()) continue;
            layer.weight = at(a[0]);
            layer.bias = at(a[1]);
            layer.weight_gradient = at<void>(a[2]);
            layer.bias_gradient = at<void>(a[3]);
            layer.rate_gradients = at<double>(a[4]);
            layer.adapted_weight = at<void>(a[5]);
            layer.adapted_bias = at<void>(a[6]);
            layer.weight_rate_numbers = at(a[7]);
            layer.bias_rate_numbers = at(a[8]);
            layer.weight_rate_gradients = at<void>(a[9]);
            layer.bias_rate_gradients = at<void>(a[10]);
            a += OF_LAYER;
            layer.weight_rates = rate->first;
            layer.bias_rates = rate->second;
            ++rate;
        }
    };
    const nb::gil_scoped_release released;
    return prepared.run(fill, data, threads, profile);
}
bool run(Prepared& prepared, std::int64_t tasks, const std::vector<Address>& addresses,
         const std::vector<std::pair<Rates, Rates>>& rates, int threads) {
    return run_with(prepared, tasks, addresses, rates, threads, nullptr);
}

nb::tuple measure(Prepared& prepared, std::int64_t tasks, const std::vector<Address>& addresses,
                  const std::vector<std::pair<Rates, Rates>>& rates, int threads) {
    return measured(prepared,
                    [&](Profile* profile) { return run_with(prepared, tasks, addresses, rates, threads, profile); });
}

nb::dict sizes(const Prepared& prepared, std::int64_t tasks) {
    const Sizes found = prepared.sizes(tasks);
    nb::dict named;
    named["instruction_set"] = prepared.engine().name;
    named["tile_tasks"] = found.tile_tasks;
    named["arena_bytes"] = found.arena_bytes;
    named["chunks"] = found.chunks;
    named["partial_bytes"] = found.partial_bytes;
    named["replays"] = found.replays;
    return named;
}

void activation(const std::string& name, const std::vector<double>& constants, const std::string& instruction_set, bool doubles,
                std::int64_t count, const std::vector<Address>& in, const std::vector<Address>& out) {
    if (in.size() != 4 || out.size() != 4) throw std::invalid_argument("wanted are four addresses in and four out");
    const void* const given[] = {at(in[0]), at(in[1]), at(in[2]), at(in[3])};
    void* const found[] = {at<void>(out[0]), at<void>(out[1]), at<void>(out[2]), at<void>(out[3])};
    engine_named(instruction_set).activation(activation_layer(name, constants, false), doubles, count, given, found);
}

}  // namespace

NB_MODULE(_cpu, m) {
    m.doc() = "The C++ part of maml_fast. Use maml_fast.cpu_features to ask whether it is there.";
    m.def("version", [] { return MAML_FAST_VERSION; }, "The version of maml_fast this was built with.");
    m.def("instruction_sets", &instruction_sets,
          "The instruction sets this processor has, from lowest to highest, beginning with \"baseline\".");
    m.def(
        "engines",
        [] {
            std::vector<std::pair<std::string, int>> found;
            for (const Engine* engine : engines()) found.emplace_back(engine->name, engine->vector_bytes);
            return found;
        },
        "The instruction sets that there is code for and this processor has, with the bytes of a vector.");
    m.def(
        "peak", [](const std::string& name, bool doubles) { return engine_named(name).peak(doubles); },
        nb::arg("instruction_set"), nb::arg("doubles"), "FLOP a second of multiply-adds that stay in registers, one thread.");
    m.def(
        "share_openmp", [](Address entry) { Pool::share_openmp(reinterpret_cast<Pool::OpenMp>(entry)); }, nb::arg("entry"),
        "Run on the threads of a GNU OpenMP: the address of its GOMP_parallel, or 0 for threads of maml_fast's own.");
    m.def("activation", &activation, nb::arg("name"), nb::arg("constants"), nb::arg("instruction_set"), nb::arg("doubles"),
          nb::arg("count"), nb::arg("given"), nb::arg("found"),
          "The four rules of an activation on flat arrays: x, dy, t_x, t_dy -> y, dx, t_y, t_dx.");

    nb::class_<Parameters>(m, "Parameters")
        .def(
            "__init__",
            [](Parameters* p, bool has_weight, bool has_bias, bool weight_adapts, bool bias_adapts, bool learns,
               bool learns_rates, bool weight_by_number, bool bias_by_number, bool weight_by_step, bool bias_by_step,
               const std::string& form, bool prelude) {
                new (p) Parameters{has_weight,       has_bias,       weight_adapts,  bias_adapts,  learns, learns_rates,
                                   weight_by_number, bias_by_number, weight_by_step, bias_by_step, form,   prelude};
            },
            nb::arg("has_weight"), nb::arg("has_bias"), nb::arg("weight_adapts"), nb::arg("bias_adapts"),
            nb::arg("learns"), nb::arg("learns_rates"), nb::arg("weight_by_number"), nb::arg("bias_by_number"), nb::arg("weight_by_step"),
            nb::arg("bias_by_step"), nb::arg("form"), nb::arg("prelude"));
    nb::class_<Builder>(m, "Builder")
        .def(nb::init<const std::string&, const std::string&, std::int64_t, std::int64_t, std::int64_t, const Shape&, bool,
                      bool, bool, bool, double, bool, double>(),
             nb::arg("loss"), nb::arg("layout"), nb::arg("steps"), nb::arg("rows"), nb::arg("query_rows"), nb::arg("shape"),
             nb::arg("first_order"), nb::arg("gradient"), nb::arg("exports"), nb::arg("inputs"),
             nb::arg("momentum"), nb::arg("nesterov"), nb::arg("weight_decay"))
        .def("linear", &Builder::linear, nb::arg("in_features"), nb::arg("out_features"), nb::arg("parameters"))
        .def("conv", &Builder::conv, nb::arg("in_channels"), nb::arg("out_channels"), nb::arg("kernel"), nb::arg("stride"),
             nb::arg("padding"), nb::arg("parameters"))
        .def("norm", &Builder::norm, nb::arg("kind"), nb::arg("features"), nb::arg("length"), nb::arg("groups"),
             nb::arg("eps"), nb::arg("parameters"))
        .def("pointwise", &Builder::pointwise, nb::arg("name"), nb::arg("constants"), nb::arg("prelude"))
        .def("max_pool", &Builder::max_pool, nb::arg("prelude"))
        .def("average_pool", &Builder::average_pool, nb::arg("window"), nb::arg("step"), nb::arg("prelude"))
        .def("rearrange", &Builder::rearrange, nb::arg("shape"), nb::arg("prelude"))
        .def("reshape", &Builder::reshape, nb::arg("merge"), nb::arg("positions"), nb::arg("prelude"))
        .def("prepare", &Builder::prepare, nb::arg("instruction_set"), nb::arg("doubles"));
    nb::class_<Prepared>(m, "Prepared")
        .def("sizes", &sizes, nb::arg("tasks"))
        .def("run", &run, nb::arg("tasks"), nb::arg("addresses"), nb::arg("rates"), nb::arg("threads"))
        .def("measure", &measure, nb::arg("tasks"), nb::arg("addresses"), nb::arg("rates"), nb::arg("threads"),
             "`run`, and where its time went.")
        .def("parts", &parts, "What `measure` tells apart: data, loss, start, workspace, then the stages of the chain.");
}
