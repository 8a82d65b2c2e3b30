// A chunk of the kernels that prepare for Hopper's scans, and where the slots held after it stand.
#pragma once

#include "replay.cuh"
#include "window.cuh"

namespace dla {

struct Chunk {
    Row row;
    int64_t first;  // token of the sequence
    int64_t place;  // among all chunks, as segment numbers them
    int64_t kept;   // where what is made of it stands (abi.cuh)
    int len;        // 0: no such chunk
};

template <typename Params>
DEVICE Chunk chunk_of(const Params& p) {
    constexpr int C = Bf16::CHUNK;
    const Extents& e = p.extents;
    const int head = blockIdx.x % e.value_heads;
    const int64_t at = blockIdx.x / e.value_heads;
    Chunk chunk;
    if (e.cu_seqlens) {
        chunk.row = row_of(e, sequence_of_chunk(e, at, C), head);
        chunk.first = (at - first_chunk(chunk.row, C)) * C;
    } else {
        const int64_t chunks = chunks_of_window(e, p.from, p.to, C);
        chunk.row = row_of(e, at / chunks, head);
        chunk.first = p.from + at % chunks * C;
    }
    chunk.kept = at;
    chunk.place = first_chunk(chunk.row, C) + chunk.first / C;
    const int64_t left = chunk.row.len - chunk.first;
    const bool inside = chunk.first >= p.from && chunk.first < p.to && left > 0;
    chunk.len = !inside ? 0 : left < C ? static_cast<int>(left) : C;
    return chunk;
}

// The same of a window of the backward.
template <typename Params>
DEVICE Chunk chunk_of_backward(const Params& p) {
    const WindowChunk at = chunk_of_block(p.extents, blockIdx.x, p.from, p.to, Bf16::CHUNK);
    return {at.row, at.first, at.place / p.extents.value_heads, at.kept / p.extents.value_heads, at.len};
}

// The places of the slots that are held after the chunk (0: not held), by one warp; lane i has tokens and slots i and
// i + 32. The slot that a token opens takes the place of the one that merges away then, which is that of its first item,
// or if none merges the next free one. An item is an entry slot or a token that opened a slot: so tokens lead to tokens.
template <typename R>
DEVICE void exit_places(const R& replay, const Exits& exits, int len, int entry, const uint8_t* entry_place,
                        uint8_t* exit_place) {
    constexpr int FOUND = 128;  // + place; less: the token whose place it is
    const int lane = lane_index();
    int link[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int t = lane + 32 * half, event = t < len ? replay.events[t] : EXTEND;
        link[half] = FOUND;
        if (event == OPEN) link[half] = FOUND + replay.len[t] - 1;
        if (event >= MERGE) {
            // The first of entry slots, then tokens before t that is in the slot, or beyond it.
            const int gone = event - MERGE + 1;
            int low = 0, high = entry + t;
            while (low < high) {
                const int middle = (low + high) / 2;
                const int at = t == 0           ? middle
                               : middle < entry ? replay.of_slot(t - 1, middle)
                                                : replay.of_token(t - 1, middle - entry);
                if (at < gone) low = middle + 1;
                else high = middle;
            }
            link[half] = low < entry ? FOUND + entry_place[low] : low - entry;
        }
    }
    const auto of_token = [&](int token) {
        const int low = __shfl_sync(ALL, link[0], token % 32), high = __shfl_sync(ALL, link[1], token % 32);
        return token % 64 < 32 ? low : high;
    };
    while (__any_sync(ALL, link[0] < FOUND || link[1] < FOUND)) {
        const int low = of_token(link[0]), high = of_token(link[1]);
        if (link[0] < FOUND) link[0] = low;
        if (link[1] < FOUND) link[1] = high;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int i = lane + 32 * half, opened = of_token(exits.tokens[i].from) - FOUND;
        const Exits::Range entries = exits.entries[i];
        const bool held = i < replay.len[len - 1];
        exit_place[i] = !held ? 0 : entries.from < entries.to ? entry_place[entries.from] : opened;
    }
}

}  // namespace dla
