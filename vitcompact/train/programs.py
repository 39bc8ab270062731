"""Which program trains at a step: a run compiles one for each way in which its model trains.

Reconstruction of attention (Sparsifiner) comes first, with attention dense and every token kept;
then the plan itself, its keep rate warmed up (EViT), or with a less reduced companion (MCTF).
"""
import dataclasses
from typing import NamedTuple

import numpy as np

from vitcompact.methods.tokens.dynamicvit import DynamicViT
from vitcompact.methods.tokens.evit import EViT
from vitcompact.methods.tokens.mctf import MCTF
from vitcompact.plan import Plan


class Program(NamedTuple):
  """What one jitted step trains.

  plan: of the model. companion: of a second pass with the same weights, or None. links: predictors
  of links learn to reconstruct attention, and nothing else learns.
  """
  plan: Plan
  companion: Plan | None = None
  links: bool = False


def check(config, model):
  """Raises ValueError where the config asks for a training that its model's plan does not have."""
  plan, keep, loss = model.plan, config.keep_warmup, config.loss
  if config.reconstruct.steps and plan.with_links(masked=False) == plan:
    raise ValueError(f"config.reconstruct.steps={config.reconstruct.steps} trains predictors of "
                     "links, and the plan has none; set it to 0, or add links to the plan")
  if not 0 <= config.reconstruct.steps < config.total_steps:
    raise ValueError(f"config.reconstruct.steps={config.reconstruct.steps} must leave some of "
                     f"config.total_steps={config.total_steps}")
  if (keep.start or keep.steps) and not isinstance(plan.tokens, EViT):
    raise ValueError(f"config.keep_warmup is for EViT's keep rate, and the plan has "
                     f"tokens={plan.tokens}; set its start and steps to 0")
  if loss.kept_ratio and (not isinstance(plan.tokens, DynamicViT) or plan.tokens.keep == 1):
    raise ValueError("config.loss.kept_ratio is for DynamicViT with keep < 1, and the plan has "
                     f"tokens={plan.tokens}; set it to 0")
  if loss.consistency and not (isinstance(plan.tokens, MCTF) and isinstance(plan.tokens.r, int)):
    raise ValueError("config.loss.consistency compares with a pass of MCTF(r=a whole number) that "
                     f"merges less, and the plan has tokens={plan.tokens}; set it to 0")
  if loss.companion_r < 0:
    raise ValueError(f"config.loss.companion_r={loss.companion_r} must be 0 or more tokens")


def reconstructing(model) -> Plan:
  """A model's plan with attention dense and every token kept, and the predictors that it has."""
  return _with_tokens(model, dataclasses.replace(model.plan.with_links(masked=False), tokens=None))


def _with_tokens(model, plan: Plan) -> Plan:
  """A plan of more tokens than the model's, with the predictors of links that the model has.

  A block in which few tokens would be left has none, though now it sees more of them.
  """
  if model.plan.tokens is None:
    return plan
  parts = model.parts()
  without = {i: {**plan.blocks.get(i, {}), "links": None} for i in range(model.depth)
             if plan.at(i).links is not None and parts[f"blocks_{i}"].links is None}
  return dataclasses.replace(plan, blocks={**plan.blocks, **without})


def program_at(config, model, step: int) -> Program:
  """The program of step 0, 1, ... of a run; a checked config, and its model."""
  plan = model.plan
  if step < config.reconstruct.steps:
    return Program(reconstructing(model), links=True)
  step -= config.reconstruct.steps
  if config.keep_warmup.start or config.keep_warmup.steps:
    tokens = plan.tokens.at_epoch(step, start=config.keep_warmup.start,
                                  length=max(config.keep_warmup.steps, 1))
    return Program(_with_tokens(model, dataclasses.replace(plan, tokens=tokens)))
  if config.loss.consistency:
    # One draw for a step; the authors draw on each device.
    r = int(np.random.default_rng((config.seed, step)).integers(config.loss.companion_r + 1))
    less = dataclasses.replace(plan.tokens, r=min(r, plan.tokens.r))
    return Program(plan, companion=dataclasses.replace(plan, tokens=less))
  return Program(plan)
