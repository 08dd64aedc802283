// Counts of what decides the speed of a kernel: the wavefronts of shared memory, the sectors and
// bytes of global memory, and the instructions of the matrix and the special units. They are
// counted by launch, block and place in the source.
//
// Accesses of the lanes of a warp form an instruction if they are at the same place in the source
// and have the same rank there. The rank counts the lane's visits of the place since the last
// function of the whole warp or the last rejoin_lanes(). So an inactive lane only makes an
// instruction smaller. Loops that lanes leave at different iterations need rejoin_lanes().
//
// A wavefront moves a word of 4 bytes from each of the 32 banks. An instruction takes a phase for
// each 128 bytes: its 32 lanes with up to 4 bytes, 16 lanes with 8, or 8 lanes with 16. A phase
// takes as many wavefronts as the most distinct words in one bank (CUDA C++ best practices guide,
// "Shared memory and memory banks"). Global memory moves sectors of 32 bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "csrc/cuda/emulator/emulator.h"

namespace bclip::cuda::emulator {

enum class Kind {
  kSharedLoad,
  kSharedStore,
  kLoadMatrices,
  kCopy,
  kGlobalLoad,
  kGlobalStore,
  kMultiply,
  kExp2,
  kLog2,
  kReciprocal,
  kShuffle,
  kWarpBarrier,
  kBlockBarrier,
};
const char* name_of(Kind kind);

// Whether this process counts. It decides for later launches only.
extern bool counting;

// What a lane does. `shared` is a byte of the block's memory or -1. `global` is null if the lane
// accesses no global memory. `size` is in bytes.
void count_lane(Site site, Kind kind, int64_t shared, const void* global, int size);
inline void count(Site site, Kind kind, int64_t shared = -1, const void* global = nullptr,
                  int size = 0) {
  if (counting) count_lane(site, kind, shared, global, size);
}
void rejoin_lane();  // the running lane passes rejoin_lanes()

// The sums over the instructions of one place.
struct Counts {
  int64_t instructions = 0;  // of warps; barriers of a block count once a block
  int64_t lanes = 0;         // active lanes
  int64_t wavefronts = 0, least_wavefronts = 0;
  int64_t sectors = 0, least_sectors = 0;  // least for as many different bytes
  int64_t bytes = 0;                       // of global memory, that lanes ask for

  auto tied() const {
    return std::tie(instructions, lanes, wavefronts, least_wavefronts, sectors, least_sectors,
                    bytes);
  }
  bool operator==(const Counts& other) const { return tied() == other.tied(); }
};

// The file's name without folders, the line, the kind, and the bytes of a lane.
using Operation = std::tuple<std::string, int, Kind, int>;

// Blocks with equal counts.
struct CountedTile {
  std::vector<int64_t> blocks;  // ascending
  std::map<Operation, Counts> counts;
};

struct CountedLaunch {
  std::string kernel;  // as in benchmarks/results/cuda_resources.md
  int64_t blocks;
  int threads, shared_bytes;
  std::vector<CountedTile> tiles;  // the tile with the most blocks first
};

void start_counting();  // forgets earlier launches
// Returns the launches since start_counting(), in their order, and forgets them.
std::vector<CountedLaunch> counted_launches();
void stop_counting();

// Called by the emulator.
void begin_counted_launch(const void* kernel, int64_t blocks, int threads, int shared_bytes);
void end_counted_warp(int warp);  // all lanes of the warp meet
void end_counted_block(int64_t block);
void end_counted_launch();

// The name of a kernel: the operator, the function and the template's arguments, from the symbol
// table of this module.
std::string kernel_name(const void* kernel);

}  // namespace bclip::cuda::emulator
