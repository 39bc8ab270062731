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

# Number of keep rates in a warm-up, including 1 and the final one: each compiles its own program.
WARMUP_RATES = 8


@dataclasses.dataclass(frozen=True)
class EViT:
  """Tokens axis: after the attention of each of `blocks`, keeps ceil(keep * patches) patches.

  keep: in (0, 1]; 1 changes nothing. blocks: numbered from 0. fuse: adds one token, the sum of the
  other patches weighted by the class token's attention.
  """
  axis: ClassVar[str] = "tokens"
  provenance: ClassVar = ("arXiv 2202.07800", "how the keep rate falls in training is ours")
  # The keep rate is 1 for `start` steps of the main phase, then falls to `keep` over `steps` steps.
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
    """Returns the method with another keep rate; it has no parameters, so weights fit every rate.
    """
    return dataclasses.replace(self, keep=keep)

  def at_epoch(self, epoch: float, *, start: float = 10.0, length: float = 100.0) -> "EViT":
    """Returns the method to train with at this (fractional) epoch of a keep rate warm-up.

    The authors' rate is 1 before `start`, falls to `keep` as a half cosine over `length` epochs,
    and stays there. Here it is rounded to the nearest of WARMUP_RATES even steps from 1 to `keep`.
    """
    progress = min(max((epoch - start) / length, 0.0), 1.0)
    fraction = (1 - math.cos(math.pi * progress)) / 2
    step = round(fraction * (WARMUP_RATES - 1))
    return self.at_keep(self.keep if step == WARMUP_RATES - 1 else
                        1 - (1 - self.keep) * step / (WARMUP_RATES - 1))

  def at_step(self, config, step: int) -> "EViT":
    """Returns the method to train with at a step of the main phase."""
    warmup = config.keep_warmup
    if not (warmup.start or warmup.steps):
      return self
    return self.at_epoch(step, start=warmup.start, length=max(warmup.steps, 1))

  def needs(self, site: Site) -> dict[str, str]:
    del site
    return {"free tokens": "token reducers are for isotropic models such as DeiT and LV-ViT",
            "class token": "use ToMe there",
            "softmax": "it chooses patches by their attention; use ToMe there"}

  def removes(self, site: Site) -> tuple[str, ...]:
    del site
    return ("grid",)

  @classmethod
  def options(cls, site: Site) -> list["EViT"]:
    """Returns keep rates from 0.9 to 0.5, at one, two and three quarters of the depth."""
    blocks = tuple(sorted({site.depth * quarter // 4 for quarter in (1, 2, 3)}))
    return [cls(keep=keep, blocks=blocks) for keep in (0.9, 0.8, 0.7, 0.5)]

  def reduction(self, block: int, depth: int) -> Reduction:
    """Returns what happens in this block."""
    del depth
    if block not in self.blocks or self.keep == 1:
      return token_state.NOTHING
    return Reduction(after_attention=self.reduce)

  def reduce(self, tokens: Tokens, query_bnhd, key_bnhd, prefix: int) -> Tokens:
    """Reduces tokens after attention, given the queries and keys that it used (real heads)."""
    patches = tokens.x.shape[1] - prefix
    count = math.ceil(self.keep * patches - 1e-9)
    if count == patches:
      return tokens
    score_bp = class_scores(query_bnhd, key_bnhd)[:, prefix:]
    kept_bk = jnp.sort(jax.lax.top_k(score_bp, count)[1], axis=1)
    batch = score_bp.shape[0]
    rows = jnp.arange(batch)[:, None]
    # A dropped patch moves into the fused token, which comes last, or is gone (-1).
    moved_bp = jnp.full((batch, patches), prefix + count if self.fuse else -1, jnp.int32)
    moved_bp = moved_bp.at[rows, kept_bk].set(jnp.arange(prefix, prefix + count)[None])
    first_bp = jnp.broadcast_to(jnp.arange(prefix, dtype=jnp.int32), (batch, prefix))
    x = [tokens.x[:, :prefix], take(tokens.x, kept_bk + prefix)]
    remainder_bn = None
    if self.fuse:
      # The remainder of an earlier block competes like a patch: a second remainder may be kept.
      old_bn = jnp.zeros(tokens.x.shape[:2], bool) if tokens.remainder is None else tokens.remainder
      remainder_bn = jnp.concatenate([old_bn[:, :prefix], take(old_bn, kept_bk + prefix),
                                      jnp.ones((batch, 1), bool)], axis=1)
      weight_bp = jnp.where(moved_bp == prefix + count, score_bp, 0).astype(tokens.x.dtype)
      x.append(jnp.einsum("bp,bpw->bw", weight_bp, tokens.x[:, prefix:])[:, None])
    moved_bn = jnp.concatenate([first_bp, moved_bp], axis=1)
    return Tokens(jnp.concatenate(x, axis=1), remainder=remainder_bn,
                  source=follow(identity_source(tokens), moved_bn))


def class_scores(query_bnhd, key_bnhd):
  """Returns the class token's attention (B, N), mean over heads: one row of scores, not a map."""
  return attention.DENSE.maps(query_bnhd[:, :1], key_bnhd).mean(axis=(1, 2))
