"""MCTF: fuse tokens by similarity, attention received and size, one attention ahead (Lee et al.,
CVPR 2024, arXiv 2403.10030). Written from the paper's equations.

Each fusion has shapes of its own, so XLA compiles each anew: on a CPU core 25 s for the forward
pass of DeiT-S with its 11, of which no one operation takes more than a fifth.
"""
import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vitcompact import attention, token_state
from vitcompact.attention import Core
from vitcompact.methods.merging import (
  Merge,
  alternating,
  best_rows,
  cosines,
  merging,
  without_prefix,
)
from vitcompact.methods.protocol import Pass, Site
from vitcompact.settings import Setting, weight
from vitcompact.token_state import Reduction, Tokens, take

LEAST = 10   # tokens that always stay, the class token counted
TILE = 64    # queries whose attention is formed at a time, to sum what each key receives

CHOICES = {"one_step_ahead": (0, 1, 2), "bidirectional": (True, False),
           "pooling": ("size_mean", "size_attention_mean", "max", "mean"),
           "order": ("position", "code"), "prop_attn": (True, False)}


@dataclasses.dataclass(frozen=True)
class MCTF:
  """Tokens axis: at the start of each of `blocks`, r tokens are fused into others.

  Attention A is computed for the N tokens before; its rows and columns are then fused along with
  the tokens, so that values, output and FFN see fewer tokens already ("one step ahead").

  r: tokens a block loses; below 1, that share of all but one. At most half, and 10 stay; 0 changes
    nothing. The authors' "fast" form is MCTF(r=0.35, blocks=(3, 6, 9)).
  blocks: None is 1..depth-1.
  tau_sim, tau_info, tau_size: temperatures; the criterion w is used as w^(1/tau).
  one_step_ahead: 0 fuses after the block, by its own attention; 1 as above; 2 computes attention
    again for the fused tokens ("precise").
  bidirectional: half of the r go from even positions to odd ones, then half back.
  pooling: features of a fused token, and its row of A: the mean weighted by size ("size_mean") or
    by size times attention received, their "max" (such rows of A sum to more than 1, and A is
    formed), or the plain "mean".
  order: "position", tokens stay in ascending position; "code", even positions first, then odd ones
    by criterion, as in the authors' implementation.
  prop_attn: attention counts a token `size` times.

  Trained with a second pass of the same weights, which merges between 0 and loss.companion_r tokens
  a block and learns from the labels as well; `consistency` compares the two.
  """
  axis: ClassVar[str] = "tokens"
  settings: ClassVar = {"loss.consistency": weight(),
                        "loss.companion_r": Setting(7, low=0, unit="of tokens")}
  collections: ClassVar = ("tokens",)
  losses_across: ClassVar = ("consistency",)
  losses: ClassVar = {"consistency": lambda seen: consistency(
      _class_token(seen), _class_token(seen.second), seen.logits, seen.labels)}

  r: int | float = 16
  blocks: tuple[int, ...] | None = None
  tau_sim: float = 1.0
  tau_info: float = 20.0
  tau_size: float = 40.0
  one_step_ahead: int = 1
  bidirectional: bool = True
  pooling: str = "size_mean"
  order: str = "position"
  prop_attn: bool = True

  def __post_init__(self):
    whole_or_share = isinstance(self.r, int) or (isinstance(self.r, float) and self.r < 1)
    if isinstance(self.r, bool) or not whole_or_share or self.r < 0:
      raise ValueError(f"MCTF(r={self.r!r}): must be a whole number of tokens, or a share of them "
                       "below 1")
    if self.blocks is not None:
      object.__setattr__(self, "blocks", token_state.checked_blocks("MCTF", self.blocks))
    for field in ("tau_sim", "tau_info", "tau_size"):
      tau = getattr(self, field)
      if isinstance(tau, bool) or not isinstance(tau, int | float) or not tau > 0:
        raise ValueError(f"MCTF({field}={tau!r}): must be a number above 0")
    for field, allowed in CHOICES.items():
      value = getattr(self, field)
      if value not in allowed or type(value) is not type(allowed[0]):
        raise ValueError(f"MCTF({field}={value!r}): must be one of {allowed}")

  def check_training(self, config):
    if config.loss.consistency and not isinstance(self.r, int):
      raise ValueError("config.loss.consistency compares with a pass that merges fewer of r "
                       f"tokens, and the plan has {self}; give r as a whole number, or set it to 0")

  def second_pass(self, config, step: int) -> "MCTF | None":
    """One draw for a step; the authors draw on each device."""
    if not config.loss.consistency:
      return None
    r = int(np.random.default_rng((config.seed, step)).integers(config.loss.companion_r + 1))
    return dataclasses.replace(self, r=min(r, self.r))

  def needs(self, site: Site) -> dict[str, str]:
    return {"free tokens": "token reducers are for isotropic models such as DeiT and LV-ViT",
            "softmax": "it fuses by attention; use ToMe there",
            "full attention": "it fuses by the attention that a token receives from all; use "
            f"blocks={{{site.block}: {{'attention': None}}}}, or ToMe"}

  def removes(self, site: Site) -> tuple[str, ...]:
    del site
    return ("grid",) if self.order == "position" else ("grid", "token order")

  @classmethod
  def options(cls, site: Site) -> list["MCTF"]:
    """Fusing at a constant pace until three quarters, or half, of the patches are left."""
    patches = site.tokens - site.prefix
    paces = {round(patches * share / max(site.depth - 1, 1)) for share in (0.25, 0.5)}
    return [cls(r=r) for r in sorted(paces - {0})]

  def reduction(self, block: int, depth: int) -> Reduction:
    """What happens in this block."""
    active = range(1, depth) if self.blocks is None else self.blocks
    if block not in active or self.r == 0:
      return token_state.NOTHING
    if self.one_step_ahead == 0:
      return Reduction(after_block=self.fuse_after)
    return Reduction(fuse=self.fuse)

  def lost_of(self, tokens: int) -> int:
    """How many of `tokens` tokens (class token counted) a block loses."""
    r = max(0, tokens - LEAST) if tokens - self.r < LEAST else self.r
    r = int((tokens - 1) * r + 1e-9) if 0 < r < 1 else r
    return min(r, (tokens - 1) // 2)

  def fuse_after(self, tokens: Tokens, query_bnhd, key_bnhd, prefix: int) -> Tokens:
    """Tokens after the block, fused by the queries and keys that it used (real heads)."""
    merge, attention_bn = self._decide(tokens, query_bnhd, key_bnhd, prefix, ideal=0)
    return tokens if merge is None else self._apply(merge, tokens, attention_bn)

  def fuse(self, tokens: Tokens, query_bnhd, key_bnhd,
           prefix: int) -> tuple[Tokens, Callable | None]:
    """Fused tokens, and what makes the attention of the old ones over these; None if precise."""
    precise = self.one_step_ahead == 2
    merge, attention_bn = self._decide(tokens, query_bnhd, key_bnhd, prefix,
                                       ideal=1 if precise else 0)
    if merge is None:
      return tokens, lambda core: core
    fused = self._apply(merge, tokens, attention_bn)
    if precise:
      return fused, None
    return fused, lambda core: core._replace(
        spread=lambda value: take(value, merge.moved), average=self.pooling != "max",
        gather=lambda rows: self._pool(merge, rows, sizes(tokens), attention_bn))

  def _decide(self, tokens, query_bnhd, key_bnhd, prefix, ideal) -> tuple[Merge | None, jax.Array]:
    """Which tokens are fused (None: none), and the attention that each receives, (B, N).

    ideal: share of the scores computed for it that the method needs; 0 where it has them anyway.
    """
    x, query, key, size = jax.lax.stop_gradient((tokens.x, query_bnhd, key_bnhd, sizes(tokens)))
    batch, count, _ = x.shape
    r = self.lost_of(count)
    if not r:
      return None, None
    with attention.share(ideal):
      attention_bn = received(query, key, size if tokens.proportional else None)
    weight_bmn = without_prefix(self.criterion(x, attention_bn, size), prefix)
    pairs, score_bn = pairings(weight_bmn, r, self.bidirectional)
    rank_bn = jnp.broadcast_to(alternating(count, prefix), (batch, count))
    if self.order == "position":
      rank_bn = jnp.broadcast_to(jnp.arange(count), (batch, count))
    elif self.bidirectional:
      # Odd positions that were not fused: by score, after all the even ones.
      best_bn = jnp.argsort(jnp.argsort(-score_bn, axis=1, stable=True), axis=1)
      odd = rank_bn[:, 1::2]
      rank_bn = rank_bn.at[:, 1::2].set(jnp.where(odd < prefix, odd, best_bn + 2 * count))
    return merging(pairs, rank_bn), attention_bn

  def criterion(self, x_bnw, attention_bn, size_bn):
    """Weights (B, even, odd) by which pairs are chosen, in float32."""
    info_bn = _relative_inverse(attention_bn) ** (1 / self.tau_info)
    size_bn = _relative_inverse(size_bn) ** (1 / self.tau_size)
    alone_bn = info_bn * size_bn
    similar_bmn = ((cosines(x_bnw) + 1) / 2) ** (1 / self.tau_sim)
    return similar_bmn * alone_bn[:, ::2, None] * alone_bn[:, None, 1::2]

  def _apply(self, merge: Merge, tokens: Tokens, attention_bn) -> Tokens:
    size_bn = sizes(tokens)
    return Tokens(self._pool(merge, tokens.x, size_bn, attention_bn), size=merge.total(size_bn),
                  proportional=self.prop_attn,
                  source=token_state.follow(token_state.identity_source(tokens), merge.moved))

  def _pool(self, merge: Merge, rows_bn, size_bn, attention_bn):
    """Rows of (B, N, ...), features or attention, as fused tokens have them: (B, K, ...)."""
    if self.pooling == "max":
      return merge.largest(rows_bn)
    weights = {"size_mean": size_bn, "size_attention_mean": size_bn * attention_bn,
               "mean": jnp.ones_like(size_bn)}
    return merge.mean(rows_bn, weights[self.pooling])


def consistency(student_bw: jax.Array, teacher_bw: jax.Array, student_bk: jax.Array,
                labels_b: jax.Array, threshold: float = 0.4) -> jax.Array:
  """MCTF: squared error of normalised class tokens where the student is right already: (B,).

  The mean is that over the images whose true class has more than `threshold` of the student's
  probability, 0 if none has. The teacher (the same network, less reduced) gets no gradient.

  student_bk: the student's logits; labels_b: int, the true classes.
  """
  probability_bk = jax.nn.softmax(student_bk.astype(jnp.float32))
  passing_b = jnp.take_along_axis(probability_bk, labels_b[:, None], axis=1)[:, 0] > threshold
  error_bw = student_bw.astype(jnp.float32) - jax.lax.stop_gradient(teacher_bw.astype(jnp.float32))
  share = jnp.maximum(jnp.mean(passing_b), 1 / passing_b.shape[0])
  return jnp.where(passing_b, jnp.mean(error_bw ** 2, axis=-1), 0) / share


def _class_token(seen: Pass):
  return seen.collections["tokens"]["prefix"][0][:, 0]


def sizes(tokens: Tokens):
  """(B, N) float32: how many source tokens each holds."""
  return jnp.ones(tokens.x.shape[:2]) if tokens.size is None else tokens.size


def _relative_inverse(array_bn):
  """1/a over the largest 1/a of an image."""
  inverse_bn = 1 / jnp.maximum(array_bn.astype(jnp.float32), 1e-12)
  return inverse_bn / inverse_bn.max(axis=1, keepdims=True)


def pairings(weight_bmn, r: int, bidirectional: bool):
  """r fusions, [(from, into), ...] of indices (B, r'), and the largest weight of each odd token.

  Half of r (rounded down) from even positions into odd ones, then the rest from odd ones into the
  even ones that are left, by the same weights; not bidirectional: all from even into odd.
  """
  first = r // 2 if bidirectional else r
  row_br, column_br = best_rows(weight_bmn, first)
  pairs = [(2 * row_br, 2 * column_br + 1)]
  taken_bm = (jnp.arange(weight_bmn.shape[1])[None, :, None] == row_br[:, None, :]).any(axis=2)
  left_bmn = jnp.where(taken_bm[:, :, None], -jnp.inf, weight_bmn)
  if bidirectional:
    column_br, row_br = best_rows(left_bmn.swapaxes(1, 2), r - first)
    pairs.append((2 * column_br + 1, 2 * row_br))
  return pairs, left_bmn.max(axis=1)


def received(query_bnhd, key_bmhd, size_bm=None):
  """The attention that each key receives, mean over heads and queries: (B, M), float32.

  Of all queries: where tokens are fused, all are scored. Formed for TILE queries at a time, so
  that no map of all is.
  """
  core = Core(size=size_bm)
  batch, count, heads, width = query_bnhd.shape
  tiles = -(-count // TILE)
  length = -(-count // tiles)
  padded = jnp.pad(query_bnhd, ((0, 0), (0, tiles * length - count), (0, 0), (0, 0)))
  tiles_tbnhd = padded.reshape(batch, tiles, length, heads, width).swapaxes(0, 1)
  real_tn = (jnp.arange(tiles * length) < count).reshape(tiles, length)

  def add(total_bm, tile):
    query, real_n = tile
    maps_bhnm = core.maps(query, key_bmhd)
    return total_bm + jnp.where(real_n[None, None, :, None], maps_bhnm, 0).sum(axis=(1, 2)), None

  total_bm, _ = jax.lax.scan(add, jnp.zeros(key_bmhd.shape[:2]), (tiles_tbnhd, real_tn))
  return total_bm / (heads * count)
