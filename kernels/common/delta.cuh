// How prepare leaves for the delta rule's scan on Hopper what that reads of a chunk: as the scan's operands lie.
#pragma once

#include "tile.cuh"

namespace dla {

struct DeltaLayout {
    int width;  // dk as computed

    static constexpr int C = Bf16::CHUNK, WRITE_PLANES = 2;

    // Elements of a chunk: Qt in pairs, the transition, Kh.
    METHOD constexpr int queries() const { return C * width / 2; }
    METHOD constexpr int transition() const { return width * width; }
    METHOD constexpr int writes() const { return WRITE_PLANES * C * width; }

    // The left operand of warp `warp`'s 16 rows at `step`, in 16 bytes a lane.
    METHOD constexpr int query(int warp, int step, int lane) const { return (warp * (width / 16) + step) * 32 + lane; }
    // Element (k, n) of a right operand of `depth` rows k: blocks of 8 x 8, n contiguous, k before n.
    METHOD constexpr int at(int depth, int k, int n) const { return n / 8 * depth * 8 + k * 8 + n % 8; }
};

}  // namespace dla
