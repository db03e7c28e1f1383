// Causal 3-D convolution of frames [T, H, W, C] by Winograd's algorithm in all of its dimensions, tile by tile.
//
// A tile is 4 x 4 pixels of 4 frames. Its input, 6 frames of 6 x 6 pixels, becomes 216 points, at each of which all
// channels are multiplied as one matrix product over a block of tiles: 216 products in place of 27 * 64. All between
// the frames that are read and those that are written stays in a core's second cache.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "norm.h"
#include "product.h"
#include "winograd.h"

namespace skylapse {

constexpr long MAX_CHANNELS = 4096;
constexpr long FRAMES = 4;                  // of a tile, where there are three taps over time
constexpr size_t MAX_BYTES = 96 << 20;      // of a convolution's weights as they are multiplied: 8 times what they were
constexpr size_t CACHED_BYTES = 16 << 20;   // of weights that a block of a few tiles may read again

// What one call works on. Frames: [height, width, c_in] each, of half the sides where they are doubled on the way.
struct Clip {
  const float* const* frames;  // num_frames + taps - 1 of them
  long num_frames, height, width;
  bool doubled;
  const float* residual;  // as y, added; or null
  float* y;               // [num_frames, height, width, c_out], or null where it is not wanted
  float* normed;          // silu(rms_norm(y) * gamma), or null
  const float* gamma;
};

class Conv3d {
 public:
  // weight: [c_out, c_in, taps, side, side], taps and side each 1 or 3; bias: [c_out].
  Conv3d(const float* weight, const float* bias, long c_out, long c_in, long taps, long side)
      : c_in_(c_in), c_out_(c_out), taps_(taps), in_(round_up(c_in, LANES)), out_(round_up(c_out, LANES)), bias_(out_) {
    if ((taps != 1 && taps != 3) || (side != 1 && side != 3)) throw std::invalid_argument("taps and side must be 1 or 3");
    if (std::max(c_in, c_out) > MAX_CHANNELS) throw std::invalid_argument("there may be 4096 channels at most");
    std::copy(bias, bias + c_out, bias_.begin());
    // The fewest multiplications whose weights are not too large.
    if (taps == 3 && side == 1)
      be<3, true, 1>(weight);
    else if (taps == 1 && side == 1)
      be<1, false, 1>(weight);
    else if (taps == 3 && bytes<3, true, 4>() <= MAX_BYTES)
      be<3, true, 4>(weight);
    else if (taps == 3 && bytes<3, false, 4>() <= MAX_BYTES)
      be<3, false, 4>(weight);
    else if (taps == 3)
      be<3, false, 2>(weight);
    else if (bytes<1, false, 4>() <= MAX_BYTES)
      be<1, false, 4>(weight);
    else
      be<1, false, 2>(weight);
  }

  long c_in() const { return c_in_; }
  long c_out() const { return c_out_; }
  long taps() const { return taps_; }

  // Pieces of work that may be done in any order and by several threads at once.
  long num_pieces(const Clip& clip) const { return (clip.num_frames + frames_ - 1) / frames_ * blocks(clip); }

  void run(const Clip& clip, long piece) const {
    const long first = piece % blocks(clip) * block_;
    (this->*run_)(clip, piece / blocks(clip) * frames_, first, std::min(block_, tiles(clip) - first));
  }

 private:
  // TAPS over time, by Winograd's algorithm if FAST; S x S results a tile and frame.
  template <int TAPS, bool FAST, int S>
  struct Way {
    static constexpr int RESULTS = TAPS == 1 ? 1 : FRAMES;
    static constexpr int READ = RESULTS + TAPS - 1;   // frames
    static constexpr int TIMES = FAST ? READ : TAPS;  // matrices over time
    static constexpr int SIDE = S == 1 ? 1 : 3, READ_SIDE = S + SIDE - 1, POINTS = READ_SIDE * READ_SIDE;
  };

  template <int TAPS, bool FAST, int S>
  size_t bytes() const {
    return sizeof(float) * Way<TAPS, FAST, S>::TIMES * Way<TAPS, FAST, S>::POINTS * c_in_ * out_;
  }

  template <int TAPS, bool FAST, int S>
  void be(const float* weight) {
    pack<TAPS, FAST, S>(weight);
    run_ = &Conv3d::run_block<TAPS, FAST, S>;
    side_ = S;
    frames_ = Way<TAPS, FAST, S>::RESULTS;
    block_ = bytes<TAPS, FAST, S>() > CACHED_BYTES ? 32 : S == 1 ? 64 : 8;
  }

  long tiles_wide(const Clip& clip) const { return (clip.width + side_ - 1) / side_; }
  long tiles(const Clip& clip) const { return tiles_wide(clip) * ((clip.height + side_ - 1) / side_); }
  long blocks(const Clip& clip) const { return (tiles(clip) + block_ - 1) / block_; }

