// How prepare leaves for the delta rule's scan on Hopper what that reads of a chunk: as the scan's operands lie.
#pragma once

#include "../abi.cuh"
#include "tile.cuh"

namespace dla {

struct DeltaLayout {
    int width;  // dk as computed

    static constexpr int C = DELTA_CHUNK;
    // P . Lambda as left operands in shared memory: of the first 64 tokens, then of the others, by 16 columns; blocks of 8 x 8,
    // eight of them for the rows, twice. Elements, in pairs, of 16 columns and of all.
    static constexpr int PAIRS_OF_STEP = 64 * 16 / 2, PAIRS = 12 * PAIRS_OF_STEP;
    METHOD static constexpr int pair(int half, int step) { return (half * 4 + step) * PAIRS_OF_STEP; }

    // Elements of a chunk: Qt in pairs, the transition, Kh.
    METHOD constexpr int queries() const { return C * width / 2; }
    METHOD constexpr int transition() const { return width * width; }
    METHOD constexpr int writes() const { return C * width; }

    // The left operand of the `block`-th 16 rows at `step`, in 16 bytes a lane.
    METHOD constexpr int query(int block, int step, int lane) const { return (block * (width / 16) + step) * 32 + lane; }
    // Element (k, n) of a right operand of `depth` rows k: blocks of 8 x 8, n contiguous, k before n.
    METHOD constexpr int at(int depth, int k, int n) const { return n / 8 * depth * 8 + k * 8 + n % 8; }
};

}  // namespace dla
