#include <algorithm>

#include "../features/features.h"
#include "../instances.h"
#include "host.h"
#include "launch.h"

namespace fastattn::cuda {
namespace {

// Of row_threads.h, softmax_forward.h, softmax_backward.h, line_sum.h and part_sum.h.
constexpr int kThreads = 256, kSharedBytes = 128 + 16 * kThreads, kLineThreads = 128, kManyLines = 32;
// Elements a thread holds: 32 numbers forward, 64 bytes of each operand backward.
constexpr i64 kForwardHeld = 32;
i64 backward_held(i64 element_bytes) { return 64 / element_bytes; }
// Threads of a row, at least: fewer would leave its accesses in pieces of less than a sector or two.
constexpr i64 kFewestWide = 4, kFewestNarrow = 16;

// To as few threads each as can hold a row, to more where there are too few rows to fill the device.
RowDeal deal(const Problem& problem, i64 held, i64 run, bool wide, const Device& device) {
  RowDeal deal;
  const i64 columns = problem.key_length;
  deal.rows = checked("batch * heads * rows", problem.batch * problem.query_heads * problem.query_length,
                      kMostBlocks - kThreads);
  i64 threads = wide ? kFewestWide : kFewestNarrow;
  const auto blocks = [&] { return ceil_div(deal.rows, kThreads / threads); };
  while (threads < kThreads && threads * held < columns) threads *= 2;
  while (threads < kThreads && blocks() < 2 * device.multiprocessors && threads * run < columns) threads *= 2;
  deal.threads = static_cast<int>(threads);
  deal.tiles = static_cast<int>(ceil_div(columns, threads * held));
  deal.wide = wide;
  deal.thread_step = wide ? static_cast<int>(run) : 1;
  deal.element_step = wide ? 1 : deal.threads;
  return deal;
}

Launch row_launch(const RowDeal& deal, const Device& device) {
  return {static_cast<int>(ceil_div(deal.rows, kThreads / deal.threads)), 1, 1, kSharedBytes, device.stream};
}

struct Gradients {
  const Problem& problem;
  const SoftmaxBackward& views;
  Workspace& workspace;
  const Device& device;
  SoftmaxGradientParams rows;

  float* partial(i64 count) const { return static_cast<float*>(workspace.allocate(count * sizeof(float))); }

  // The pass over the rows.
  void row_pass() {
    const View& bias = views.ddense_bias;
    const i64 size = element_size(views.out.dtype), run = 16 / size;
    rows.features = features_of(problem);
    rows.scale = static_cast<float>(problem.scale);
    rows.out = rows_of(views.out);
    rows.grad_out = rows_of(views.grad_out);
    rows.dscores = rows_of(views.dscores);
    const bool wide =
        in_runs(views.out, run) && in_runs(views.grad_out, run) && (!views.dscores || in_runs(views.dscores, run));
    rows.deal = deal(problem, backward_held(size), run, wide, device);
    const i64 count = rows.deal.rows;
    const bool by_column = bias && bias.size[3] == problem.key_length;
    if (by_column || table_lines() > 0) rows.delta = partial(count);
    if (views.dslopes) rows.distances = partial(count);
    if (views.dtable) rows.ends = partial(2 * count);
    if (bias && !by_column) rows.totals = partial(count);
    const Launch launch = row_launch(rows.deal, device);
    switch (element_of("out", views.out)) {
      case Element::kFloat32:
        return softmax_backward_f32(launch, rows);
      case Element::kFloat16:
        return softmax_backward_f16(launch, rows);
      case Element::kBFloat16:
        return softmax_backward_bf16(launch, rows);
    }
  }

  // Inner entries of the table that some place uses.
  i64 table_lines() const { return views.dtable ? std::max<i64>(0, views.dtable.size[2] - 2) : 0; }

  LineSumParams lines(i64 count) const {
    LineSumParams p;
    p.features = rows.features;
    p.out = rows.out;
    p.grad_out = rows.grad_out;
    p.element = element_of("out", views.out);
    p.delta = rows.delta;
    p.lines = checked("lines", count);
    return p;
  }

  void launch_lines(const LineSumParams& p) const {
    const i64 blocks = ceil_div(p.lines, kLineThreads) * p.parts * p.batches * p.heads;
    const Launch launch{checked("blocks", blocks), 1, 1, 0, device.stream};
    if (p.element == Element::kFloat32)
      line_sum_f32(launch, p);
    else
      line_sum_f16(launch, p);
  }

  // Cuts the rows into parts: enough blocks to fill the device, at least 64 rows each.  Sums of each batch, head and
  // part.
  void cut_rows(LineSumParams& p) const {
    p.batches = rows.features.batch;
    p.heads = rows.features.heads;
    const i64 whole = ceil_div(p.lines, kLineThreads) * p.batches * p.heads;
    const i64 most = ceil_div(problem.query_length, 64);
    const i64 parts = std::clamp(ceil_div(8 * device.multiprocessors, whole), i64{1}, most);
    p.rows_per_part = static_cast<int>(ceil_div(problem.query_length, parts));
    p.parts = static_cast<int>(ceil_div(problem.query_length, p.rows_per_part));
    p.sums = partial(i64{p.batches} * p.heads * p.parts * p.lines);
  }

