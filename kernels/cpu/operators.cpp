// The operators of domain `skylapse` for ONNX Runtime. All work on frames [T, H, W, C] of floats; operators.py says what
// each computes.

#include <iterator>

#include "conv3d.h"
#include "downsample.h"
#include "ort.h"

using namespace skylapse;
using namespace skylapse::ort;

namespace {

void expect(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(what);
}

struct CausalConv3d {
  static constexpr const char* NAME = "CausalConv3d";
  static constexpr Presence INPUTS[] = {REQUIRED, REQUIRED, REQUIRED, OPTIONAL, OPTIONAL, OPTIONAL};
  static constexpr Presence OUTPUTS[] = {OPTIONAL, OPTIONAL};

  explicit CausalConv3d(const Info* info) : conv_(of(constant(info, 1), constant(info, 2))), doubled_(attribute(info, "doubled")) {}

  void run(Context* context) {
    const Tensor x = input(context, 0), past = input(context, 3), residual = input(context, 4), gamma = input(context, 5);
    expect(x.shape.size() == 4 && x.shape[3] == conv_.c_in(), "x must be [frames, height, width, c_in]");
    const long num_past = past ? past.shape[0] : 0, num_frames = x.shape[0] + num_past - conv_.taps() + 1;
    const long scale = doubled_ ? 2 : 1, height = x.shape[1] * scale, width = x.shape[2] * scale;
    expect(num_frames >= 0, "there must be as many frames as the kernel has taps");
    expect(!past || (past.shape[1] == x.shape[1] && past.shape[2] == x.shape[2] && past.shape[3] == x.shape[3]),
           "past frames must have the sides of x");
    const std::vector<int64_t> shape = {num_frames, height, width, conv_.c_out()};
    expect(!residual || residual.shape == shape, "residual must have the shape of the result");
    const Tensor y = output(context, 0, shape), normed = output(context, 1, shape);
    expect(!normed || (gamma && gamma.shape == std::vector<int64_t>{conv_.c_out()}), "gamma must be [c_out]");
    const long frame = x.shape[1] * x.shape[2] * x.shape[3];
    std::vector<const float*> frames;
    for (long t = 0; t < num_past; ++t) frames.push_back(past.data + t * frame);
    for (long t = 0; t < x.shape[0]; ++t) frames.push_back(x.data + t * frame);
    const Clip clip{frames.data(), num_frames, height, width, doubled_, residual.data, y.data, normed.data, gamma.data};
    parallel(context, conv_.num_pieces(clip), [&](long piece) { conv_.run(clip, piece); });
  }

 private:
  static Conv3d of(const Tensor& weight, const Tensor& bias) {
    const auto& shape = weight.shape;
    expect(shape.size() == 5 && shape[3] == shape[4], "weight must be [c_out, c_in, taps, side, side]");
    return Conv3d(weight.data, bias.data, shape[0], shape[1], shape[2], shape[3]);
  }

  Conv3d conv_;
  bool doubled_;
};

struct HalvingConv2d {
  static constexpr const char* NAME = "HalvingConv2d";
  static constexpr Presence INPUTS[] = {REQUIRED, REQUIRED, REQUIRED};
  static constexpr Presence OUTPUTS[] = {REQUIRED};

  explicit HalvingConv2d(const Info* info) : conv_(of(constant(info, 1), constant(info, 2))) {}

  void run(Context* context) {
    const Tensor x = input(context, 0);
    const long height = x.shape.at(1), width = x.shape.at(2), rows = height / 2;
    const Tensor y = output(context, 0, {x.shape[0], rows, width / 2, conv_.c_out()});
    parallel(context, x.shape[0] * rows, [&](long i) {
      const long t = i / rows;
      conv_.run(x.data + t * height * width * x.shape[3], height, width, i % rows, y.data + t * rows * (width / 2) * conv_.c_out());
    });
  }

 private:
  static Downsample of(const Tensor& weight, const Tensor& bias) {
    expect(weight.shape.size() == 4 && weight.shape[2] == 3 && weight.shape[3] == 3, "weight must be [c_out, c_in, 3, 3]");
    return Downsample(weight.data, bias.data, weight.shape[0], weight.shape[1]);
  }

  Downsample conv_;
};

struct RMSNorm {
  static constexpr const char* NAME = "RMSNorm";
  static constexpr Presence INPUTS[] = {REQUIRED, REQUIRED};
  static constexpr Presence OUTPUTS[] = {REQUIRED};

  explicit RMSNorm(const Info* info) : with_silu_(attribute(info, "silu")) {}

  void run(Context* context) {
    constexpr long GROUP = 256;  // pixels a piece
    const Tensor x = input(context, 0), gamma = input(context, 1), y = output(context, 0, x.shape);
    const long channels = x.shape.back();
    long pixels = 1;
    for (size_t i = 0; i + 1 < x.shape.size(); ++i) pixels *= x.shape[i];
    parallel(context, (pixels + GROUP - 1) / GROUP, [&](long piece) {
      for (long p = piece * GROUP; p < std::min((piece + 1) * GROUP, pixels); ++p)
        norm_pixel(x.data + p * channels, gamma.data, channels, with_silu_, y.data + p * channels);
    });
  }

 private:
  bool with_silu_;
};

struct LastFrames {
  static constexpr const char* NAME = "LastFrames";
  static constexpr Presence INPUTS[] = {REQUIRED, REQUIRED};
  static constexpr Presence OUTPUTS[] = {REQUIRED};

  explicit LastFrames(const Info*) {}

  void run(Context* context) {
    const Tensor past = input(context, 0), x = input(context, 1), y = output(context, 0, past.shape);
    const long frame = past.shape.at(1) * past.shape.at(2) * past.shape.at(3);
    for (long t = 0; t < past.shape[0]; ++t) {
      const long own = x.shape[0] - past.shape[0] + t;  // negative: a frame that is still of the past
      std::copy_n(own < 0 ? past.data + (past.shape[0] + own) * frame : x.data + own * frame, frame, y.data + t * frame);
    }
  }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) Status* RegisterCustomOps(Options* options, const ApiBase* base) {
  static const Operator operators[] = {
      operator_of<CausalConv3d>(), operator_of<HalvingConv2d>(), operator_of<RMSNorm>(), operator_of<LastFrames>()};
  const Api found = base->get_api(VERSION);
  api = found ? found : base->get_api(1);
  if (!found) return failed(std::runtime_error("onnxruntime must be 1.17 or newer"));
  Domain* domain = nullptr;
  try {
    call<const char*, Domain**>(CREATE_CUSTOM_OP_DOMAIN, "skylapse", &domain);
    for (const Operator& made : operators) call<Domain*, const Operator*>(CUSTOM_OP_DOMAIN_ADD, domain, &made);
    call<Options*, Domain*>(ADD_CUSTOM_OP_DOMAIN, options, domain);
    return nullptr;
  } catch (const std::exception& error) {
    return failed(error);
  }
}
