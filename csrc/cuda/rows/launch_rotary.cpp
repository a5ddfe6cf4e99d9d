#include <algorithm>

#include "../instances.h"
#include "host.h"
#include "launch.h"

namespace fastattn::cuda {
namespace {

constexpr int kThreads = 256, kHeads = 4;  // of a block of rotary.h

RotaryTable table_of(const View& view) {
  return {static_cast<const float*>(view.data), view.stride[0], view.stride[1], view.stride[2]};
}

bool table_in_runs(const View& view) {
  return (view.size[2] <= 1 || view.stride[2] == 1) && view.stride[0] % 4 == 0 && view.stride[1] % 4 == 0 &&
         reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
}

RotarySide side_of(const RotationSide& given) {
  RotarySide side;
  const i64 batch = given.from.size[0];
  side.from = rows_of(given.from);
  side.to = rows_of(given.to);
  side.cos = table_of(given.cos);
  side.sin = table_of(given.sin);
  side.positions = static_cast<const i64*>(given.positions.data);
  side.positions_batch = given.positions.stride[0];
  side.positions_token = given.positions.stride[1];
  side.offsets = {static_cast<const i64*>(given.offsets.data), given.offsets.stride[0]};
  side.offset = given.offset;
  side.heads = checked("heads", given.from.size[1]);
  side.length = checked("length", given.from.size[2]);
  side.tokens = checked("batch * length", batch * given.from.size[2]);
  side.groups = checked("heads", ceil_div(given.from.size[1], kHeads));
  side.table_rows = given.cos.size[1];
  return side;
}

}  // namespace

void rotate(const RotationSide& query, const RotationSide& key, bool interleaved, bool conjugate,
            const Device& device) {
  const RotationSide* given[2] = {&query, &key};
  RotaryParams p;
  const Element element = element_of("query", query.from);
  const i64 dim = query.from.size[3], half = query.cos.size[2], run = 16 / element_size(query.from.dtype);
  p.dim = checked("head dimension", dim);
  p.half = static_cast<int>(half);
  p.interleaved = interleaved;
  p.conjugate = conjugate;
  p.wide = interleaved ? 2 * half % run == 0 : half % run == 0;
  for (int n = 0; n < 2; ++n) {
    const RotationSide& side = *given[n];
    p.side[n] = side_of(side);
    p.wide = p.wide && in_runs(side.from, run) && in_runs(side.to, run) && table_in_runs(side.cos) &&
             table_in_runs(side.sin);
    p.copy_rest = p.copy_rest || (dim > 2 * half && side.from.data != side.to.data);
  }
  const i64 turning = p.wide ? (interleaved ? 2 * half : half) / run : half;
  p.units = static_cast<int>(turning + (p.copy_rest ? (dim - 2 * half) / (p.wide ? run : 1) : 0));
  if (!p.units) return;
  p.tokens_per_block = std::max(1, kThreads / p.units);
  i64 blocks = 0;
  for (RotarySide& side : p.side) {
    side.blocks = checked("blocks", ceil_div(side.tokens, p.tokens_per_block) * side.groups);
    blocks += side.blocks;
  }
  if (!blocks) return;
  const Launch launch{checked("blocks", blocks), 1, 1, 0, device.stream};
  switch (element) {
    case Element::kFloat32:
      return rotary_f32(launch, p);
    case Element::kFloat16:
      return rotary_f16(launch, p);
    case Element::kBFloat16:
      return rotary_bf16(launch, p);
  }
}

void rotate(const Rotation& r, const Device& device) {
  const auto side = [&](int n) { return RotationSide{r.from[n], r.to[n], r.cos, r.sin, r.positions, {}, 0}; };
  rotate(side(0), side(1), r.interleaved, r.conjugate, device);
}

}  // namespace fastattn::cuda
