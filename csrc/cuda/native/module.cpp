#include "module.h"

#include <vector>

#include "../sim/simulator.h"

namespace py = pybind11;

namespace fastattn::cuda::native {

namespace {

using Bind = void (*)(py::module_&);

std::vector<Bind>& bindings() {
  static std::vector<Bind> all;
  return all;
}

py::dict to_dict(const sim::Traffic& traffic) {
  py::dict result;
  result["requests"] = traffic.requests;
  result["ideal"] = traffic.ideal;
  result["actual"] = traffic.actual;
  return result;
}

py::dict to_dict(const sim::Report& report) {
  py::dict result;
  result["kernel"] = report.kernel;
  result["grid"] = py::make_tuple(report.grid[0], report.grid[1], report.grid[2]);
  result["threads"] = report.threads;
  result["shared_bytes"] = report.shared_bytes;
  result["products"] = report.products;
  result["warpgroup_products"] = report.warpgroup_products;
  result["tensor_copies"] = report.tensor_copies;
  result["shuffles"] = report.shuffles;
  result["warp_barriers"] = report.warp_barriers;
  result["block_barriers"] = report.block_barriers;
  py::dict traffic;
  for (int i = 0; i < static_cast<int>(sim::Access::kCount); ++i) {
    traffic[sim::access_name(static_cast<sim::Access>(i))] = to_dict(report.traffic[i]);
  }
  result["traffic"] = traffic;
  py::list lines;
  for (const sim::LineTraffic& line : report.lines) {
    py::dict entry = to_dict(line.traffic);
    entry["file"] = line.file;
    entry["line"] = line.line;
    entry["function"] = line.function;
    entry["access"] = sim::access_name(line.access);
    lines.append(entry);
  }
  result["lines"] = lines;
  return result;
}

}  // namespace

Binding::Binding(Bind bind) { bindings().push_back(bind); }

PYBIND11_MODULE(_native, module) {
  module.doc() = "CUDA kernels of fastattn in the simulator (csrc/cuda/README.md). For developers; in no wheel.";

  module.def(
      "options",
      [](py::kwargs changes) {
        sim::Options& options = sim::options();
        for (const auto& [key, value] : changes) {
          const auto name = py::cast<std::string>(key);
          if (name == "races") {
            options.races = py::cast<bool>(value);
          } else if (name == "counters") {
            options.counters = py::cast<bool>(value);
          } else if (name == "shared_limit") {
            options.shared_limit = py::cast<int>(value);
          } else if (name == "sum_bits") {
            options.sum_bits = py::cast<int>(value);
          } else if (name == "seed") {
            options.seed = py::cast<uint64_t>(value);
          } else {
            throw py::type_error("the simulator has options races, counters, shared_limit, sum_bits and seed, not " +
                                 name);
          }
        }
        py::dict result;
        result["races"] = options.races;
        result["counters"] = options.counters;
        result["shared_limit"] = options.shared_limit;
        result["sum_bits"] = options.sum_bits;
        result["seed"] = options.seed;
        return result;
      },
      "Changes the options that are named, and returns all: races (find unordered accesses to shared memory), counters "
      "(wavefronts and sectors), shared_limit (bytes a block may have), sum_bits (not 0: that sums of 8-bit products "
      "keep), seed (not 0: warps run and tensor copies "
      "arrive in an order of chance).");
  module.def(
      "reports",
      [] {
        py::list result;
        for (const sim::Report& report : sim::reports()) result.append(to_dict(report));
        return result;
      },
      "A dict for each of the latest 256 launches since clear_reports(): what it was and what its accesses cost.");
  module.def(
      "last_report",
      [] {
        if (sim::reports().empty()) throw std::runtime_error("nothing was launched since clear_reports()");
        return to_dict(sim::reports().back());
      },
      "The report of the last launch.");
  module.def("clear_reports", &sim::clear_reports);

  for (const Bind bind : bindings()) bind(module);
}

}  // namespace fastattn::cuda::native
