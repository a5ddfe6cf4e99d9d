// Rotation and masked softmax in the simulator.
#include "../rows/launch.h"

#include "device.h"
#include "module.h"
#include "tensors.h"

namespace py = pybind11;

namespace fastattn::cuda::native {
namespace {

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
