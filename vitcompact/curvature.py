"""The KL that an error in the output of each branch of a dense model costs, to second order.

By the Fisher information of the logits, a small error e costs KL = E (g . e)^2 / 2. Here g is the
gradient, with respect to the branch's output, of c . logits for a random c with covariance
diag(p) - p p^T. One backward pass gives g for all branches. An error that is spread evenly over
the n values of the output (tokens x channels) then costs |g|^2 |e|^2 / (2 n).

Fisher information has long been used to choose what to prune (for example Theis et al., arXiv
1801.05787); this use of it is ours.
"""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcompact.batches import CHUNK_VALUES
from vitcompact.execution import Execution

BRANCHES = {"heads": ("attn", "out"), "attention": ("attn", "out"), "ffn": ("mlp",)}
BACKWARD_DIVISOR = 8   # chunks are this much smaller: a backward pass keeps all activations


def kl_per_error(model: nn.Module, variables, images, size: int) -> dict[str, dict[str, float]]:
  """Returns {block: {axis: KL in nats}} for errors as large as the variance of a branch's output.

  It is exact for small errors that are spread evenly; for others it only compares blocks. Blocks or
  axes without such a branch are absent. For a model without a classifier, the squared error of
  its features takes the place of the KL, in the same units for all blocks.

  images: (B, H, W, C); size: number of values in the residual stream of one image.
  """
  model = model.clone(execution=Execution(), remat=False)
  names = list(model.compactable_blocks())
  paths = {(*name.split("/"), *branch) for name in names for branch in BRANCHES.values()}
  step = min(max(CHUNK_VALUES // (BACKWARD_DIVISOR * size), 1), len(images))
  images = images[:len(images) // step * step]   # chunks of equal size share one program
  run = jax.jit(functools.partial(_kl_sums, model, paths))
  totals, key = {}, jax.random.key(0)
  for number, start in enumerate(range(0, len(images), step)):
    sums = run(variables, images[start:start + step], jax.random.fold_in(key, number))
    for path, value in sums.items():
      totals[path] = totals.get(path, 0.0) + float(value) / len(images)
  return {name: {axis: totals[path] for axis, branch in BRANCHES.items()
                 if (path := "/".join((name, *branch))) in totals} for name in names}


def _kl_sums(model, paths, variables, images, key):
  """Returns {path of a branch: its KL per error, summed over a chunk of images}."""
  offsets = jax.eval_shape(lambda: _run_with_offsets(model, paths, variables, images, {})[1])
  offsets = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), offsets)

  def combined(offsets):
    logits, outputs = _run_with_offsets(model, paths, variables, images, offsets)
    keys = jax.random.split(key, len(jax.tree.leaves(logits)))
    return sum(_random_combination(leaf, leaf_key, bool(model.num_classes)) for leaf, leaf_key in
               zip(jax.tree.leaves(logits), keys, strict=True)), outputs

  gradients, outputs = jax.grad(combined, has_aux=True)(offsets)

  def cost(gradient, output):
    output = output.reshape(-1, output.shape[-1]).astype(jnp.float32)
    variance = jnp.mean(jnp.var(output, axis=0))
    return jnp.sum(jnp.square(gradient.astype(jnp.float32))) * variance / 2

  return jax.tree.map(cost, gradients, outputs)


def _run_with_offsets(model, paths, variables, images, offsets):
  """Returns (logits, {path: output of a branch}); each branch's offset is added to its output."""
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


def _random_combination(logits, key, classifier: bool):
  """Returns sum_i c_i . logits_i; c_i has covariance diag(p) - p p^T, or identity for features."""
  draws = jax.random.normal(key, logits.shape, jnp.float32)
  if classifier:
    p = jax.lax.stop_gradient(jax.nn.softmax(logits.astype(jnp.float32)))
    draws = jnp.sqrt(p) * draws
    draws = draws - p * jnp.sum(draws, axis=-1, keepdims=True)
  return jnp.sum(logits * draws)
