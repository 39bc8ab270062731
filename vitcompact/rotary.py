"""Rotary positions: queries and keys are rotated by angles that depend on where a patch lies.

Su et al., arXiv 2104.09864, in two dimensions: as in DINOv3 (Simeoni et al., arXiv 2508.10104),
with positions from -1 to 1, and the two halves of a head rotated as pairs; or as in EVA-02
(Fang et al., arXiv 2303.11331), with positions counted in patches of a grid of fixed size
(`reference` patches on a side), and neighbouring channels rotated as pairs. A patch keeps its
angles when others are dropped or merged; a merged token has the angles of the mean position of its
patches. Prefix tokens are not rotated.
"""
import math

import jax.numpy as jnp
import numpy as np

from vitcompact.token_state import Tokens


def grid_positions(grid: tuple[int, int], prefix: int, reference: int | None = None) -> np.ndarray:
  """Returns (prefix + h w, 2) float32: row and column of each token's centre, from -1 to 1 over the
  image; with a reference, of its top left corner, from 0 to `reference`. Prefix tokens are at 0,
  which means no rotation."""
  if reference is None:
    rows, columns = ((2 * np.arange(side) + 1) / side - 1 for side in grid)
  else:
    rows, columns = (np.arange(side) / side * reference for side in grid)
  patches = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
  return np.concatenate([np.zeros((prefix, 2)), patches]).astype(np.float32)


def token_positions(tokens: Tokens, positions_s2: np.ndarray):
  """Returns the position of each token: (N, 2), or (B, N, 2) after a token reduction."""
  if tokens.source is None:
    return positions_s2
  batch, count = tokens.x.shape[:2]
  rows = jnp.arange(batch)[:, None]
  # Dropped patches go to an extra last row, which is cut off.
  source = jnp.where(tokens.source < 0, count, tokens.source)
  marked = jnp.concatenate([positions_s2, np.ones((len(positions_s2), 1), np.float32)], axis=1)
  sums = jnp.zeros((batch, count + 1, 3)).at[rows, source].add(marked[None])[:, :count]
  return sums[..., :2] / jnp.maximum(sums[..., 2:], 1)


def angles(positions_n2, head_width: int, temperature: float, reference: int | None = None):
  """Returns angles (..., N, head_width / 2), rows before columns: 2 pi x / period, with periods
  that grow from 1 towards `temperature`; with a reference, x / period."""
  share = np.arange(head_width // 4, dtype=np.float32) / (head_width // 4)
  turns = 2 * math.pi if reference is None else 1
  rates = (turns / np.float32(temperature) ** share).astype(np.float32)
  angles_n2d = positions_n2[..., None] * rates.reshape((1,) * positions_n2.ndim + (-1,))
  return angles_n2d.reshape(*angles_n2d.shape[:-2], -1)


def rotate(x_bnhd, angles_nd, neighbours: bool = False):
  """Rotates pairs of channels in float32: the first half of each head with the second half, or
  neighbouring channels."""
  angles_nd = jnp.asarray(angles_nd)
  angles_nd = angles_nd if angles_nd.ndim == 3 else angles_nd[None]
  cos, sin = jnp.cos(angles_nd)[:, :, None], jnp.sin(angles_nd)[:, :, None]
  if neighbours:
    first, second = (x_bnhd[..., start::2].astype(jnp.float32) for start in (0, 1))
  else:
    first, second = jnp.split(x_bnhd.astype(jnp.float32), 2, axis=-1)
  rotated = first * cos - second * sin, second * cos + first * sin
  if neighbours:
    pairs = jnp.concatenate([x[..., None] for x in rotated], axis=-1)   # ONNX export has no stack
    return pairs.reshape(x_bnhd.shape).astype(x_bnhd.dtype)
  return jnp.concatenate(rotated, axis=-1).astype(x_bnhd.dtype)

