"""AdamW, Muon and SGD, the published schedules, decay by name, and learning rates by name."""
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from vitcompact import trees


def warmup_cosine(step, *, peak, warmup_steps, total_steps, start, final):
  """The learning rate of step 0, 1, ... (an array or a number).

  Linear from `start` to `peak`, then a half cosine to `final`. As in DeiT the cosine counts from
  step 0, so that the rate drops slightly below the peak when the warm-up ends. All counts may be
  epochs instead of steps.
  """
  warmup = start + step * (peak - start) / max(warmup_steps, 1)
  cosine = final + 0.5 * (peak - final) * (1 + jnp.cos(jnp.pi * step / total_steps))
  return jnp.where(step < warmup_steps, warmup, jnp.where(step < total_steps, cosine, final))


def warmup_then_cosine(step, *, peak, warmup_steps, total_steps, start, final):
  """Like `warmup_cosine`, but the cosine begins at the peak, after the warm-up.

  The warm-up includes both ends: its last step has the peak rate (Sparsifiner, DynamicViT).
  """
  warmup = start + step * (peak - start) / max(warmup_steps - 1, 1)
  rest = total_steps - warmup_steps
  cosine = final + 0.5 * (peak - final) * (1 + jnp.cos(jnp.pi * (step - warmup_steps) / rest))
  return jnp.where(step < warmup_steps, warmup, jnp.where(step < total_steps, cosine, final))


def schedule(optim, total_steps: int):
  """step -> learning rate, from the config's `optim` section, over `total_steps`.

  optim.schedule:
    "step": `warmup_cosine`.
    "epoch": `warmup_cosine`, evaluated once an epoch, at its first step.
    "late_epoch": "epoch", one epoch later (DeiT's loop sets the rate after an epoch, so its first
      two epochs run at the first rate).
    "after_warmup": `warmup_then_cosine`.
  The last `cooldown_steps` have the final rate.
  """
  total, epoch_steps = total_steps - optim.cooldown_steps, optim.epoch_steps
  curve = warmup_then_cosine if optim.schedule == "after_warmup" else warmup_cosine

  def rate(step):
    if optim.schedule in ("epoch", "late_epoch"):
      delay = int(optim.schedule == "late_epoch")
      step = epoch_steps * jnp.maximum(step // epoch_steps - delay, 0)
    return curve(step, peak=optim.learning_rate, warmup_steps=optim.warmup_steps,
                 total_steps=total, start=optim.warmup_learning_rate,
                 final=optim.final_learning_rate)
  return rate


def decay_mask(params, rules):
  """A tree of bool: which parameters decay, by name. Rank would not do: biases of heads are 2-D."""
  leaves = trees.first_match(rules, params, may_be_idle=True)
  return jax.tree.map(lambda leaf: leaf.decay, leaves, is_leaf=lambda x: isinstance(x, trees.Leaf))


def one_optimizer(optim, rate, mask) -> optax.GradientTransformation:
  """AdamW, Muon or SGD: p <- p - lr (update(g) + weight_decay p); `mask` says which p decay.

  Muon (Jordan et al., 2024) trains the matrices of blocks, and AdamW all other parameters. Its
  updates are scaled to the root mean square of AdamW's, so that both share one learning rate (Liu
  et al., arXiv 2502.16982, section 2.2). SGD has Nesterov momentum b1, and adds the decay to the
  gradient, like PyTorch's.
  """
  adamw = optax.adamw(rate, b1=optim.b1, b2=optim.b2, eps=optim.eps,
                      weight_decay=optim.weight_decay, mask=mask)
  if optim.name == "adamw":
    return adamw
  if optim.name == "muon":
    muon = contrib.muon(rate, beta=optim.b1, eps=optim.eps, weight_decay=optim.weight_decay,
                        weight_decay_mask=mask, muon_weight_dimension_numbers=muon_dimensions,
                        consistent_rms=MUON_RMS)
    return optax.partition({"muon": muon, "adamw": adamw}, lambda params: (
        jax.tree_util.tree_map_with_path(
            lambda path, x: "muon" if matrix_dimensions(trees.name_of(path), x) else "adamw",
            params)))
  return optax.chain(optax.add_decayed_weights(optim.weight_decay, mask),
                     optax.sgd(rate, momentum=optim.b1, nesterov=True))


# Lower bound of a parameter's norm in `adaptive_clip`, so that parameters that are 0 can move.
LEAST_NORM = 1e-3
TO_HEADS = re.compile(r".*/(query|key|value)/kernel")   # output: (heads, head width), the last axes
FROM_HEADS = re.compile(r".*/out/kernel")               # input: (heads, head width), the first axes
# Matrices that Muon leaves to AdamW: those of classifiers.
CLASSIFIERS = re.compile(r"(\w+_)?head(_\w+)?/.*")
MUON_RMS = 0.2     # root mean square of AdamW's updates, about


def unit_norms(name: str, x):
  """The norm of each unit of a parameter or of its gradient: float32, broadcasts against x.

  A unit is the weights of one output of a kernel. Any other leaf is one unit.
  """
  outputs = 0
  if name.endswith("kernel"):
    outputs = 2 if x.ndim == 3 and TO_HEADS.fullmatch(name) else 1
  axes = tuple(range(x.ndim - outputs))
  return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes, keepdims=True))


