"""compact: converts a trained dense model's weights to those of a smaller plan."""
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from vitcompact import batches, calibration, checks, trees
from vitcompact import block as blocks
from vitcompact.methods import protocol
from vitcompact.plan import Plan

OVERFIT_RATIO = 1.5   # held-out over fitted error: above this, warn of too few images
GAIN = "on Fashion-MNIST, half of the heads and factors lost 2.5 points with images, 41.4 without"
ENOUGH = "give about 256 large or 1,024 small ones"


def compact(model: nn.Module, variables, plan: Plan, images=None,
            progress: Callable[[str, dict], Any] | None = None):
  """Returns (small model, its variables): `model` under `plan`, with weights fitted to `model`'s.

  With calibration images, blocks are fitted one after another in closed form, without training (our
  own work, not the papers'). A block's input is the residual stream of the compact blocks before
  it; its target is the dense model's stream. The fit chooses which heads stay and which of them
  each hallucinated head copies, and refits values and outputs; finds the factors with the least
  output error; fits mask predictors to the dense maps; and sets batch norm statistics. A quarter
  of the images is held out to choose the ridge. Without images, hallucinated heads copy
  the real ones in order, factors are truncated singular value decompositions, and mask predictors
  are newly initialised.

  Layers that the plan does not change keep their names and their exact values.

  Args:
    model: a dense model (its plan has no method), or one whose methods have an approximate dense
      form, such as MoH; the fit then starts from that form.
    variables: {"params", "batch_stats"?}.
    images: (B, H, W, C), normalised training images of mixed classes: about 256 large or 1,024
      small ones; or an iterable of such batches.
    progress: called after each block with its name and the errors of its fits: {"heads": {"copied",
      "fitted", "held_out": relative squared errors of attention's output, "order"}, "ffn fc2":
      {"fitted", "held_out"}, ...}.
  Raises:
    ValueError: the model is not dense and has no dense form, or is already folded.
  """
  checks.check_model(model)
  checks.check_plan(plan)
  densified = all(hasattr(method, "to_dense") for method in model.plan.methods())
  if model.deploy or not densified:
    raise ValueError("compact starts from a dense, unfolded model; this one has "
                     f"plan={model.plan.to_json()}, deploy={model.deploy}")
  checks.check_variables(model, variables)
  if images is not None:
    checks.check_images(model, images := batches.join_batches(model, images))
    checks.check_values(images)
    checks.check_finite(variables)
    jax.eval_shape(model.apply, variables, images)   # the model itself checks their size
  if model.plan != Plan():
    model, variables = _dense_form(model, variables, images)
  small = model.clone(plan=plan)
  small.check()
  params, stats = dict(variables["params"]), dict(variables.get("batch_stats", {}))
  old_stats = trees.named_leaves(stats)
  if images is None:
    for name, module in small.compactable_blocks().items():
      params[name], stats[name] = blocks.from_dense(module.site, module.methods, params[name],
                                                    stats.get(name, {}))
  else:
    for name, new in _fit_blocks(model, small, variables, images, progress).items():
      params[name], stats[name] = new
  stats = {name: leaf for name, leaf in stats.items() if leaf}
  if images is None and any(method.axis != "tokens" for method in plan.methods()):
    new_norms = trees.named_leaves(stats).keys() - old_stats.keys()
    warnings.warn("compact without calibration images chooses and fits by the weights alone"
                  f"{', and new batch norms start without statistics' if new_norms else ''}; "
                  f"with images= it uses activations ({GAIN}; docs/compaction.md)", stacklevel=2)
  new = {"params": params, **({"batch_stats": stats} if stats else {})}
  checks.check_variables(small, new, "the compacted variables")   # a method may be the user's
  return small, new