  // A matrix [c_in, out] in panels for each point over space and each over time.
  template <int TAPS, bool FAST, int S>
  void pack(const float* weight) {
    using W = Way<TAPS, FAST, S>;
    constexpr int SIDE = W::SIDE, READ = W::READ_SIDE;
    weights_.assign(W::POINTS * W::TIMES * c_in_ * out_, 0.0f);
    for (long o = 0; o < c_out_; ++o)
      for (long i = 0; i < c_in_; ++i, weight += TAPS * SIDE * SIDE) {
        double rows[SIDE][READ], planes[TAPS][READ][READ];
        for (int t = 0; t < TAPS; ++t) {
          for (int y = 0; y < SIDE; ++y) {
            double taps[SIDE];
            for (int x = 0; x < SIDE; ++x) taps[x] = weight[(t * SIDE + y) * SIDE + x];
            Winograd<S>::weights(taps, rows[y]);
          }
          for (int x = 0; x < READ; ++x) {
            double taps[SIDE], made[READ];
            for (int y = 0; y < SIDE; ++y) taps[y] = rows[y][x];
            Winograd<S>::weights(taps, made);
            for (int y = 0; y < READ; ++y) planes[t][y][x] = made[y];
          }
        }
        for (int point = 0; point < W::POINTS; ++point) {
          double taps[TAPS], made[W::TIMES];
          for (int t = 0; t < TAPS; ++t) taps[t] = planes[t][point / READ][point % READ];
          if constexpr (FAST)
            Winograd<FRAMES>::weights(taps, made);
          else
            std::copy(taps, taps + TAPS, made);
          for (int t = 0; t < W::TIMES; ++t)
            weights_[(point * W::TIMES + t) * c_in_ * out_ + packed_index(i, o, c_in_, out_)] = made[t];
        }
      }
  }

  // `count` tiles from the `first` of a frame on, of the frames of one tile from `time` on.
  template <int TAPS, bool FAST, int S>
  void run_block(const Clip& clip, long time, long first, long count) const {
    using W = Way<TAPS, FAST, S>;
    // A point's tiles lie together; the spare vector keeps points from falling into the same few lines of the cache.
    const long in = count * in_, out = count * out_;
    const long in_step = W::READ * in + LANES, out_step = W::RESULTS * out + LANES;
    static thread_local std::vector<float> scratch;
    const size_t needed = W::POINTS * (in_step + out_step) + W::READ * (in + out) + S * S * out_;
    if (scratch.size() < needed) scratch.resize(needed);
    float* inputs = scratch.data();                 // [POINTS][READ, count, in]
    float* outputs = inputs + W::POINTS * in_step;  // [POINTS][RESULTS, count, out]
    float* mixed = outputs + W::POINTS * out_step;  // [READ, count, in]
    float* products = mixed + W::READ * in;         // [READ, count, out]
    float* pixels = products + W::READ * out;       // [S, S, out]

    for (long n = 0; n < count; ++n) read_tile<W::READ, S>(clip, time, first + n, inputs + n * in_, in_step, in);
    const float* weights = weights_.data();
    const long matrix = c_in_ * out_;
    for (long point = 0; point < W::POINTS; ++point, weights += W::TIMES * matrix) {
      const float* from = inputs + point * in_step;
      float* to = outputs + point * out_step;
      if constexpr (FAST) {
        over_time<W::READ, W::READ>(from, in, mixed, [](const Vec* d, Vec* v) { Winograd<FRAMES>::inputs(d, v); });
        for (long t = 0; t < W::READ; ++t)
          product<false>(mixed + t * in, in_, weights + t * matrix, c_in_, out_, products + t * out, count);
        over_time<W::READ, W::RESULTS>(products, out, to, [](const Vec* m, Vec* y) { Winograd<FRAMES>::outputs(m, y); });
      } else {  // frames lie behind one another, so those of a tap are one product
        product<false>(from, in_, weights, c_in_, out_, to, W::RESULTS * count);
        for (long t = 1; t < TAPS; ++t)
          product<true>(from + t * in, in_, weights + t * matrix, c_in_, out_, to, W::RESULTS * count);
      }
    }
    for (long t = 0; t < W::RESULTS && time + t < clip.num_frames; ++t)
      for (long n = 0; n < count; ++n)
        write_tile<S>(clip, time + t, first + n, outputs + t * out + n * out_, out_step, pixels);
  }

  template <int IN, int OUT, typename Transform>
  static inline void over_time(const float* from, long step, float* to, const Transform& transform) {
    for (long i = 0; i < step; i += LANES) {
      Vec given[IN], made[OUT];
      for (int t = 0; t < IN; ++t) given[t] = load(from + t * step + i);
      transform(given, made);
      for (int t = 0; t < OUT; ++t) store(to + t * step + i, made[t]);
    }
  }