def matrix_dimensions(name: str, x) -> contrib.MuonDimensionNumbers | None:
  """The input and output axes of a parameter that is a matrix of a block; None for other
  parameters: vectors, convolutions, embeddings and classifiers."""
  if not name.endswith("/kernel") or CLASSIFIERS.fullmatch(name):
    return None
  if x.ndim == 2:
    return contrib.MuonDimensionNumbers(0, 1)
  if x.ndim == 3 and TO_HEADS.fullmatch(name):
    return contrib.MuonDimensionNumbers(0, (1, 2))
  if x.ndim == 3 and FROM_HEADS.fullmatch(name):
    return contrib.MuonDimensionNumbers((0, 1), 2)
  return None


def muon_dimensions(params):
  """A tree with `matrix_dimensions` of every parameter."""
  return jax.tree_util.tree_map_with_path(
      lambda path, x: matrix_dimensions(trees.name_of(path), x), params)


def adaptive_clip(factor: float) -> optax.GradientTransformation:
  """Clips the gradient of each unit to a norm of `factor` times the norm of its weights.

  Brock et al., arXiv 2102.06171, section 4.1, with the units of timm's `adaptive_clip_grad`: optax
  derives units from the number of axes, which is wrong for positions and for kernels over heads.
  """
  def clip(path, gradient, parameter):
    name = trees.name_of(path)
    max_norm = factor * jnp.maximum(unit_norms(name, parameter), LEAST_NORM)
    scale = jnp.minimum(1, max_norm / jnp.maximum(unit_norms(name, gradient), 1e-6))
    return gradient * scale.astype(gradient.dtype)

  def update(updates, state, params):
    return jax.tree_util.tree_map_with_path(clip, updates, params), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class FirstGroup(NamedTuple):
  """The parameters that are trained in a method's first phase only.

  label: names their part of the optimiser's state; pattern: matches their names; section: the
  config's section of the phase.
  """
  label: str
  pattern: str
  section: Any


class Optimizers(NamedTuple):
  """The optimisers of the phases. They share one state, with separate moments for each group.

  main: updates all parameters but those of the first phase. first: updates only those; None without
  a first phase. rate: step -> learning rate over the whole run, for the log.
  """
  main: optax.GradientTransformation
  first: optax.GradientTransformation | None
  rate: optax.Schedule


def freeze(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """An optimiser with the same state that updates neither the state nor the parameters."""
  return optax.GradientTransformation(
      optimizer.init, lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates),
                                                           state))


def scale_rate(rate, factor: float, first_step: int):
  """The schedule `rate` times `factor`, and 0 before `first_step`."""
  return lambda step: jnp.where(step >= first_step, factor * rate(step), 0.0)


def make_optimizers(optim, total_steps: int, params, mask,
                    first: FirstGroup | None = None) -> Optimizers:
  """Makes the optimisers from the config's section `optim`; params and mask: trees of parameters.

  `optim.rates` is ((pattern, factor, first step), ...). The first pattern that matches a
  parameter's whole name sets the factor of its learning rate and the step until which it is frozen,
  counted from the end of the first phase. A parameter that no pattern matches has factor 1.
  """
  rates = [*optim.rates, (".*", 1.0, 0)]
  rules = [(rate[0], str(i)) for i, rate in enumerate(rates)]
  first_steps = 0
  if first is not None:
    rules, first_steps = [(first.pattern, first.label), *rules], first.section.steps
  labels = trees.first_match(rules, params, may_be_idle=True)
  main_rate, used = schedule(optim, total_steps - first_steps), set(jax.tree.leaves(labels))
  for i, (pattern, _, _) in enumerate(optim.rates):
    if str(i) not in used:
      raise ValueError(f"config.optim.rates: {pattern!r} matches no parameter, or only those that "
                       "an earlier pattern matches; a name looks like "
                       f"{next(iter(trees.named_leaves(params)))}")
  groups = {str(i): one_optimizer(optim, scale_rate(main_rate, factor, first_step), mask)
            for i, (_, factor, first_step) in enumerate(rates) if str(i) in used}

  def partition(groups):
    update = optax.partition(groups, labels)
    clips = [clip(limit) for clip, limit in ((optax.clip_by_global_norm, optim.clip_norm),
                                             (adaptive_clip, optim.adaptive_clip)) if limit]
    return optax.chain(*clips, update) if clips else update

  if first is None or first.label not in used:
    return Optimizers(partition(groups), None, main_rate)
  first_rate = schedule(_first_optim(optim, first.section), first_steps)
  first_group, frozen_groups = one_optimizer(optim, first_rate, mask), {
      label: freeze(group) for label, group in groups.items()}

  def rate(step):
    return jnp.where(step < first_steps, first_rate(step),
                     main_rate(jnp.maximum(step - first_steps, 0)))

  return Optimizers(partition({**groups, first.label: freeze(first_group)}),
                    partition({**frozen_groups, first.label: first_group}), rate)


def _first_optim(optim, section):
  """The `optim` section with the learning rates of a first phase."""
  same = {key: section[key] for key in ("learning_rate", "warmup_steps", "warmup_learning_rate",
                                        "final_learning_rate")}
  return type(optim)({**optim.to_dict(), **same, "cooldown_steps": 0})


def ema_decay(half_life: float, total_steps: int) -> float:
  """The decay whose half-life is the fraction `half_life` of the run, whatever the run's length.

  DeiT's 0.99996 over 375,300 steps is a half-life of 0.0462 of the run.
  """
  return 0.5 ** (1 / (half_life * total_steps))
