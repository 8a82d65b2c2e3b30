// slots: events -> the slots held at every chunk's entry and the tokens at which they start (OPERATOR.md, section 3,
// steps 3 to 5), for the backward, which has the log and asks no drift.
//
// One warp per sequence and value head, token after token: lane l holds the starts and places of slots l and l + 32. A merge
// moves those behind it down by one. A chain, about 40 clocks a token.

#include "common/replay.cuh"

namespace dla {
namespace {

DEVICE void slots(const SlotsParams& p) {
    const Extents& e = p.extents;
    const int lane = threadIdx.x;
    const int64_t index = blockIdx.x;
    const Row row = row_of(e, index / e.value_heads, index % e.value_heads);
    int held = p.initial_len ? p.initial_len[index] : 0;
    int32_t low = lane - held, high = lane + 32 - held;
    int low_place = lane, high_place = lane + 32;
    for (int64_t first = 0; first < row.len; first += 32) {
        if (first % p.chunk == 0) {
            const int64_t at = (first_chunk(row, p.chunk) + first / p.chunk) * e.value_heads + row.head;
            int32_t* const starts = p.chunk_starts + at * e.capacity;
            if (lane == 0) p.chunk_len[at] = held;
            if (lane < e.capacity) starts[lane] = lane < held ? low : 0;
            if (lane + 32 < e.capacity) starts[lane + 32] = lane + 32 < held ? high : 0;
            if (p.chunk_place) {
                uint8_t* const places = p.chunk_place + at * e.capacity;
                if (lane < e.capacity) places[lane] = lane < held ? low_place : 0;
                if (lane + 32 < e.capacity) places[lane + 32] = lane + 32 < held ? high_place : 0;
            }
        }
        const int mine = first + lane < row.len ? p.events[row.at(first + lane)] : EXTEND;
        const int count = row.len - first < 32 ? static_cast<int>(row.len - first) : 32;
        for (int t = 0; t < count; t++) {
            const int event = __shfl_sync(ALL, mine, t);
            if (event == EXTEND) continue;
            int place = held;
            if (event >= MERGE) {
                // Slots behind the older of the pair.
                const int pair = event - MERGE;
                const int32_t above = __shfl_sync(ALL, high, 0);
                const int32_t next_low = __shfl_down_sync(ALL, low, 1), next_high = __shfl_down_sync(ALL, high, 1);
                if (lane > pair) low = lane == 31 ? above : next_low;
                if (lane + 32 > pair) high = next_high;
                const int gone = pair + 1;
                const int low_gone = __shfl_sync(ALL, low_place, gone % 32), high_gone = __shfl_sync(ALL, high_place, gone % 32);
                place = gone < 32 ? low_gone : high_gone;
                const int above_place = __shfl_sync(ALL, high_place, 0);
                const int next_low_place = __shfl_down_sync(ALL, low_place, 1), next_high_place = __shfl_down_sync(ALL, high_place, 1);
                if (lane > pair) low_place = lane == 31 ? above_place : next_low_place;
                if (lane + 32 > pair) high_place = next_high_place;
                held--;
            }
            if (lane == held) low = static_cast<int32_t>(first) + t, low_place = place;
            if (lane + 32 == held) high = static_cast<int32_t>(first) + t, high_place = place;
            held++;
        }
    }
}

}  // namespace
}  // namespace dla

KERNEL BLOCK_OF(32) slots(const __grid_constant__ dla::SlotsParams p) { dla::slots(p); }
