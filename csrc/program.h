// What a meta-step is asked to do: plain data, the same for every instruction set.
//
// T tasks, N support rows, M query rows, S inner steps, I/O features of a linear layer. Pointers to numbers are to float or
// double, as the call says; arrays are contiguous but for RowData.
#pragma once

#include <cstdint>
#include <vector>

#include "profile.h"

namespace maml_fast {

enum class Kind { linear, pointwise, merge_rows, split_rows, conv, norm, max_pool, average_pool, rearrange };
enum class Form { shared, factored, dense };  // of a linear layer's fast weights
enum class Activation { relu, leaky_relu, tanh, sigmoid, silu, gelu, gelu_tanh, softplus, sine, scale };
// Of which numbers a norm takes mean and variance: a channel's of all rows and positions, a row's of a group of channels, or
// a row's of the last axes, so many numbers together.
enum class NormKind { batch, group, layer };
enum class LossKind { mse, cross_entropy, bce_with_logits, huber };

// How parameters move in an inner step: gradient descent, with these.
struct InnerRule {
    double momentum = 0, weight_decay = 0;
    bool nesterov = false;
    bool plain() const { return momentum == 0 && weight_decay == 0; }
};

// One operation of the chain, in order.
struct Layer {
    Kind kind = Kind::linear;
    bool prelude = false;          // below everything that adapts: runs once
    std::int64_t in_features = 0;  // of one row that enters: I for linear, all of them otherwise
    std::int64_t out_features = 0;
    std::int64_t positions = 1;  // rows of the operation for a row of the data

    Activation activation = Activation::relu;
    double constants[2] = {0, 0};  // of the activation

    // Images: rows [channels, height, width]. A convolution has in_features and out_features channels.
    std::int64_t kernel = 1, stride = 1, padding = 0;  // of a convolution
    std::int64_t window[2] = {1, 1}, step[2] = {1, 1};  // of an average, both ways; a maximum has windows 2x2 side by side
    std::vector<std::int64_t> shape;                    // of a row behind a rearrangement

    // A norm's weight (gamma) and bias (beta) have out_features numbers: its channels, or the last axes of a layer norm.
    NormKind norm = NormKind::batch;
    std::int64_t groups = 1;
    double eps = 0;

    // Of layers with parameters: linear, conv, norm.
    Form form = Form::shared;
    bool has_weight = true, has_bias = false;
    bool weight_adapts = false, bias_adapts = false;
    bool learns = false;               // in the prelude: of weight and bias, those that "adapt" get a gradient
    // A norm's, which do not move then: whether they have values of their own for each step and the query, [S + 1, ...], as has
    // the gradient.
    bool weight_by_step = false, bias_by_step = false;
    bool learns_rates = false;         // whether rate_gradients is wanted
    bool weight_by_number = false;     // each number has rates of its own, and weight_rates counts for nothing
    bool bias_by_number = false;
    std::vector<double> weight_rates;  // [S]; empty: the weight does not adapt
    std::vector<double> bias_rates;    // [S]; empty: the bias does not adapt
    const void* weight_rate_numbers = nullptr;  // [S, ...] of the weight's shape
    const void* bias_rate_numbers = nullptr;    // [S, O]
    const void* weight = nullptr;      // [O, I]; of a convolution [O, I, kernel, kernel]
    const void* bias = nullptr;        // [O]
    void* weight_gradient = nullptr;   // of the weight's shape, summed over tasks
    void* bias_gradient = nullptr;     // [O]
    double* rate_gradients = nullptr;  // [2, S], of weight and bias
    void* weight_rate_gradients = nullptr;  // of rates by number, as those lie
    void* bias_rate_gradients = nullptr;
    void* adapted_weight = nullptr;    // [T, ...] after the inner steps; null: not wanted
    void* adapted_bias = nullptr;      // [T, O]

