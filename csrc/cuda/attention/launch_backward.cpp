#include <algorithm>

#include "../hopper/launch.h"
#include "../instances.h"
#include "call.h"
#include "launch.h"

namespace fastattn::cuda {
namespace {

#define FASTATTN_BY_DIM(kernel) {kernel##_d32, kernel##_d64, kernel##_d96, kernel##_d128, kernel##_d192, kernel##_d256}
using BackwardLaunch = void (*)(const Launch&, const BackwardParams&);
constexpr BackwardLaunch kBackwardKv[2][6] = {FASTATTN_BY_DIM(backward_kv_f16), FASTATTN_BY_DIM(backward_kv_bf16)};
constexpr BackwardLaunch kBackwardQ[2][6] = {FASTATTN_BY_DIM(backward_q_f16), FASTATTN_BY_DIM(backward_q_bf16)};
using ParameterLaunch = void (*)(const Launch&, const ParameterParams&);
constexpr ParameterLaunch kParameter[2] = {parameter_gradient_f16, parameter_gradient_bf16};

// Blocks the gradient of the table aims for, where its diagonals are too few to fill a device.
constexpr i64 kBlocksPerMultiprocessor = 8;

int dim_index_of(const Problem& p) { return dim_index(std::max(p.head_dim, p.value_dim)); }

float* numbers(const View& view) { return static_cast<float*>(const_cast<void*>(view.data)); }

// One backward call: the kernels that the wanted gradients need, and the small sums after them.
class Backward {
 public:
  Backward(const Problem& problem, const BackwardInput& input, const BackwardOutput& output, Workspace& workspace,
           const Device& device)
      : p(problem), in(input), out(output), workspace(workspace), device(device) {
    attention = attention_of(p, workspace, device);
    grad_out = operand_of("grad_out", in.grad_out);
    statistics = static_cast<const float*>(in.statistics.data);
    dim = dim_index_of(p);
    rows = p.batch * p.query_heads * p.query_length;
    delta = floats(rows);
    hopper = takes_hopper_backward(p, in.grad_out, device);
  }

  void run() {
    const bool for_keys = out.dkey || out.dvalue || out.dcol_table;
    const bool for_queries = out.dquery || out.dslopes || out.dtable || out.drow_table;
    if (for_queries || out.ddense_bias) attention.key_spans = key_spans_of(p, attention, workspace, device);
    if (for_keys) attention.query_spans = query_spans_of(p, attention, workspace, device);
    if (rows) launch_delta();
    if (out.dsink) sum_partials(partial_sink, delta_tiles, 1, 0, out.dsink, false);
    if (for_keys) launch_kv();
    if (for_queries) launch_q();
    if (out.ddense_bias) launch_bias();
    if (out.dtable) launch_table();
    rotate_back(p, out.dquery, out.dkey, device);
  }

 private:
  float* floats(i64 count) { return static_cast<float*>(workspace.allocate(sizeof(float) * std::max(count, i64{1}))); }

  Launch launch(i64 blocks, int shared_bytes) const {
    return {checked("blocks", blocks), 1, 1, shared_bytes, device.stream};
  }

  void launch_delta() {
    DeltaParams d;
    d.out = operand_of("out", in.out);
    d.grad_out = grad_out;
    if (in.grad_lse)
      d.grad_lse = {static_cast<const float*>(in.grad_lse.data), in.grad_lse.stride[0], in.grad_lse.stride[1],
                    in.grad_lse.stride[2]};
    d.statistics = statistics;
    d.delta = delta;
    d.element = element_of("query", p.query);
    d.batch = attention.batch;
    d.heads = attention.heads;
    d.query_length = attention.query_length;
    d.value_dim = attention.value_dim;
    d.tiles = delta_tiles = static_cast<int>(ceil_div(p.query_length, DeltaTiles::kRows));
    if (out.dsink) {
      d.sink = attention.sink;
      d.partial_sink = partial_sink = floats(p.batch * p.query_heads * d.tiles);
    }
    attention_delta(launch(p.batch * p.query_heads * d.tiles, DeltaTiles::kSharedBytes), d);
  }

  BackwardParams common() const {
    BackwardParams b;
    b.attention = attention;
    b.grad_out = grad_out;
    b.statistics = statistics;
    b.delta = delta;
    return b;
  }

