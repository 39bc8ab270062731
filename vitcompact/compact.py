"""compact: a trained dense model's weights brought to a smaller plan."""
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from vitcompact import block as blocks
from vitcompact import trees
from vitcompact.calibration import Calibration, held_last, run, take, taught, through
from vitcompact.doors import check_images, check_model, check_plan, check_values, check_variables
from vitcompact.methods import protocol
from vitcompact.plan import Plan

FEW = 1.5   # times the error of the images fitted: beyond, those held out say that they were few


def compact(model: nn.Module, variables, plan: Plan, images=None,
            progress: Callable[[str, dict], Any] | None = None):
  """Returns (small model, its variables): `model` under `plan`, with weights that come closest.

  With calibration images, every choice is made by them, block after block, each on the stream of
  the compact blocks before it, towards the stream of the dense model: which heads stay, which one
  each other head copies, values and outputs refitted; factors that minimise the error of the
  outputs; mask predictors that restore the dense maps; statistics of batch norms. In closed form,
  without training (our own work, not the papers'). A quarter of the images is held out, by which
  the fits are regularised. Without images, hallucinated heads copy the real ones by order, factors
  are truncated singular value decompositions, and predictors are new.

  Layers that the plan leaves alone keep their names and bits.

  Args:
    model: a dense model (its plan has no method), or one whose methods have a dense form that comes
      close, as MoH does: that form is where it starts. variables: {"params", "batch_stats"?}.
    images: (B, H, W, C), normalised, of mixed classes: some 256 large or 1,024 small ones, of
      training data.
    progress: called after each block with its name and what its fits tell: {"heads": {"copied",
      "fitted", "held_out": relative squared errors of attention's output, "order"}, "ffn fc2":
      {"fitted", "held_out"}, ...}.
  Raises:
    ValueError: the model is not dense and has no dense form, or is already folded.
  """
  check_model(model)
  check_plan(plan)
  densified = all(hasattr(method, "to_dense") for method in model.plan.methods())
  if model.deploy or not densified:
    raise ValueError("compact starts from a dense, unfolded model; this one has "
                     f"plan={model.plan.to_json()}, deploy={model.deploy}")
  check_variables(model, variables)
  if images is not None:
    check_images(model, images)
    check_values(images)
    jax.eval_shape(model.apply, variables, images)   # their size, in the model's own words
  if model.plan != Plan():
    model, variables = _dense_form(model, variables, images)
  small = model.clone(plan=plan)
  small.check()
  params, stats = dict(variables["params"]), dict(variables.get("batch_stats", {}))
  old_stats = trees.named_leaves(stats)
  if images is None:
    for name, module in small.submodules().items():
      if hasattr(module, "methods"):
        params[name], stats[name] = blocks.from_dense(module.site, module.methods, params[name],
                                                      stats.get(name, {}))
  else:
    for name, new in _fitted(model, small, variables, images, progress).items():
      params[name], stats[name] = new
  stats = {name: leaf for name, leaf in stats.items() if leaf}
  if images is None and any(method.axis != "tokens" for method in plan.methods()):
    new_norms = trees.named_leaves(stats).keys() - old_stats.keys()
    warnings.warn("compact without calibration images chooses by order and fits to weights alone"
                  f"{', and new batch norms start without statistics' if new_norms else ''}; with "
                  "images= it chooses and fits by what they show (docs/compaction.md)",
                  stacklevel=2)
  return small, {"params": params, **({"batch_stats": stats} if stats else {})}


def _dense_form(model: nn.Module, variables, images):
  """(dense model, its variables) of a model whose methods have dense forms."""
  if images is None:
    raise ValueError(f"the dense form of plan={model.plan.to_json()} follows from what its methods "
                     "do on images; give images=")
  params, stats = dict(variables["params"]), dict(variables.get("batch_stats", {}))

  def on_block(name, block, x):
    own = {"params": params[name], "batch_stats": stats.get(name, {})}
    out = run(block, own, x)
    for method in block.methods.present():
      data = Calibration(block, own["params"], own["batch_stats"], x, None, 0, {})
      params[name], stats[name] = protocol.to_dense(method, block.site, params[name],
                                                    stats.get(name, {}), data)
    return out

  through(model, variables, np.asarray(images, np.float32), on_block)
  stats = {name: leaf for name, leaf in stats.items() if leaf}
  return model.clone(plan=Plan()), {"params": params,
                                    **({"batch_stats": stats} if stats else {})}


def _fitted(model: nn.Module, small: nn.Module, variables, images, progress):
  """{name: (params, stats)} of the blocks under a plan, fitted one after another.

  The dense model runs on the images twice over, as one batch: in every block one half is the
  compact model's stream, the other its teacher's. Once a reducer leaves the compact model with
  other tokens, its half goes on alone, and the teacher of a block is the dense block on its input.
  """
  images, held = held_last(images)
  modules = small.clone(remat=False).submodules()
  params, stats, found, told = variables["params"], variables.get("batch_stats", {}), {}, {}

  def on_block(name, dense, x):
    paired = len(jax.tree.leaves(x)[0]) == 2 * len(images)
    own = {"params": params[name], "batch_stats": stats.get(name, {})}
    dense_out, teacher = taught(dense, own, take(x, slice(len(images), None)) if paired else x)
    data = Calibration(dense, *own.values(), take(x, slice(len(images))), teacher, held, {})
    found[name], out = _fit_block(modules[name], data)
    told[name] = data.notes
    if progress is not None:
      progress(name, data.notes)
    if paired and modules[name].methods.tokens is None:
      out = jax.tree.map(lambda *halves: np.concatenate(halves), out, dense_out)
    return out

  through(model, variables, np.concatenate([images, images]), on_block)
  _warn_of_few(told, len(images))
  return found


def _fit_block(block: nn.Module, data: Calibration):
  """((params, stats), output) of a block, fitted to its inputs.

  block: under the plan, at the model's size; data: its dense form, at the size of these inputs.
  """
  dense = data.module

  def seen(methods, params, stats):
    return dataclasses.replace(data, module=dense.clone(methods=methods), params=params,
                               stats=stats)

  new = blocks.from_dense(block.site, block.methods, data.params, data.stats, seen)
  return new, run(dense.clone(methods=block.methods), dict(zip(("params", "batch_stats"), new,
                                                               strict=True)), data.x)


def _warn_of_few(notes: dict[str, dict], images: int):
  """Once, of the fit that tells most clearly that there were too few images."""
  if images < 8:
    warnings.warn(f"{images} calibration images are too few to hold any out: a fit may be worse "
                  "than none; give some hundred", stacklevel=3)
  fits = [(fit["held_out"] / max(fit["fitted"], 1e-9), name, part, fit)
          for name, block in notes.items() for part, fit in block.items()
          if fit["held_out"] > 0.01]
  if fits and max(fits, key=lambda fit: fit[0])[0] > FEW:
    _, name, part, fit = max(fits, key=lambda fit: fit[0])
    warnings.warn(f"{images} calibration images are few: in {name}, {part}, the relative error is "
                  f"{fit['held_out']:.2g} on those held out, {fit['fitted']:.2g} on those fitted; "
                  "give more images", stacklevel=3)
