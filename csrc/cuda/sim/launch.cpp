#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>

#include "block.h"

namespace fastattn::cuda::sim {

namespace {

std::mutex one_launch_at_a_time;
std::vector<Report> latest_reports;
constexpr size_t kReports = 256;

void keep(Report report) {
  if (latest_reports.size() == kReports) latest_reports.erase(latest_reports.begin());
  latest_reports.push_back(std::move(report));
}

[[noreturn]] void refuse(const char* kernel, const std::string& reason) {
  throw std::runtime_error("simulated kernel " + std::string(kernel) + ": " + reason);
}

}  // namespace

Options& options() {
  static Options value = [] {
    Options initial;
    if (const char* races = std::getenv("FASTATTN_SIMULATOR_RACES")) initial.races = std::string(races) != "0";
    return initial;
  }();
  return value;
}

const std::vector<Report>& reports() { return latest_reports; }
void clear_reports() { latest_reports.clear(); }

void launch(const char* kernel, int threads, int min_blocks, const Launch& launch, const void* params,
            void (*body)(const void*)) {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  if (threads < kLanes || threads > 1024 || threads % kLanes != 0) {
    refuse(kernel, std::to_string(threads) + " threads: not a multiple of 32 up to 1024");
  }
  if (launch.grid_x < 1 || launch.grid_y < 1 || launch.grid_z < 1) refuse(kernel, "the grid is empty");
  if (launch.grid_y > 65535 || launch.grid_z > 65535) refuse(kernel, "a grid has at most 65535 blocks along y and z");
  if (launch.shared_bytes < 0 || launch.shared_bytes > options().shared_limit) {
    refuse(kernel, std::to_string(launch.shared_bytes) + " bytes of shared memory, where a block may have " +
                       std::to_string(options().shared_limit));
  }
  block.begin_launch(kernel, threads, min_blocks, launch);
  struct Finish {  // also after an error
    ~Finish() { keep(block.end_launch()); }
  } finish;
  int index[3];
  for (index[2] = 0; index[2] < launch.grid_z; ++index[2]) {
    for (index[1] = 0; index[1] < launch.grid_y; ++index[1]) {
      for (index[0] = 0; index[0] < launch.grid_x; ++index[0]) {
        block.run(kernel, threads, launch, index, params, body);
      }
    }
  }
}

void unsupported(const char* instruction, Where where) {
  block.fail(where, std::string("the simulator does not know ") + instruction);
}

}  // namespace fastattn::cuda::sim
