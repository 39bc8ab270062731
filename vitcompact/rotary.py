"""Rotary positions: queries and keys turned by angles that follow from where a patch lies.

Su et al., arXiv 2104.09864, in two dimensions: as in DINOv3 (Simeoni et al., arXiv 2508.10104),
where places go from -1 to 1 and the halves of a head are turned as pairs; or as in EVA-02 (Fang et
al., arXiv 2303.11331), where places are counted in patches of a grid of fixed size (`reference`
patches on a side) and neighbouring channels are turned as pairs. A patch keeps its angles when
others are dropped or merged; a merged token has those of the mean place of its patches. Prefix
tokens are not turned.
"""
import math

import jax.numpy as jnp
import numpy as np

from vitcompact.token_state import Tokens


def places(grid: tuple[int, int], prefix: int, reference: int | None = None) -> np.ndarray:
  """(prefix + h w, 2) float32: row and column of each token's centre, each from -1 to 1 over the
  image; or, with a reference, of its first corner, each from 0 to `reference`. Prefix tokens stand
  at 0, where nothing turns."""
  if reference is None:
    rows, columns = ((2 * np.arange(side) + 1) / side - 1 for side in grid)
  else:
    rows, columns = (np.arange(side) / side * reference for side in grid)
  patches = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
  return np.concatenate([np.zeros((prefix, 2)), patches]).astype(np.float32)


def places_of(tokens: Tokens, places_s2: np.ndarray):
  """Where each token lies now: (N, 2), or (B, N, 2) once tokens were reduced."""
  if tokens.source is None:
    return places_s2
  batch, count = tokens.x.shape[:2]
  rows = jnp.arange(batch)[:, None]
  # Dropped patches go to a last row, which is cut off.
  source = jnp.where(tokens.source < 0, count, tokens.source)
  marked = jnp.concatenate([places_s2, np.ones((len(places_s2), 1), np.float32)], axis=1)
  sums = jnp.zeros((batch, count + 1, 3)).at[rows, source].add(marked[None])[:, :count]
  return sums[..., :2] / jnp.maximum(sums[..., 2:], 1)


def angles(places_n2, head_width: int, temperature: float, reference: int | None = None):
  """(..., N, head_width / 2): 2 pi x / period, of rows before columns; the periods grow from 1
  towards `temperature`. With a reference x / period: periods are of radians."""
  share = np.arange(head_width // 4, dtype=np.float32) / (head_width // 4)
  turns = 2 * math.pi if reference is None else 1
  rates = (turns / np.float32(temperature) ** share).astype(np.float32)
  turned = places_n2[..., None] * rates.reshape((1,) * places_n2.ndim + (-1,))
  return turned.reshape(*turned.shape[:-2], -1)


def turn(x_bnhd, angles_nd, neighbours: bool = False):
  """Each head's first half and second half, turned as pairs, or its neighbouring channels; computed
  in float32."""
  angles_nd = jnp.asarray(angles_nd)
  angles_nd = angles_nd if angles_nd.ndim == 3 else angles_nd[None]
  cos, sin = jnp.cos(angles_nd)[:, :, None], jnp.sin(angles_nd)[:, :, None]
  if neighbours:
    first, second = (x_bnhd[..., start::2].astype(jnp.float32) for start in (0, 1))
  else:
    first, second = jnp.split(x_bnhd.astype(jnp.float32), 2, axis=-1)
  turned = first * cos - second * sin, second * cos + first * sin
  if neighbours:
    pairs = jnp.concatenate([x[..., None] for x in turned], axis=-1)   # ONNX files know no stack
    return pairs.reshape(x_bnhd.shape).astype(x_bnhd.dtype)
  return jnp.concatenate(turned, axis=-1).astype(x_bnhd.dtype)

