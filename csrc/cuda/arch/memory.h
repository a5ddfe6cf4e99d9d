// Loads, stores and atomics.  Global addresses are 64-bit pointers; shared addresses are 32-bit byte offsets, as the
// instructions take them.  V is trivially copyable, of 1, 2, 4, 8 or 16 bytes, and its address is a multiple of its
// size.
#pragma once

#include <cstring>
#include <type_traits>

#include "types.h"

namespace fastattn::cuda {

using SharedAddress = uint32_t;

template <class V>
inline constexpr bool kIsAccessUnit =
    std::is_trivially_copyable_v<V> &&
    (sizeof(V) == 1 || sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16);

#ifdef __CUDACC__
namespace detail {

// The register form of an access unit, and back.
template <class V, class Raw>
__device__ __forceinline__ V reinterpret(const Raw& raw) {
  static_assert(sizeof(V) == sizeof(Raw));
  V value;
  memcpy(&value, &raw, sizeof(V));
  return value;
}

}  // namespace detail
#endif

// Where dynamic shared memory begins: a multiple of 1024.
FASTATTN_DEVICE SharedAddress shared_base() {
#ifdef __CUDACC__
  extern __shared__ __align__(1024) unsigned char fastattn_dynamic_shared[];
  return static_cast<SharedAddress>(__cvta_generic_to_shared(fastattn_dynamic_shared));
#else
  return sim::kSharedBase;
#endif
}

template <class V>
FASTATTN_DEVICE V load_shared(SharedAddress address FASTATTN_WHERE) {
  static_assert(kIsAccessUnit<V>);
#ifdef __CUDACC__
  if constexpr (sizeof(V) == 1) {
    uint32_t x;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return detail::reinterpret<V>(static_cast<uint8_t>(x));
  } else if constexpr (sizeof(V) == 2) {
    uint16_t x;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(address) : "memory");
    return detail::reinterpret<V>(x);
  } else if constexpr (sizeof(V) == 4) {
    uint32_t x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return detail::reinterpret<V>(x);
  } else if constexpr (sizeof(V) == 8) {
    Vec2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x[0]), "=r"(v.x[1]) : "r"(address) : "memory");
    return detail::reinterpret<V>(v);
  } else {
    Vec4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x[0]), "=r"(v.x[1]), "=r"(v.x[2]), "=r"(v.x[3])
                 : "r"(address)
                 : "memory");
    return detail::reinterpret<V>(v);
  }
#else
  V value;
  sim::load_shared(&value, address, sizeof(V), where);
  return value;
#endif
}

template <class V>
FASTATTN_DEVICE void store_shared(SharedAddress address, V value FASTATTN_WHERE) {
  static_assert(kIsAccessUnit<V>);
#ifdef __CUDACC__
  if constexpr (sizeof(V) == 1) {
    const uint32_t x = detail::reinterpret<uint8_t>(value);
    asm volatile("st.shared.u8 [%0], %1;" ::"r"(address), "r"(x) : "memory");
  } else if constexpr (sizeof(V) == 2) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(detail::reinterpret<uint16_t>(value)) : "memory");
  } else if constexpr (sizeof(V) == 4) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(detail::reinterpret<uint32_t>(value)) : "memory");
  } else if constexpr (sizeof(V) == 8) {
    const Vec2 v = detail::reinterpret<Vec2>(value);
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(v.x[0]), "r"(v.x[1]) : "memory");
  } else {
    const Vec4 v = detail::reinterpret<Vec4>(value);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x[0]), "r"(v.x[1]), "r"(v.x[2]),
                 "r"(v.x[3])
                 : "memory");
  }
#else
  sim::store_shared(address, &value, sizeof(V), where);
#endif
}

