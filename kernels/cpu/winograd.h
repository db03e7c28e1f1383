// Winograd's algorithm F(m, 3): m results of a convolution of 3 taps with m + 2 multiplications (Lavin & Gray, arXiv
// 1509.09308; by the Toom-Cook construction for any points). m = 4 has the points 0, +-5/8, +-3/2 and infinity: the
// usual 0, +-1, +-2 triple the rounding error where three dimensions are nested (Alam et al., arXiv 2201.10369).
#pragma once

#include "vector.h"

namespace skylapse {

constexpr double A = 5.0 / 8, B = 3.0 / 2;

template <int M>
struct Winograd;

template <>
struct Winograd<1> {  // none: one tap
  static void weights(const double* w, double* u) { u[0] = w[0]; }
  static void inputs(const Vec* d, Vec* v) { v[0] = d[0]; }
  static void outputs(const Vec* m, Vec* y) { y[0] = m[0]; }
};

template <>
struct Winograd<2> {
  static void weights(const double* w, double* u) {
    u[0] = w[0];
    u[1] = (w[0] + w[1] + w[2]) / 2;
    u[2] = (w[0] - w[1] + w[2]) / 2;
    u[3] = w[2];
  }
  static inline __attribute__((always_inline)) void inputs(const Vec* d, Vec* v) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[1] - d[3];
  }
  static inline __attribute__((always_inline)) void outputs(const Vec* m, Vec* y) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }
};

template <>
struct Winograd<4> {
  static void weights(const double* w, double* u) {
    const double points[] = {0, A, -A, B, -B};
    for (int i = 0; i < 5; ++i) {
      double scale = 1;
      for (int j = 0; j < 5; ++j)
        if (j != i) scale *= points[i] - points[j];
      u[i] = (w[0] + points[i] * (w[1] + points[i] * w[2])) / scale;
    }
    u[5] = w[2];
  }
  static inline __attribute__((always_inline)) void inputs(const Vec* d, Vec* v) {
    constexpr float a = A, b = B, aa = A * A, bb = B * B;
    const Vec even_a = d[4] - bb * d[2], odd_a = a * (d[3] - bb * d[1]);
    const Vec even_b = d[4] - aa * d[2], odd_b = b * (d[3] - aa * d[1]);
    v[0] = d[4] + (aa * bb * d[0] - (aa + bb) * d[2]);
    v[1] = even_a + odd_a;
    v[2] = even_a - odd_a;
    v[3] = even_b + odd_b;
    v[4] = even_b - odd_b;
    v[5] = d[5] + (aa * bb * d[1] - (aa + bb) * d[3]);
  }
  static inline __attribute__((always_inline)) void outputs(const Vec* m, Vec* y) {
    constexpr float a = A, b = B, aa = A * A, bb = B * B, aaa = A * A * A, bbb = B * B * B;
    const Vec even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + even_a + even_b;
    y[1] = a * odd_a + b * odd_b;
    y[2] = aa * even_a + bb * even_b;
    y[3] = m[5] + aaa * odd_a + bbb * odd_b;
  }
};

}  // namespace skylapse
