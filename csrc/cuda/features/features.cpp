#include "features.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "checks.h"

namespace fastattn::cuda {
namespace {

// As kFarthest of geometry.h: positions, windows and lengths add up within 31 bits.
constexpr i64 kFarthest = i64{1} << 29;
constexpr double kLog2E = 1.4426950408889634;

template <class T>
const T* pointer(const View& view) {
  return static_cast<const T*>(view.data);
}

Dense dense_of(const View& view) { return {view.data, view.stride[0], view.stride[1], view.stride[2], view.stride[3]}; }

void set_scale(Attention& f, const Problem& p) {
  // slopes alone are taken to the units of q.k, where these are numbers of ordinary size
  const double size = std::abs(p.scale);
  const bool added =
      p.table || p.dense_bias || p.row_table || p.col_table || (p.slopes && !(size > 1e-6 && size < 1e6));
  f.scale = static_cast<float>(p.scale);
  f.scale_log2 = static_cast<float>(p.scale * kLog2E);
  f.slope_unit = static_cast<float>(kLog2E);
  if (p.softcap != 0) {
    f.softcap_in = static_cast<float>(p.scale / p.softcap);
    f.softcap_out = static_cast<float>(p.softcap * kLog2E);
  } else if (added || p.scale == 0) {
    f.scaled = true;
  } else {
    f.negate = p.scale < 0;
    f.multiplier = std::abs(f.scale_log2);
    f.slope_unit = static_cast<float>(1 / size);
  }
}

void check_dense(const char* name, const View& view) {
  if (view.size[3] > 1 && view.stride[3] != 1)
    throw std::runtime_error(std::string("fastattn: ") + name + ": the last dimension must be dense");
}

ContentTables tables_of(const Problem& p) {
  ContentTables t;
  if (!p.row_table && !p.col_table) return t;
  t.last = checked("columns of row_table and col_table", p.table_columns(), kFarthest) - 1;
  if (p.row_table) {
    check_dense("row_table", p.row_table);
    t.rows = pointer<float>(p.row_table);
    t.rows_batch = p.row_table.stride[0];
    t.rows_head = p.row_table.stride[1];
    t.rows_row = checked("elements between rows of row_table", p.row_table.stride[2]);
  }
  if (p.col_table) {
    check_dense("col_table", p.col_table);
    t.cols = pointer<float>(p.col_table);
    t.cols_batch = p.col_table.stride[0];
    t.cols_head = p.col_table.stride[1];
    t.cols_column = checked("elements between rows of col_table", p.col_table.stride[2]);
  }
  t.columns = pointer<int32_t>(p.columns);
  const i64 last = checked("columns", p.column_entries(), kFarthest) - 1;
  t.left = static_cast<int>(std::clamp(p.columns_left, i64{0}, last));
  t.right = static_cast<int>(last) - t.left;
  return t;
}

}  // namespace

Attention features_of(const Problem& p) {
  Attention f;
  f.batch = checked("batch", p.batch);
  f.heads = checked("query heads", p.query_heads);
  f.group = static_cast<int>(p.group());
  f.query_length = checked("query length", p.query_length, kFarthest);
  f.key_length = checked("key length", p.key_length, kFarthest);
  f.head_dim = static_cast<int>(p.head_dim);
  f.value_dim = static_cast<int>(p.value_dim);
  set_scale(f, p);

  const auto window = [](i64 width) { return width < 0 || width >= kFarthest ? -1 : static_cast<int>(width); };
  f.window_left = window(p.window_left);
  f.window_right = window(p.window_right);
  f.query_offset = static_cast<int>(std::clamp(p.query_offset, -kFarthest, kFarthest));
  f.query_offsets = {pointer<i64>(p.query_offsets), p.query_offsets.stride[0]};
  f.key_lengths = {pointer<i64>(p.key_lengths), p.key_lengths.stride[0]};
  f.prefix_lengths = {pointer<i64>(p.prefix_lengths), p.prefix_lengths.stride[0]};
  f.query_ids = {pointer<i64>(p.query_ids), p.query_ids.stride[0]};
  f.key_ids = {pointer<i64>(p.key_ids), p.key_ids.stride[0]};
  f.mask = dense_of(p.dense_mask);

  f.slopes = {pointer<float>(p.slopes), p.slopes.stride[0]};
  if (p.table) {
    f.table = pointer<float>(p.table);
    f.table_batch = p.table.stride[0];
    f.table_head = p.table.stride[1];
    const i64 last = checked("columns of the table", p.table.size[2], kFarthest) - 1;
    f.table_left = static_cast<int>(std::clamp(p.table_left, i64{0}, last));
    f.table_right = static_cast<int>(last) - f.table_left;
  }
  if (p.dense_bias) {
    f.bias = dense_of(p.dense_bias);
    f.bias_element = element_of("dense_bias", p.dense_bias);
    // 32 bits inside one batch and head
    const i64 span = p.query_length * std::abs(f.bias.row) + p.key_length * std::abs(f.bias.column);
    checked("elements that dense_bias spans for one batch and head", span);
    f.bias_row = static_cast<int>(f.bias.row);
    f.bias_column = static_cast<int>(f.bias.column);
  }
  f.content = tables_of(p);
  f.sink = {pointer<float>(p.sink), p.sink.stride[0]};
  if (p.dropout_p > 0) {
    f.dropout_seed = pointer<i64>(p.seed);
    f.drop_below = static_cast<uint32_t>(std::min(p.dropout_p * 4294967296.0, 4294967295.0));
    f.keep_scale = p.dropout_p < 1 ? static_cast<float>(1.0 / (1.0 - p.dropout_p)) : 0.0f;
  }
  return f;
}

}  // namespace fastattn::cuda