  // The points over space of one tile of NUM frames; frames behind the last and pixels outside of one are zeros.
  template <int NUM, int S>
  void read_tile(const Clip& clip, long time, long tile, float* to, long step, long frame_step) const {
    static const float zeros[MAX_CHANNELS] = {};
    constexpr int BORDER = S == 1 ? 0 : 1, READ = S + 2 * BORDER;
    const long top = tile / tiles_wide(clip) * S - BORDER, left = tile % tiles_wide(clip) * S - BORDER;
    long at[READ * READ];  // of a pixel in a frame, or negative
    for (int y = 0; y < READ; ++y)
      for (int x = 0; x < READ; ++x) {
        const long row = top + y, column = left + x;
        const bool inside = row >= 0 && row < clip.height && column >= 0 && column < clip.width;
        const long pixel = clip.doubled ? row / 2 * (clip.width / 2) + column / 2 : row * clip.width + column;
        at[y * READ + x] = inside ? pixel * c_in_ : -1;
      }
    for (long t = 0; t < NUM; ++t, to += frame_step) {
      const float* pixels[READ * READ];
      const bool is_there = time + t < clip.num_frames + taps_ - 1;
      for (int i = 0; i < READ * READ; ++i) pixels[i] = is_there && at[i] >= 0 ? clip.frames[time + t] + at[i] : zeros;
      long c = 0;
      for (; c + LANES <= c_in_; c += LANES) read_points<S, true>(pixels, c, to + c, step);
      if (c < c_in_) read_points<S, false>(pixels, c, to + c, step);
    }
  }

  // Of LANES channels, or of what is left of them.
  template <int S, bool WHOLE>
  inline void read_points(const float* const* pixels, long c, float* to, long step) const {
    constexpr int READ = S == 1 ? 1 : S + 2;
    Vec columns[READ][READ];
    for (int x = 0; x < READ; ++x) {
      Vec given[READ], made[READ];
      for (int y = 0; y < READ; ++y) {
        const float* pixel = pixels[y * READ + x] + c;
        given[y] = WHOLE ? load(pixel) : load(pixel, c_in_ - c);
      }
      Winograd<S>::inputs(given, made);
      for (int y = 0; y < READ; ++y) columns[y][x] = made[y];
    }
    for (int y = 0; y < READ; ++y) {
      Vec made[READ];
      Winograd<S>::inputs(columns[y], made);
      for (int x = 0; x < READ; ++x) store(to + (y * READ + x) * step, made[x]);
    }
  }

  // The pixels of one tile of one frame, with all that is done to a pixel while it is at hand.
  template <int S>
  void write_tile(const Clip& clip, long t, long tile, const float* from, long step, float* pixels) const {
    const long top = tile / tiles_wide(clip) * S, left = tile % tiles_wide(clip) * S;
    const long rows = std::min<long>(S, clip.height - top), columns = std::min<long>(S, clip.width - left);
    const long origin = ((t * clip.height + top) * clip.width + left) * c_out_;
    for (long c = 0; c < out_; c += LANES) write_points<S>(from + c, step, bias_.data() + c, pixels + c);
    for (long y = 0; y < rows; ++y)
      for (long x = 0; x < columns; ++x) {
        float* pixel = pixels + (y * S + x) * out_;
        const long at = origin + (y * clip.width + x) * c_out_;
        for (long c = 0; c < c_out_; c += LANES) {
          Vec value = load(pixel + c);
          if (clip.residual) value += load(clip.residual + at + c, c_out_ - c);
          if (clip.y) store(clip.y + at + c, value, c_out_ - c);
          if (clip.normed && clip.residual) store(pixel + c, value);
        }
        if (clip.normed) norm_pixel(pixel, clip.gamma, c_out_, true, clip.normed + at);
      }
  }

  template <int S>
  inline void write_points(const float* from, long step, const float* bias, float* pixels) const {
    constexpr int READ = S == 1 ? 1 : S + 2;
    Vec columns[S][READ];
    for (int x = 0; x < READ; ++x) {
      Vec given[READ], made[S];
      for (int y = 0; y < READ; ++y) given[y] = load(from + (y * READ + x) * step);
      Winograd<S>::outputs(given, made);
      for (int y = 0; y < S; ++y) columns[y][x] = made[y];
    }
    for (int y = 0; y < S; ++y) {
      Vec made[S];
      Winograd<S>::outputs(columns[y], made);
      for (int x = 0; x < S; ++x) store(pixels + (y * S + x) * out_, made[x] + load(bias));
    }
  }

  long c_in_, c_out_, taps_, in_, out_, side_, frames_, block_;
  void (Conv3d::*run_)(const Clip&, long, long, long) const;
  std::vector<float> weights_, bias_;
};

}  // namespace skylapse
