#pragma once

#include "scheduler.h"

namespace simt {

// Reports copies that are in flight when a thread exits: shared memory may belong to another block by then.
void check_copies_were_waited_for(const Thread& thread);

}  // namespace simt
