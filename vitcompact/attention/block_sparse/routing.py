"""Bi-level routing: regions of queries attend to the regions of keys that they score best.

Zhu et al., BiFormer, CVPR 2023, arXiv 2303.08810:

  A_R = Q_R K_R^T,   I_R = top-k of each row of A_R

where row i of Q_R and of K_R is the mean of the queries, or keys, of region i, all heads side by
side: one choice for all heads. Then the queries of a region attend to the tokens of its k regions.
"""
import jax
import jax.numpy as jnp

from vitcompact.attention.block_sparse.layout import BlockLayout
from vitcompact.attention.block_sparse.windows import Windows
from vitcompact.attention.reference import SCOPE


def regions(grid: tuple[int, int], side: int) -> Windows:
  """A grid cut into side x side regions; where they do not divide it, the last ones are padded,
  and there may be fewer of them."""
  return Windows(tuple(grid), tuple(-(-n // min(n, side)) for n in grid))


def route(layout: BlockLayout, query_bnfd, key_bmfd, count: int) -> BlockLayout:
  """`layout` with the `count` best regions of keys for each region of queries. No gradient; ties go
  to the lowest index."""
  query, key = (jax.lax.stop_gradient(x) for x in (query_bnfd, key_bmfd))
  with jax.named_scope(SCOPE):
    score_bqk = jnp.einsum("bfqd,bfkd->bqk", layout.means(layout.queries, query),
                           layout.means(layout.keys, key), precision=jax.lax.Precision.HIGHEST)
  best_bqs = jax.lax.top_k(score_bqk, count)[1]
  batch, regions, _ = best_bqs.shape
  heads = query_bnfd.shape[2]
  return layout._replace(chosen=jnp.broadcast_to(best_bqs[:, None], (batch, heads, regions, count)))
