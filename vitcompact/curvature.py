"""What an error in the output of each branch of a dense model costs in KL, to second order.

By the Fisher information of the logits, a small error e costs KL = E (g . e)^2 / 2, where g is the
gradient, at the branch's output, of a random combination of the logits whose covariance is
diag(p) - p p^T. One backward pass gives g at all branches at once. An error that is spread evenly
over n tokens and channels then costs |g|^2 |e|^2 / (2 n). Fisher information has long been used to
choose what to prune (for example Theis et al., arXiv 1801.05787); this use of it is ours.
"""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcompact.calibration import VALUES
from vitcompact.execution import Execution

BRANCHES = {"heads": ("attn", "out"), "attention": ("attn", "out"), "ffn": ("mlp",)}
SHARE = 8   # of `VALUES`: a backward pass keeps what every block computes


def kl_per_error(model: nn.Module, variables, images, size: int) -> dict[str, dict[str, float]]:
  """Returns {block: {axis: KL in nats per unit of relative squared error of the branch's output}}.

  The cost is exact for small errors that are spread evenly over tokens and channels; for others it
  only compares blocks. Axes of which a block has no branch are absent. For a model without a
  classifier it is the squared error of the features, in a unit that all blocks share.

  images: (B, H, W, C); size: number of values of an image's residual stream, for the chunk size.
  """
  model = model.clone(execution=Execution(), remat=False)
  names = [name for name, module in model.submodules().items() if hasattr(module, "methods")]
  paths = {(*name.split("/"), *branch) for name in names for branch in BRANCHES.values()}
  step = min(max(VALUES // (SHARE * size), 1), len(images))
  images = images[:len(images) // step * step]   # chunks of one size are one program
  run = jax.jit(functools.partial(_gradients, model, paths))
  totals, key = {}, jax.random.key(0)
  for number, start in enumerate(range(0, len(images), step)):
    found = run(variables, images[start:start + step], jax.random.fold_in(key, number))
    for path, value in found.items():
      totals[path] = totals.get(path, 0.0) + float(value) / len(images)
  return {name: {axis: totals[path] for axis, branch in BRANCHES.items()
                 if (path := "/".join((name, *branch))) in totals} for name in names}


def _gradients(model, paths, variables, images, key):
  """Returns {path of a branch: its KL per error, summed over a chunk of images}."""
  offsets = jax.eval_shape(lambda: _outputs(model, paths, variables, images, {})[1])
  offsets = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), offsets)

  def combined(offsets):
    logits, outputs = _outputs(model, paths, variables, images, offsets)
    keys = jax.random.split(key, len(jax.tree.leaves(logits)))
    return sum(_combination(leaf, one, bool(model.num_classes)) for leaf, one in zip(
        jax.tree.leaves(logits), keys, strict=True)), outputs

  gradients, outputs = jax.grad(combined, has_aux=True)(offsets)

  def cost(gradient, output):
    output = output.reshape(-1, output.shape[-1]).astype(jnp.float32)
    variance = jnp.mean(jnp.var(output, axis=0))
    return jnp.sum(jnp.square(gradient.astype(jnp.float32))) * variance / 2

  return jax.tree.map(cost, gradients, outputs)


def _outputs(model, paths, variables, images, offsets):
  """Returns (logits, {path: output of a branch}) of the model with these offset."""
  outputs = {}

  def watch(next_fun, args, kwargs, context):
    out = next_fun(*args, **kwargs)
    if context.method_name == "__call__" and context.module.path in paths:
      name = "/".join(context.module.path)
      outputs[name] = out
      out = out + offsets.get(name, 0)
    return out

  with nn.intercept_methods(watch):
    logits = model.apply(variables, images)
  return logits, outputs


def _combination(logits, key, classifier: bool):
  """Returns sum_i c_i . logits_i, c_i of covariance diag(p) - p p^T (features: identity)."""
  draws = jax.random.normal(key, logits.shape, jnp.float32)
  if classifier:
    p = jax.lax.stop_gradient(jax.nn.softmax(logits.astype(jnp.float32)))
    draws = jnp.sqrt(p) * draws
    draws = draws - p * jnp.sum(draws, axis=-1, keepdims=True)
  return jnp.sum(logits * draws)
