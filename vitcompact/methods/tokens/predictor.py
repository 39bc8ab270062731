"""The small network of DynamicViT that scores patches, and how its choice is trained (Rao et al.,
NeurIPS 2021, arXiv 2106.02034)."""
import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcompact.layers import LayerNorm, dense, gelu
from vitcompact.torch_names import Entry, linear, norm
from vitcompact.trees import Leaf

EPSILON = 1e-5   # of its LayerNorm

RULES = [(r".*/predict_tokens/(in_proj|out\d)/kernel", Leaf(("embed", None), decay=True))]


def log_choices(module: nn.Module, x_bpw, keep_bp):
  """Log probabilities (B, P, 2) of (keep, drop) for each patch, float32, from its own features and
  the mean of those with keep = 1.

  Called in a compact method of `module`, which owns the layers: norm, in_proj, out1, out2, out3.
  """
  width = x_bpw.shape[-1]

  def layer(features, name):
    return dense(features, dtype=module.dtype).clone(name=name, parent=module)

  x_bpw = LayerNorm(epsilon=EPSILON, dtype=module.dtype, name="norm", parent=module)(x_bpw)
  x_bpw = with_mean(gelu(layer(width, "in_proj")(x_bpw)), keep_bp)
  x_bpw = gelu(layer(width // 2, "out1")(x_bpw))
  x_bpw = gelu(layer(width // 4, "out2")(x_bpw))
  return jax.nn.log_softmax(layer(2, "out3")(x_bpw).astype(jnp.float32))


def with_mean(x_bpw, keep_bp):
  """The second half of the features becomes its mean over the kept patches: (B, P, width)."""
  local, rest = jnp.split(x_bpw, [x_bpw.shape[-1] // 2], axis=-1)
  keep_bp1 = keep_bp[..., None].astype(x_bpw.dtype)
  # No kept patch is no reason for a NaN.
  mean = (rest * keep_bp1).sum(1, keepdims=True) / jnp.maximum(keep_bp1.sum(1, keepdims=True), 1)
  return jnp.concatenate([local, jnp.broadcast_to(mean, rest.shape)], axis=-1)


def straight_through(key, choice_bp2):
  """Draws 1 (keep) or 0 from log probabilities (B, P, 2); the gradient is a Gumbel softmax's."""
  soft = jax.nn.softmax(choice_bp2 + jax.random.gumbel(key, choice_bp2.shape))[..., 0]
  hard = (soft >= 0.5).astype(soft.dtype)
  return hard + (soft - jax.lax.stop_gradient(soft))


def budget(share: float, patches: int) -> int:
  """How many of `patches` a share is, rounded down, at least 1; 0.3 * 10 is 3."""
  return max(1, int(patches * share + 1e-9))


def kept_ratio(keep_masks, shares) -> jax.Array:
  """Mean over stages s of (mean_i keep^s_i - shares_s)^2: (B,).

  keep_masks: a list with (B, P) of each stage, 1 where a patch is kept; shares: of all patches,
  what each stage is to keep.
  """
  squares = [(jnp.mean(keep_bp, axis=1) - share) ** 2
             for keep_bp, share in zip(keep_masks, shares, strict=True)]
  return sum(squares) / len(squares)


def stage_masks(tokens) -> list[jax.Array]:
  """Of the collection "tokens": (B, P) for each stage, which patches it kept."""
  found = {int(name.removeprefix("blocks_")): block["predict_tokens"]["keep_mask"][0]
           for name, block in tokens.items() if name.startswith("blocks_")
           and "predict_tokens" in block}
  return [found[block] for block in sorted(found)]


def torch_entries(stage: int, ours: str) -> list[Entry]:
  """The tensors of the predictor of a stage, in block `ours`; the authors number them."""
  torch, ours = f"score_predictor.{stage}", f"{ours}/predict_tokens"
  return [*norm(f"{torch}.in_conv.0", f"{ours}/norm"),
          *linear(f"{torch}.in_conv.1", f"{ours}/in_proj"),
          *linear(f"{torch}.out_conv.0", f"{ours}/out1"),
          *linear(f"{torch}.out_conv.2", f"{ours}/out2"),
          *linear(f"{torch}.out_conv.4", f"{ours}/out3")]
