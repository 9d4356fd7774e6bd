#pragma once

#include "common/decode_tiles.h"
#include "common/head_map.h"
#include "cuda/decode_call.h"
#include "cuda/machine.h"

namespace ea::cuda {

constexpr int kTileRows = 16;

EA_DEVICE int lowest_lane(uint32_t lanes) { return popcount((lanes & (~lanes + 1)) - 1); }

// The query rows of a tile, those of one key head. Lanes r and r + 16 have row r.
struct TileRows {
  int count, key_head;          // the same for all lanes; without rows there is nothing to do
  int head, token, value_head;  // of the lane's row; those of row 0 if there is no such row
};

// The tile `part` of the rows of a key head that `readers` query heads read.
template <typename HeadOfReader>
EA_DEVICE TileRows rows_of(const DecodeCall& call, int sample, int key_head, int readers, int part,
                           const HeadOfReader& head_of) {
  const int first = part * kTileRows, rows = readers * call.tokens - first;
  TileRows tile;
  tile.count = rows < kTileRows ? rows : kTileRows;
  tile.key_head = key_head;
  const int row = lane() % kTileRows;
  const QueryRow at = query_row(first + (row < tile.count ? row : 0), call.tokens);
  tile.head = head_of(at.reader);
  tile.token = at.token;
  tile.value_head = call.q_to_v == nullptr
                        ? even_group(tile.head, call.heads, call.value_heads)
                        : call.q_to_v[sample * call.q_to_v_step + tile.head];
  return tile;
}

// Tile `tile` of a sample. All lanes of a warp call it; those of every warp find the same.
EA_DEVICE TileRows find_rows(const DecodeCall& call, int sample, int tile) {
  if (call.q_to_k == nullptr) {
    const int group = call.heads / call.key_heads;
    const int tiles = ceil_div(group * call.tokens, kTileRows), key_head = tile / tiles;
    return rows_of(call, sample, key_head, group, tile % tiles,
                   [&](int reader) { return key_head * group + reader; });
  }
  // Tiles are numbered by key head; each lane counts those of one.
  const int32_t* map = call.q_to_k + sample * call.q_to_k_step;
  int before = 0;
  for (int first = 0; first < call.key_heads; first += 32) {
    const int mine = first + lane();
    const int readers = mine < call.key_heads ? count_readers(map, call.heads, mine) : 0;
    const int tiles = ceil_div(readers * call.tokens, kTileRows);
    int end = before + tiles;
    for (int step = 1; step < 32; step *= 2) {
      const int left = shuffle(end - before, (lane() + 32 - step) % 32);
      end += lane() >= step ? left : 0;
    }
    const uint32_t owner = ballot(end - tiles <= tile && tile < end);
    if (owner != 0) {
      const int source = lowest_lane(owner);
      const int key_head = first + source;
      const int part = tile - shuffle(end - tiles, source);
      return rows_of(call, sample, key_head, shuffle(readers, source), part, [&](int reader) {
        return find_reader(map, call.heads, key_head, reader);
      });
    }
    before = shuffle(end, 31);
  }
  return {0, 0, 0, 0, 0};
}

// The value heads that the rows of a tile read, each once, in slots.
struct ValueSlots {
  int count;   // the same for all lanes
  int head;    // of the slot that has the lane's number
  int of_row;  // the slot that the lane's row reads; -1 if there is no such row
};

EA_DEVICE ValueSlots find_slots(const TileRows& rows) {
  ValueSlots slots{0, 0, -1};
  bool waits = lane() < kTileRows && lane() < rows.count;
  for (uint32_t waiting = ballot(waits); waiting != 0; waiting = ballot(waits)) {
    const int head = shuffle(rows.value_head, lowest_lane(waiting));
    if (lane() == slots.count) slots.head = head;
    if (waits && rows.value_head == head) {
      slots.of_row = slots.count;
      waits = false;
    }
    ++slots.count;
  }
  slots.of_row = shuffle(slots.of_row, lane() % kTileRows);
  return slots;
}

}  // namespace ea::cuda