// ld.global: sees what this kernel wrote.
template <class V>
FASTATTN_DEVICE V load_global(const V* address FASTATTN_WHERE) {
  static_assert(kIsAccessUnit<V>);
#ifdef __CUDACC__
  if constexpr (sizeof(V) == 1) {
    uint32_t x;
    asm volatile("ld.global.u8 %0, [%1];" : "=r"(x) : "l"(address) : "memory");
    return detail::reinterpret<V>(static_cast<uint8_t>(x));
  } else if constexpr (sizeof(V) == 2) {
    uint16_t x;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(x) : "l"(address) : "memory");
    return detail::reinterpret<V>(x);
  } else if constexpr (sizeof(V) == 4) {
    uint32_t x;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(x) : "l"(address) : "memory");
    return detail::reinterpret<V>(x);
  } else if constexpr (sizeof(V) == 8) {
    Vec2 v;
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x[0]), "=r"(v.x[1]) : "l"(address) : "memory");
    return detail::reinterpret<V>(v);
  } else {
    Vec4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x[0]), "=r"(v.x[1]), "=r"(v.x[2]), "=r"(v.x[3])
                 : "l"(address)
                 : "memory");
    return detail::reinterpret<V>(v);
  }
#else
  V value;
  sim::load_global(&value, address, sizeof(V), /*constant=*/false, where);
  return value;
#endif
}

// ld.global.nc: memory that no thread of this kernel writes.  The compiler may move it and merge equal ones.
template <class V>
FASTATTN_DEVICE V load_constant(const V* address FASTATTN_WHERE) {
  static_assert(kIsAccessUnit<V>);
#ifdef __CUDACC__
  if constexpr (sizeof(V) == 1) {
    return detail::reinterpret<V>(__ldg(reinterpret_cast<const unsigned char*>(address)));
  } else if constexpr (sizeof(V) == 2) {
    return detail::reinterpret<V>(__ldg(reinterpret_cast<const unsigned short*>(address)));
  } else if constexpr (sizeof(V) == 4) {
    return detail::reinterpret<V>(__ldg(reinterpret_cast<const unsigned int*>(address)));
  } else if constexpr (sizeof(V) == 8) {
    return detail::reinterpret<V>(__ldg(reinterpret_cast<const uint2*>(address)));
  } else {
    return detail::reinterpret<V>(__ldg(reinterpret_cast<const uint4*>(address)));
  }
#else
  V value;
  sim::load_global(&value, address, sizeof(V), /*constant=*/true, where);
  return value;
#endif
}

template <class V>
FASTATTN_DEVICE void store_global(V* address, V value FASTATTN_WHERE) {
  static_assert(kIsAccessUnit<V>);
#ifdef __CUDACC__
  if constexpr (sizeof(V) == 1) {
    const uint32_t x = detail::reinterpret<uint8_t>(value);
    asm volatile("st.global.u8 [%0], %1;" ::"l"(address), "r"(x) : "memory");
  } else if constexpr (sizeof(V) == 2) {
    asm volatile("st.global.u16 [%0], %1;" ::"l"(address), "h"(detail::reinterpret<uint16_t>(value)) : "memory");
  } else if constexpr (sizeof(V) == 4) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(address), "r"(detail::reinterpret<uint32_t>(value)) : "memory");
  } else if constexpr (sizeof(V) == 8) {
    const Vec2 v = detail::reinterpret<Vec2>(value);
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(v.x[0]), "r"(v.x[1]) : "memory");
  } else {
    const Vec4 v = detail::reinterpret<Vec4>(value);
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x[0]), "r"(v.x[1]), "r"(v.x[2]),
                 "r"(v.x[3])
                 : "memory");
  }
#else
  sim::store_global(address, &value, sizeof(V), where);
#endif
}

// Returns the old value; where it is not used the instruction is the cheaper reduction.
FASTATTN_DEVICE float atomic_add(float* address, float value FASTATTN_WHERE) {
#ifdef __CUDACC__
  return ::atomicAdd(address, value);
#else
  return sim::atomic_add(address, value, where);
#endif
}

FASTATTN_DEVICE int atomic_add(int* address, int value FASTATTN_WHERE) {
#ifdef __CUDACC__
  return ::atomicAdd(address, value);
#else
  return sim::atomic_add(address, value, where);
#endif
}

}  // namespace fastattn::cuda
