"""EViT: keep the patches that the class token attends to, fuse the rest into one (Liang et al.,
ICLR 2022, arXiv 2202.07800)."""
import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from vitcompact import attention, token_state
from vitcompact.methods.protocol import Site
from vitcompact.settings import Setting
from vitcompact.token_state import Reduction, Tokens, follow, identity_source, take

# Keep rates that a warm-up goes through, the first (1) and the last included: each is a program of
# its own to compile.
WARMUP_RATES = 8


@dataclasses.dataclass(frozen=True)
class EViT:
  """Tokens axis: after the attention of each of `blocks`, ceil(keep * patches) patches go on.

  keep: in (0, 1]; 1 changes nothing. blocks: numbered from 0. fuse: the others are summed, weighted
  by the class token's attention, into one further token.
  """
  axis: ClassVar[str] = "tokens"
  # The keep rate is 1 for `start` steps of the main phase, then falls to `keep` in `steps`.
  settings: ClassVar = {"keep_warmup.start": Setting(0, low=0, unit="of steps"),
                        "keep_warmup.steps": Setting(0, low=0, unit="of steps")}

  keep: float = 0.7
  blocks: tuple[int, ...] = (3, 6, 9)
  fuse: bool = True

  def __post_init__(self):
    token_state.check_keep("EViT", self.keep)
    if not isinstance(self.fuse, bool):
      raise ValueError(f"EViT(fuse={self.fuse!r}): must be True or False")
    object.__setattr__(self, "blocks", token_state.checked_blocks("EViT", self.blocks))

  def at_keep(self, keep: float) -> "EViT":
    """The same with another keep rate. It has no parameters: weights fit all of them."""
    return dataclasses.replace(self, keep=keep)

  def at_epoch(self, epoch: float, *, start: float = 10.0, length: float = 100.0) -> "EViT":
    """What trains at this (fractional) epoch when the keep rate is warmed up.

    The authors' rate is 1 before `start`, a half cosine down to `keep` over `length` epochs, then
    `keep`. Here it is rounded to the nearest of WARMUP_RATES even steps from 1 to `keep`.
    """
    done = min(max((epoch - start) / length, 0.0), 1.0)
    lost = (1 - math.cos(math.pi * done)) / 2
    step = round(lost * (WARMUP_RATES - 1))
    return self.at_keep(self.keep if step == WARMUP_RATES - 1 else
                        1 - (1 - self.keep) * step / (WARMUP_RATES - 1))

  def at_step(self, config, step: int) -> "EViT":
    """What trains at a step of the main phase."""
    warmup = config.keep_warmup
    if not (warmup.start or warmup.steps):
      return self
    return self.at_epoch(step, start=warmup.start, length=max(warmup.steps, 1))

  def needs(self, site: Site) -> dict[str, str]:
    del site
    return {"free tokens": "token reducers are for isotropic models such as DeiT and LV-ViT",
            "class token": "use ToMe there",
            "softmax": "it keeps patches by attention; use ToMe there"}

  def removes(self, site: Site) -> tuple[str, ...]:
    del site
    return ("grid",)

  @classmethod
  def options(cls, site: Site) -> list["EViT"]:
    """Keep rates of nine tenths to a half, after one, two and three quarters of the depth."""
    blocks = tuple(sorted({site.depth * quarter // 4 for quarter in (1, 2, 3)}))
    return [cls(keep=keep, blocks=blocks) for keep in (0.9, 0.8, 0.7, 0.5)]

  def reduction(self, block: int, depth: int) -> Reduction:
    """What happens in this block."""
    del depth
    if block not in self.blocks or self.keep == 1:
      return token_state.NOTHING
    return Reduction(after_attention=self.reduce)

  def reduce(self, tokens: Tokens, query_bnhd, key_bnhd, prefix: int) -> Tokens:
    """Tokens after attention, with the queries and keys that it used (real heads)."""
    patches = tokens.x.shape[1] - prefix
    count = math.ceil(self.keep * patches - 1e-9)
    if count == patches:
      return tokens
    score_bp = class_scores(query_bnhd, key_bnhd)[:, prefix:]
    kept_bk = jnp.sort(jax.lax.top_k(score_bp, count)[1], axis=1)
    batch = score_bp.shape[0]
    rows = jnp.arange(batch)[:, None]
    # A dropped patch moves into the fused token, which comes last, or nowhere.
    moved_bp = jnp.full((batch, patches), prefix + count if self.fuse else -1, jnp.int32)
    moved_bp = moved_bp.at[rows, kept_bk].set(jnp.arange(prefix, prefix + count)[None])
    first_bp = jnp.broadcast_to(jnp.arange(prefix, dtype=jnp.int32), (batch, prefix))
    x = [tokens.x[:, :prefix], take(tokens.x, kept_bk + prefix)]
    remainder_bn = None
    if self.fuse:
      # The remainder of an earlier block competes like a patch, and may be kept beside the new one.
      old_bn = jnp.zeros(tokens.x.shape[:2], bool) if tokens.remainder is None else tokens.remainder
      remainder_bn = jnp.concatenate([old_bn[:, :prefix], take(old_bn, kept_bk + prefix),
                                      jnp.ones((batch, 1), bool)], axis=1)
      weight_bp = jnp.where(moved_bp == prefix + count, score_bp, 0).astype(tokens.x.dtype)
      x.append(jnp.einsum("bp,bpw->bw", weight_bp, tokens.x[:, prefix:])[:, None])
    moved_bn = jnp.concatenate([first_bp, moved_bp], axis=1)
    return Tokens(jnp.concatenate(x, axis=1), remainder=remainder_bn,
                  source=follow(identity_source(tokens), moved_bn))


def class_scores(query_bnhd, key_bnhd):
  """The class token's attention, mean over heads: (B, N). One row of scores, never a map."""
  return attention.DENSE.maps(query_bnhd[:, :1], key_bnhd).mean(axis=(1, 2))
