"""Tokens: the state that goes from block to block, including where each token came from."""
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from vitcompact.attention import Core


@flax.struct.dataclass
class Paths:
  """Which tokens take a block's whole FFN, and which take a shorter path. A decision is valid from
  the block that makes it until the next decision or until the tokens change.

  Inference gathers rows. full: (B, k) int32, the tokens that take the FFN; short: (B, N - k), the
  others; place: (B, N), the index of each token in [full, short].
  Training computes both paths. mask: (B, N) float32, 1 for tokens that take the FFN.
  """
  full: jax.Array | None = None
  short: jax.Array | None = None
  place: jax.Array | None = None
  mask: jax.Array | None = None


@flax.struct.dataclass
class Tokens:
  """Tokens between two blocks: prefix, patches in ascending source order, perhaps a fused token.

  x: (B, N, width).
  size: (B, N) float32, how many source tokens each token holds; None: nothing was merged.
  source: (B, S) int32, for each of the S tokens before the first block, the index of the token that
    holds it now, or -1 if it was dropped; None: no token was reduced yet.
  keep_mask: (B, N) float32, 0 for tokens that count as dropped but are still there, so that the
    choice has a gradient (DynamicViT in training); or None.
  remainder: (B, N) bool, which tokens are fused remainders instead of patches: the last one, and
    earlier ones that were kept; or None.
  proportional: whether attention counts a token `size` times.
  paths: which tokens take the FFN; None: all of them.
  """
  x: jax.Array
  size: jax.Array | None = None
  source: jax.Array | None = None
  keep_mask: jax.Array | None = None
  remainder: jax.Array | None = None
  paths: Paths | None = None
  proportional: bool = flax.struct.field(pytree_node=False, default=False)

  @property
  def fused(self) -> bool:
    """Whether the last token is a fused remainder."""
    return self.remainder is not None

  def core(self) -> Core:
    """Returns the attention with these tokens as keys."""
    return Core(size=self.size if self.proportional else None, keep_mask=self.keep_mask)


class Reduction(NamedTuple):
  """What a method of the tokens axis does at each point of one block; None: nothing.

  predict: makes a module (tokens, prefix, train) -> tokens that runs before the block; its
    parameters are the block's `predict_tokens`.
  fuse: (tokens, query, key, prefix) -> (tokens, to_fused), runs before the values are computed.
    to_fused: Core -> Core, the attention with these queries and keys over the values of the new
    tokens; None: queries and keys of the new tokens are computed.
  after_attention: (tokens, query, key, prefix) -> tokens, runs before the FFN; after_block: the
    same, runs after the FFN.
  ffn: makes a module (full, x, paths, train) -> y that replaces the FFN branch: x (B, N, width) is
    its input before the norm, y its output; full(x, train, mix=None) applies norm and FFN to any
    rows of x, see `layers.Mlp`. It is made with the block's kind of norm (None: folded); its
    parameters are the block's `fast_path`.

  query, key: (B, N, heads, d) of the real heads; prefix: the number of tokens before the patches.
  """
  predict: Callable[..., nn.Module] | None = None
  fuse: Callable | None = None
  after_attention: Callable | None = None
  after_block: Callable | None = None
  ffn: Callable[..., nn.Module] | None = None


NOTHING = Reduction()


def shapes_after(reduction: Reduction, tokens: Tokens, prefix: int) -> Tokens:
  """Returns the shapes of the tokens after a block, without computing anything."""
  def run(tokens):
    if reduction.predict is not None:
      module = reduction.predict(parent=None)
      tokens = module.init_with_output(jax.random.key(0), tokens, prefix)[0]
    heads = jnp.zeros((*tokens.x.shape[:2], 1, 2))
    if reduction.fuse is not None:
      tokens, _ = reduction.fuse(tokens, heads, heads, prefix)
    for step in (reduction.after_attention, reduction.after_block):
      tokens = tokens if step is None else step(tokens, heads, heads, prefix)
    return tokens
  return jax.eval_shape(run, tokens)


def check_keep(method: str, keep):
  """Raises ValueError unless `keep` is a number in (0, 1]."""
  if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1:
    raise ValueError(f"{method}(keep={keep!r}): must be a number in (0, 1]; 1 keeps every token")


def checked_blocks(method: str, blocks) -> tuple[int, ...]:
  """Returns the blocks in ascending order; ValueError unless they are different block numbers."""
  numbers = tuple(blocks) if isinstance(blocks, tuple | list) else None
  if (not numbers or
      not all(isinstance(b, int) and not isinstance(b, bool) and b >= 0 for b in numbers) or
      len(set(numbers)) < len(numbers)):
    raise ValueError(f"{method}(blocks={blocks!r}): must be different block numbers, counted from "
                     "0, such as (3, 6, 9)")
  return tuple(sorted(numbers))


def take(array_bn, index_bk):
  """Gathers rows of (B, N, ...) by an index (B, K) for each image: (B, K, ...)."""
  index = index_bk.reshape(*index_bk.shape, *(1,) * (array_bn.ndim - 2))
  return jnp.take_along_axis(array_bn, index, axis=1)


