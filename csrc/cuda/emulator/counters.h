// Counters of wavefronts of shared memory, sectors and bytes of global memory, and instructions of
// the matrix and special units. These numbers limit the speed of a kernel. Each count belongs to a
// launch, a block and a place in the source.
//
// Accesses of a warp's lanes form one instruction if they have the same place in the source and the
// same rank. The rank is the number of the lane's visits to the place since the last function of
// the whole warp or the last rejoin_lanes(). So an inactive lane only makes an instruction smaller.
// A loop that lanes leave at different iterations needs rejoin_lanes().
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

// Counts one lane's operation. `shared` is the offset of a byte in the block's memory, or -1. A
// null `global` means no access to global memory. `size` is in bytes.
void count_lane(Site site, Kind kind, int64_t shared, const void* global, int size);
inline void count(Site site, Kind kind, int64_t shared = -1, const void* global = nullptr,
                  int size = 0) {
  if (counting) count_lane(site, kind, shared, global, size);
}
void rejoin_lane();  // the running lane passes rejoin_lanes()

// Sums over the instructions of one place.
struct Counts {
  int64_t instructions = 0;  // warp instructions, and one a block for each of its barriers
  int64_t lanes = 0;         // active lanes
  int64_t wavefronts = 0, least_wavefronts = 0;
  int64_t sectors = 0, least_sectors = 0;  // the least holds as many different bytes
  int64_t bytes = 0;                       // requested bytes of global memory

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
