// Root-mean-square norm over the channels of a pixel, and SiLU behind it where it is wanted.
#pragma once

#include <cmath>

#include "vector.h"

namespace skylapse {

constexpr float NORM_EPS = 1e-24f;  // of the mean square: the reference clamps the norm at 1e-12

inline void norm_pixel(const float* x, const float* gamma, long channels, bool with_silu, float* y) {
  Vec squares{};
  for (long c = 0; c < channels; c += LANES) {
    const Vec v = load(x + c, channels - c);
    squares += v * v;
  }
  const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(channels) + NORM_EPS);
  for (long c = 0; c < channels; c += LANES) {
    const Vec v = load(x + c, channels - c) * scale * load(gamma + c, channels - c);
    store(y + c, with_silu ? silu(v) : v, channels - c);
  }
}

}  // namespace skylapse
