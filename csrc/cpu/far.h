// Codes so much longer than the rest that a scale for all would leave the rest no precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

namespace vqk::cpu {

// how much longer than the rest makes a code far
constexpr double kFarRatio = 4;

// the norm beyond which a code is far, where of `share` codes one may be; infinite where none is
inline double far_beyond(std::vector<double> norms, int64_t share) {
  const int64_t most = static_cast<int64_t>(norms.size()) / share;
  if (most == 0) return HUGE_VAL;
  const double longest = *std::max_element(norms.begin(), norms.end());
  const auto near_longest = [&](double norm) { return kFarRatio * norm >= longest; };
  if (std::count_if(norms.begin(), norms.end(), near_longest) > most) return HUGE_VAL;
  std::nth_element(norms.begin(), norms.begin() + most, norms.end(), std::greater<>());
  return kFarRatio * norms[static_cast<size_t>(most)];
}

}  // namespace vqk::cpu
