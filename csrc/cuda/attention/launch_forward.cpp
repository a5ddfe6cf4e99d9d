#include <algorithm>
#include <initializer_list>
#include <iterator>
#include <string>
#include <utility>

#include "../hopper/launch.h"
#include "../instances.h"
#include "call.h"
#include "launch.h"

namespace fastattn::cuda {
namespace {

#define FASTATTN_BY_DIM(kernel) {kernel##_d32, kernel##_d64, kernel##_d96, kernel##_d128, kernel##_d192, kernel##_d256}
using ForwardLaunch = void (*)(const Launch&, const ForwardParams&);
constexpr ForwardLaunch kForward[2][6] = {FASTATTN_BY_DIM(forward_f16), FASTATTN_BY_DIM(forward_bf16)};
using DecodeLaunch = void (*)(const Launch&, const DecodeParams&);
constexpr int kDecodeDims[] = {64, 128, 256};
constexpr DecodeLaunch kDecode[2][3] = {{decode_f16_d64, decode_f16_d128, decode_f16_d256},
                                        {decode_bf16_d64, decode_bf16_d128, decode_bf16_d256}};

constexpr i64 kFewQueries = 16, kMostSplits = 128;

i64 width(const Problem& p) { return std::max(p.head_dim, p.value_dim); }

int decode_index(const Problem& p) {
  return static_cast<int>(std::lower_bound(std::begin(kDecodeDims), std::end(kDecodeDims), static_cast<int>(width(p))) -
                          kDecodeDims);
}

Plan decode_plan(const Problem& p, const Device& device) {
  const DecodeTiles tiles = decode_tiles(kDecodeDims[decode_index(p)]);
  Plan plan{"decode", tiles.dim, DecodeTiles::kRows, tiles.keys, tiles.threads(), tiles.shared_bytes(), 1, 1};
  const i64 whole = ceil_div(p.query_length * p.group(), DecodeTiles::kRows) * p.kv_heads * p.batch;
  // Enough blocks to fill the device twice, and work for each: at least two steps over the keys.
  const i64 wanted = ceil_div(2 * device.multiprocessors, whole), most = ceil_div(p.key_length, 2 * tiles.step());
  plan.splits = static_cast<int>(std::clamp(wanted, i64{1}, std::clamp(most, i64{1}, kMostSplits)));
  return plan;
}

void decode(const Problem& p, const ForwardOutput& output, const Plan& plan, Workspace& workspace,
            const Device& device) {
  const DecodeTiles tiles = decode_tiles(plan.dim);
  DecodeParams params;
  params.attention = attention_of(p, workspace, device);
  params.out = result_of("out", output.out);
  params.lse = static_cast<float*>(const_cast<void*>(output.lse.data));
  params.statistics = static_cast<float*>(const_cast<void*>(output.statistics.data));
  params.row_tiles = static_cast<int>(ceil_div(p.query_length * p.group(), DecodeTiles::kRows));
  params.keys_per_split =
      static_cast<int>(ceil_div(ceil_div(std::max(p.key_length, i64{1}), plan.splits), tiles.step()) * tiles.step());
  params.splits = static_cast<int>(ceil_div(std::max(p.key_length, i64{1}), params.keys_per_split));
  const i64 rows = p.batch * p.query_heads * p.query_length;
  if (params.splits > 1) {
    params.partial_out = static_cast<float*>(workspace.allocate(sizeof(float) * params.splits * rows * p.value_dim));
    params.partial_stat = static_cast<float*>(workspace.allocate(sizeof(float) * params.splits * rows * 2));
  }
  const i64 blocks = i64{params.splits} * params.row_tiles * p.kv_heads * p.batch;
  kDecode[type_index(p)][decode_index(p)]({checked("blocks", blocks), 1, 1, plan.shared_bytes, device.stream}, params);
  if (params.splits == 1) return;

  CombineParams combine;
  combine.partial_out = params.partial_out;
  combine.partial_stat = params.partial_stat;
  combine.splits = params.splits;
  combine.batch = params.attention.batch;
  combine.heads = params.attention.heads;
  combine.query_length = params.attention.query_length;
  combine.value_dim = params.attention.value_dim;
  combine.element = element_of("query", p.query);
  combine.sink = params.attention.sink;
  combine.out = params.out;
  combine.lse = params.lse;
  combine.statistics = params.statistics;
  attention_combine({checked("blocks", ceil_div(rows, CombineTiles::kRows)), 1, 1, 0, device.stream}, combine);
}

// Few queries have a kernel of their own; 0 splits where this is no such call.
Plan few_queries_plan(const Problem& p, const Device& device) {
  const bool few = p.query_length <= kFewQueries && p.dropout_p == 0 && p.batch * p.query_heads * p.query_length > 0 &&
                   !hopper_takes_few_queries(p, device);
  Plan plan;
  if (few) plan = decode_plan(p, device);
  if (!few || plan.shared_bytes > device.shared_memory_per_block) plan.splits = 0;
  return plan;
}

Plan rows_plan(const Problem& p, const Device& device) {
  const ForwardTiles tiles = forward_tiles(kHeadDims[dim_index(width(p))]);
  const bool two_stages = fits(device, tiles.shared_bytes(true), tiles.min_blocks);
  Plan plan;
  plan.dim = tiles.dim;
  plan.rows = tiles.rows;
  plan.keys = tiles.keys;
  plan.threads = tiles.threads();
  plan.shared_bytes = tiles.shared_bytes(two_stages);
  plan.stages = two_stages ? 2 : 1;
  return plan;
}

}  // namespace

Plan attention_plan(const Problem& p, const Device& device) {
  if (const Plan plan = few_queries_plan(p, device); plan.splits) return plan;
  const char* against = reason_against_hopper(p, device);
  if (!against) return hopper_forward_plan(p, device);
  Plan plan = rows_plan(p, device);
  if (device.capability / 10 == 9) plan.against_hopper = against;
  return plan;
}

namespace {

std::string entries(const Plan& plan) {
  std::string json = std::string(R"("kernel": ")") + plan.kernel + '"';
  for (const auto& [name, value] :
       std::initializer_list<std::pair<const char*, int>>{{"dim", plan.dim},
                                                          {"rows", plan.rows},
                                                          {"keys", plan.keys},
                                                          {"threads", plan.threads},
                                                          {"stages", plan.stages},
                                                          {"splits", plan.splits},
                                                          {"shared_bytes", plan.shared_bytes},
                                                          {"packed_heads", plan.packed_heads},
                                                          {"registers", plan.registers},
                                                          {"waves", plan.waves}})
    if (value) json += std::string(", \"") + name + "\": " + std::to_string(value);
  if (*plan.against_hopper) json += std::string(R"(, "not_hopper": ")") + plan.against_hopper + '"';
  return json;
}

}  // namespace

std::string e4m3_plan_json(const Problem& p, const Device& device) {
  return "{" + entries(hopper_e4m3_plan(p, device)) + "}";
}

std::string plan_json(const Problem& p, const Device& device) {
  return "{" + entries(attention_plan(p, device)) + R"(, "backward_q": {)" +
         entries(attention_backward_q_plan(p, device)) + R"(}, "backward_kv": {)" +
         entries(attention_backward_kv_plan(p, device)) + "}}";
}

void attention_forward(const Problem& p, const ForwardOutput& output, Workspace& workspace, const Device& device) {
  if (p.batch * p.query_heads * p.query_length == 0) return;
  if (const Plan plan = few_queries_plan(p, device); plan.splits) return decode(p, output, plan, workspace, device);
  if (!reason_against_hopper(p, device)) return hopper_forward(p, output, workspace, device);
  const Plan plan = rows_plan(p, device);
  ForwardParams params;
  params.attention = attention_of(p, workspace, device);
  params.attention.key_spans = key_spans_of(p, params.attention, workspace, device);
  params.out = result_of("out", output.out);
  params.lse = static_cast<float*>(const_cast<void*>(output.lse.data));
  params.statistics = static_cast<float*>(const_cast<void*>(output.statistics.data));
  params.tiles = static_cast<int>(ceil_div(p.query_length, plan.rows));
  params.two_stages = plan.stages == 2;
  const i64 blocks = params.tiles * p.query_heads * p.batch;
  kForward[type_index(p)][dim_index(width(p))]({checked("blocks", blocks), 1, 1, plan.shared_bytes, device.stream},
                                               params);
}

}  // namespace fastattn::cuda
