// What a convolution of the data sees: patches a of n = taps * C numbers, one for each pixel of its result; and the mean and
// covariance of all of them, which tell mean and variance of whatever is linear in a.
#pragma once

#include "images/conv_products.h"

namespace maml_fast::MAML_FAST_ISA {

// So many numbers of a patch at most: their covariance should cost less than a convolution.
constexpr Index MOST_PATCH = 32;

// Images less the mean of each channel, in the border too, so that sums over patches do not cancel. What is said of the
// patches does not change but for their mean, which a norm takes away.
template <class T>
class Patches {
   public:
    Patches(const ConvShape& conv) : conv_(conv), n(conv.terms()), np(padded<double>(n + 1)) {}

    void allocate(Arena& arena, Index rows, ImageShape shape) {
        centred = take_image<T>(arena, rows, shape, conv_.padding, true);
        mean = arena.template take<double>(n);
        covariance = arena.template take<double>(n * n);
        some_ = arena.template take<double>(AT_ONCE * np);
        sums_ = arena.template take<double>((n + 1) * np);
    }

    void take(const Image<T>& data, SegmentList<double>& list) {
        for (Index c = 0; c < conv_.channels; ++c) centre(data, c);
        add_up(list);
        const double count = static_cast<double>(pixels());
        for (Index i = 0; i < n; ++i) mean[i] = sums_[i * np + n] / count;
        for (Index i = 0; i < n; ++i)
            for (Index j = 0; j < n; ++j) covariance[i * n + j] = sums_[i * np + j] / count - mean[i] * mean[j];
    }

    Index pixels() const { return centred.rows * conv_.result(centred.shape).positions(); }

   private:
    static constexpr Index AT_ONCE = 64;

    const ConvShape& conv_;

   public:
    const Index n, np;  // numbers of a patch; and with a 1 behind them, filled up to vectors
    Image<T> centred;
    double *mean = nullptr, *covariance = nullptr;  // [n], [n][n]

   private:
    // Whether patches reach a line or column, of so many where there are `results` of them.
    bool reaches(Index at, Index results) const {
        const Index padded = at + conv_.padding;
        return padded - conv_.stride * smaller(padded / conv_.stride, results - 1) < conv_.kernel;
    }
    void centre(const Image<T>& data, Index c) {
        double total = 0, count = 0;
        const ImageShape z = conv_.result(data.shape);
        each_line(data, [&](Index r, Index y) {
            if (!reaches(y, z.height)) return;
            const T* p = data.at(r, y, 0) + c;
            for (Index x = 0; x < data.shape.width; ++x) {
                if (!reaches(x, z.width)) continue;
                total += static_cast<double>(p[x * data.by_pixel]);
                ++count;
            }
        });
        const T middle = static_cast<T>(total / count);
        T* to = centred.at(0, -conv_.padding, -conv_.padding) + c;
        for (Index i = 0; i < centred.rows * centred.by_row; i += centred.by_pixel) to[i] = -middle;
        each_line(data, [&](Index r, Index y) {
            const T* p = data.at(r, y, 0) + c;
            T* q = centred.at(r, y, 0) + c;
            for (Index x = 0; x < data.shape.width; ++x) q[x * centred.by_pixel] = p[x * data.by_pixel] - middle;
        });
    }
    template <class Visit>
    static void each_line(const Image<T>& image, Visit visit) {
        for (Index r = 0; r < image.rows; ++r)
            for (Index y = 0; y < image.shape.height; ++y) visit(r, y);
    }
    // sums[i][j] = sum over patches of a_i a_j, with 1 as the last of the numbers.
    void add_up(SegmentList<double>& list) {
        const ImageShape z = conv_.result(centred.shape);
        Index held = 0;
        Begin begin = Begin::zero;
        const auto flush = [&] {
            list.clear();
            list.push_back({0, some_, held});
            const Segments<double> segments{list.data(), 1, np, np};
            sum_all<double, false>(n + 1, np / LANES<double>, segments, begin, static_cast<const double*>(nullptr), [&] {
                return [x = some_, c = sums_, by = np](const double*& start, double*& sum) mutable {
                    start = x++;
                    sum = c;
                    c += by;
                };
            });
            begin = Begin::result;
            held = 0;
        };
        const Index line = conv_.kernel * conv_.channels;
        for (Index r = 0; r < centred.rows; ++r)
            for (Index y = 0; y < z.height; ++y)
                for (Index x = 0; x < z.width; ++x) {
                    const T* p = centred.at(r, y * conv_.stride - conv_.padding, x * conv_.stride - conv_.padding);
                    double* to = some_ + held * np;
                    for (Index ky = 0; ky < conv_.kernel; ++ky, p += centred.by_line)
                        for (Index i = 0; i < line; ++i) *to++ = static_cast<double>(p[i]);
                    *to = 1;
                    if (++held == AT_ONCE) flush();
                }
        if (held) flush();
    }

    double *some_ = nullptr, *sums_ = nullptr;  // [AT_ONCE][np], [n + 1][np]
};

}  // namespace maml_fast::MAML_FAST_ISA
