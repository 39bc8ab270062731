"""EViT: keep the patches that the class token attends to, fuse the rest into one (Liang et al.,
ICLR 2022, arXiv 2202.07800)."""
import dataclasses
import math

import jax
import jax.numpy as jnp

from vitcompact import attention
from vitcompact.tokens.carry import Tokens, follow, identity_source, take


@dataclasses.dataclass(frozen=True)
class EViT:
  """Tokens axis: after the attention of each of `blocks`, ceil(keep * patches) patches go on.

  keep: in (0, 1]; 1 changes nothing. blocks: numbered from 0. fuse: the others are summed, weighted
  by the class token's attention, into one further token.
  """
  keep: float = 0.7
  blocks: tuple[int, ...] = (3, 6, 9)
  fuse: bool = True

  def __post_init__(self):
    if not 0 < self.keep <= 1:
      raise ValueError(f"EViT(keep={self.keep!r}): must be in (0, 1]")
    object.__setattr__(self, "blocks", tuple(sorted(self.blocks)))

  def after_attention(self, block: int, depth: int):
    """The reduction of this block, a function (tokens, query, key, prefix) -> tokens, or None."""
    del depth
    return self.reduce if block in self.blocks and self.keep < 1 else None

  def reduce(self, tokens: Tokens, query_bnhd, key_bnhd, prefix: int) -> Tokens:
    """Tokens after attention, with the queries and keys that it used (real heads)."""
    patches = tokens.x.shape[1] - prefix
    score_bp = class_scores(query_bnhd, key_bnhd)[:, prefix:]
    count = math.ceil(self.keep * patches - 1e-9)
    kept_bk = jnp.sort(jax.lax.top_k(score_bp, count)[1], axis=1)
    batch = score_bp.shape[0]
    rows = jnp.arange(batch)[:, None]
    # A dropped patch moves into the fused token, which comes last, or nowhere.
    moved_bp = jnp.full((batch, patches), prefix + count if self.fuse else -1, jnp.int32)
    moved_bp = moved_bp.at[rows, kept_bk].set(jnp.arange(prefix, prefix + count)[None])
    first_bp = jnp.broadcast_to(jnp.arange(prefix, dtype=jnp.int32), (batch, prefix))
    x = [tokens.x[:, :prefix], take(tokens.x, kept_bk + prefix)]
    if self.fuse:
      weight_bp = jnp.where(moved_bp == prefix + count, score_bp, 0).astype(tokens.x.dtype)
      x.append(jnp.einsum("bp,bpw->bw", weight_bp, tokens.x[:, prefix:])[:, None])
    moved_bn = jnp.concatenate([first_bp, moved_bp], axis=1)
    return Tokens(jnp.concatenate(x, axis=1), fused=self.fuse,
                  source=follow(identity_source(tokens), moved_bn))


def class_scores(query_bnhd, key_bnhd):
  """The class token's attention, mean over heads: (B, N). One row of scores, never a map."""
  return attention.DENSE.maps(query_bnhd[:, :1], key_bnhd).mean(axis=(1, 2))
