// Defines simt::planted: whether a bug in the kernels is active. Compiled like the runtime, so that the checks of
// memory accesses do not see it.
#include <string>

namespace simt {
namespace {
std::string active_bug;
}

bool planted(const char* bug) { return active_bug == bug; }
}  // namespace simt

// Makes a bug active; an empty string: none.
extern "C" __attribute__((visibility("default"))) void simt_plant(const char* bug) { simt::active_bug = bug; }
