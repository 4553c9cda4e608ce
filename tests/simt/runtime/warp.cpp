#include "warp.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "access.h"
#include "clocks.h"
#include "report.h"
#include "scheduler.h"

namespace simt {
namespace {

// Lanes with disjoint masks may be in different operations at the same time.
struct Collective {
  const char* name;
  Site site;
  uint32_t arrived;
  Lanes lanes;
};
std::vector<std::vector<Collective>> pending_of_warp;

std::string describe(const char* name, uint32_t mask, Site site) {
  return format("%s with mask %08x at %s:%d", name, mask, site.file, site.line);
}

struct Shuffle {
  uint64_t value, result;
  int source_lane;
};

void exchange(const Lanes& lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    auto* shuffle = static_cast<Shuffle*>(lanes.argument[lane]);
    if (!shuffle || shuffle->source_lane < 0) continue;
    const auto* source = static_cast<const Shuffle*>(lanes.argument[shuffle->source_lane]);
    if (!source) {
      fail_about(lanes.first_thread + lane, "divergent-warp", lanes.place,
                 format("reads the value of lane %d, which takes no part in the shuffle", shuffle->source_lane));
    }
    shuffle->result = source->value;
  }
}

struct Match {
  uint64_t value;
  uint32_t result;
};

void find_equals(const Lanes& lanes) {
  for (void* argument : lanes.argument) {
    auto* match = static_cast<Match*>(argument);
    for (int lane = 0; match && lane < 32; ++lane) {
      const auto* other = static_cast<const Match*>(lanes.argument[lane]);
      if (other && other->value == match->value) match->result |= 1u << lane;
    }
  }
}

}  // namespace

bool same_site(Site a, Site b) { return a.line == b.line && strcmp(a.file, b.file) == 0; }

void reset_collectives(int num_warps) { pending_of_warp.assign(num_warps, {}); }

void warp_collective(const char* name, uint32_t mask, void* argument, void (*operation)(const Lanes&), Site site,
                     uint32_t place) {
  const int warp = current_thread->index / 32, lane = current_thread->index % 32;
  const int lanes_in_warp = std::min(32, current_launch()->num_threads - warp * 32);
  if (lanes_in_warp < 32) mask &= (1u << lanes_in_warp) - 1;
  if (!(mask >> lane & 1)) {
    fail("divergent-warp", place,
         format("lane %d calls ", lane) + describe(name, mask, site) + ", whose mask does not contain it");
  }
  std::vector<Collective>& pending = pending_of_warp[warp];
  auto mine = pending.end();
  for (auto other = pending.begin(); other != pending.end(); ++other) {
    if (!(other->lanes.mask & mask)) continue;
    if (other->lanes.mask != mask || strcmp(other->name, name) != 0 || !same_site(other->site, site)) {
      fail("divergent-warp", place,
           format("lane %d is in ", lane) + describe(name, mask, site) + ", while others wait in " +
               describe(other->name, other->lanes.mask, other->site));
    }
    mine = other;
  }
  if (mine == pending.end()) {
    pending.push_back({name, site, 0, {warp * 32, mask, place, {}}});
    mine = pending.end() - 1;
  }
  mine->arrived |= 1u << lane;
  mine->lanes.argument[lane] = argument;
  mine->lanes.place = place;
  if (mine->arrived != mask) return wait_in(name, site, place);
  const Lanes lanes = mine->lanes;
  pending.erase(mine);
  operation(lanes);
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1) && i != lane) make_ready(warp * 32 + i);
  }
  let_others_go_first();
}

int lane_index() { return current_thread->index % 32; }

void sync_warp(uint32_t mask, Site site) {
  int nothing = 0;
  warp_collective(
      "__syncwarp", mask, &nothing, [](const Lanes& lanes) { clocks.warp_barrier(lanes.first_thread, lanes.mask); },
      site, place_of(__builtin_return_address(0)));
}

uint64_t shuffle(uint32_t mask, uint64_t value, int source_lane, const char* name, Site site) {
  Shuffle argument{value, value, source_lane};
  warp_collective(name, mask, &argument, &exchange, site, place_of(__builtin_return_address(0)));
  return argument.result;
}

uint32_t match(uint32_t mask, uint64_t value, Site site) {
  Match argument{value, 0};
  warp_collective("__match_any_sync", mask, &argument, &find_equals, site, place_of(__builtin_return_address(0)));
  return argument.result;
}

void check_atomic(const void* address, size_t bytes) {
  const uint32_t place = place_of(__builtin_return_address(0));
  check_alignment(address, bytes, "atomic operation", place);
  access_memory(address, bytes, AccessKind::kAtomic, place);
}

}  // namespace simt
