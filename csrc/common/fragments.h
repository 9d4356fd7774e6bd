#pragma once

#include <cstdint>

#include "common/macros.h"

// Which elements the lanes of a warp hold in a tensor core's product of 16 x 16 by 16 x 8 numbers of two
// bytes (mma.sync.m16n8k16, "Warp-level matrix fragments" in the PTX manual), and where rows of granules
// of 16 bytes lie in shared memory. Two numbers lie side by side in a register.

namespace ea::fragments {

// The left factor, of 4 registers: the row and the first column of a register.
EA_HOST_DEVICE constexpr int left_row(int lane, int reg) { return lane / 4 + 8 * (reg % 2); }
EA_HOST_DEVICE constexpr int left_column(int lane, int reg) {
  return 2 * (lane % 4) + 8 * (reg / 2);
}

// The right factor, of 2 registers: the first row and the column of a register.
EA_HOST_DEVICE constexpr int right_row(int lane, int reg) { return 2 * (lane % 4) + 8 * reg; }
EA_HOST_DEVICE constexpr int right_column(int lane) { return lane / 4; }

// Their product, of 4 floats.
EA_HOST_DEVICE constexpr int product_row(int lane, int index) { return lane / 4 + 8 * (index / 2); }
EA_HOST_DEVICE constexpr int product_column(int lane, int index) {
  return 2 * (lane % 4) + index % 2;
}

// ldmatrix.x4 takes from each lane the address of a row of 8 numbers: of matrix lane / 8, its row
// lane % 8. Register j of a lane is then two numbers of matrix j. These are the rows (and granules) to
// ask for, so that the four registers are:
struct Place {
  int row, granule;
};

// A left factor; or, transposed, two right factors of neighbouring columns. All are stored row by row.
EA_HOST_DEVICE constexpr Place left_place(int lane) { return {lane % 16, lane / 16}; }

// Two right factors of neighbouring columns, which are stored column by column.
EA_HOST_DEVICE constexpr Place right_place(int lane) {
  return {lane % 8 + lane / 16 * 8, lane / 8 % 2};
}

// One column block of two right factors, one below the other, stored column by column.
EA_HOST_DEVICE constexpr Place deep_right_place(int lane) { return {lane % 8, lane / 8}; }

// Where granule `granule` of row `row` lies among rows of `granules` granules, a multiple of 8: eight
// rows of one column, and eight columns of one row, lie in different banks. Eight granules further in a
// row are eight further in memory.
EA_HOST_DEVICE constexpr int swizzled(int row, int granule, int granules) {
  return row * granules + (granule ^ (row % 8));
}

}  // namespace ea::fragments
