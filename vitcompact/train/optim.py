"""AdamW, Muon or SGD, the published schedules, decay by name, and which parameters train when."""
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
  step 0, so it takes over slightly below the peak. Epochs may stand for steps.
  """
  warmup = start + step * (peak - start) / max(warmup_steps, 1)
  cosine = final + 0.5 * (peak - final) * (1 + jnp.cos(jnp.pi * step / total_steps))
  return jnp.where(step < warmup_steps, warmup, jnp.where(step < total_steps, cosine, final))


def warmup_then_cosine(step, *, peak, warmup_steps, total_steps, start, final):
  """As `warmup_cosine`, but the cosine begins at the peak, when the warm-up is over.

  The warm-up has both its ends: its last step is at the peak (Sparsifiner, DynamicViT).
  """
  warmup = start + step * (peak - start) / max(warmup_steps - 1, 1)
  rest = total_steps - warmup_steps
  cosine = final + 0.5 * (peak - final) * (1 + jnp.cos(jnp.pi * (step - warmup_steps) / rest))
  return jnp.where(step < warmup_steps, warmup, jnp.where(step < total_steps, cosine, final))


def schedule(optim, total_steps: int):
  """step -> learning rate, from the config's `optim` section, over `total_steps`.

  "step": `warmup_cosine`. "epoch": its value when the epoch of `epoch_steps` began. "late_epoch":
  that of the epoch before (DeiT's loop sets the rate after an epoch, so its first two epochs run at
  the first rate). "after_warmup": `warmup_then_cosine`. The last `cooldown_steps` are at the final
  rate.
  """
  total, e = total_steps - optim.cooldown_steps, optim.epoch_steps
  curve = warmup_then_cosine if optim.schedule == "after_warmup" else warmup_cosine

  def rate(step):
    if optim.schedule in ("epoch", "late_epoch"):
      late = int(optim.schedule == "late_epoch")
      step = e * jnp.maximum(step // e - late, 0)
    return curve(step, peak=optim.learning_rate, warmup_steps=optim.warmup_steps,
                 total_steps=total, start=optim.warmup_learning_rate,
                 final=optim.final_learning_rate)
  return rate


def decay_mask(params, rules):
  """A tree of bool: which parameters decay. By name: a head's bias is 2-D here, and so are taps."""
  leaves = trees.first_match(rules, params, may_be_idle=True)
  return jax.tree.map(lambda leaf: leaf.decay, leaves, is_leaf=lambda x: isinstance(x, trees.Leaf))


def one_optimizer(optim, rate, mask) -> optax.GradientTransformation:
  """p <- p - lr (update(g) + weight_decay p), where `mask` is true, of AdamW, Muon or SGD.

  Muon (Jordan et al., 2024) is for the matrices of blocks, all others have AdamW; its updates have
  the root mean square of AdamW's, so that one rate is for both (Liu et al., arXiv 2502.16982,
  section 2.2). SGD has Nesterov momentum b1, and adds the decay to the gradient, as PyTorch's does.
  """
  adamw = optax.adamw(rate, b1=optim.b1, b2=optim.b2, eps=optim.eps,
                      weight_decay=optim.weight_decay, mask=mask)
  if optim.name == "adamw":
    return adamw
  if optim.name == "muon":
    muon = contrib.muon(rate, beta=optim.b1, eps=optim.eps, weight_decay=optim.weight_decay,
                        weight_decay_mask=mask, muon_weight_dimension_numbers=of_matrices,
                        consistent_rms=MUON_RMS)
    return optax.partition({"muon": muon, "adamw": adamw}, lambda params: (
        jax.tree_util.tree_map_with_path(
            lambda path, x: "muon" if matrix(trees.name_of(path), x) else "adamw", params)))
  return optax.chain(optax.add_decayed_weights(optim.weight_decay, mask),
                     optax.sgd(rate, momentum=optim.b1, nesterov=True))


# The least norm of a parameter that `adaptive_clip` counts: what starts at 0 has to move.
LEAST_NORM = 1e-3
# Kernels whose output is (heads, head width), their last two axes; whose input is, the first two.
TO_HEADS = re.compile(r".*/(query|key|value)/kernel")
FROM_HEADS = re.compile(r".*/out/kernel")
# Matrices that Muon leaves to AdamW: those of classifiers.
CLASSIFIERS = re.compile(r"(\w+_)?head(_\w+)?/.*")
MUON_RMS = 0.2     # of AdamW's updates, about


def unit_norms(name: str, x):
  """The norm of each unit of a parameter or of its gradient, float32, in a shape that goes with x.

  A unit is what one output takes: all of a kernel's axes but the last. Other leaves are one unit.
  """
  outputs = 0
  if name.endswith("kernel"):
    outputs = 2 if x.ndim == 3 and TO_HEADS.fullmatch(name) else 1
  axes = tuple(range(x.ndim - outputs))
  return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes, keepdims=True))


