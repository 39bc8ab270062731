"""DynamicViT's small network that scores patches, and the training of its choice (Rao et al.,
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
  """Returns log probabilities (B, P, 2) of (keep, drop) for each patch, float32, computed from its
  own features and the mean of the patches with keep = 1.

  Must be called from an `nn.compact` method of `module`, which owns the layers: norm, in_proj,
  out1, out2, out3.
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
  """Replaces the second half of the features by its mean over the kept patches: (B, P, width)."""
  local, rest = jnp.split(x_bpw, [x_bpw.shape[-1] // 2], axis=-1)
  keep_bp1 = keep_bp[..., None].astype(x_bpw.dtype)
  # The maximum avoids NaN if no patch is kept.
  mean = (rest * keep_bp1).sum(1, keepdims=True) / jnp.maximum(keep_bp1.sum(1, keepdims=True), 1)
  return jnp.concatenate([local, jnp.broadcast_to(mean, rest.shape)], axis=-1)


def straight_through(key, choice_bp2):
  """Draws 1 (keep) or 0 from log probabilities (B, P, 2), with the gradient of a Gumbel softmax."""
  soft = jax.nn.softmax(choice_bp2 + jax.random.gumbel(key, choice_bp2.shape))[..., 0]
  hard = (soft >= 0.5).astype(soft.dtype)
  return hard + (soft - jax.lax.stop_gradient(soft))


def budget(share: float, patches: int) -> int:
  """Returns share * patches, rounded down, at least 1; 0.3 * 10 is 3 despite its rounding error."""
  return max(1, int(patches * share + 1e-9))


def kept_ratio(keep_masks, shares) -> jax.Array:
  """Returns the mean over stages s of (mean_i keep^s_i - shares_s)^2: (B,).

  keep_masks: a list with a (B, P) mask of each stage, 1 for kept patches; shares: the share of all
  patches that each stage should keep.
  """
  squares = [(jnp.mean(keep_bp, axis=1) - share) ** 2
             for keep_bp, share in zip(keep_masks, shares, strict=True)]
  return sum(squares) / len(squares)


def stage_masks(tokens) -> list[jax.Array]:
  """Returns the keep mask (B, P) of each stage, from the collection "tokens"."""
  masks = {int(name.removeprefix("blocks_")): block["predict_tokens"]["keep_mask"][0]
           for name, block in tokens.items() if name.startswith("blocks_")
           and "predict_tokens" in block}
  return [masks[block] for block in sorted(masks)]


def torch_entries(stage: int, ours: str) -> list[Entry]:
  """Returns entries of the predictor of a stage, in block `ours`, under the authors' names."""
  torch, ours = f"score_predictor.{stage}", f"{ours}/predict_tokens"
  return [*norm(f"{torch}.in_conv.0", f"{ours}/norm"),
          *linear(f"{torch}.in_conv.1", f"{ours}/in_proj"),
          *linear(f"{torch}.out_conv.0", f"{ours}/out1"),
          *linear(f"{torch}.out_conv.2", f"{ours}/out2"),
          *linear(f"{torch}.out_conv.4", f"{ours}/out3")]
