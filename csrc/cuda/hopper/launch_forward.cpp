#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <string_view>

#include "../arch/tensor_map.h"
#include "../attention/call.h"
#include "../instances.h"
#include "launch.h"
#include "tiles.h"

namespace fastattn::cuda {
namespace {

#ifdef FASTATTN_CUDA_ARCHS
constexpr bool kBuilt = std::string_view(FASTATTN_CUDA_ARCHS).find("90a") != std::string_view::npos;
#else
constexpr bool kBuilt = true;  // the simulator has every instruction
#endif

using HopperLaunch = void (*)(const Launch&, const HopperForwardParams&);
#define FASTATTN_BY_DIM(kernel) {kernel##_d64, kernel##_d96, kernel##_d128, kernel##_d192, kernel##_d256}
constexpr HopperLaunch kFull[2][5] = {FASTATTN_BY_DIM(hopper_forward_f16), FASTATTN_BY_DIM(hopper_forward_bf16)};
constexpr HopperLaunch kPlain[2][5] = {FASTATTN_BY_DIM(hopper_forward_plain_f16),
                                       FASTATTN_BY_DIM(hopper_forward_plain_bf16)};
constexpr HopperLaunch kUnpinned[5] = {hopper_forward_unpinned_bf16_d64, nullptr, hopper_forward_unpinned_bf16_d128,
                                       nullptr, hopper_forward_unpinned_bf16_d256};

// What K and V of a section of heads may take of L2's 50 MB.
constexpr i64 kSectionBytes = i64{32} << 20;

std::string_view asked() {
  const char* value = std::getenv("FASTATTN_CUDA_HOPPER");
  return value ? value : "0";
}

int hopper_dim_index(const Problem& p) {
  const int dim = static_cast<int>(std::max(p.head_dim, p.value_dim));
  return static_cast<int>(std::lower_bound(std::begin(kHopperDims), std::end(kHopperDims), dim) - kHopperDims);
}

// Intervals of keys are all there is.
bool is_plain(const Attention& a) {
  return !a.scaled && !a.negate && a.softcap_out == 0 && !a.query_ids.data && !a.mask.data && !a.slopes.data &&
         !a.table && !a.bias.data && !a.dropout_seed;
}

HopperForwardTiles tiles_of(const Problem& p) {
  return hopper_forward_tiles(kHopperDims[hopper_dim_index(p)], is_plain(features_of(p)));
}

i64 total_tiles(const Problem& p, const HopperForwardTiles& tiles) {
  return ceil_div(p.query_length, tiles.rows()) * p.query_heads * p.batch;
}

// A tensor as the copies see it, `rows` of which one copy takes.  A dimension that is broadcast has one element.
MappedOperand map_of(const View& shape, const Operand& x, int columns, int rows) {
  TensorLayout layout;
  MappedOperand result;
  layout.data = x.data;
  layout.element = shape.dtype == DType::kFloat16 ? TensorElement::kHalf : TensorElement::kBFloat16;
  layout.rank = 4;
  const i64 strides[3] = {x.row, x.head, x.batch};
  layout.size[0] = static_cast<uint64_t>(shape.size[3]);
  for (int axis = 0; axis < 3; ++axis) {
    const i64 size = shape.size[2 - axis];
    layout.size[axis + 1] = static_cast<uint64_t>(strides[axis] == 0 ? 1 : size);
    layout.stride_bytes[axis] = static_cast<uint64_t>(strides[axis] == 0 ? 16 : 2 * strides[axis]);
  }
  result.head_step = x.head != 0;
  result.batch_step = x.batch != 0;
  layout.box[0] = static_cast<uint32_t>(columns);
  layout.box[1] = static_cast<uint32_t>(rows);
  layout.box[2] = layout.box[3] = 1;
  layout.swizzle = columns == 64 ? Swizzle::k128 : Swizzle::k64;
  result.map = encode_tensor_map(layout);
  return result;
}

Schedule schedule_of(const Problem& p, const Attention& a, const HopperForwardTiles& tiles) {
  Schedule order;
  order.tiles = static_cast<int>(ceil_div(p.query_length, tiles.rows()));
  order.pairs = checked("batch times heads", p.batch * p.query_heads);
  order.total = checked("tiles", total_tiles(p, tiles), kMostBlocks / 4);
  const i64 head_bytes = 2 * p.key_length * (p.head_dim + p.value_dim);
  i64 section = a.group;
  while (2 * section <= order.pairs && 2 * section / a.group * head_bytes <= kSectionBytes) section *= 2;
  order.section = static_cast<int>(std::min<i64>(section, order.pairs));
  order.longest_first = a.window_right >= 0;
  return order;
}

}  // namespace

const char* reason_against_hopper(const Problem& p, const Device& device) {
  if (device.capability / 10 != 9) return "not a device of capability 9.0";
  if (!kBuilt) return "the library was built without sm_90a";
  if (asked() == "0" || asked().empty()) return "not asked for with FASTATTN_CUDA_HOPPER=1";
  if (p.key_length == 0) return "no keys";
  for (const View* x : {&p.query, &p.key, &p.value})
    if (x->size[2] > 1 && x->stride[2] == 0) return "an operand is broadcast along its length";
  return nullptr;
}

Plan hopper_forward_plan(const Problem& p, const Device& device) {
  const HopperForwardTiles tiles = tiles_of(p);
  Plan plan;
  plan.kernel = "hopper_forward";
  plan.dim = tiles.dim;
  plan.rows = tiles.rows();
  plan.keys = tiles.keys;
  plan.threads = tiles.threads();
  plan.shared_bytes = tiles.shared_bytes();
  plan.stages = tiles.stages;
  plan.registers = tiles.consumer_registers();
  plan.waves = static_cast<int>(ceil_div(total_tiles(p, tiles), device.multiprocessors));
  return plan;
}

void hopper_forward(const Problem& p, const ForwardOutput& output, Workspace& workspace, const Device& device) {
  const HopperForwardTiles tiles = tiles_of(p);
  const int columns = tiles.dim % 64 == 0 ? 64 : 32;  // of a panel
  HopperForwardParams params;
  params.attention = attention_of(p, workspace, device);
  const Attention& a = params.attention;
  params.query = map_of(p.query, a.query, columns, tiles.rows());
  params.key = map_of(p.key, a.key, columns, tiles.keys);
  params.value = map_of(p.value, a.value, columns, tiles.keys);
  params.rows_out = result_of("out", output.out);
  params.out =
      map_of(output.out, {params.rows_out.data, params.rows_out.batch, params.rows_out.head, params.rows_out.row},
             columns, 64);
  params.lse = static_cast<float*>(const_cast<void*>(output.lse.data));
  params.statistics = static_cast<float*>(const_cast<void*>(output.statistics.data));
  params.schedule = schedule_of(p, a, tiles);

  const int dim = hopper_dim_index(p), type = type_index(p);
  const bool plain = is_plain(a), unpinned = asked() == "unpinned" && type == 1 && kUnpinned[dim];
  const HopperLaunch launch = !plain ? kFull[type][dim] : unpinned ? kUnpinned[dim] : kPlain[type][dim];
  launch({std::min(params.schedule.total, device.multiprocessors), 1, 1, tiles.shared_bytes(), device.stream}, params);
}

}  // namespace fastattn::cuda
