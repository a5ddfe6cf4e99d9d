#include "call.h"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>

#include "../instances.h"
#include "../rows/launch.h"

namespace fastattn::cuda {
namespace {

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("fastattn: " + what); }

void check_rows(const char* name, const View& view) {
  const std::string prefix = std::string(name) + ": ";
  if (view.size[3] % 8)
    fail(prefix + "the last dimension must be a multiple of 8, got " + std::to_string(view.size[3]));
  if (view.size[3] > 1 && view.stride[3] != 1) fail(prefix + "the last dimension must be dense");
  if (reinterpret_cast<uintptr_t>(view.data) % 16) fail(prefix + "must start at a multiple of 16 bytes");
  for (int axis = 0; axis < 3; ++axis)
    if (view.stride[axis] * element_size(view.dtype) % 16)
      fail(prefix + "stride " + std::to_string(axis) + " must be a multiple of 16 bytes, got " +
           std::to_string(view.stride[axis]) + " elements");
}

// A contiguous view of workspace memory in the shape and dtype of another.
View room_for(const View& like, Workspace& workspace) {
  View view = like;
  i64 stride = 1;
  for (int axis = 3; axis >= 0; --axis) {
    view.stride[axis] = stride;
    stride *= view.size[axis];
  }
  view.data = workspace.allocate(static_cast<size_t>(stride * element_size(like.dtype)));
  return view;
}

RotationSide query_side(const Problem& p, const View& from, const View& to) {
  RotationSide side;
  side.from = from;
  side.to = to;
  side.cos = p.query_cos;
  side.sin = p.query_sin;
  side.offsets = p.query_offsets;
  side.offset = p.query_offset;
  return side;
}

RotationSide key_side(const Problem& p, const View& from, const View& to) {
  RotationSide side;
  side.from = from;
  side.to = to;
  side.cos = p.key_cos;
  side.sin = p.key_sin;
  return side;
}

// Queries and keys from which on ids and masks are read once more: fewer have few tiles to pass over.
constexpr i64 kLeastForSpans = 256;

Spans spans_of(const Problem& p, SpansParams s, Workspace& workspace, const Device& device) {
  if ((!s.row_ids.data && !s.mask.data) || std::min(s.rows, s.columns) < kLeastForSpans) return {};
  const i64 batch = s.row_ids.batch || s.column_ids.batch || s.mask.batch ? p.batch : 1;
  s.heads = s.mask.head ? static_cast<int>(p.query_heads) : 1;
  s.blocks = static_cast<int>(ceil_div(s.rows, kSpanRows));
  const i64 blocks = batch * s.heads * s.blocks;
  if (!blocks) return {};
  s.spans = static_cast<int32_t*>(workspace.allocate(4 * sizeof(int32_t) * blocks));
  attention_spans({checked("blocks", blocks), 1, 1, SpansTiles::kSharedBytes, device.stream}, s);
  const i64 of_head = 4 * s.blocks;
  return {s.spans, batch > 1 ? of_head * s.heads : 0, s.heads > 1 ? of_head : 0};
}

}  // namespace

Spans key_spans_of(const Problem& p, const Attention& a, Workspace& workspace, const Device& device) {
  return spans_of(p, {a.query_ids, a.key_ids, a.mask, a.query_length, a.key_length}, workspace, device);
}

Spans query_spans_of(const Problem& p, const Attention& a, Workspace& workspace, const Device& device) {
  Dense turned = a.mask;
  std::swap(turned.row, turned.column);
  return spans_of(p, {a.key_ids, a.query_ids, turned, a.key_length, a.query_length}, workspace, device);
}

int dim_index(i64 dim) {
  const int* found = std::lower_bound(std::begin(kHeadDims), std::end(kHeadDims), static_cast<int>(dim));
  if (dim > *(std::end(kHeadDims) - 1)) fail("head dimensions go up to 256, got " + std::to_string(dim));
  return static_cast<int>(found - kHeadDims);
}

int type_index(const Problem& problem) {
  if (problem.query.dtype == DType::kFloat16) return 0;
  if (problem.query.dtype == DType::kBFloat16) return 1;
  fail("query must be float16 or bfloat16");
}

Operand operand_of(const char* name, const View& view) {
  check_rows(name, view);
  return {view.data, view.stride[0], view.stride[1], view.stride[2]};
}

Result result_of(const char* name, const View& view) {
  if (!view) return {};
  check_rows(name, view);
  return {const_cast<void*>(view.data), view.stride[0], view.stride[1], view.stride[2]};
}

Attention attention_of(const Problem& p, Workspace& workspace, const Device& device) {
  Attention attention = features_of(p);
  View query = p.query, key = p.key;
  if (p.query_cos) {
    const View turned_query = room_for(query, workspace), turned_key = room_for(key, workspace);
    rotate(query_side(p, query, turned_query), key_side(p, key, turned_key), p.interleaved, /*conjugate=*/false,
           device);
    query = turned_query;
    key = turned_key;
  }
  attention.query = operand_of("query", query);
  attention.key = operand_of("key", key);
  attention.value = operand_of("value", p.value);
  return attention;
}

void rotate_back(const Problem& p, const View& dquery, const View& dkey, const Device& device) {
  if (!p.query_cos || (!dquery && !dkey)) return;
  // one of them may not be wanted: a view without heads has nothing to rotate
  const auto or_nothing = [](View view, const View& like) {
    if (!view) {
      view = like;
      view.size[1] = 0;
    }
    return view;
  };
  const View query = or_nothing(dquery, p.query), key = or_nothing(dkey, p.key);
  rotate(query_side(p, query, query), key_side(p, key, key), p.interleaved, /*conjugate=*/true, device);
}

}  // namespace fastattn::cuda
