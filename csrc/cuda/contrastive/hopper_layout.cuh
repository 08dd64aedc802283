// How CUTLASS divides a tile of the Hopper kernels among threads. The host can read these types,
// too.
#pragma once

#include <cute/tensor.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include "csrc/cuda/contrastive/hopper.h"

namespace bclip::cuda {

// Rows, columns and depth of a tile.
using HopperTile = cute::Shape<cute::Int<kHopperRows>, cute::Int<kHopperColumns>, cute::_64>;
// Two tiles of neighbouring rows get the same text features by multicast.
using HopperCluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
constexpr int kHopperStages = 4;

// Two groups of warps, with 64 rows each.
template <class Element>
using HopperMma = decltype(cute::make_tiled_mma(
    cute::SM90::GMMA::ss_op_selector<Element, Element, float, HopperTile,
                                     cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>(),
    cute::Layout<cute::Shape<cute::_2, cute::_1, cute::_1>>{}));

}  // namespace bclip::cuda
