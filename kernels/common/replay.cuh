// Where a chunk's events put every slot held at its entry and every token of it (OPERATOR.md, section 4;
// Replay in src/events.rs). An item is an entry slot j (item j) or a token s (item 64 + s); one thread follows
// one item through the chunk.
#pragma once

#include "row.cuh"

namespace dla {

constexpr int MOST_SLOTS = 64;
constexpr uint8_t EXTEND = 0, OPEN = 1, MERGE = 2;

template <int C>
struct Replay {
    static constexpr int ITEMS = MOST_SLOTS + C;

    uint8_t* events;  // [C]
    uint8_t* len;     // [C] slots held after token t
    uint8_t* place;   // [C][ITEMS] pi_t(j) and slot_t(s), s <= t

    METHOD void take(Carve& carve) {
        events = carve.take<uint8_t>(C);
        len = carve.take<uint8_t>(C);
        place = carve.take<uint8_t>(C * ITEMS);
    }

    // Replays `tokens` events from `entry` slots on. By the block; ends with a barrier.
    METHOD void run(const uint8_t* log, const Row& row, int64_t first, int tokens, int entry) const {
        const int thread = threadIdx.x;
        if (thread < 32) {
            // m grows with every slot that opens without a merge.
            int held = entry;
#pragma unroll
            for (int from = 0; from < C; from += 32) {
                const int t = from + thread, event = t < tokens ? log[row.at(first + t)] : EXTEND;
                const uint32_t opens = __ballot_sync(ALL, event == OPEN);
                events[t] = event;
                len[t] = held + __popc(opens & ((2u << thread) - 1));
                held += __popc(opens);
            }
        }
        __syncthreads();
        for (int item = thread; item < ITEMS; item += THREADS) {
            const bool slot = item < MOST_SLOTS;
            const int from = slot ? 0 : item - MOST_SLOTS;
            if (slot && item >= entry) continue;
            int at = item;
            for (int t = from; t < tokens; t++) {
                const int event = events[t];
                if (!slot && t == from) at = len[t] - 1;
                else if (event >= MERGE && at > event - MERGE) at--;
                place[t * ITEMS + item] = at;
            }
        }
        __syncthreads();
    }

    METHOD int of_slot(int t, int j) const { return place[t * ITEMS + j]; }
    METHOD int of_token(int t, int s) const { return place[t * ITEMS + MOST_SLOTS + s]; }
};

// What ends in every exit slot: ranges of entry slots and of tokens (slots are stretches of time).
struct Exits {
    struct Range {
        uint8_t from, to;
    };
    Range* entries;  // [MOST_SLOTS]
    Range* tokens;   // [MOST_SLOTS]

    METHOD void take(Carve& carve) {
        entries = carve.take<Range>(MOST_SLOTS);
        tokens = carve.take<Range>(MOST_SLOTS);
    }

    // By the block, after the replay; ends with a barrier.
    template <typename R>
    METHOD void find(const R& replay, int count, int entry) const {
        const int thread = threadIdx.x;
        for (int i = thread; i < MOST_SLOTS; i += THREADS) entries[i] = {0, 0}, tokens[i] = {0, 0};
        __syncthreads();
        const int last = count - 1;
        for (int j = thread; j < entry; j += THREADS) {
            const int exit = replay.of_slot(last, j);
            if (j == 0 || replay.of_slot(last, j - 1) != exit) entries[exit].from = j;
            if (j == entry - 1 || replay.of_slot(last, j + 1) != exit) entries[exit].to = j + 1;
        }
        for (int s = thread; s < count; s += THREADS) {
            const int exit = replay.of_token(last, s);
            if (s == 0 || replay.of_token(last, s - 1) != exit) tokens[exit].from = s;
            if (s == count - 1 || replay.of_token(last, s + 1) != exit) tokens[exit].to = s + 1;
        }
        __syncthreads();
    }
};

}  // namespace dla