def _dense_form(model: nn.Module, variables, images):
  """(dense model, its variables) for a model whose methods have dense forms."""
  if images is None:
    raise ValueError(f"the dense form of plan={model.plan.to_json()} depends on activations; give "
                     "images=")
  params, stats = dict(variables["params"]), dict(variables.get("batch_stats", {}))

  def on_block(name, block, x):
    own = {"params": params[name], "batch_stats": stats.get(name, {})}
    out = calibration.run(block, own, x)
    for method in block.methods.present():
      data = calibration.Calibration(block, own["params"], own["batch_stats"], x, None, 0, {})
      params[name], stats[name] = protocol.to_dense(method, block.site, params[name],
                                                    stats.get(name, {}), data)
    return out

  calibration.run_blocks(model, variables, np.asarray(images, np.float32), on_block)
  stats = {name: leaf for name, leaf in stats.items() if leaf}
  return model.clone(plan=Plan()), {"params": params,
                                    **({"batch_stats": stats} if stats else {})}


def _fit_blocks(model: nn.Module, small: nn.Module, variables, images, progress):
  """{name: (params, stats)} of the blocks under a plan, fitted one after another.

  After the first block, each image is in the batch twice: the first half is run through the compact
  model, the second through the dense teacher. Once a reducer acts, the two have different tokens:
  only the compact half continues, and a block's teacher is the dense block on that block's input.
  """
  images, held_out = batches.hold_out_last(images)
  modules = small.clone(remat=False).submodules()
  params, stats, fitted, notes = variables["params"], variables.get("batch_stats", {}), {}, {}

  def on_block(name, dense, x):
    twice = len(jax.tree.leaves(x)[0]) == 2 * len(images)
    own = {"params": params[name], "batch_stats": stats.get(name, {})}
    dense_x = batches.take_images(x, slice(len(images), None)) if twice else x
    dense_out, teacher = calibration.run_teacher(dense, own, dense_x)
    own_x = batches.take_images(x, slice(len(images)))
    data = calibration.Calibration(dense, *own.values(), own_x, teacher, held_out, {})
    fitted[name], out = _fit_block(modules[name], data)
    notes[name] = data.notes
    if progress is not None:
      progress(name, data.notes)
    if (twice or len(fitted) == 1) and modules[name].methods.tokens is None:
      out = jax.tree.map(lambda *halves: np.concatenate(halves), out, dense_out)
    return out

  logits = calibration.run_blocks(model, variables, images, on_block)
  if model.num_classes and not isinstance(logits, tuple):
    checks.warn_if_few_classes(np.asarray(logits)[-len(images):], stacklevel=3)
  _warn_if_too_few(notes, len(images))
  return fitted


def _fit_block(block: nn.Module, data: calibration.Calibration):
  """((params, stats), output) of a block, fitted on calibration inputs.

  block: with the plan's methods, at the model's image size; data: the calibration of its dense
    form, at the size of the inputs.
  """
  dense, data = data.module, dataclasses.replace(data, kept={})

  def calibration_of(methods, params, stats):
    return dataclasses.replace(data, module=dense.clone(methods=methods), params=params,
                               stats=stats)

  new = blocks.from_dense(block.site, block.methods, data.params, data.stats, calibration_of)
  variables = dict(zip(("params", "batch_stats"), new, strict=True))
  return new, data.run(dense.clone(methods=block.methods), variables)


def _warn_if_too_few(notes: dict[str, dict], images: int):
  """Warns once if there are too few images, naming the fit that overfits most."""
  if images < checks.FEW_IMAGES:
    none = ", too few to hold any out: a fit may be worse than none" * (images < 8)
    warnings.warn(f"few calibration images: {images}{none}; {ENOUGH}", stacklevel=3)
  fits = [(fit["held_out"] / max(fit["fitted"], 1e-9), name, part, fit)
          for name, block in notes.items() for part, fit in block.items()
          if fit["held_out"] > 0.01]
  if fits and max(fits, key=lambda fit: fit[0])[0] > OVERFIT_RATIO:
    _, name, part, fit = max(fits, key=lambda fit: fit[0])
    warnings.warn(f"{images} calibration images are few: in {name}, {part}, the relative error is "
                  f"{fit['held_out']:.2g} on held-out images, {fit['fitted']:.2g} on fitted ones; "
                  f"{ENOUGH}", stacklevel=3)
