"""Windows: the tokens of a grid, cut into rectangular blocks."""
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Windows(NamedTuple):
  """A grid of tokens (rows, columns) cut into blocks of `sides`; the last blocks are padded."""
  grid: tuple[int, int]
  sides: tuple[int, int]

  @property
  def counts(self) -> tuple[int, int]:
    """Number of blocks along each side."""
    return tuple(-(-n // side) for n, side in zip(self.grid, self.sides, strict=True))

  @property
  def blocks(self) -> int:
    return math.prod(self.counts)

  @property
  def area(self) -> int:
    """Number of slots of a block, including padding."""
    return math.prod(self.sides)

  def cut(self, x_bnfd):
    """Cuts tokens into blocks: (B, n, f, d) -> (B, f, blocks, area, d), zeros in the padding."""
    split = self._split(x_bnfd).transpose(0, 5, 1, 3, 2, 4, 6)
    return split.reshape(*split.shape[:2], self.blocks, self.area, split.shape[-1])

  def means(self, x_bnfd):
    """Returns means over the tokens of each block: (B, n, f, d) -> (B, f, blocks, d), float32."""
    sums_bijfd = self._sums(self._split(x_bnfd))
    sums_bfkd = sums_bijfd.reshape(-1, self.blocks, *x_bnfd.shape[2:]).swapaxes(1, 2)
    return sums_bfkd / jnp.asarray(self.valid().sum(axis=1), jnp.float32)[None, None, :, None]

  def means_by_rows(self, x_bnfd, first: int):
    """Returns `means` of the tokens after the first `first`, one row of blocks after another; the
    grid must need no padding.

    A CPU then need not copy all heads to leave out the first tokens.
    """
    (rows, columns), (height, width) = self.counts, self.sides
    tokens = height * columns * width

    def row(i):
      x = jax.lax.dynamic_slice_in_dim(x_bnfd, first + i * tokens, tokens, axis=1)
      return self._sums(x.reshape(-1, height, columns, width, *x.shape[2:]))

    sums_ibjfd = jax.lax.map(row, jnp.arange(rows))
    sums_bfijd = sums_ibjfd.transpose(1, 3, 0, 2, 4)
    return sums_bfijd.reshape(*sums_bfijd.shape[:2], self.blocks, -1) / self.area

  def _sums(self, x):
    """Sums blocks, in float32: (..., height, columns, width, f, d) -> (..., columns, f, d)."""
    # Summed line by line in place: a single reduction over both axes takes half as long again.
    x = x.astype(jnp.float32)
    lines = sum(x[..., i, :, :, :, :] for i in range(self.sides[0]))
    return sum(lines[..., i, :, :] for i in range(self.sides[1]))

  def _split(self, x_bnfd):
    """Splits (B, n, f, d) into (B, rows of blocks, height, columns of blocks, width, f, d)."""
    batch, _, heads, width = x_bnfd.shape
    grid = x_bnfd.reshape(batch, *self.grid, heads, width)
    missing = [(0, count * side - n) for n, side, count in
               zip(self.grid, self.sides, self.counts, strict=True)]
    if any(after for _, after in missing):
      grid = jnp.pad(grid, [(0, 0), *missing, (0, 0), (0, 0)])
    (i, j), (h, w) = self.counts, self.sides
    return grid.reshape(batch, i, h, j, w, heads, width)

  def join(self, x_bfkad):
    """Inverse of `cut`: (B, f, blocks, area, d) -> (B, n, f, d)."""
    batch, heads, _, _, width = x_bfkad.shape
    (i, j), (h, w) = self.counts, self.sides
    split = x_bfkad.reshape(batch, heads, i, j, h, w, width).transpose(0, 2, 4, 3, 5, 1, 6)
    grid = split.reshape(batch, i * h, j * w, heads, width)[:, :self.grid[0], :self.grid[1]]
    return grid.reshape(batch, -1, heads, width)

  def valid(self) -> np.ndarray:
    """Returns (blocks, area): which slots hold a token."""
    (i, j), (h, w) = self.counts, self.sides
    inside = np.zeros((i * h, j * w), bool)
    inside[:self.grid[0], :self.grid[1]] = True
    return inside.reshape(i, h, j, w).transpose(0, 2, 1, 3).reshape(self.blocks, self.area)

  def block_of(self) -> np.ndarray:
    """Returns (n,): the block of each token."""
    rows, columns = np.indices(self.grid).reshape(2, -1)
    return rows // self.sides[0] * self.counts[1] + columns // self.sides[1]

  def slot_of(self) -> np.ndarray:
    """Returns (n,): the place of each token in the order of blocks."""
    rows, columns = np.indices(self.grid).reshape(2, -1)
    inside = rows % self.sides[0] * self.sides[1] + columns % self.sides[1]
    return self.block_of() * self.area + inside

  def centres(self) -> np.ndarray:
    """Returns (blocks, 2): centres of the blocks, as shares of the sides of the grid."""
    return (np.indices(self.counts).reshape(2, -1).T + 0.5) / np.array(self.counts)


def on_grid(grid: tuple[int, int], window: int) -> Windows:
  """Returns blocks of about window x window tokens."""
  return Windows(tuple(grid), tuple(_side(n, window) for n in grid))


def on_sequence(tokens: int, area: int) -> Windows:
  """Returns blocks of `area` consecutive tokens: the grid is a single column."""
  return Windows((tokens, 1), (min(tokens, area), 1))


def _side(n: int, window: int) -> int:
  """Returns the divisor of n nearest to `window`, the larger one of two; if none is near, the side
  of blocks that need padding."""
  best = min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - window), -d))
  if abs(best - window) <= window // 4:
    return best
  return -(-n // max(1, round(n / window)))


def nearest_blocks(queries: Windows, keys: Windows) -> np.ndarray:
  """Returns (blocks of queries,): the block of keys with the nearest centre, which is the block
  itself if both have the same grid."""
  distance = np.abs(queries.centres()[:, None] - keys.centres()[None]).sum(axis=-1)
  return distance.argmin(axis=1)
