"""Which training phase a step is in; a run compiles one program for each phase.

A method may have a first phase, in which only its own parameters learn, attention is dense and
every token is kept. In the main phase the plan itself is trained: a method may change with the
step, and may ask for a second forward pass under another plan.
"""
import dataclasses
from typing import Any, NamedTuple

from vitcompact.methods import protocol
from vitcompact.methods.protocol import FirstPhase
from vitcompact.plan import Plan, describe_method
from vitcompact.train.config import check_ramp, flat


class Phase(NamedTuple):
  """What one jitted step trains.

  plan: the model's. second: the plan of a second pass with the same weights, or None. first: the
  method's first phase if the step is in it, else None.
  """
  plan: Plan
  second: Plan | None = None
  first: FirstPhase | None = None


def first_phase(plan: Plan) -> tuple[str, FirstPhase] | None:
  """(scope, phase) of the method that has a first phase; None if no method has one."""
  found = {protocol.scope_of(method): phase for method in plan.methods()
           if (phase := protocol.first_phase(method)) is not None}
  if len(found) > 1:
    raise ValueError(f"the plan has {len(found)} methods with a first phase of their own "
                     f"({', '.join(found)}); train one, then start from its file")
  return next(iter(found.items()), None)


def first_steps(config, plan: Plan) -> int:
  """The number of steps in the first phase."""
  found = first_phase(plan)
  return config[found[1].section].steps if found else 0


def check(config, model):
  """Raises ValueError if the phases of the config do not fit the model's plan."""
  found, steps = first_phase(model.plan), first_steps(config, model.plan)
  if steps:
    scope, phase = found
    if not steps < config.total_steps:
      raise ValueError(f"config.{phase.section}.steps={steps} must be less than "
                       f"config.total_steps={config.total_steps}")
    check_ramp(config, config.total_steps - steps, "the main phase (config.total_steps="
               f"{config.total_steps} less config.{phase.section}.steps={steps})")
    if config[phase.section].warmup_steps > steps:
      raise ValueError(f"config.{phase.section}.warmup_steps={config[phase.section].warmup_steps} "
                       f"is longer than config.{phase.section}.steps={steps}: lower it")
    if all(phase is not protocol.first_phase(method)
           for site in model.sites() for method in model.plan.at(site).present()):
      raise ValueError(f"config.{phase.section}.steps={steps} trains {scope}, which no block of "
                       "this model has: set it to 0, or lower the method's min_tokens")
  for method in model.plan.methods():
    protocol.check_training(method, config)


def check_end(config, model):
  """Raises ValueError if the run ends while a method still differs from the plan. Not to be called
  for resumed runs: one that began like this may continue."""
  last_step = config.total_steps - first_steps(config, model.plan) - 1
  for method in model.plan.methods():
    if (last := protocol.at_step(method, config, last_step)) != method:
      keys = ", ".join(f"config.{key}={flat(config)[key]}" for key in protocol.settings(method))
      raise ValueError(f"config.total_steps={config.total_steps} ends while the plan's "
                       f"{describe_method(method)} still trains as {describe_method(last)} "
                       f"({keys}): give the run more steps, or lower these")


def phase_at(config, model, step: int) -> Phase:
  """The phase of step 0, 1, ... of a run, from its checked config and its model."""
  first = first_steps(config, model.plan)
  if step < first:
    _, phase = first_phase(model.plan)
    return Phase(plan_of_first_phase(model, phase), first=phase)
  step -= first
  plan = map_methods(model, lambda method: protocol.at_step(method, config, step))
  seconds = {method: protocol.second_pass(method, config, step) for method in plan.methods()}
  if not any(seconds.values()):
    return Phase(plan)
  return Phase(plan, second=plan.map(lambda method: seconds[method] or method))


def plan_of_first_phase(model, phase: FirstPhase) -> Plan:
  """The plan in a method's first phase: all tokens are kept, other methods are unchanged."""
  plan = map_methods(model, lambda method: phase.method(method)
                     if protocol.first_phase(method) is phase else method, written_out=True)
  return dataclasses.replace(plan, tokens=None)


def map_methods(model, change, written_out: bool = False) -> Plan:
  """The model's plan with `change(method)` for each method. Each method acts in the same blocks as
  before, even if the change leaves more tokens in blocks that had too few for it."""
  plan: Any = model.plan
  if plan.tokens is not None and (written_out or plan.map(change) != plan):
    plan = plan.written_out(model.sites())
  return plan.map(change)
