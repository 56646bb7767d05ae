#include "peaks.h"

#include <time.h>

#include <chrono>
#include <numeric>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace vqk::cpu {
namespace {

// one stretch of work, seconds: long beside the start of a thread
constexpr double kStretch = 2e-3;

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// of this thread's own work, so that waiting for a core that another process holds does not count
double worked() {
#ifdef CLOCK_THREAD_CPUTIME_ID
  timespec time;
  if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time) == 0) return time.tv_sec + 1e-9 * time.tv_nsec;
#endif
  return seconds();
}

double rate_of(const Peak& peak, int64_t turns) {
  const double start = worked();
  peak.run(turns);
  return static_cast<double>(peak.operations * turns) / std::max(worked() - start, 1e-9);
}

double best_rate(const Peak& peak, double wanted) {
  int64_t turns = 1;
  while (static_cast<double>(peak.operations * turns) < kStretch * rate_of(peak, turns)) turns *= 2;
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<double> rates(static_cast<size_t>(threads));
  double best = 0;
  const double start = seconds();
  do {
    // side by side: cores that are busy together may be slower than one alone
    each_task(threads, 0,
              [&](int64_t task, void*) { rates[static_cast<size_t>(task)] = rate_of(peak, turns); });
    best = std::max(best, std::accumulate(rates.begin(), rates.end(), 0.0));
  } while (seconds() - start < wanted);
  return best;
}

}  // namespace

std::map<std::string, double> peaks(double seconds) {
  const PeakKernels& body = *kernels().peaks;
  std::map<std::string, double> rates;
  for (int kind = 0; kind < body.count; ++kind)
    if (body.kinds[kind].supported()) rates[body.kinds[kind].name] = best_rate(body.kinds[kind], seconds);
  return rates;
}

}  // namespace vqk::cpu