def matrix(name: str, x) -> contrib.MuonDimensionNumbers | None:
  """Which axes of a parameter are the inputs of a block's matrix, and which its outputs; None of
  what is no such matrix: vectors, convolutions, embeddings and classifiers."""
  if not name.endswith("/kernel") or CLASSIFIERS.fullmatch(name):
    return None
  if x.ndim == 2:
    return contrib.MuonDimensionNumbers(0, 1)
  if x.ndim == 3 and TO_HEADS.fullmatch(name):
    return contrib.MuonDimensionNumbers(0, (1, 2))
  if x.ndim == 3 and FROM_HEADS.fullmatch(name):
    return contrib.MuonDimensionNumbers((0, 1), 2)
  return None


def of_matrices(params):
  """`matrix` of every parameter, a tree."""
  return jax.tree_util.tree_map_with_path(lambda path, x: matrix(trees.name_of(path), x), params)


def adaptive_clip(factor: float) -> optax.GradientTransformation:
  """Scales down the gradient of each unit whose norm is above factor times that of its weights.

  Brock et al., arXiv 2102.06171, section 4.1, over the units of timm's `adaptive_clip_grad`; optax
  tells units by the number of axes, which is wrong of positions and of kernels over heads.
  """
  def clipped(path, gradient, parameter):
    name = trees.name_of(path)
    most = factor * jnp.maximum(unit_norms(name, parameter), LEAST_NORM)
    scale = jnp.minimum(1, most / jnp.maximum(unit_norms(name, gradient), 1e-6))
    return gradient * scale.astype(gradient.dtype)

  def update(updates, state, params):
    return jax.tree_util.tree_map_with_path(clipped, updates, params), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class FirstGroup(NamedTuple):
  """The parameters that a method's first phase trains, and nothing else does.

  label: of their part of the optimiser's state; pattern: of their names; section: of the config.
  """
  label: str
  pattern: str
  section: Any


class Optimizers(NamedTuple):
  """Updates of one and the same state, in which every group of parameters has moments of its own.

  main: of all but those of the first phase. first: of these only, None without such a phase.
  rate: step -> the learning rate of the run at that step, for the log.
  """
  main: optax.GradientTransformation
  first: optax.GradientTransformation | None
  rate: optax.Schedule


def frozen(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """Its state, and no update of that or of the parameters."""
  return optax.GradientTransformation(
      optimizer.init, lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates),
                                                           state))


def scaled(rate, factor: float, first_step: int):
  """A schedule times a factor, 0 before a step."""
  return lambda step: jnp.where(step >= first_step, factor * rate(step), 0.0)


def make_optimizers(optim, total_steps: int, params, mask,
                    first: FirstGroup | None = None) -> Optimizers:
  """From the config's section `optim`; params and mask: trees of all parameters.

  `optim.rates` is ((pattern, factor, first step), ...): a parameter has the learning rate times the
  factor of the first pattern that matches its whole name, and is frozen before that step. A
  parameter that none matches has factor 1. Steps are counted from the end of the first phase.
  """
  rates = [*optim.rates, (".*", 1.0, 0)]
  rules = [(rate[0], str(i)) for i, rate in enumerate(rates)]
  before = 0
  if first is not None:
    rules, before = [(first.pattern, first.label), *rules], first.section.steps
  labels = trees.first_match(rules, params, may_be_idle=True)
  main_rate, used = schedule(optim, total_steps - before), set(jax.tree.leaves(labels))
  for i, (pattern, _, _) in enumerate(optim.rates):
    if str(i) not in used:
      raise ValueError(f"config.optim.rates: {pattern!r} matches no parameter that an earlier "
                       "pattern leaves; names are such as "
                       f"{next(iter(trees.named_leaves(params)))}")
  groups = {str(i): one_optimizer(optim, scaled(main_rate, factor, first_step), mask)
            for i, (_, factor, first_step) in enumerate(rates) if str(i) in used}

  def partitioned(groups):
    update = optax.partition(groups, labels)
    clips = [clip(most) for clip, most in ((optax.clip_by_global_norm, optim.clip_norm),
                                           (adaptive_clip, optim.adaptive_clip)) if most]
    return optax.chain(*clips, update) if clips else update

  if first is None or first.label not in used:
    return Optimizers(partitioned(groups), None, main_rate)
  first_rate = schedule(_first_optim(optim, first.section), before)
  own, frozen_groups = one_optimizer(optim, first_rate, mask), {
      label: frozen(group) for label, group in groups.items()}

  def rate(step):
    return jnp.where(step < before, first_rate(step), main_rate(jnp.maximum(step - before, 0)))

  return Optimizers(partitioned({**groups, first.label: frozen(own)}),
                    partitioned({**frozen_groups, first.label: own}), rate)


def _first_optim(optim, section):
  """The `optim` section with the learning rates of a first phase."""
  same = {key: section[key] for key in ("learning_rate", "warmup_steps", "warmup_learning_rate",
                                        "final_learning_rate")}
  return type(optim)({**optim.to_dict(), **same, "cooldown_steps": 0})


def ema_decay(half_life: float, total_steps: int) -> float:
  """The decay whose half-life is that fraction of the run, so that it fits a run of any length.

  DeiT's 0.99996 over 375,300 steps is a half-life of 0.0462 of the run.
  """
  return 0.5 ** (1 / (half_life * total_steps))
