// delta_i = sum over d of dO_id O_id, less the gradient of lse; and the sink's gradient, one partial sum per block.
#pragma once

#include "scores.h"
#include "tiles.h"

namespace fastattn::cuda {

FASTATTN_DEVICE float dot8(const Vec4& a, const Vec4& b, Element element) {
  float sum = 0.0f;
  FASTATTN_UNROLL
  for (int n = 0; n < 4; ++n) {
    float a0, a1, b0, b1;
    if (element == Element::kFloat16) {
      unpack2<Half>(a.x[n], a0, a1);
      unpack2<Half>(b.x[n], b0, b1);
    } else {
      unpack2<BFloat16>(a.x[n], a0, a1);
      unpack2<BFloat16>(b.x[n], b0, b1);
    }
    sum = fmaf(a0, b0, sum);
    sum = fmaf(a1, b1, sum);
  }
  return sum;
}

FASTATTN_DEVICE void attention_delta(const DeltaParams& p) {
  const int tile = block_index() % p.tiles, bh = block_index() / p.tiles, b = bh / p.heads, h = bh % p.heads;
  const int i = tile * DeltaTiles::kRows + thread_index() / 8, part = thread_index() % 8;
  float delta = 0.0f, sink_gradient = 0.0f;
  if (i < p.query_length) {
    const uint16_t* out = static_cast<const uint16_t*>(p.out.data) + b * p.out.batch + h * p.out.head + i * p.out.row;
    const uint16_t* grad =
        static_cast<const uint16_t*>(p.grad_out.data) + b * p.grad_out.batch + h * p.grad_out.head + i * p.grad_out.row;
    for (int c = part; c < p.value_dim / 8; c += 8)
      delta += dot8(load_constant(reinterpret_cast<const Vec4*>(out) + c),
                    load_constant(reinterpret_cast<const Vec4*>(grad) + c), p.element);
  }
  delta += shuffle_xor(delta, 1);
  delta += shuffle_xor(delta, 2);
  delta += shuffle_xor(delta, 4);
  if (i < p.query_length && part == 0) {
    const i64 row = static_cast<i64>(bh) * p.query_length + i;
    if (p.grad_lse.data)
      delta -= load_constant(p.grad_lse.data + b * p.grad_lse.batch + h * p.grad_lse.head + i * p.grad_lse.row);
    const float largest = load_constant(p.statistics + 2 * row), log_sum = load_constant(p.statistics + 2 * row + 1);
    // a row without any visible key has no gradient, whatever came in
    if (log_sum == infinity()) delta = 0.0f;
    store_global(p.delta + row, delta);
    if (p.partial_sink) {
      const float sink = load_constant(p.sink.data + b * p.sink.batch + h) * kLog2E;
      sink_gradient = -exp2_approx(sink - largest - log_sum) * delta;
    }
  }
  if (p.partial_sink) {
    const SharedAddress sums = shared_base();
    if (part == 0) store_shared(sums + 4 * (thread_index() / 8), sink_gradient);
    sync_block();
    if (thread_index() == 0) {
      float total = 0.0f;
      for (int r = 0; r < DeltaTiles::kRows; ++r) total += load_shared<float>(sums + 4 * r);
      store_global(p.partial_sink + block_index(), total);
    }
  }
}

}  // namespace fastattn::cuda
