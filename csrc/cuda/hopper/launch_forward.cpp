#include <algorithm>
#include <stdexcept>
#include <string>

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

constexpr HopperLaunch kE4M3[2][3] = {
    {hopper_forward_e4m3_d64, hopper_forward_e4m3_d128, hopper_forward_e4m3_d256},
    {hopper_forward_plain_e4m3_d64, hopper_forward_plain_e4m3_d128, hopper_forward_plain_e4m3_d256}};

HopperForwardTiles tiles_of(const Problem& p) {
  const bool plain = is_plain(features_of(p));
  if (p.query.dtype == kFloat8) return hopper_e4m3_tiles(kHopperE4M3Dims[hopper_e4m3_dim_index(p)], plain);
  return hopper_forward_tiles(kHopperDims[hopper_dim_index(p)], plain);
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

namespace {

Plan plan_of(const Problem& p, const Device& device) {
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

HopperForwardParams params_of(const Problem& p, const ForwardOutput& output, Workspace& workspace,
                              const Device& device) {
  const HopperForwardTiles tiles = tiles_of(p);
  HopperForwardParams params;
  params.attention = attention_of(p, workspace, device);
  params.attention.key_spans = key_spans_of(p, params.attention, workspace, device);
  const Attention& a = params.attention;
  const Packing packing = params.packing = packing_for(p, tiles);
  params.query = packed_map_of(p, a.query, p.head_dim, tiles.dim, packing);
  params.key = map_of(p, a.key, p.kv_heads, p.key_length, p.head_dim, tiles.dim, tiles.keys);
  params.value = map_of(p, a.value, p.kv_heads, p.key_length, p.value_dim, tiles.dim, tiles.keys);
  params.rows_out = result_of("out", output.out);
  params.out = packed_map_of(p, params.rows_out, output.out.dtype, p.value_dim, tiles.dim, packing);
  params.lse = static_cast<float*>(const_cast<void*>(output.lse.data));
  params.statistics = static_cast<float*>(const_cast<void*>(output.statistics.data));
  params.schedule = schedule_of(p, p.query_length, tiles.groups * packing.queries, packing.packs,
                                a.group / packing.heads, tiles.element * p.key_length * (p.head_dim + p.value_dim));
  params.schedule.longest_first = a.window_right >= 0;
  return params;
}

void start(HopperLaunch launch, const HopperForwardParams& params, int shared_bytes, const Device& device) {
  launch({std::min(params.schedule.total, device.multiprocessors), 1, 1, shared_bytes, device.stream}, params);
}

PerHead scale_of(const char* name, const View& scale) {
  if (scale && (scale.dtype != DType::kFloat32 || (scale.size[1] > 1 && scale.stride[1] != 1)))
    throw std::runtime_error(std::string("fastattn: ") + name + " must be float32 and dense");
  return {static_cast<const float*>(scale.data), scale.stride[0]};
}

}  // namespace

Plan hopper_forward_plan(const Problem& p, const Device& device) { return plan_of(p, device); }
Plan hopper_e4m3_plan(const Problem& p, const Device& device) {
  Plan plan = plan_of(p, device);
  plan.kernel = "hopper_forward_e4m3";
  return plan;
}

void hopper_e4m3_forward(const Problem& p, const OperandScales& scales, const ForwardOutput& output,
                         Workspace& workspace, const Device& device) {
  if (p.batch * p.query_heads * p.query_length == 0) return;
  if (const char* reason = reason_against_e4m3(p, device))
    throw std::runtime_error(std::string("fastattn: no kernel takes these operands of 8 bits: ") + reason);
  HopperForwardParams params = params_of(p, output, workspace, device);
  params.query_scale = scale_of("query_scale", scales.query);
  params.key_scale = scale_of("key_scale", scales.key);
  params.value_scale = scale_of("value_scale", scales.value);
  start(kE4M3[is_plain(params.attention)][hopper_e4m3_dim_index(p)], params, tiles_of(p).shared_bytes(), device);
}

void hopper_forward(const Problem& p, const ForwardOutput& output, Workspace& workspace, const Device& device) {
  const HopperForwardParams params = params_of(p, output, workspace, device);
  const int dim = hopper_dim_index(p), type = type_index(p);
  const bool plain = is_plain(params.attention), unpinned = hopper_asked() == "unpinned" && type == 1 && kUnpinned[dim];
  const HopperLaunch launch = !plain ? kFull[type][dim] : unpinned ? kUnpinned[dim] : kPlain[type][dim];
  start(launch, params, tiles_of(p).shared_bytes(), device);
}

}  // namespace fastattn::cuda
