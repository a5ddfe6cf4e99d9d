// Attention in the simulator.
#include "../attention/launch.h"
#include "../hopper/launch.h"
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

void simulate_e4m3_forward(py::object problem, py::object query_scale, py::object key_scale, py::object value_scale,
                           py::object out, py::object lse) {
  Tensors tensors;
  const Problem p = read_problem(tensors, problem);
  const OperandScales scales{tensors.read("query_scale", query_scale), tensors.read("key_scale", key_scale),
                             tensors.read("value_scale", value_scale)};
  Scratch scratch;
  hopper_e4m3_forward(p, scales, {tensors.write("out", out), tensors.write("lse", lse), {}}, scratch, simulated());
}

void simulate_backward(py::object problem, py::object grad_out, py::object grad_lse, py::object out,
                       py::object statistics, py::object dquery, py::object dkey, py::object dvalue, py::object dslopes,
                       py::object dtable, py::object ddense_bias, py::object dsink, py::object drow_table,
                       py::object dcol_table) {
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
  output.drow_table = tensors.write("drow_table", drow_table);
  output.dcol_table = tensors.write("dcol_table", dcol_table);
  Scratch scratch;
  attention_backward(p, input, output, scratch, simulated());
}

std::string plan(py::object problem) {
  Tensors tensors;
  return plan_json(read_problem(tensors, problem), simulated());
}

std::string float8_plan(py::object problem) {
  Tensors tensors;
  return e4m3_plan_json(read_problem(tensors, problem), simulated());
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
  module.def("float8_forward", &simulate_e4m3_forward,
             "Writes out, in bfloat16, and lse of a fastattn.problem.Problem whose operands are float8_e4m3fn, times "
             "scales (B|1, H) or None.");
  module.def("attention_backward", &simulate_backward,
             "Writes the gradients that are not None, parameters' contiguous in their parameter's shape.");
  module.def("attention_plan", &plan, "Tiles, stages and splits of each kernel of a call, as JSON.");
  module.def("float8_plan", &float8_plan, "The same of 8-bit operands, which have one kernel.");
  module.def("capability", [] { return simulated().capability; }, "Of the simulated device, times 10.");
  module.def("set_device", &set_device, py::arg("shared_memory_per_block") = 166912, py::arg("multiprocessors") = 4,
             py::arg("capability") = 80,
             "What the simulated device has: bytes of shared memory for a block, multiprocessors, 10 * capability.");
}

}  // namespace fastattn::cuda::native