    std::int64_t weight_numbers() const {
        if (kind == Kind::norm) return out_features;
        return in_features * out_features * (kind == Kind::conv ? kernel * kernel : 1);
    }
    bool has_parameters() const { return kind == Kind::linear || kind == Kind::conv || kind == Kind::norm; }
};

// Where tasks go: one in each lane of the vectors; or one after another, with their rows in the lanes, or their channels.
enum class Layout { tasks_in_lanes, rows_in_lanes, channels_in_lanes };

struct Program {
    std::vector<Layer> layers;
    LossKind loss = LossKind::mse;
    Layout layout = Layout::tasks_in_lanes;
    std::int64_t steps = 1;         // S
    std::int64_t rows = 1;          // N
    std::int64_t query_rows = 1;    // M
    std::int64_t in_features = 1;   // of a row of the data
    std::vector<std::int64_t> shape;  // of a row of the data, where channels are in lanes
    InnerRule rule;
    bool first_order = false;
    bool gradient = true;
    bool exports = false;  // whether the adapted parameters are wanted
    bool inputs = false;   // whether gradients by the data are wanted

    // Whether a step's direction is more than a number times the adjoint anywhere.
    bool turns() const {
        for (const Layer& layer : layers)
            if (layer.weight_by_number || layer.bias_by_number) return true;
        return !rule.plain();
    }
    // Whether the meta-gradient depends on support rows by way of what lies below what adapts: only through the inner steps'
    // own derivatives.
    bool reaches_support() const { return !first_order && steps > 0; }
    // Whether anything below what adapts has a gradient.
    bool goes_below() const {
        for (const Layer& layer : layers)
            if (layer.learns) return true;
        return inputs;
    }
};

// Rows [T, N, features]: the features one behind the other, `by_task` and `by_row` numbers apart. Tasks may share theirs.
struct RowData {
    const void* p = nullptr;
    std::int64_t by_task = 0, by_row = 0;
};

struct TaskData {
    std::int64_t tasks = 0;
    RowData support_x;               // [T, N, in_features]
    RowData support_y;               // [T, N, out_features]; int64 [T, N] for cross entropy
    RowData query_x;                 // [T, M, in_features]
    RowData query_y;                 // [T, M, ...]; null: no query loss
    RowData support_weight;          // [T, N], what rows count in the loss; null: all alike
    RowData query_weight;            // [T, M]
    void* task_losses = nullptr;     // [T]
    void* support_losses = nullptr;  // [T, S]
    void* query_outputs = nullptr;   // [T, M, out_features]
    void* by_support_x = nullptr;    // [T, N, in_features], each task's gradients by its own rows; null: not wanted
    void* by_query_x = nullptr;      // [T, M, in_features]
};

// What one thread keeps, and how the tasks are cut: a function of program and tasks alone, whatever the threads.
struct Sizes {
    std::int64_t tile_tasks = 0;
    std::int64_t arena_bytes = 0;    // of one thread
    std::int64_t chunks = 0;         // each with a partial sum of its own, added up in order
    std::int64_t partial_bytes = 0;  // of one chunk
    bool replays = false;            // the adjoint computes each inner step's values again, rather than keep all steps'
};

class Pool;

// A program made ready by one instruction set's engine: the memory of its tiles is kept from call to call. One call at a
// time. `program` must outlive it; pointers and rates of its layers may change between calls, sizes and kinds not.
class Session {
   public:
    virtual ~Session() = default;
    virtual Sizes sizes(std::int64_t tasks) const = 0;
    // Whether all losses and gradients are finite. Throws std::bad_alloc. `profile`: is filled; null: nothing is measured.
    virtual bool run(const TaskData& data, Pool& pool, int threads, Profile* profile) = 0;
    // What is measured, the parts of `Beside` first.
    virtual std::int64_t parts() const = 0;
    virtual StageProfile part(std::int64_t i) const = 0;
};

// What is compiled once for each instruction set.
struct Engine {
    const char* name;
    int vector_bytes;
    Session* (*open)(const Program&, bool doubles);
    // All four rules of an activation, for the tests: from x, dy, t_x, t_dy to y, dx, t_y, t_dx, n numbers each.
    void (*activation)(const Layer&, bool doubles, std::int64_t n, const void* const in[4], void* const out[4]);
    // FLOP a second that one thread reaches with multiply-adds of registers alone.
    double (*peak)(bool doubles);
};

// Those that were built and this processor can run, from lowest to highest.
const std::vector<const Engine*>& engines();

}  // namespace maml_fast
