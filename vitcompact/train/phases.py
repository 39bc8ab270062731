"""Which phase of training a step is in: a run compiles one program for each.

A method may have a phase of its own first, in which its parameters alone learn, attention is dense
and every token is kept; then the plan itself is trained, in which a method may change with the
steps, and which may have a second pass under another plan.
"""
import dataclasses
from typing import Any, NamedTuple

from vitcompact.methods import protocol
from vitcompact.methods.protocol import FirstPhase
from vitcompact.plan import Plan, describe_method
from vitcompact.train.config import check_ramp, flat


class Phase(NamedTuple):
  """What one jitted step trains.

  plan: of the model. second: of a second pass with the same weights, or None. first: the phase in
  which a method's own parameters learn and nothing else does, or None.
  """
  plan: Plan
  second: Plan | None = None
  first: FirstPhase | None = None


def first_phase(plan: Plan) -> tuple[str, FirstPhase] | None:
  """(scope, phase) of the method that has a phase of its own before the others train."""
  found = {protocol.scope_of(method): phase for method in plan.methods()
           if (phase := protocol.first_phase(method)) is not None}
  if len(found) > 1:
    raise ValueError(f"the plan has {len(found)} methods with a first phase of their own "
                     f"({', '.join(found)}); train one, then start from its file")
  return next(iter(found.items()), None)


def first_steps(config, plan: Plan) -> int:
  """Steps of the first phase."""
  found = first_phase(plan)
  return config[found[1].section].steps if found else 0


def check(config, model):
  """Raises ValueError where the config asks for a training that its model's plan does not have."""
  found, steps = first_phase(model.plan), first_steps(config, model.plan)
  if steps:
    scope, phase = found
    if not steps < config.total_steps:
      raise ValueError(f"config.{phase.section}.steps={steps} must leave some of "
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
  """Raises ValueError where the run is over before a method has become what the plan says. Not for
  runs that began so: they may go on."""
  last_step = config.total_steps - first_steps(config, model.plan) - 1
  for method in model.plan.methods():
    if (last := protocol.at_step(method, config, last_step)) != method:
      keys = ", ".join(f"config.{key}={flat(config)[key]}" for key in protocol.settings(method))
      raise ValueError(f"config.total_steps={config.total_steps} ends while the plan's "
                       f"{describe_method(method)} still trains as {describe_method(last)} "
                       f"({keys}): give the run more steps, or lower these")


def phase_at(config, model, step: int) -> Phase:
  """The phase of step 0, 1, ... of a run; a checked config, and its model."""
  plan, before = model.plan, first_steps(config, model.plan)
  if step < before:
    _, phase = first_phase(plan)
    return Phase(in_first_phase(model, phase), first=phase)
  step -= before
  now = changed(model, lambda method: protocol.at_step(method, config, step))
  seconds = {method: protocol.second_pass(method, config, step) for method in now.methods()}
  if not any(seconds.values()):
    return Phase(now)
  return Phase(now, second=now.map(lambda method: seconds[method] or method))


def in_first_phase(model, phase: FirstPhase) -> Plan:
  """A model's plan as it is in a method's first phase: its other methods as they are, but every
  token is kept."""
  plan = changed(model, lambda method: phase.method(method)
                 if protocol.first_phase(method) is phase else method, written_out=True)
  return dataclasses.replace(plan, tokens=None)


def changed(model, change, written_out: bool = False) -> Plan:
  """The model's plan with `change(method)` for each method; in blocks in which a method does not
  act, as few tokens are left, it does not, though more of them may be left now."""
  plan: Any = model.plan
  if plan.tokens is not None and (written_out or plan.map(change) != plan):
    plan = plan.written_out(model.sites())
  return plan.map(change)
