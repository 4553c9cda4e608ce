// The switch behind simt::planted: which bug, if any, the kernels have now. Compiled like the runtime, so that the
// checks of memory accesses do not see it.
#include <string>

namespace simt {
namespace {
std::string bug_in_place;
}

bool planted(const char* bug) { return bug_in_place == bug; }
}  // namespace simt

// Empty: none.
extern "C" __attribute__((visibility("default"))) void simt_plant(const char* bug) { simt::bug_in_place = bug; }