  // gradient[b, h, first + n] (+)= sign * the sum of parts[b, h, t, n] over t and what shares (b, h).
  void add_parts(const float* parts, i64 count, i64 lines, const View& gradient, i64 first, float sign,
                 bool accumulate = false) const {
    PartSumParams p;
    p.parts = parts;
    p.batches = static_cast<int>(gradient.size[0]);
    p.heads = static_cast<int>(gradient.size[1]);
    p.sum_batches = rows.features.batch / p.batches;
    p.sum_heads = rows.features.heads / p.heads;
    p.count = static_cast<int>(count);
    p.lines = checked("lines", lines);
    p.sign = sign;
    p.out = static_cast<char*>(const_cast<void*>(gradient.data)) + first * element_size(gradient.dtype);
    p.out_batch = gradient.stride[0];
    p.out_head = gradient.stride[1];
    p.out_element = element_of("gradient", gradient);
    p.accumulate = accumulate;
    const i64 blocks = (lines >= kManyLines ? ceil_div(lines, kThreads) : lines) * p.batches * p.heads;
    part_sum({checked("blocks", blocks), 1, 1, kSharedBytes, device.stream}, p);
  }

  // Fills a contiguous gradient: the sum of no parts.
  void zero(const View& gradient) const {
    const i64 count = gradient.size[0] * gradient.size[1] * gradient.size[2] * gradient.size[3];
    if (!gradient || !count) return;
    PartSumParams p;
    p.count = 0;
    p.lines = checked("elements of a gradient", count);
    p.out = const_cast<void*>(gradient.data);
    p.out_element = element_of("gradient", gradient);
    part_sum(
        {checked("blocks", count >= kManyLines ? ceil_div(count, kThreads) : count), 1, 1, kSharedBytes, device.stream},
        p);
  }

  void slopes() const { add_parts(rows.distances, problem.query_length, 1, views.dslopes, 0, -1); }

  void table() const {
    const View& gradient = views.dtable;
    const i64 columns = gradient.size[2];
    // a table of one column has both ends in it
    add_parts(rows.ends, problem.query_length, 1, gradient, 0, 1);
    add_parts(rows.ends + rows.deal.rows, problem.query_length, 1, gradient, columns - 1, 1,
              /*accumulate=*/columns == 1);
    if (!table_lines()) return;
    LineSumParams p = lines(table_lines());
    p.diagonal = true;
    p.first_distance = 1 - rows.features.table_left;
    cut_rows(p);
    launch_lines(p);
    add_parts(static_cast<const float*>(p.sums), p.parts, p.lines, gradient, 1, 1);
  }

  void bias() const {
    const View& gradient = views.ddense_bias;
    const bool own_rows = gradient.size[2] == problem.query_length;
    if (rows.totals) {
      // one column: the rows' own sums, or all of them
      if (own_rows)
        add_parts(rows.totals, 1, problem.query_length, gradient, 0, 1);
      else
        add_parts(rows.totals, problem.query_length, 1, gradient, 0, 1);
      return;
    }
    LineSumParams p = lines(problem.key_length);
    if (own_rows) {
      p.batches = static_cast<int>(gradient.size[0]);
      p.heads = static_cast<int>(gradient.size[1]);
      p.sum_batches = rows.features.batch / p.batches;
      p.sum_heads = rows.features.heads / p.heads;
      p.parts = rows.features.query_length;
      p.sums = const_cast<void*>(gradient.data);
      p.sum_element = element_of("dense_bias", gradient);
      launch_lines(p);
    } else {
      cut_rows(p);
      launch_lines(p);
      add_parts(static_cast<const float*>(p.sums), p.parts, p.lines, gradient, 0, 1);
    }
  }
};

}  // namespace

void softmax_forward(const Problem& problem, const SoftmaxForward& views, const Device& device) {
  const i64 run = 16 / element_size(views.scores.dtype);
  const Element element = element_of("scores", views.scores);
  if (!problem.batch || !problem.query_heads || !problem.query_length || !problem.key_length) return;
  SoftmaxParams p;
  p.features = features_of(problem);
  p.scale = static_cast<float>(problem.scale);
  p.scores = rows_of(views.scores);
  p.out = rows_of(views.out);
  const bool wide = in_runs(views.scores, run) && in_runs(views.out, run);
  p.deal = deal(problem, kForwardHeld, run, wide, device);
  p.wide_mask = wide && problem.dense_mask && in_runs(problem.dense_mask, run);
  p.wide_bias = wide && problem.dense_bias && in_runs(problem.dense_bias, run);
  const Launch launch = row_launch(p.deal, device);
  switch (element) {
    case Element::kFloat32:
      return softmax_forward_f32(launch, p);
    case Element::kFloat16:
      return softmax_forward_f16(launch, p);
    case Element::kBFloat16:
      return softmax_forward_bf16(launch, p);
  }
}

void softmax_backward(const Problem& problem, const SoftmaxBackward& views, Workspace& workspace,
                      const Device& device) {
  Gradients gradients{problem, views, workspace, device, {}};
  if (!problem.batch || !problem.query_heads || !problem.query_length || !problem.key_length) {
    for (const View* gradient : {&views.dslopes, &views.dtable, &views.ddense_bias}) gradients.zero(*gradient);
    return;
  }
  gradients.row_pass();
  if (views.dslopes) gradients.slopes();
  if (views.dtable) gradients.table();
  if (views.ddense_bias) gradients.bias();
}

}  // namespace fastattn::cuda
