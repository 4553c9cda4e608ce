#pragma once

#include "scheduler.h"

namespace simt {

// A thread that exits must not leave copies in flight: shared memory may belong to another block by then.
void check_copies_were_waited_for(const Thread& thread);

}  // namespace simt
