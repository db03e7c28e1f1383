// Vectors of floats as wide as the instruction set that this is compiled for (GCC's and Clang's vector extensions).
#pragma once

#include <cstring>

namespace skylapse {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;  // ROWS x 2 vectors of sums leave registers for what is multiplied
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 4;
#else
constexpr int LANES = 4, ROWS = 8;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int IntVec __attribute__((vector_size(LANES * 4)));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline long round_up(long n, long to) { return (n + to - 1) / to * to; }

inline Vec all(float x) { return x - Vec{}; }
inline Vec load(const float* at) { return *reinterpret_cast<const Unaligned*>(at); }
inline void store(float* at, Vec x) { *reinterpret_cast<Unaligned*>(at) = x; }

// The first `count` lanes alone; those behind them are zeros.
inline Vec load(const float* at, long count) {
  if (count >= LANES) return load(at);
  Vec x{};
  std::memcpy(&x, at, count * sizeof(float));
  return x;
}

inline void store(float* at, Vec x, long count) {
  if (count >= LANES) return store(at, x);
  std::memcpy(at, &x, count * sizeof(float));
}

template <int N>
struct Lanes {
  typedef float Type __attribute__((vector_size(N * 4)));
};

template <int N>
inline float sum(typename Lanes<N>::Type x) {
  if constexpr (N == 2) {
    return x[0] + x[1];
  } else {  // halves upon one another, as no chain of additions is longer than it must be
    typename Lanes<N / 2>::Type low, high;
    std::memcpy(&low, &x, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof low, sizeof high);
    return sum<N / 2>(low + high);
  }
}

inline float sum(Vec x) { return sum<LANES>(x); }

// e^x to 2 units in the last place: 2^n e^r with |r| <= ln 2 / 2, and e^r's series (Cody & Waite's reduction).
inline Vec exp(Vec x) {
  const Vec low = all(-87.0f), high = all(88.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the lowest bits
  const Vec shifted = x * 1.44269504f + round;
  const Vec n = shifted - round;
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec series = all(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f}) series = series * r + c;
  IntVec bits, power;
  std::memcpy(&bits, &shifted, sizeof bits);
  power = (bits << 23) + 0x3f800000;  // what is above the integer is shifted out
  Vec scale;
  std::memcpy(&scale, &power, sizeof scale);
  return series * scale;
}

inline Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

}  // namespace skylapse
