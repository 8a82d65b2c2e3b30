// slots: events -> the slots held at every chunk's entry, the tokens at which they start and their places (OPERATOR.md, section
// 3, steps 3 to 5), for the backward, which has the log and asks no drift.
//
// What a chunk does to the list of slots depends on its events and on how many are held at its entry, which is how many were
// opened before (a merge opens one more and takes one away). So slots_maps replays every chunk by itself, in terms of the
// entry's slots: a warp a chunk, lane l has entries l and l + 32 of the list, a merge moves those behind it down by one. An
// entry's start is that of entry slot j or token t of the chunk, its place that of entry slot j or a new one. The list at the
// chunk's end stands where the next chunk's starts will be. Then slots puts these maps one after the other: a warp a row and
// head, two shuffles a chunk and 32 slots, maps asked for eight chunks ahead.
//
// One chain over the tokens took 95 ns a token, 3.1 ms of 32,768 x 16 heads.

#include "common/replay.cuh"

namespace dla {
namespace {

constexpr uint32_t OF_ENTRY = 0x80;  // else a token of the chunk, or a place
constexpr int AHEAD = 8;

DEVICE int64_t chunks_of(const Row& row, int chunk) { return (row.len + chunk - 1) / chunk; }

// Of a list of 64 whose lane l has entries l and l + 32.
DEVICE uint32_t entry_of(uint32_t low, uint32_t high, int index, bool wide) {
    const uint32_t x = __shfl_sync(ALL, low, index % 32);
    if (!wide) return x;
    const uint32_t y = __shfl_sync(ALL, high, index % 32);
    return index < 32 ? x : y;
}

// Slots held before token `first`.
DEVICE int held_before(const SlotsParams& p, const Row& row, int64_t first, int held) {
    const int lane = lane_index();
    constexpr int AT_ONCE = 8;
    // No more than M are ever held.
    for (int64_t from = 0; from < first && held < p.extents.capacity; from += 32 * AT_ONCE) {
        int event[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int64_t t = from + i * 32 + lane;
            event[i] = t < first ? p.events[row.at(t)] : EXTEND;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) held += __popc(__ballot_sync(ALL, event[i] == OPEN));
    }
    return held;
}

DEVICE void slots_maps(const SlotsParams& p) {
    const Extents& e = p.extents;
    const int lane = lane_index(), warp = warp_index();
    const int64_t index = blockIdx.x / p.parts;
    const Row row = row_of(e, index / e.value_heads, index % e.value_heads);
    const bool wide = e.capacity > 32;
    const int64_t chunks = chunks_of(row, p.chunk), place0 = first_chunk(row, p.chunk);
    const int initial = p.initial_len ? static_cast<int>(p.initial_len[index]) : 0;
    for (int64_t n = blockIdx.x % p.parts * WARPS + warp; n < chunks; n += p.parts * WARPS) {
        const int64_t begin = n * p.chunk, at = (place0 + n) * e.value_heads + row.head;
        const int64_t end = row.len - begin < p.chunk ? row.len : begin + p.chunk;
        int held = held_before(p, row, begin, initial);
        if (lane == 0) p.chunk_len[at] = held;
        if (n + 1 == chunks) return;  // no one asks what it leaves
        uint32_t low = lane < held ? (OF_ENTRY | lane) * 0x101u : 0;
        uint32_t high = lane + 32 < held ? (OF_ENTRY | (lane + 32)) * 0x101u : 0;
        for (int64_t first = begin; first < end; first += 32) {
            const int mine = first + lane < end ? p.events[row.at(first + lane)] : EXTEND;
            const int count = end - first < 32 ? static_cast<int>(end - first) : 32;
            for (int t = 0; t < count; t++) {
                const int event = __shfl_sync(ALL, mine, t);
                if (event == EXTEND) continue;
                uint32_t place = static_cast<uint32_t>(held);
                if (event >= MERGE) {
                    // Slots behind the older of the pair.
                    const int pair = event - MERGE;
                    place = entry_of(low, high, pair + 1, wide) >> 8;
                    const uint32_t above = wide ? __shfl_sync(ALL, high, 0) : 0;
                    const uint32_t next_low = __shfl_down_sync(ALL, low, 1);
                    if (lane > pair) low = lane == 31 ? above : next_low;
                    if (wide) {
                        const uint32_t next_high = __shfl_down_sync(ALL, high, 1);
                        if (lane + 32 > pair) high = next_high;
                    }
                    held--;
                }
                const uint32_t opened = static_cast<uint32_t>(first - begin) + t | place << 8;
                if (lane == held) low = opened;
                if (lane + 32 == held) high = opened;
                held++;
            }
        }
        int32_t* const map = p.chunk_starts + (at + e.value_heads) * e.capacity;
        if (lane < e.capacity) map[lane] = static_cast<int32_t>(low);
        if (lane + 32 < e.capacity) map[lane + 32] = static_cast<int32_t>(high);
    }
}

DEVICE void slots(const SlotsParams& p) {
    const Extents& e = p.extents;
    const int lane = threadIdx.x;
    const int64_t index = blockIdx.x;
    const Row row = row_of(e, index / e.value_heads, index % e.value_heads);
    const bool wide = e.capacity > 32;
    const int64_t chunks = chunks_of(row, p.chunk), first_at = first_chunk(row, p.chunk) * e.value_heads + row.head;
    const int initial = p.initial_len ? static_cast<int>(p.initial_len[index]) : 0;
    uint32_t low = lane - initial, high = lane + 32 - initial, low_place = lane, high_place = lane + 32;
    // Chunk n's entry: how many, and what the chunk before made of its own.
    struct Asked {
        int len;
        uint32_t low, high;
    };
    const auto ask = [&](int64_t n) {
        Asked asked = {0, 0, 0};
        if (n >= chunks) return asked;
        const int64_t at = first_at + n * e.value_heads;
        asked.len = static_cast<int>(p.chunk_len[at]);
        if (n == 0) return asked;
        const int32_t* const map = p.chunk_starts + at * e.capacity;
        if (lane < e.capacity) asked.low = static_cast<uint32_t>(map[lane]);
        if (lane + 32 < e.capacity) asked.high = static_cast<uint32_t>(map[lane + 32]);
        return asked;
    };
    // A start and a place as a map has them, in a chunk from token `begin` on.
    const auto follow = [&](uint32_t code, uint32_t& start, uint32_t& place, uint32_t begin) {
        const uint32_t from = code & 0xff, to = code >> 8 & 0xff;
        const uint32_t start_then = entry_of(low, high, from & 63, wide), place_then = entry_of(low_place, high_place, to & 63, wide);
        start = from & OF_ENTRY ? start_then : begin + from;
        place = to & OF_ENTRY ? place_then : to;
    };
    Asked next[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) next[i] = ask(i);
    for (int64_t n = 0; n < chunks; n += AHEAD) {
        Asked now[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) now[i] = next[i], next[i] = ask(n + AHEAD + i);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (n + i >= chunks) break;
            if (n + i > 0) {
                const uint32_t begin = static_cast<uint32_t>((n + i - 1) * p.chunk);
                uint32_t start, place, high_start = 0, place_of_high = 0;
                follow(now[i].low, start, place, begin);
                if (wide) follow(now[i].high, high_start, place_of_high, begin);
                low = start, low_place = place, high = high_start, high_place = place_of_high;
            }
            const int64_t at = first_at + (n + i) * e.value_heads;
            int32_t* const starts = p.chunk_starts + at * e.capacity;
            const bool held = lane < now[i].len, held_high = lane + 32 < now[i].len;
            if (lane < e.capacity) starts[lane] = held ? static_cast<int32_t>(low) : 0;
            if (lane + 32 < e.capacity) starts[lane + 32] = held_high ? static_cast<int32_t>(high) : 0;
            if (p.chunk_place) {
                uint8_t* const places = p.chunk_place + at * e.capacity;
                if (lane < e.capacity) places[lane] = held ? low_place : 0;
                if (lane + 32 < e.capacity) places[lane + 32] = held_high ? high_place : 0;
            }
        }
    }
}

}  // namespace
}  // namespace dla

KERNEL BLOCKS_OF(dla::THREADS, 4) slots_maps(const __grid_constant__ dla::SlotsParams p) { dla::slots_maps(p); }
KERNEL BLOCK_OF(32) slots(const __grid_constant__ dla::SlotsParams p) { dla::slots(p); }
