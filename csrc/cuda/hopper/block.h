// What a block's warpgroups share: where tiles and barriers lie, and how they pass tiles of keys to each other.
//
// Use u of the ring, counted over the whole launch, takes stage u % stages; its barriers' phase is u / stages.  Of each
// stage: `keys_full`, `values_full` complete when a copy has come; `keys_empty`, `values_empty` when every warp of
// consumers has arrived; `values_checked` when the checkers have looked, which consumers wait for where a tile is
// masked (producer.h).
//
// Values of 8 bits come to `arrivals` and are transposed to `values` (transpose.h): `values_checked` then completes
// when they are there, and `arrivals_empty` when they have been read.
#pragma once

#include "ring.h"
#include "schedule.h"
#include "tiles.h"

#include <type_traits>

namespace fastattn::cuda {

// kPlain: intervals of keys are the only mask, nothing is added to scores, nothing is dropped (is_plain in launch.h).
// kPin: the exponentials are held before the wait for the second product (arch/overlap.h); off to measure what it does.
template <class T_, int kDim_, bool kPlain_, bool kPin_ = true>
struct HopperForwardConfig {
  using T = T_;
  static constexpr bool kEight = kIsEight<T>;
  static constexpr HopperForwardTiles kTiles =
      kEight ? hopper_e4m3_tiles(kDim_, kPlain_) : hopper_forward_tiles(kDim_, kPlain_);
  // Stages between scale and masks, dropout.  Of 8 bits there are none.
  static constexpr bool kBiases = !kPlain_ && !kEight;
  // Weights are multiplied by two to this power, so that they use the range that their type has.
  static constexpr int kWeightExponent = kEight ? 8 : 0;
  static constexpr bool kPlain = kPlain_, kPin = kPin_;
  static constexpr int kDim = kDim_, kRows = kTiles.rows(), kKeys = kTiles.keys, kStages = kTiles.stages;
  static constexpr int kGroups = kTiles.groups;
  static constexpr bool kAlternate = kTiles.alternate, kOwnOut = kTiles.own_out();
  static constexpr int kProducerRegisters = kTiles.producer_registers(), kRegisters = kTiles.consumer_registers();
  static constexpr int kKeysAt = kTiles.keys_at(), kValuesAt = kTiles.values_at(), kOutAt = kTiles.out_at();
  static constexpr int kArrivalsAt = kTiles.arrivals_at();
  static constexpr int kChecksAt = kTiles.checks_at(), kCheckBytes = kTiles.check_bytes();
  static constexpr int kContextsAt = kTiles.contexts_at(), kBarriersAt = kTiles.barriers_at();
  template <int kTileRows, int kTileDim>
  using OperandTile = std::conditional_t<kEight, ByteTile<kTileRows, kTileDim>, Tile<kTileRows, kTileDim>>;
  using QueryTile = OperandTile<kRows, kDim>;
  using KeyTile = OperandTile<kKeys, kDim>;  // and values as they come
  using ValueTile = std::conditional_t<kEight, ByteTile<kDim, kTiles.value_bytes() / kDim>, KeyTile>;
  static constexpr bool kAddsApart = kTiles.adds_apart();
  using OutTile = Tile<kRows, kDim>;
  using Out = std::conditional_t<kEight, BFloat16, T>;
  static constexpr int kWeights = kKeys * kTiles.element / 32;  // registers of weights, in fours
};

template <class Config>
struct HopperBlock {
  using KeyTile = typename Config::KeyTile;
  static constexpr int kStages = Config::kStages;
  SharedAddress base = shared_base();

  FASTATTN_DEVICE SharedAddress queries() const { return base; }
  FASTATTN_DEVICE SharedAddress out() const { return base + Config::kOutAt; }
  FASTATTN_DEVICE SharedAddress keys(int use) const { return base + Config::kKeysAt + stage(use) * KeyTile::kBytes; }
  FASTATTN_DEVICE SharedAddress values(int use) const {
    return base + Config::kValuesAt + stage(use) * Config::ValueTile::kBytes;
  }
  // where values come to
  FASTATTN_DEVICE SharedAddress arrivals(int use) const {
    return Config::kEight ? base + Config::kArrivalsAt + stage(use) * KeyTile::kBytes : values(use);
  }
  // four words: whether a checker found something, the last unused; then a byte per key
  FASTATTN_DEVICE SharedAddress checks(int use) const {
    return base + Config::kChecksAt + stage(use) * Config::kCheckBytes;
  }

  FASTATTN_DEVICE SharedAddress context(int consumer_warp) const {
    return base + Config::kContextsAt + HopperForwardTiles::kContextBytes * consumer_warp;
  }
  FASTATTN_DEVICE static SharedAddress slopes(SharedAddress context) { return context + kContextBytes; }

  FASTATTN_DEVICE SharedAddress queries_full() const { return barrier(0); }
  FASTATTN_DEVICE SharedAddress queries_empty() const { return barrier(1); }
  FASTATTN_DEVICE SharedAddress keys_full(int use) const { return barrier(2 + stage(use)); }
  FASTATTN_DEVICE SharedAddress keys_empty(int use) const { return barrier(2 + kStages + stage(use)); }
  FASTATTN_DEVICE SharedAddress values_full(int use) const { return barrier(2 + 2 * kStages + stage(use)); }
  FASTATTN_DEVICE SharedAddress values_empty(int use) const { return barrier(2 + 3 * kStages + stage(use)); }
  FASTATTN_DEVICE SharedAddress values_checked(int use) const { return barrier(2 + 4 * kStages + stage(use)); }
  FASTATTN_DEVICE SharedAddress arrivals_empty(int use) const {
    return Config::kEight ? barrier(2 + 5 * kStages + stage(use)) : values_empty(use);
  }

  // The parity of a use's own phase, and of the phase before it: a barrier no phase of which is complete yet passes
  // for the latter.
  static FASTATTN_DEVICE uint32_t phase(int use) { return static_cast<uint32_t>(use) / kStages & 1; }
  static FASTATTN_DEVICE uint32_t phase_before(int use) { return phase(use) ^ 1; }

  // By one thread, before the block meets.
  FASTATTN_DEVICE void init() const {
    constexpr int kWarps = 4 * Config::kGroups;
    mbarrier_init(queries_full(), 1);
    mbarrier_init(queries_empty(), kWarps);
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(keys_full(stage), 1);
      mbarrier_init(keys_empty(stage), kWarps);
      mbarrier_init(values_full(stage), 1);
      mbarrier_init(values_empty(stage), kWarps);
      mbarrier_init(values_checked(stage), kCheckers);
      if constexpr (Config::kEight) mbarrier_init(arrivals_empty(stage), kCheckers);
      store_shared(checks(stage), Vec4{{0, 0, 0, 0}});
    }
    mbarrier_init_fence();
  }

 private:
  static FASTATTN_DEVICE uint32_t stage(int use) { return static_cast<uint32_t>(use) % kStages; }
  FASTATTN_DEVICE SharedAddress barrier(int n) const { return base + Config::kBarriersAt + 8 * n; }
};

}  // namespace fastattn::cuda