  void launch_kv() {
    const BackwardKvTiles tiles = backward_kv_tiles(kHeadDims[dim]);
    BackwardParams b = common();
    b.tiles = static_cast<int>(ceil_div(p.key_length, tiles.keys));
    b.two_stages = fits(device, tiles.shared_bytes(true), 1);
    b.dkey = result_of("dkey", out.dkey);
    b.dvalue = result_of("dvalue", out.dvalue);
    if (out.dcol_table) b.dcol_table = numbers(out.dcol_table);
    if (hopper) return hopper_backward_kv(p, b, device);
    const i64 blocks = b.tiles * p.kv_heads * p.batch;
    if (blocks) kBackwardKv[type_index(p)][dim](launch(blocks, tiles.shared_bytes(b.two_stages)), b);
  }

  void launch_q() {
    const BackwardQTiles tiles = backward_q_tiles(kHeadDims[dim]);
    BackwardParams b = common();
    b.tiles = static_cast<int>(ceil_div(p.query_length, tiles.rows));
    b.two_stages = fits(device, tiles.shared_bytes(true), 1);
    b.dquery = result_of("dquery", out.dquery);
    if (out.drow_table) b.drow_table = numbers(out.drow_table);
    if (hopper) b.tiles = hopper_partial_sums(p);
    const i64 blocks = b.tiles * p.query_heads * p.batch;
    if (out.dslopes) b.partial_slopes = floats(blocks);
    if (out.dtable) b.partial_ends = floats(2 * blocks);
    if (hopper) {
      hopper_backward_q(p, b, device);
    } else if (blocks) {
      kBackwardQ[type_index(p)][dim](launch(blocks, tiles.shared_bytes(b.two_stages)), b);
    }
    if (out.dslopes) sum_partials(b.partial_slopes, b.tiles, 1, 0, out.dslopes, false);
    if (out.dtable) {
      // a table of one entry has both ends in it
      sum_partials(b.partial_ends, b.tiles, 2, 0, out.dtable, false);
      View last = out.dtable;
      last.data = numbers(last) + last.size[2] - 1;
      sum_partials(b.partial_ends, b.tiles, 2, 1, last, last.size[2] == 1);
    }
  }

  // Into the first column of `view`, (1|B, Hq) or (1|B, Hq, columns).
  void sum_partials(const float* partial, int count, int step, int first, const View& view, bool accumulate) {
    SumPartialsParams s;
    s.partial = partial;
    s.batch = attention.batch;
    s.heads = attention.heads;
    s.count = rows ? count : 0;
    s.step = step;
    s.first = first;
    s.out = numbers(view);
    s.out_batch = view.stride[0];
    s.out_head = view.size[1] == 1 ? 0 : view.stride[1];
    s.sum_batch = view.size[0] == 1;
    s.accumulate = accumulate;
    const i64 blocks = view.size[0] * p.query_heads;
    if (blocks) attention_sum(launch(blocks, SumTiles::kSharedBytes), {s, {}});
  }

  ParameterParams parameters() const {
    ParameterParams g;
    g.attention = attention;
    g.grad_out = grad_out;
    g.statistics = statistics;
    g.delta = delta;
    return g;
  }

  void launch_bias() {
    const View& grad = out.ddense_bias;
    const int tiles_m = static_cast<int>(ceil_div(p.query_length, ParameterTiles::kSize));
    const int tiles_n = static_cast<int>(ceil_div(p.key_length, ParameterTiles::kSize));
    ParameterParams g = parameters();
    g.dbias = const_cast<void*>(grad.data);
    g.element = element_of("dense_bias", grad);
    g.grad_batch = static_cast<int>(grad.size[0]);
    g.grad_heads = static_cast<int>(grad.size[1]);
    // a length of one is the same whether it broadcasts or not
    g.one_row = grad.size[2] == 1;
    g.one_column = grad.size[3] == 1;
    g.grad_rows = g.one_row ? 1 : tiles_m;
    g.grad_columns = g.one_column ? 1 : tiles_n;
    g.sum_batch = grad.size[0] == p.batch ? 1 : attention.batch;
    g.sum_heads = grad.size[1] == p.query_heads ? 1 : attention.heads;
    g.sum_rows = g.one_row ? tiles_m : 1;
    g.sum_columns = g.one_column ? tiles_n : 1;
    if (!rows || !p.key_length) g.sum_batch = 0;
    const i64 blocks = grad.size[0] * grad.size[1] * g.grad_rows * g.grad_columns;
    if (blocks > 0 && grad.size[2] > 0 && grad.size[3] > 0)
      kParameter[type_index(p)](launch(blocks, ParameterTiles::kSharedBytes), g);
  }

