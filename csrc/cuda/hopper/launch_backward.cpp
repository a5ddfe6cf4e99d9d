#include <algorithm>

#include "../instances.h"
#include "call.h"
#include "launch.h"

namespace fastattn::cuda {
namespace {

using HopperLaunch = void (*)(const Launch&, const HopperBackwardParams&);
#define FASTATTN_BY_TYPE(kernel) {FASTATTN_BY_DIM(kernel##_f16), FASTATTN_BY_DIM(kernel##_bf16)}
// by whether it is plain, by type, by dimension
constexpr HopperLaunch kBackwardQ[2][2][5] = {FASTATTN_BY_TYPE(hopper_backward_q),
                                              FASTATTN_BY_TYPE(hopper_backward_q_plain)};
constexpr HopperLaunch kBackwardKv[2][2][5] = {FASTATTN_BY_TYPE(hopper_backward_kv),
                                               FASTATTN_BY_TYPE(hopper_backward_kv_plain)};

HopperBackwardQTiles q_tiles_of(const Problem& p) {
  return hopper_backward_q_tiles(kHopperDims[hopper_dim_index(p)], is_plain(features_of(p)));
}
HopperBackwardKvTiles kv_tiles_of(const Problem& p) {
  return hopper_backward_kv_tiles(kHopperDims[hopper_dim_index(p)], is_plain(features_of(p)));
}

template <class Tiles>
Plan plan_of(const char* kernel, const Tiles& tiles, int rows, int keys, i64 blocks, const Device& device) {
  Plan plan{kernel, tiles.dim, rows, keys, Tiles::kThreads, tiles.shared_bytes(), tiles.stages};
  plan.registers = Tiles::kRegisters;
  plan.waves = static_cast<int>(ceil_div(blocks, device.multiprocessors));
  return plan;
}

// What both have, with tiles of `rows` queries and `keys` keys.
HopperBackwardParams common(const Problem& p, const BackwardParams& b, int dim, int rows, int keys) {
  HopperBackwardParams params;
  const Attention& a = params.attention = b.attention;
  params.query = map_of(p, a.query, p.query_heads, p.query_length, p.head_dim, dim, rows);
  params.grad_out = map_of(p, b.grad_out, p.query_heads, p.query_length, p.value_dim, dim, rows);
  params.key = map_of(p, a.key, p.kv_heads, p.key_length, p.head_dim, dim, keys);
  params.value = map_of(p, a.value, p.kv_heads, p.key_length, p.value_dim, dim, keys);
  params.statistics = b.statistics;
  params.delta = b.delta;
  return params;
}

void start(HopperLaunch launch, const HopperBackwardParams& params, int shared_bytes, const Device& device) {
  launch({std::min(params.schedule.total, device.multiprocessors), 1, 1, shared_bytes, device.stream}, params);
}

}  // namespace

int hopper_partial_sums(const Problem& p) {
  return static_cast<int>(ceil_div(p.query_length, HopperBackwardQTiles::kRows)) * HopperBackwardQTiles::kGroups;
}

Plan hopper_backward_q_plan(const Problem& p, const Device& device) {
  const HopperBackwardQTiles tiles = q_tiles_of(p);
  const int rows = HopperBackwardQTiles::kRows;
  return plan_of("hopper_backward_q", tiles, rows, tiles.keys, ceil_div(p.query_length, rows) * p.query_heads * p.batch,
                 device);
}

Plan hopper_backward_kv_plan(const Problem& p, const Device& device) {
  const HopperBackwardKvTiles tiles = kv_tiles_of(p);
  return plan_of("hopper_backward_kv", tiles, tiles.queries, tiles.keys(),
                 ceil_div(p.key_length, tiles.keys()) * p.kv_heads * p.batch, device);
}

void hopper_backward_q(const Problem& p, const BackwardParams& b, const Device& device) {
  const int rows = HopperBackwardQTiles::kRows;
  const HopperBackwardQTiles tiles = q_tiles_of(p);
  HopperBackwardParams params = common(p, b, tiles.dim, rows, tiles.keys);
  params.rows_dquery = b.dquery;
  params.dquery = map_of(p, b.dquery, p.query_heads, p.query_length, p.head_dim, tiles.dim, 64);
  params.partial_slopes = b.partial_slopes;
  params.partial_ends = b.partial_ends;
  params.schedule = schedule_of(p, p.query_length, rows, p.query_heads, b.attention.group,
                                2 * p.key_length * (p.head_dim + p.value_dim));
  params.schedule.longest_first = b.attention.window_right >= 0;
  start(kBackwardQ[is_plain(b.attention)][type_index(p)][hopper_dim_index(p)], params, tiles.shared_bytes(), device);
}

void hopper_backward_kv(const Problem& p, const BackwardParams& b, const Device& device) {
  const HopperBackwardKvTiles tiles = kv_tiles_of(p);
  HopperBackwardParams params = common(p, b, tiles.dim, tiles.queries, tiles.keys());
  params.rows_dkey = b.dkey;
  params.rows_dvalue = b.dvalue;
  params.dkey = map_of(p, b.dkey, p.kv_heads, p.key_length, p.head_dim, tiles.dim, 64);
  params.dvalue = map_of(p, b.dvalue, p.kv_heads, p.key_length, p.value_dim, tiles.dim, 64);
  // the first keys of a causal mask are seen by most rows: longest first as they come
  params.schedule = schedule_of(p, p.key_length, tiles.keys(), p.kv_heads, 1,
                                2 * b.attention.group * p.query_length * (p.head_dim + p.value_dim));
  start(kBackwardKv[is_plain(b.attention)][type_index(p)][hopper_dim_index(p)], params, tiles.shared_bytes(), device);
}

}  // namespace fastattn::cuda
