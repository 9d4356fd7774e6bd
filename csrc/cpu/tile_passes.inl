// Attention of a tile and its gradient. Included by for_each_isa.h, once per instruction set.

#include "cpu/tile.inl"

#include "cpu/tile_attend.inl"
#include "cpu/tile_differentiate.inl"
