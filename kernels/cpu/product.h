// Matrix products of a few rows, whose right side is packed once and streams from cache.
#pragma once

#include <algorithm>

#include "vector.h"

namespace skylapse {

constexpr int PANEL = 2 * LANES;  // columns that are made at once

// Where the weight of (row of `depth`, column) lies in panels [depth, PANEL]; the last may be of LANES columns.
inline long packed_index(long row, long column, long depth, long width) {
  const long panel = column / PANEL * PANEL;
  return panel * depth + row * std::min<long>(PANEL, width - panel) + column - panel;
}

template <bool ADDS, int R, int V>
inline void tile_product(const float* a, long a_step, const float* b, long depth, float* c, long c_step) {
  Vec sums[R][V] = {};
  if (ADDS)
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sums[r][v] = load(c + r * c_step + v * LANES);
  for (long k = 0; k < depth; ++k) {
    Vec weights[V];
    for (int v = 0; v < V; ++v) weights[v] = load(b + (k * V + v) * LANES);
    for (int r = 0; r < R; ++r) {
      const Vec x = all(a[r * a_step + k]);
      for (int v = 0; v < V; ++v) sums[r][v] += x * weights[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(c + r * c_step + v * LANES, sums[r][v]);
}

template <bool ADDS, int V>
inline void panel_product(const float* a, long a_step, const float* b, long depth, float* c, long c_step, long rows) {
  long r = 0;
  for (; r + ROWS <= rows; r += ROWS) tile_product<ADDS, ROWS, V>(a + r * a_step, a_step, b, depth, c + r * c_step, c_step);
  for (; r + 2 <= rows; r += 2) tile_product<ADDS, 2, V>(a + r * a_step, a_step, b, depth, c + r * c_step, c_step);
  if (r < rows) tile_product<ADDS, 1, V>(a + r * a_step, a_step, b, depth, c + r * c_step, c_step);
}

// c [rows, width] = a [rows, depth] x b, packed, or that added to it; width is a multiple of LANES.
template <bool ADDS>
inline void product(const float* a, long a_step, const float* b, long depth, long width, float* c, long rows) {
  long n = 0;
  for (; n + PANEL <= width; n += PANEL) panel_product<ADDS, 2>(a, a_step, b + n * depth, depth, c + n, width, rows);
  if (n < width) panel_product<ADDS, 1>(a, a_step, b + n * depth, depth, c + n, width, rows);
}

}  // namespace skylapse
