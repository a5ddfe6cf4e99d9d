// The one source of the CPU kernels: compiled once per instruction set with its own flags and
// -DFASTATTN_ISA=<name>, which names the namespace everything lives in.
#include "kernels.h"

#include "additive_backward.h"
#include "additive_forward.h"
#include "backward.h"
#include "forward.h"
#include "masked_softmax.h"
#include "roofline.h"
#include "rotary.h"
#include "row_intervals.h"
#include "weights_forward.h"

namespace fastattn::cpu::FASTATTN_ISA {

#if defined(FASTATTN_BF16_OPERANDS)
using ModeOfBFloat16 = BFloat16Mode;
#else
using ModeOfBFloat16 = Float32Mode;
#endif
// Where a tile product does sixteen times the work of a multiply-add, six of them are the faster float32, and three the
// faster float16.  Their operands cost more to pack: it pays from so many queries and keys on.
#if defined(__AMX_BF16__)
using ModeOfFloat32 = BFloat16Pieces<3>;
using ModeOfFloat16 = BFloat16Pieces<2>;
#else
using ModeOfFloat32 = Float32Mode;
using ModeOfFloat16 = Float32Mode;
#endif
constexpr i64 kLeastToSplit32 = 128, kLeastToSplit16 = 64;

// call(mode), with the kind of arithmetic this problem is computed in, forward and backward
template <class Call>
static auto with_mode(const Problem& p, Call call) {
  const i64 length = smaller(p.query_length, p.key_length);
  switch (p.query.dtype) {
    case DType::kFloat64:
      return call(Float64Mode{});
    case DType::kBFloat16:
      return call(ModeOfBFloat16{});
    case DType::kFloat16:
      return length < kLeastToSplit16 ? call(Float32Mode{}) : call(ModeOfFloat16{});
    default:
      return length < kLeastToSplit32 ? call(Float32Mode{}) : call(ModeOfFloat32{});
  }
}

static void run_forward(const Problem& problem, const ForwardOutput& output, const Parallel& parallel) {
  const RowIntervals masked(problem, parallel);
  with_mode(problem, [&]<class Mode>(Mode) { forward<Mode>(masked.problem(), output, parallel); });
}

static void run_weights_forward(const Problem& problem, const ForwardOutput& output, const WeightsOutput& weights,
                                const Parallel& parallel) {
  const RowIntervals masked(problem, parallel);
  with_mode(problem, [&]<class Mode>(Mode) { weights_forward<Mode>(masked.problem(), output, weights, parallel); });
}

static ForwardPlan run_plan(const Problem& problem, i64 threads) {
  const auto one_by_one = [](i64 count, void (*item)(void*, i64), void* context) {
    for (i64 i = 0; i < count; ++i) item(context, i);
  };
  const RowIntervals masked(problem, {1, one_by_one});
  return with_mode(problem, [&]<class Mode>(Mode) { return forward_plan<Mode>(masked.problem(), threads); });
}

static void run_backward(const Problem& problem, const BackwardInput& input, const BackwardOutput& output,
                         const Parallel& parallel) {
  const RowIntervals masked(problem, parallel);
  with_mode(problem, [&]<class Mode>(Mode) { backward<Mode>(masked.problem(), input, output, parallel); });
}

static void run_softmax_forward(const Problem& problem, const SoftmaxForward& views, const Parallel& parallel) {
  const RowIntervals masked(problem, parallel);
  if (problem.query.dtype == DType::kFloat64) return softmax_forward<double>(masked.problem(), views, parallel);
  softmax_forward<float>(masked.problem(), views, parallel);
}

static void run_softmax_backward(const Problem& problem, const SoftmaxBackward& views, const Parallel& parallel) {
  if (problem.query.dtype == DType::kFloat64) return softmax_backward<double>(problem, views, parallel);
  softmax_backward<float>(problem, views, parallel);
}

static void run_rotate(const Rotation& rotation, const Parallel& parallel) {
  if (rotation.from[0].dtype == DType::kFloat64) return rotate<double>(rotation, parallel);
  rotate<float>(rotation, parallel);
}

static void run_additive_forward(const Problem& problem, const View& weight, const ForwardOutput& output,
                                 const Parallel& parallel) {
  if (problem.query.dtype == DType::kFloat64) return additive_forward<double>(problem, weight, output, parallel);
  additive_forward<float>(problem, weight, output, parallel);
}

static void run_additive_backward(const Problem& problem, const View& weight, const BackwardInput& input,
                                  const BackwardOutput& output, const View& dweight, const Parallel& parallel) {
  if (problem.query.dtype == DType::kFloat64)
    return additive_backward<double>(problem, weight, input, output, dweight, parallel);
  additive_backward<float>(problem, weight, input, output, dweight, parallel);
}

static Roofline run_roofline(DType dtype, double seconds) {
  switch (dtype) {
    case DType::kFloat64:
      return roofline<Float64Mode>(seconds);
    case DType::kBFloat16:
      return roofline<ModeOfBFloat16>(seconds);
    default:
      return roofline<Float32Mode>(seconds);
  }
}

static void run_exp2(const float* in, float* out, i64 n, bool coarse) {
  FlushScope flush;
  for (i64 i = 0; i < n; i += kLanes<float>) store(out + i, coarse ? exp2<4>(load(in + i)) : exp2<5>(load(in + i)));
}

#define FASTATTN_STRING2(x) #x
#define FASTATTN_STRING(x) FASTATTN_STRING2(x)

extern const Kernels kernels;
const Kernels kernels = {FASTATTN_STRING(FASTATTN_ISA),
                         run_forward,
                         run_plan,
                         run_backward,
                         run_weights_forward,
                         run_softmax_forward,
                         run_softmax_backward,
                         run_rotate,
                         run_additive_forward,
                         run_additive_backward,
                         run_roofline,
                         run_exp2};

}  // namespace fastattn::cpu::FASTATTN_ISA
