// 3 x 3 convolution with a stride of 2 and a row and column of zeros at the lower right: pixels gathered, then a product.
#pragma once

#include <vector>

#include "product.h"

namespace skylapse {

class Downsample {
 public:
  // weight: [c_out, c_in, 3, 3]; bias: [c_out].
  Downsample(const float* weight, const float* bias, long c_out, long c_in)
      : c_in_(c_in), c_out_(c_out), out_(round_up(c_out, LANES)), weights_(9 * c_in * out_), bias_(bias, bias + c_out) {
    for (long o = 0; o < c_out; ++o)
      for (long i = 0; i < c_in; ++i)
        for (long tap = 0; tap < 9; ++tap)
          weights_[packed_index(tap * c_in + i, o, 9 * c_in, out_)] = weight[(o * c_in + i) * 9 + tap];
  }

  long c_out() const { return c_out_; }

  // One row of one frame: x [height, width, c_in] -> y [height / 2, width / 2, c_out].
  void run(const float* x, long height, long width, long row, float* y) const {
    const long columns = width / 2, depth = 9 * c_in_;
    static thread_local std::vector<float> scratch;
    if (static_cast<long>(scratch.size()) < BLOCK * (depth + out_)) scratch.resize(BLOCK * (depth + out_));
    float *gathered = scratch.data(), *made = gathered + BLOCK * depth;
    for (long first = 0; first < columns; first += BLOCK) {
      const long count = std::min(BLOCK, columns - first);
      for (long n = 0; n < count; ++n)
        for (long tap = 0; tap < 9; ++tap) {
          const long at_y = 2 * row + tap / 3, at_x = 2 * (first + n) + tap % 3;
          float* to = gathered + n * depth + tap * c_in_;
          if (at_y < height && at_x < width)
            std::copy_n(x + (at_y * width + at_x) * c_in_, c_in_, to);
          else
            std::fill_n(to, c_in_, 0.0f);
        }
      product<false>(gathered, depth, weights_.data(), depth, out_, made, count);
      for (long n = 0; n < count; ++n)
        for (long c = 0; c < c_out_; ++c) y[(row * columns + first + n) * c_out_ + c] = made[n * out_ + c] + bias_[c];
    }
  }

 private:
  static constexpr long BLOCK = 32;
  long c_in_, c_out_, out_;
  std::vector<float> weights_, bias_;
};

}  // namespace skylapse
