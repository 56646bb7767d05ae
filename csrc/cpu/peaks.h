// What this CPU can do at most.
#pragma once

#include <map>
#include <string>

namespace vqk::cpu {

// operations per second of all threads of torch's pool, by the kind of product, in the instruction set in
// use; `seconds` are spent on each kind, and the best moment counts
std::map<std::string, double> peaks(double seconds);

}  // namespace vqk::cpu
