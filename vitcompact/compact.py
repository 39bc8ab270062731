"""compact: a trained dense model's weights brought to a smaller plan."""
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcompact import trees
from vitcompact.plan import Plan


def compact(model: nn.Module, variables, plan: Plan, images=None):
  """Returns (small model, its variables): `model` under `plan`, with weights that come closest.

  Hallucinated heads copy the maps of the real ones, by order; factorised layers are truncated
  singular value decompositions. Layers that the plan leaves alone keep their names and bits.

  Args:
    model: a dense model (its plan has no method); variables: {"params", "batch_stats"?}.
    images: (B, H, W, C), normalised: a calibration batch. With it, factorisations minimise the
      error on the activations it causes, and batch norms start at the statistics they will see.
  Raises:
    ValueError: the model is not dense, or is already folded.
  """
  if model.plan != Plan() or model.deploy:
    raise ValueError("compact starts from a dense, unfolded model; this one has "
                     f"plan={model.plan.to_json()}, deploy={model.deploy}")
  small = model.clone(plan=plan)
  small.check()
  params, stats = dict(variables["params"]), dict(variables.get("batch_stats", {}))
  moments = {} if images is None else input_moments(model, variables, images)
  old_stats = trees.named_leaves(stats)
  for name, module in small.submodules().items():
    params[name], stats[name] = module.from_dense(params[name], stats.get(name, {}),
                                                moments.get(name, {}))
  stats = {name: leaf for name, leaf in stats.items() if leaf}
  if images is None and trees.named_leaves(stats).keys() - old_stats.keys():
    warnings.warn("compact without calibration images: inference is right, but new batch norms "
                  "start without statistics, so training differs at first; pass images=",
                  stacklevel=2)
  return small, {"params": params, **({"batch_stats": stats} if stats else {})}


def input_moments(model: nn.Module, variables, images):
  """Mean and second moment of the inputs of every FFN layer, over tokens and images.

  Returns:
    A tree that mirrors the parameters: {"blocks_0": {"mlp": {"fc2": {"mean": (m,), "second":
    (m, m)}}}}.
  """
  def record(variables, images):
    seen = {}

    def watch(next_fun, args, kwargs, context):
      module = context.module
      if context.method_name == "__call__" and module.name in ("fc1", "fc2"):
        x = args[0].reshape(-1, args[0].shape[-1]).astype(jnp.float32)
        second = jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST) / x.shape[0]
        seen["/".join(module.path)] = {"mean": x.mean(axis=0), "second": second}
      return next_fun(*args, **kwargs)

    with nn.intercept_methods(watch):
      model.apply(variables, images)
    return seen

  return trees.nested(jax.jit(record)(variables, images))
