// Slots by their tokens and summed drift, by a warp, and the keys by which pairs are compared (src/events.rs).
#pragma once

#include "replay.cuh"

namespace dla {

constexpr uint32_t NONE = 0xffffffffu;

// Tokens and drift of two slots a lane.
struct Ledger {
    uint32_t tokens[2], drift[2];  // slots lane and lane + 32
    int len;
};

DEVICE uint32_t saturating(uint32_t a, uint32_t b) { return a + b < a ? 0xffffffffu : a + b; }

// Slot i + 1 for the lane that holds slot i.
template <typename X>
DEVICE void next_slot(const X (&x)[2], X (&next)[2]) {
    const int lane = lane_index();
    const X low = __shfl_down_sync(ALL, x[0], 1), high = __shfl_down_sync(ALL, x[1], 1);
    const X first_high = __shfl_sync(ALL, x[1], 0);
    next[0] = lane == 31 ? first_high : low;
    next[1] = lane == 31 ? 0 : high;
}

// The pair of least cost, the oldest winning a tie.
DEVICE int cheapest_pair(const Ledger& ledger, bool mass) {
    uint32_t tokens[2], drift[2], best = NONE;
    next_slot(ledger.tokens, tokens);
    next_slot(ledger.drift, drift);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int i = lane_index() + 32 * half;
        if (i + 1 >= ledger.len) continue;
        const float sum = __uint2float_rn(saturating(ledger.drift[half], drift[half]));
        const float cost =
            mass ? sum : __fdiv_rn(sum, __uint2float_rn(saturating(ledger.tokens[half], tokens[half])));
        const uint32_t key = (__float_as_uint(cost) & ~63u) | i;
        best = key < best ? key : best;
    }
    return __reduce_min_sync(ALL, best) & 63;
}

DEVICE void apply(Ledger& ledger, uint8_t event, float score) {
    const int lane = lane_index();
    const uint32_t drift = __float2uint_rn(__fmul_rn(score, 4096.0f));
    if (event >= MERGE) {
        uint32_t tokens[2], drifts[2];
        next_slot(ledger.tokens, tokens);
        next_slot(ledger.drift, drifts);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = lane + 32 * half, merged = event - MERGE;
            if (i == merged) {
                ledger.tokens[half] = saturating(ledger.tokens[half], tokens[half]);
                ledger.drift[half] = saturating(ledger.drift[half], drifts[half]);
            } else if (i > merged) {
                ledger.tokens[half] = tokens[half];
                ledger.drift[half] = drifts[half];
            }
        }
        ledger.len--;
    }
    const bool opens = event != EXTEND;
    const int slot = opens ? ledger.len : ledger.len - 1;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (lane + 32 * half == slot) {
            ledger.tokens[half] = opens ? 1 : saturating(ledger.tokens[half], 1);
            ledger.drift[half] = opens ? drift : saturating(ledger.drift[half], drift);
        }
    }
    ledger.len += opens;
}

}  // namespace dla
