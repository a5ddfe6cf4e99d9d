// Elements in memory as numbers: one at a time, or as many as 16 bytes hold.
#pragma once

#include "../arch/arch.h"
#include "../features/params.h"

namespace fastattn::cuda {

// How an element of type T (float, Half, BFloat16) lies in memory.
template <class T>
struct StoredAs {
  using Type = uint16_t;
};
template <>
struct StoredAs<float> {
  using Type = float;
};
template <class T>
using Stored = typename StoredAs<T>::Type;

// Elements of one 16-byte access.
template <class T>
inline constexpr int kWide = 16 / static_cast<int>(sizeof(Stored<T>));

template <class T>
FASTATTN_DEVICE float widen(Stored<T> value) {
  if constexpr (sizeof(Stored<T>) == 4) {
    return value;
  } else {
    return unpack1<T>(value);
  }
}

template <class T>
FASTATTN_DEVICE Stored<T> narrow(float value) {
  if constexpr (sizeof(Stored<T>) == 4) {
    return value;
  } else {
    return pack1<T>(value);
  }
}

template <class T>
FASTATTN_DEVICE void widen(const Vec4& raw, float (&values)[kWide<T>]) {
  FASTATTN_UNROLL
  for (int n = 0; n < 4; ++n) {
    if constexpr (sizeof(Stored<T>) == 4) {
      values[n] = float_of(raw.x[n]);
    } else {
      unpack2<T>(raw.x[n], values[2 * n], values[2 * n + 1]);
    }
  }
}

template <class T>
FASTATTN_DEVICE Vec4 narrow(const float (&values)[kWide<T>]) {
  Vec4 raw;
  FASTATTN_UNROLL
  for (int n = 0; n < 4; ++n) {
    if constexpr (sizeof(Stored<T>) == 4) {
      raw.x[n] = bits_of(values[n]);
    } else {
      raw.x[n] = pack2<T>(values[2 * n], values[2 * n + 1]);
    }
  }
  return raw;
}

// A number of a type that is known at run time only.
FASTATTN_DEVICE float load_number(const void* data, Element element, i64 at) {
  if (element == Element::kFloat32) return load_constant(static_cast<const float*>(data) + at);
  const uint16_t bits = load_constant(static_cast<const uint16_t*>(data) + at);
  return element == Element::kFloat16 ? unpack1<Half>(bits) : unpack1<BFloat16>(bits);
}

FASTATTN_DEVICE void store_number(void* data, Element element, i64 at, float value) {
  if (element == Element::kFloat32) {
    store_global(static_cast<float*>(data) + at, value);
  } else {
    store_global(static_cast<uint16_t*>(data) + at,
                 element == Element::kFloat16 ? pack1<Half>(value) : pack1<BFloat16>(value));
  }
}

template <class T>
FASTATTN_DEVICE Vec4 load_wide(const Stored<T>* at FASTATTN_WHERE) {
  return load_global(reinterpret_cast<const Vec4*>(at) FASTATTN_HERE);
}

template <class T>
FASTATTN_DEVICE void store_wide(Stored<T>* at, const Vec4& raw FASTATTN_WHERE) {
  store_global(reinterpret_cast<Vec4*>(at), raw FASTATTN_HERE);
}

}  // namespace fastattn::cuda
