"""compact: a trained dense model's weights brought to a smaller plan."""
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcompact import trees
from vitcompact.doors import check_images, check_model, check_plan, check_variables
from vitcompact.execution import Execution
from vitcompact.plan import Plan


def compact(model: nn.Module, variables, plan: Plan, images=None):
  """Returns (small model, its variables): `model` under `plan`, with weights that come closest.

  Hallucinated heads copy the maps of the real ones, by order; factorised layers are truncated
  singular value decompositions. Layers that the plan leaves alone keep their names and bits.

  Args:
    model: a dense model (its plan has no method); variables: {"params", "batch_stats"?}.
    images: (B, H, W, C), normalised: a calibration batch. With it, factorisations minimise the
      error on the activations that the compact model will have, block after block, and their batch
      norms start at the statistics they will see.
  Raises:
    ValueError: the model is not dense, or is already folded.
  """
  check_model(model)
  check_plan(plan)
  if model.plan != Plan() or model.deploy:
    raise ValueError("compact starts from a dense, unfolded model; this one has "
                     f"plan={model.plan.to_json()}, deploy={model.deploy}")
  check_variables(model, variables)
  if images is not None:
    check_images(model, images)
  small = model.clone(plan=plan)
  small.check()
  blocks = {} if images is None else calibrated(model, variables, plan, images)
  params, stats = dict(variables["params"]), dict(variables.get("batch_stats", {}))
  old_stats = trees.named_leaves(stats)
  for name, module in small.submodules().items():
    params[name], stats[name] = (blocks[name] if name in blocks else
                                 module.from_dense(params[name], stats.get(name, {}), {}))
  stats = {name: leaf for name, leaf in stats.items() if leaf}
  if images is None and trees.named_leaves(stats).keys() - old_stats.keys():
    warnings.warn("compact without calibration images: inference is right, but new batch norms "
                  "start without statistics, so training differs at first; pass images=",
                  stacklevel=2)
  return small, {"params": params, **({"batch_stats": stats} if stats else {})}


def calibrated(model: nn.Module, variables, plan: Plan, images):
  """{name: (params, stats)} of the blocks under a plan, each fitted to the inputs it will have.

  Where only FFNs are factorised, those are nearly the dense model's, and it runs once. Else each
  block is compacted as the dense model calls it, and sees what the compact blocks before it give.
  """
  # No images in chunks, and nothing computed twice.
  model = model.clone(execution=Execution(), remat=False)
  stats, found = variables.get("batch_stats", {}), {}
  blocks = model.clone(plan=plan).submodules()
  if all(method.axis == "ffn" for method in plan.methods()):
    _, moments = observed(model)(variables, images)
    return {name: block.from_dense(variables["params"][name], stats.get(name, {}),
                                   moments.get(name, {})) for name, block in blocks.items()}

  def watch(next_fun, args, kwargs, context):
    module = context.module
    name = "/".join(module.path) if context.method_name == "__call__" else ""
    if not hasattr(blocks.get(name), "methods"):
      return next_fun(*args, **kwargs)
    found[name], out = compact_block(module, blocks[name], variables["params"][name],
                                     stats.get(name, {}), args[0])
    return out

  with nn.intercept_methods(watch):
    model.apply(variables, images)
  return found


def compact_block(dense: nn.Module, block: nn.Module, params, stats, x):
  """((params, stats), output) of a block, fitted to a batch of its inputs.

  dense: as it is called, at the size of these inputs; block: under the plan, at the model's size.
  """
  site = dense.site._replace(tokens_left=block.site.tokens_left)
  dense = dense.clone(site=site, parent=None, name=None)

  def forward(methods):
    run = observed(dense.clone(methods=methods))
    return lambda new: run({"params": new[0], "batch_stats": new[1]}, x)

  # The other methods first: they decide what reaches the FFN.
  others = block.methods._replace(ffn=None)
  new = block.clone(methods=others).from_dense(params, stats, {})
  out, moments = forward(others)(new)
  if block.methods.ffn is not None:
    forward = forward(block.methods)
    # Twice: where fc1 is factorised too, fc2 then sees another hidden layer.
    for _ in range(2):
      new = block.from_dense(params, stats, moments)
      out, moments = forward(new)
  return new, out


def observed(module: nn.Module):
  """A function of (variables, x): the output, and the mean and second moment of the inputs of every
  FFN layer, over tokens and images, in a tree that mirrors the parameters: {"blocks_0": {"mlp":
  {"fc2": {"mean": (m,), "second": (m, m)}}}}."""
  @jax.jit
  def run(variables, x):
    seen = {}

    def watch(next_fun, args, kwargs, context):
      module = context.module
      if context.method_name == "__call__" and module.name in ("fc1", "fc2"):
        x = args[0].reshape(-1, args[0].shape[-1]).astype(jnp.float32)
        second = jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST) / x.shape[0]
        seen["/".join(module.path)] = {"mean": x.mean(axis=0), "second": second}
      return next_fun(*args, **kwargs)

    with nn.intercept_methods(watch):
      out = module.apply(variables, x)
    return out, trees.nested(seen)

  return run
