#include "call.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>

#include "launch.h"

namespace fastattn::cuda {
namespace {

#ifdef FASTATTN_CUDA_ARCHS
constexpr bool kBuilt = std::string_view(FASTATTN_CUDA_ARCHS).find("90a") != std::string_view::npos;
#else
constexpr bool kBuilt = true;  // the simulator has every instruction
#endif

// What a section of heads may take of L2's 50 MB.
constexpr i64 kSectionBytes = i64{32} << 20;

bool same_row_everywhere(const View& x) { return x.size[2] > 1 && x.stride[2] == 0; }

// One dimension of a tensor, and how much of it a copy takes.
struct Axis {
  i64 size, stride;
  int box;
};

TensorElement element_of(DType dtype) {
  return dtype == DType::kFloat16 ? TensorElement::kHalf
         : dtype == kFloat8       ? TensorElement::kByte
                                  : TensorElement::kBFloat16;
}

TensorMap map_of_axes(DType dtype, const void* data, i64 columns, int dim, const Axis (&axes)[3]) {
  const auto bytes = static_cast<int>(element_size(dtype));
  const int row = dim * bytes % 128 == 0 ? 128 : 64;  // of a panel
  TensorLayout layout;
  layout.data = data;
  layout.element = element_of(dtype);
  layout.rank = 4;
  layout.swizzle = row == 128 ? Swizzle::k128 : Swizzle::k64;
  layout.size[0] = static_cast<uint64_t>(columns);
  layout.box[0] = static_cast<uint32_t>(row / bytes);
  for (int n = 0; n < 3; ++n) {
    const bool broadcast = axes[n].stride == 0;
    layout.size[n + 1] = static_cast<uint64_t>(broadcast ? 1 : axes[n].size);
    layout.stride_bytes[n] = static_cast<uint64_t>(broadcast ? 16 : bytes * axes[n].stride);
    layout.box[n + 1] = static_cast<uint32_t>(axes[n].box);
  }
  return encode_tensor_map(layout);
}

}  // namespace

std::string_view hopper_asked() {
  const char* value = std::getenv("FASTATTN_CUDA_HOPPER");
  return value && *value ? value : "0";
}

int hopper_dim_index(const Problem& p) {
  const int dim = static_cast<int>(std::max(p.head_dim, p.value_dim));
  return static_cast<int>(std::lower_bound(std::begin(kHopperDims), std::end(kHopperDims), dim) - kHopperDims);
}

int hopper_e4m3_dim_index(const Problem& p) {
  const int dim = static_cast<int>(std::max(p.head_dim, p.value_dim));
  return static_cast<int>(std::lower_bound(std::begin(kHopperE4M3Dims), std::end(kHopperE4M3Dims), dim) -
                          kHopperE4M3Dims);
}

bool is_plain(const Attention& a) {
  return !a.scaled && !a.negate && a.softcap_out == 0 && !a.query_ids.data && !a.mask.data && !a.slopes.data &&
         !a.table && !a.bias.data && !a.dropout_seed;
}

MappedOperand map_of(const Problem& p, const Operand& x, i64 heads, i64 length, i64 columns, int dim, int rows) {
  const Axis axes[3] = {{length, x.row, rows}, {heads, x.head, 1}, {p.batch, x.batch, 1}};
  return {map_of_axes(p.query.dtype, x.data, columns, dim, axes), x.head != 0, x.batch != 0};
}

MappedOperand packed_map_of(const Problem& p, const Result& x, DType dtype, i64 columns, int dim,
                            const Packing& packing) {
  const Axis axes[3] = {
      {p.query_heads, x.head, packing.heads}, {p.query_length, x.row, packing.queries}, {p.batch, x.batch, 1}};
  return {map_of_axes(dtype, x.data, columns, dim, axes), x.head != 0, x.batch != 0};
}

MappedOperand packed_map_of(const Problem& p, const Operand& x, i64 columns, int dim, const Packing& packing) {
  return packed_map_of(p, Result{const_cast<void*>(x.data), x.batch, x.head, x.row}, p.query.dtype, columns, dim,
                       packing);
}

MappedOperand map_of(const Problem& p, const Result& x, i64 heads, i64 length, i64 columns, int dim, int rows) {
  if (!x.data) return {};
  return map_of(p, Operand{x.data, x.batch, x.head, x.row}, heads, length, columns, dim, rows);
}

Schedule schedule_of(const Problem& p, i64 length, int rows, i64 heads, i64 group, i64 bytes) {
  Schedule order;
  order.tiles = static_cast<int>(ceil_div(length, rows));
  order.pairs = checked("batch times heads", p.batch * heads);
  order.total = checked("tiles", order.tiles * p.batch * heads, kMostBlocks / 4);
  i64 section = group;
  while (2 * section <= order.pairs && 2 * section / group * bytes <= kSectionBytes) section *= 2;
  order.section = static_cast<int>(std::min<i64>(section, order.pairs));
  return order;
}

const char* reason_against_hopper(const Problem& p, const Device& device) {
  if (device.capability / 10 != 9) return "not a device of capability 9.0";
  if (!kBuilt) return "the library was built without sm_90a";
  if (hopper_asked() == "0") return "not asked for with FASTATTN_CUDA_HOPPER=1";
  if (p.row_table || p.col_table) return "row and column tables";
  if (p.key_length == 0) return "no keys";
  if (same_row_everywhere(p.query) || same_row_everywhere(p.key) || same_row_everywhere(p.value))
    return "an operand is broadcast along its length";
  return nullptr;
}

const char* reason_against_e4m3(const Problem& p, const Device& device) {
  if (const char* reason = reason_against_hopper(p, device)) return reason;
  if (p.head_dim % 16 || p.value_dim % 16) return "a head dimension that is no multiple of 16";
  if (std::max(p.head_dim, p.value_dim) > 256 || std::min(p.head_dim, p.value_dim) == 0) return "the head dimension";
  if (p.query_cos || p.softcap != 0 || p.slopes || p.table || p.dense_bias || p.dropout_p > 0)
    return "a stage between products and masks, or dropout";
  if (std::max(p.head_dim, p.value_dim) > 128 && p.key_length > kMostKeysInFewBits)
    return "more than 1024 keys above D = 128, where the chip adds with 14 bits";
  if (!(p.scale > 0)) return "a scale that is not positive";
  return nullptr;
}

bool takes_hopper_backward(const Problem& p, const View& grad_out, const Device& device) {
  return !reason_against_hopper(p, device) && p.query_length > 0 && p.batch > 0 && p.query_heads > 0 &&
         !same_row_everywhere(grad_out);
}

}  // namespace fastattn::cuda
