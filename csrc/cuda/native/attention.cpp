// Attention in the simulator.
#include "../attention/launch.h"
#include "../sim/simulator.h"

#include "device.h"
#include "module.h"
#include "tensors.h"

namespace py = pybind11;

namespace fastattn::cuda::native {
namespace {

void simulate_forward(py::object problem, py::object out, py::object lse, py::object statistics) {
  Tensors tensors;
  const Problem p = read_problem(tensors, problem);
  const ForwardOutput output{tensors.write("out", out), tensors.write("lse", lse),
                             tensors.write("statistics", statistics)};
  Scratch scratch;
  attention_forward(p, output, scratch, simulated());
}

void simulate_backward(py::object problem, py::object grad_out, py::object grad_lse, py::object out,
                       py::object statistics, py::object dquery, py::object dkey, py::object dvalue, py::object dslopes,
                       py::object dtable, py::object ddense_bias, py::object dsink) {
  Tensors tensors;
  const Problem p = read_problem(tensors, problem);
  const BackwardInput input{tensors.read("grad_out", grad_out), tensors.read("grad_lse", grad_lse),
                            tensors.read("out", out), tensors.read("statistics", statistics)};
  BackwardOutput output;
  output.dquery = tensors.write("dquery", dquery);
  output.dkey = tensors.write("dkey", dkey);
  output.dvalue = tensors.write("dvalue", dvalue);
  output.dslopes = tensors.write("dslopes", dslopes);
  output.dtable = tensors.write("dtable", dtable);
  output.ddense_bias = tensors.write("ddense_bias", ddense_bias);
  output.dsink = tensors.write("dsink", dsink);
  Scratch scratch;
  attention_backward(p, input, output, scratch, simulated());
}

py::dict plan(py::object problem) {
  Tensors tensors;
  const Plan plan = attention_plan(read_problem(tensors, problem), simulated());
  py::dict result;
  result["kernel"] = plan.kernel;
  result["dim"] = plan.dim;
  result["rows"] = plan.rows;
  result["keys"] = plan.keys;
  result["threads"] = plan.threads;
  result["shared_bytes"] = plan.shared_bytes;
  result["stages"] = plan.stages;
  result["splits"] = plan.splits;
  if (plan.packed_heads) result["packed_heads"] = plan.packed_heads;
  if (plan.registers) result["registers"] = plan.registers;
  if (plan.waves) result["waves"] = plan.waves;
  if (*plan.against_hopper) result["not_hopper"] = plan.against_hopper;
  return result;
}

void set_device(int shared_memory_per_block, int multiprocessors, int capability) {
  simulated().capability = capability;
  sim::options().shared_limit = shared_memory_per_block;
  simulated().shared_memory_per_block = shared_memory_per_block;
  simulated().multiprocessors = multiprocessors;
}

}  // namespace

FASTATTN_BIND(attention) {
  module.def("attention_forward", &simulate_forward,
             "Writes out, lse and statistics of a fastattn.problem.Problem, laid out as its operators return them.");
  module.def("attention_backward", &simulate_backward,
             "Writes the gradients that are not None, parameters' contiguous in their parameter's shape.");
  module.def("attention_plan", &plan, "Tiles, stages and splits of a forward call.");
  module.def("set_device", &set_device, py::arg("shared_memory_per_block") = 166912, py::arg("multiprocessors") = 4,
             py::arg("capability") = 80,
             "What the simulated device has: bytes of shared memory for a block, multiprocessors, 10 * capability.");
}

}  // namespace fastattn::cuda::native