  void launch_table() {
    const i64 columns = p.table.size[2];
    if (columns <= 2) return;
    const int size = ParameterTiles::kSize;
    ParameterParams g = parameters();
    g.rows = static_cast<int>(ceil_div(p.query_length, size));
    g.columns = static_cast<int>(ceil_div(p.key_length, size));
    i64 first = -(g.rows - 1), last = g.columns - 1;
    if (!p.query_offsets) {
      // only diagonals with a distance strictly between the ends: |distance - size * diagonal + offset| < size
      const auto floor_div = [](i64 a, i64 b) { return a >= 0 ? a / b : -((b - 1 - a) / b); };
      first = std::max(first, -floor_div(attention.table_left + size - 1 - attention.query_offset, size));
      last = std::min(last, floor_div(attention.table_right + size - 1 + attention.query_offset, size));
    }
    // batches whose distances or tables differ are kept apart
    const i64 apart = p.query_offsets || p.table.size[0] > 1 ? p.batch : 1;
    const i64 diagonals = rows && p.key_length ? std::max(last - first + 1, i64{0}) : 0;
    SumDiagonalsParams s;
    if (diagonals) {
      const i64 most = std::min(g.rows, g.columns);
      const i64 wanted = kBlocksPerMultiprocessor * device.multiprocessors / (diagonals * p.query_heads * apart);
      g.splits = s.splits = static_cast<int>(std::clamp(wanted, i64{1}, most));
      g.first_diagonal = s.first_diagonal = static_cast<int>(first);
      g.diagonals = s.diagonals = static_cast<int>(diagonals);
      g.sum_batch = static_cast<int>(p.batch / apart);
      const i64 blocks = apart * p.query_heads * diagonals * g.splits;
      g.partial_diagonals = floats(blocks * ParameterTiles::kDiagonals);
      s.partial = g.partial_diagonals;
      kParameter[type_index(p)](launch(blocks, ParameterTiles::kSharedBytes), g);
    }
    s.apart = static_cast<int>(apart);
    s.heads = attention.heads;
    s.query_offset = attention.query_offset;
    s.query_offsets = attention.query_offsets;
    s.dtable = numbers(out.dtable);
    s.columns = static_cast<int>(columns);
    s.table_left = attention.table_left;
    s.out_batch = static_cast<int>(out.dtable.size[0]);
    const i64 items = out.dtable.size[0] * p.query_heads * columns;
    if (items) attention_sum(launch(ceil_div(items, SumTiles::kThreads), SumTiles::kSharedBytes), {{}, s});
  }

  const Problem& p;
  const BackwardInput& in;
  const BackwardOutput& out;
  Workspace& workspace;
  const Device& device;
  Attention attention;
  Operand grad_out;
  const float* statistics = nullptr;
  float* delta = nullptr;
  float* partial_sink = nullptr;
  int delta_tiles = 0, dim = 0;
  i64 rows = 0;
  bool hopper = false;
};

// Of a kernel whose two stages take `two_stages` bytes, and one `one_stage`.
Plan plan_of(const Problem& p, const Device& device, const char* kernel, int dim, int rows, int keys, int threads,
             int two_stages, int one_stage) {
  Plan plan{kernel, dim, rows, keys, threads};
  plan.stages = fits(device, two_stages, 1) ? 2 : 1;
  plan.shared_bytes = plan.stages == 2 ? two_stages : one_stage;
  if (device.capability / 10 == 9) plan.against_hopper = reason_against_hopper(p, device);
  return plan;
}

}  // namespace

Plan attention_backward_q_plan(const Problem& p, const Device& device) {
  if (!reason_against_hopper(p, device)) return hopper_backward_q_plan(p, device);
  const BackwardQTiles tiles = backward_q_tiles(kHeadDims[dim_index_of(p)]);
  return plan_of(p, device, "backward_q", tiles.dim, tiles.rows, tiles.keys, tiles.threads(), tiles.shared_bytes(true),
                 tiles.shared_bytes(false));
}

Plan attention_backward_kv_plan(const Problem& p, const Device& device) {
  if (!reason_against_hopper(p, device)) return hopper_backward_kv_plan(p, device);
  const BackwardKvTiles tiles = backward_kv_tiles(kHeadDims[dim_index_of(p)]);
  return plan_of(p, device, "backward_kv", tiles.dim, tiles.queries, tiles.keys, tiles.threads(),
                 tiles.shared_bytes(true), tiles.shared_bytes(false));
}

void attention_backward(const Problem& problem, const BackwardInput& input, const BackwardOutput& output,
                        Workspace& workspace, const Device& device) {
  Backward(problem, input, output, workspace, device).run();
}

}  // namespace fastattn::cuda
