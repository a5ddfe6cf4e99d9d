#include <algorithm>

#include "../instances.h"
#include "call.h"
#include "launch.h"

namespace fastattn::cuda {
namespace {

using HopperLaunch = void (*)(const Launch&, const HopperForwardParams&);
constexpr HopperLaunch kFull[2][5] = {FASTATTN_BY_DIM(hopper_forward_f16), FASTATTN_BY_DIM(hopper_forward_bf16)};
constexpr HopperLaunch kPlain[2][5] = {FASTATTN_BY_DIM(hopper_forward_plain_f16),
                                       FASTATTN_BY_DIM(hopper_forward_plain_bf16)};
constexpr HopperLaunch kUnpinned[5] = {hopper_forward_unpinned_bf16_d64, nullptr, hopper_forward_unpinned_bf16_d128,
                                       nullptr, hopper_forward_unpinned_bf16_d256};

HopperForwardTiles tiles_of(const Problem& p) {
  return hopper_forward_tiles(kHopperDims[hopper_dim_index(p)], is_plain(features_of(p)));
}

Packing packing_for(const Problem& p, const HopperForwardTiles& tiles) {
  const bool apart = p.query.size[1] > 1 && p.query.stride[1] != 0;
  return packing_of(apart ? packed_heads(p.query_length, static_cast<int>(p.group()), tiles.groups) : 1,
                    static_cast<int>(p.query_heads));
}

i64 total_tiles(const Problem& p, const HopperForwardTiles& tiles, const Packing& packing) {
  return ceil_div(p.query_length, tiles.groups * packing.queries) * packing.packs * p.batch;
}

}  // namespace

bool hopper_takes_few_queries(const Problem& p, const Device& device) {
  if (reason_against_hopper(p, device) || p.query_length * p.group() <= DecodeTiles::kRows) return false;
  const HopperForwardTiles tiles = tiles_of(p);
  return total_tiles(p, tiles, packing_for(p, tiles)) >= device.multiprocessors;
}

Plan hopper_forward_plan(const Problem& p, const Device& device) {
  const HopperForwardTiles tiles = tiles_of(p);
  const Packing packing = packing_for(p, tiles);
  Plan plan;
  plan.kernel = "hopper_forward";
  plan.dim = tiles.dim;
  plan.rows = tiles.rows();
  plan.keys = tiles.keys;
  plan.threads = tiles.threads();
  plan.shared_bytes = tiles.shared_bytes();
  plan.stages = tiles.stages;
  plan.registers = tiles.consumer_registers();
  plan.packed_heads = packing.heads;
  plan.waves = static_cast<int>(ceil_div(total_tiles(p, tiles, packing), device.multiprocessors));
  return plan;
}

void hopper_forward(const Problem& p, const ForwardOutput& output, Workspace& workspace, const Device& device) {
  const HopperForwardTiles tiles = tiles_of(p);
  HopperForwardParams params;
  params.attention = attention_of(p, workspace, device);
  const Attention& a = params.attention;
  const Packing packing = params.packing = packing_for(p, tiles);
  params.query = packed_map_of(p, a.query, p.head_dim, tiles.dim, packing);
  params.key = map_of(p, a.key, p.kv_heads, p.key_length, p.head_dim, tiles.dim, tiles.keys);
  params.value = map_of(p, a.value, p.kv_heads, p.key_length, p.value_dim, tiles.dim, tiles.keys);
  params.rows_out = result_of("out", output.out);
  const Result& out = params.rows_out;
  params.out = packed_map_of(p, {out.data, out.batch, out.head, out.row}, p.value_dim, tiles.dim, packing);
  params.lse = static_cast<float*>(const_cast<void*>(output.lse.data));
  params.statistics = static_cast<float*>(const_cast<void*>(output.statistics.data));
  params.schedule = schedule_of(p, p.query_length, tiles.groups * packing.queries, packing.packs,
                                a.group / packing.heads, 2 * p.key_length * (p.head_dim + p.value_dim));
  params.schedule.longest_first = a.window_right >= 0;

  const int dim = hopper_dim_index(p), type = type_index(p);
  const bool plain = is_plain(a), unpinned = hopper_asked() == "unpinned" && type == 1 && kUnpinned[dim];
  const HopperLaunch launch = !plain ? kFull[type][dim] : unpinned ? kUnpinned[dim] : kPlain[type][dim];
  launch({std::min(params.schedule.total, device.multiprocessors), 1, 1, tiles.shared_bytes(), device.stream}, params);
}

}  // namespace fastattn::cuda
