// Tiles of a parameter. They depend on its shape alone: sums are taken in the same order by any number of
// threads.
#pragma once
#include "kernel.h"

namespace danlu {

struct Tile {
  int64_t matrix, row, column;  // where it begins
  int64_t rows, columns;
  int64_t row_tile, column_tile;
};

namespace tiles {
constexpr int64_t width = 1024;  // of a block: its sums and buffers stay in the first-level cache
constexpr int64_t size = 131072;
constexpr int64_t narrow_width = 512;  // of a block of several rows
// A tile is as wide as its matrix, since memory is slow at jumps from page to page.
constexpr int64_t most_columns = 16384;
// Each tile leaves sums of its columns: of fewer rows they would be many, of more rows inexact.
constexpr int64_t fewest_rows = 64, most_rows = 512;
}  // namespace tiles

RULE_FN int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
RULE_FN int64_t at_most(int64_t x, int64_t most) { return x < most ? x : most; }
RULE_FN int64_t at_least(int64_t x, int64_t least) { return x > least ? x : least; }

// Of a parameter that is not empty. whole_rows: no tile may end within a row.
RULE_FN Tiling tiling_of(int64_t batch, int64_t rows, int64_t columns, bool whole_rows) {
  const int64_t widest = rows < tiles::fewest_rows ? tiles::size : tiles::most_columns;
  Tiling t = {batch, rows, columns, 0, whole_rows ? columns : at_most(columns, widest), 0, 0};
  const int64_t height = divided_up(tiles::size, t.tile_columns);
  t.tile_rows = at_most(rows, at_most(at_least(height, tiles::fewest_rows), tiles::most_rows));
  t.row_tiles = divided_up(rows, t.tile_rows);
  t.column_tiles = divided_up(columns, t.tile_columns);
  return t;
}

RULE_FN int64_t count(const Tiling& t) { return t.batch * t.row_tiles * t.column_tiles; }

RULE_FN Tile tile_at(const Tiling& t, int64_t index) {
  const int64_t column_tile = index % t.column_tiles, row_tile = index / t.column_tiles % t.row_tiles;
  const int64_t row = row_tile * t.tile_rows, column = column_tile * t.tile_columns;
  return {
      index / (t.column_tiles * t.row_tiles),      row,      column,     at_most(t.rows - row, t.tile_rows),
      at_most(t.columns - column, t.tile_columns), row_tile, column_tile};
}

}  // namespace danlu
