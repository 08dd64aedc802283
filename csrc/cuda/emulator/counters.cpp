#include "csrc/cuda/emulator/counters.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <utility>

namespace bclip::cuda::emulator {

bool counting = false;

namespace {

constexpr int kWarp = 32, kBanks = 32, kWordBytes = 4, kPhaseBytes = 128, kSectorBytes = 32;

// A lane's part of an instruction. Lanes with the same key form the instruction.
struct Part {
  uint64_t key;
  int lane;
  int64_t shared;
  uintptr_t global;
};

// The rank of a lane's next visit of an operation. It counts from zero in each segment.
struct Rank {
  uint32_t segment, next;
};

struct Lane {
  uint32_t segment = 1, rejoined = 0;
  std::vector<Rank> ranks;  // by operation
};

// The launch that this thread of the process emulates.
struct Counters {
  static Counters& current() {
    static thread_local Counters counters;
    return counters;
  }

  bool running = false;
  CountedLaunch launch;
  std::vector<Lane> lanes;               // of the block
  std::vector<std::vector<Part>> parts;  // by warp, since the warp met
  std::map<Operation, Counts> block;
  // Operations by number. The first map finds them without a comparison of texts.
  std::map<std::tuple<const char*, int, Kind, int>, uint32_t> known;
  std::map<Operation, uint32_t> numbers;
  std::vector<Operation> operations;
};

std::mutex& mutex() {
  static std::mutex one;
  return one;
}
std::vector<CountedLaunch>& finished() {
  static std::vector<CountedLaunch> launches;
  return launches;
}

uint32_t number_of(Counters& state, Site site, Kind kind, int size) {
  const auto [at, added] = state.known.try_emplace({site.file, site.line, kind, size}, 0);
  if (added) {
    const char* const name = std::strrchr(site.file, '/');
    const Operation operation{name ? name + 1 : site.file, site.line, kind, size};
    const auto [number, fresh] =
        state.numbers.try_emplace(operation, static_cast<uint32_t>(state.operations.size()));
    if (fresh) state.operations.push_back(operation);
    at->second = number->second;
  }
  return at->second;
}

template <class T>
void keep_distinct(std::vector<T>& values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
}

// The wavefronts of an instruction, and the least number for these lanes.
std::pair<int, int> wavefronts_of(const Part* begin, const Part* end, int size) {
  const int phase_lanes = std::min(kWarp, kPhaseBytes / size);
  int wavefronts = 0, phases = 0;
  while (begin != end) {
    const int phase = begin->lane / phase_lanes;
    std::vector<int64_t> words;
    for (; begin != end && begin->lane / phase_lanes == phase; ++begin) {
      for (int64_t word = begin->shared / kWordBytes;
           word <= (begin->shared + size - 1) / kWordBytes; ++word) {
        words.push_back(word);
      }
    }
    keep_distinct(words);
    int of_bank[kBanks] = {};
    for (const int64_t word : words) ++of_bank[word % kBanks];
    wavefronts += *std::max_element(of_bank, of_bank + kBanks);
    ++phases;
  }
  return {wavefronts, phases};
}

// Parts are in the order of the lanes.
void add_instruction(Counters& state, const Part* begin, const Part* end) {
  const Operation& operation = state.operations[begin->key & 0xfffff];
  const int size = std::get<3>(operation);
  Counts& counts = state.block[operation];
  ++counts.instructions;
  counts.lanes += end - begin;
  if (begin->shared >= 0) {
    const auto [wavefronts, least] = wavefronts_of(begin, end, size);
    counts.wavefronts += wavefronts;
    counts.least_wavefronts += least;
  }
  std::vector<uintptr_t> addresses, sectors;
  for (; begin != end; ++begin) {
    if (!begin->global) continue;
    counts.bytes += size;
    addresses.push_back(begin->global);
    for (uintptr_t sector = begin->global / kSectorBytes;
         sector <= (begin->global + size - 1) / kSectorBytes; ++sector) {
      sectors.push_back(sector);
    }
  }
  keep_distinct(addresses);
  keep_distinct(sectors);
  counts.sectors += sectors.size();
  counts.least_sectors += (addresses.size() * size + kSectorBytes - 1) / kSectorBytes;
}

}  // namespace

const char* name_of(Kind kind) {
  constexpr const char* names[] = {"shared_load",  "shared_store", "ldmatrix", "copy",
                                   "global_load",  "global_store", "multiply", "exp2",
                                   "log2",         "reciprocal",   "shuffle",  "warp_barrier",
                                   "block_barrier"};
  return names[static_cast<int>(kind)];
}

void count_lane(Site site, Kind kind, int64_t shared, const void* global, int size) {
  Counters& state = Counters::current();
  if (!state.running) return;
  const uint32_t number = number_of(state, site, kind, size);
  if (kind == Kind::kBlockBarrier) {
    // Each thread of the block passes it once.
    Counts& counts = state.block[state.operations[number]];
    if (++counts.lanes % state.launch.threads == 0) ++counts.instructions;
    return;
  }
  Lane& lane = state.lanes[thread()];
  if (lane.ranks.size() <= number) lane.ranks.resize(number + 1);
  Rank& rank = lane.ranks[number];
  if (rank.segment != lane.segment) rank = {lane.segment, 0};
  const uint64_t key = uint64_t(lane.rejoined) << 40 | uint64_t(rank.next++) << 20 | number;
  state.parts[thread() / kWarp].push_back(
      {key, thread() % kWarp, shared, reinterpret_cast<uintptr_t>(global)});
}

void rejoin_lane() {
  Counters& state = Counters::current();
  if (!state.running) return;
  Lane& lane = state.lanes[thread()];
  ++lane.segment;
  ++lane.rejoined;
}

void start_counting() {
  const std::lock_guard<std::mutex> lock(mutex());
  finished().clear();
  counting = true;
}

std::vector<CountedLaunch> counted_launches() {
  const std::lock_guard<std::mutex> lock(mutex());
  return std::exchange(finished(), {});
}

void stop_counting() { counting = false; }

void begin_counted_launch(const void* kernel, int64_t blocks, int threads, int shared_bytes) {
  Counters& state = Counters::current();
  state.running = counting;
  if (!counting) return;
  state.launch = {kernel_name(kernel), blocks, threads, shared_bytes, {}};
  state.lanes.assign(threads, {});
  state.parts.assign(threads / kWarp, {});
  state.block.clear();
}

void end_counted_warp(int warp) {
  Counters& state = Counters::current();
  if (!state.running) return;
  std::vector<Part>& parts = state.parts[warp];
  std::sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) {
    return std::tie(a.key, a.lane) < std::tie(b.key, b.lane);
  });
  const Part* const end = parts.data() + parts.size();
  for (const Part* begin = parts.data(); begin != end;) {
    const Part* next = begin;
    while (next != end && next->key == begin->key) ++next;
    add_instruction(state, begin, next);
    begin = next;
  }
  parts.clear();
  for (int lane = warp * kWarp; lane < (warp + 1) * kWarp; ++lane) {
    ++state.lanes[lane].segment;
    state.lanes[lane].rejoined = 0;
  }
}

void end_counted_block(int64_t block) {
  Counters& state = Counters::current();
  if (!state.running) return;
  for (size_t warp = 0; warp < state.parts.size(); ++warp) end_counted_warp(static_cast<int>(warp));
  const auto counts = std::exchange(state.block, {});
  for (CountedTile& tile : state.launch.tiles) {
    if (tile.counts == counts) return tile.blocks.push_back(block);
  }
  state.launch.tiles.push_back({{block}, counts});
}

void end_counted_launch() {
  Counters& state = Counters::current();
  if (!std::exchange(state.running, false)) return;
  std::vector<CountedTile>& tiles = state.launch.tiles;
  for (CountedTile& tile : tiles) std::sort(tile.blocks.begin(), tile.blocks.end());
  std::sort(tiles.begin(), tiles.end(), [](const CountedTile& a, const CountedTile& b) {
    if (a.blocks.size() != b.blocks.size()) return a.blocks.size() > b.blocks.size();
    return a.blocks.front() < b.blocks.front();
  });
  const std::lock_guard<std::mutex> lock(mutex());
  finished().push_back(std::move(state.launch));
}

}  // namespace bclip::cuda::emulator