def identity_source(tokens: Tokens):
  """Returns the source map; the identity if no token was reduced yet."""
  if tokens.source is not None:
    return tokens.source
  batch, count = tokens.x.shape[:2]
  return jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (batch, count))


def follow(source_bs, moved_bn):
  """Updates a source map after token i moved to index moved[i] (-1: dropped)."""
  return jnp.where(source_bs < 0, -1, jnp.take_along_axis(moved_bn, jnp.maximum(source_bs, 0), 1))


def keep_best(tokens: Tokens, score_bp, count: int, prefix: int) -> Tokens:
  """Keeps the prefix and the `count` patches of highest score, in their order; drops the others."""
  batch, patches = score_bp.shape
  kept_bk = prefix + jnp.sort(jax.lax.top_k(score_bp, count)[1], axis=1)
  first_bp = jnp.broadcast_to(jnp.arange(prefix, dtype=kept_bk.dtype), (batch, prefix))
  kept_bk = jnp.concatenate([first_bp, kept_bk], axis=1)
  moved_bn = jnp.full((batch, prefix + patches), -1, jnp.int32)
  moved_bn = moved_bn.at[jnp.arange(batch)[:, None], kept_bk].set(
      jnp.arange(prefix + count, dtype=jnp.int32)[None])
  return tokens.replace(x=take(tokens.x, kept_bk), source=follow(identity_source(tokens), moved_bn))


def unmerge(tokens: Tokens):
  """Returns (B, S, width): features of the token that holds each source token, 0 if dropped."""
  source = identity_source(tokens)
  features = take(tokens.x, jnp.maximum(source, 0))
  return jnp.where(source[..., None] < 0, 0, features)


def kept_patches(tokens: Tokens, prefix: int):
  """Returns (B, N - prefix) float32: 1 for tokens after the prefix that do not count as dropped."""
  if tokens.keep_mask is None:
    return jnp.ones((tokens.x.shape[0], tokens.x.shape[1] - prefix))
  return tokens.keep_mask[:, prefix:]


def by_patch(rows_bp, tokens: Tokens, prefix: int):
  """Maps rows of tokens back to the source patches, and says which of these are left.

  rows_bp: (B, N - prefix, ...), a row for each of `tokens` after the prefix.
  Returns:
    (B, P, ...), the row of the token that holds each patch, 0 if the patch was dropped or went into
    a fused remainder; and (B, P) float32, 0 for these patches and 1 for the others.
  """
  if tokens.source is None:
    return rows_bp, kept_patches(tokens, prefix)
  index_bp = tokens.source[:, prefix:] - prefix
  keep_bp, index_bp = index_bp >= 0, jnp.maximum(index_bp, 0)
  if tokens.remainder is not None:
    keep_bp &= ~take(tokens.remainder[:, prefix:], index_bp)
  rows_bp = take(rows_bp, index_bp)
  shape = (*keep_bp.shape, *(1,) * (rows_bp.ndim - 2))
  return jnp.where(keep_bp.reshape(shape), rows_bp, 0), keep_bp.astype(jnp.float32)


def mean_of_patches(tokens: Tokens, prefix: int):
  """Returns (B, width): the mean over tokens after the prefix, weighted by size or keep mask."""
  x_bpw, weight_bn = tokens.x[:, prefix:], tokens.keep_mask
  if tokens.size is not None:
    weight_bn = tokens.size
  if weight_bn is None:
    return x_bpw.mean(axis=1)
  weight_bp1 = weight_bn[:, prefix:, None]
  return ((x_bpw * weight_bp1).sum(axis=1) / weight_bp1.sum(axis=1)).astype(x_bpw.dtype)


def record(model: nn.Module, block: int, tokens: Tokens, prefix: int):
  """Sows the output of a block: in "features" block_{i}; in "tokens" source_{i} (B, S) and
  keep_mask_{i} (B, P), which of the source patches are left, see `by_patch`.

  Does nothing in init, in which every collection is mutable and would end up among the variables.
  """
  if model.is_initializing():
    return
  model.sow("features", f"block_{block}", tokens.x)
  if model.is_mutable_collection("tokens"):
    model.sow("tokens", f"source_{block}", identity_source(tokens))
    model.sow("tokens", f"keep_mask_{block}", by_patch(tokens.x[:, prefix:], tokens, prefix)[1])


def record_last(model: nn.Module, x_bnw, tokens: Tokens, prefix: int):
  """Sows in "tokens" what losses compare: x, the normalised features of `tokens`, as prefix
  (B, prefix, width), patches (B, P, width) and keep_mask (B, P); see `by_patch`.
  """
  if model.is_initializing() or not model.is_mutable_collection("tokens"):
    return
  patches_bpw, keep_bp = by_patch(x_bnw[:, prefix:], tokens, prefix)
  for name, value in {"prefix": x_bnw[:, :prefix], "patches": patches_bpw,
                      "keep_mask": keep_bp}.items():
    model.sow("tokens", name, value)
