"""Bi-level routing: regions of queries attend to the regions of keys with the highest scores.

Zhu et al., BiFormer, CVPR 2023, arXiv 2303.08810:

  A_R = Q_R K_R^T,   I_R = top-k of each row of A_R

where row i of Q_R and K_R is the mean of the queries or keys of region i, with all heads
concatenated: one choice for all heads. The queries of a region attend to the tokens of its k
regions.
"""
import jax
import jax.numpy as jnp

from vitcompact.attention.block_sparse.layout import BlockLayout
from vitcompact.attention.block_sparse.windows import Windows
from vitcompact.attention.reference import SCOPE


def regions(grid: tuple[int, int], side: int) -> Windows:
  """Cuts a grid into side x side regions; if they do not divide it, the last ones are padded, and
  there may be fewer."""
  return Windows(tuple(grid), tuple(-(-n // min(n, side)) for n in grid))


def route(layout: BlockLayout, query_bnfd, key_bmfd, count: int) -> BlockLayout:
  """Returns `layout` with the `count` regions of keys that score highest for each region of
  queries. Has no gradient; ties go to the lowest index."""
  query, key = (jax.lax.stop_gradient(x) for x in (query_bnfd, key_bmfd))
  with jax.named_scope(SCOPE):
    score_bqk = jnp.einsum("bfqd,bfkd->bqk", layout.means(layout.queries, query),
                           layout.means(layout.keys, key), precision=jax.lax.Precision.HIGHEST)
  best_bqs = jax.lax.top_k(score_bqk, count)[1]
  batch, regions, _ = best_bqs.shape
  heads = query_bnfd.shape[2]
  return layout._replace(chosen=jnp.broadcast_to(best_bqs[:, None], (batch, heads, regions, count)))
