// Images in a tile, [row][y][x][channel]: channels fill vectors, and a border of zeros surrounds each image where a padded
// convolution reads it.
//
// Invariant: the lanes beyond the last channel are 0 in every parameter, cotangent and tangent. In a value they may hold
// anything, for nothing reads them: products take numbers of a value one by one, and norms count channels.
#pragma once

#include "lanes.h"

namespace maml_fast::MAML_FAST_ISA {

// A row of the data, or of what becomes of it; without positions, height and width are 1.
struct ImageShape {
    Index channels = 1, height = 1, width = 1;

    Index positions() const { return height * width; }
    Index numbers() const { return channels * positions(); }
    bool operator==(const ImageShape& s) const {
        return channels == s.channels && height == s.height && width == s.width;
    }
};

template <class T>
struct Image {
    T* p = nullptr;  // channel 0 of the first row's pixel (0, 0)
    Index rows = 0;
    ImageShape shape;
    Index by_pixel = 0, by_line = 0, by_row = 0;

    T* at(Index row, Index y, Index x) const { return p + row * by_row + y * by_line + x * by_pixel; }
    Index vectors() const { return ceil_div(shape.channels, LANES<T>); }
    Index pixels() const { return rows * shape.positions(); }
};

// Calls visit(a line's first number, how many there are).
template <class T, class Visit>
void each_line(const Image<T>& image, Visit visit) {
    for (Index r = 0; r < image.rows; ++r)
        for (Index y = 0; y < image.shape.height; ++y)
            visit(r * image.by_row + y * image.by_line, image.shape.width * image.by_pixel);
}
template <class T>
void clear(const Image<T>& image) {
    const auto clear_line = [&](Index at, Index count) {
        std::memset(image.p + at, 0, static_cast<std::size_t>(count) * sizeof(T));
    };
    each_line(image, clear_line);
}
// to += from, an image of the same layout
template <class T>
void add_to(const Image<T>& to, const Image<T>& from) {
    each_line(to, [&](Index at, Index count) {
        for (Index i = at; i < at + count; i += LANES<T>) store(to.p + i, load(to.p + i) + load(from.p + i));
    });
}

// Channels, counted in whole vectors.
template <class T>
constexpr Index padded(Index channels) {
    return ceil_div(channels, LANES<T>) * LANES<T>;
}

// `bare`: pixels without the lanes that would fill up a vector, for data that only convolutions read.
template <class T>
Image<T> take_image(Arena& arena, Index rows, ImageShape shape, Index border, bool bare = false) {
    Image<T> image;
    image.rows = rows;
    image.shape = shape;
    image.by_pixel = bare ? shape.channels : padded<T>(shape.channels);
    image.by_line = (shape.width + 2 * border) * image.by_pixel;
    image.by_row = (shape.height + 2 * border) * image.by_line;
    T* start = arena.template take<T>(rows * image.by_row);
    if (start) image.p = start + border * (image.by_line + image.by_pixel);
    return image;
}

}  // namespace maml_fast::MAML_FAST_ISA
