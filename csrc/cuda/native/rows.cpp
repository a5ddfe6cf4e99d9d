// Rotation and masked softmax in the simulator.
#include "../rows/launch.h"

#include <memory>
#include <vector>

#include "../sim/simulator.h"
#include "module.h"
#include "tensors.h"

namespace py = pybind11;

namespace fastattn::cuda::native {
namespace {

// The device that kernels run on here.  Few multiprocessors, so that small problems are cut as large ones are on a GPU.
Device simulated() { return {nullptr, 80, 166912, 4}; }

// Registered and filled with NaN: a partial sum that nobody wrote must not pass for one.
class Scratch : public Workspace {
 public:
  ~Scratch() override {
    for (const auto& block : blocks_) sim::Memory::unregister_range(block.get());
  }
  void* allocate(size_t bytes) override {
    const size_t words = (bytes + 3) / 4;
    blocks_.push_back(std::make_unique<uint32_t[]>(words ? words : 1));
    for (size_t i = 0; i < words; ++i) blocks_.back()[i] = 0x7FC0DEADu;
    sim::Memory::register_range(blocks_.back().get(), words * 4, /*writable=*/true, "workspace");
    return blocks_.back().get();
  }

 private:
  std::vector<std::unique_ptr<uint32_t[]>> blocks_;
};

void simulate_rotate(py::object query, py::object key, py::object query_out, py::object key_out, py::object cos,
                     py::object sin, py::object positions, bool interleaved, bool conjugate) {
  Tensors tensors;
  Rotation r;
  r.from[0] = tensors.read("query", query);
  r.from[1] = tensors.read("key", key);
  r.to[0] = tensors.write("query_out", query_out);
  r.to[1] = tensors.write("key_out", key_out);
  r.cos = tensors.read("cos", cos);
  r.sin = tensors.read("sin", sin);
  r.positions = tensors.read("positions", positions);
  r.interleaved = interleaved;
  r.conjugate = conjugate;
  rotate(r, simulated());
}

void simulate_softmax_forward(py::object problem, py::object scores, py::object out) {
  Tensors tensors;
  const Problem p = read_problem(tensors, problem);
  softmax_forward(p, {tensors.read("scores", scores), tensors.write("out", out)}, simulated());
}

void simulate_softmax_backward(py::object problem, py::object out, py::object grad_out, py::object dscores,
                               py::object dslopes, py::object dtable, py::object ddense_bias) {
  Tensors tensors;
  const Problem p = read_problem(tensors, problem);
  SoftmaxBackward views;
  views.out = tensors.read("out", out);
  views.grad_out = tensors.read("grad_out", grad_out);
  views.dscores = tensors.write("dscores", dscores);
  views.dslopes = tensors.write("dslopes", dslopes);
  views.dtable = tensors.write("dtable", dtable);
  views.ddense_bias = tensors.write("ddense_bias", ddense_bias);
  Scratch scratch;
  softmax_backward(p, views, scratch, simulated());
}

}  // namespace

FASTATTN_BIND(rows) {
  module.def("rotate", &simulate_rotate,
             "Rotates query and key into query_out and key_out, which may be themselves (fastattn.rotation.Rotation).");
  module.def("softmax_forward", &simulate_softmax_forward,
             "Softmax of scores into out; problem holds scale, masks and biases (SoftmaxProblem.attention()).");
  module.def("softmax_backward", &simulate_softmax_backward,
             "Writes the gradients that are not None, each contiguous in its parameter's shape.");
}

}  // namespace fastattn::cuda::native
