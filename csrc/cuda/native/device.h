// What launchers run on in the simulator: a device and its memory.
#pragma once

#include <memory>
#include <vector>

#include "../sim/simulator.h"
#include "../workspace.h"

namespace fastattn::cuda::native {

// Few multiprocessors, so that small problems are cut as large ones are on a GPU.  Tests change it to take other
// branches: less shared memory leaves room for one stage of copies, more multiprocessors split more.
inline Device& simulated() {
  static Device device{nullptr, 80, 166912, 4};
  return device;
}

// Registered and filled with NaN: a partial sum that nobody wrote must not pass for one.
class Scratch : public Workspace {
 public:
  ~Scratch() override {
    for (const auto& block : blocks_) sim::Memory::unregister_range(block.get());
  }
  void* allocate(size_t bytes) override {
    const size_t words = (bytes + 15) / 16 * 4;
    blocks_.push_back(std::unique_ptr<uint32_t, Free>(
        static_cast<uint32_t*>(::operator new(words ? words * 4 : 16, std::align_val_t{256}))));
    for (size_t i = 0; i < words; ++i) blocks_.back().get()[i] = 0x7FC0DEADu;
    sim::Memory::register_range(blocks_.back().get(), words * 4, /*writable=*/true, "workspace");
    return blocks_.back().get();
  }

 private:
  struct Free {
    void operator()(uint32_t* memory) const { ::operator delete(memory, std::align_val_t{256}); }
  };
  std::vector<std::unique_ptr<uint32_t, Free>> blocks_;
};

}  // namespace fastattn::cuda::native
