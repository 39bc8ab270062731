"""Report: what `measure` found, its JSON form, and the plans that it proposes."""
import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from vitcompact.count import count
from vitcompact.execution import Execution
from vitcompact.latency import Times
from vitcompact.methods import protocol
from vitcompact.models import create_model
from vitcompact.plan import BY_BLOCK, BlockMethods, Plan, describe_method
from vitcompact.planner import Choice, Costs, Knapsack, combinations


class Option(NamedTuple):
  """A method that could be used in one block or, for the tokens axis, in the whole model.

  error: the method's estimate of its relative error; kl: of the logits with this option alone, in
  nats per image (for a model without a classifier, the error of its features, see `measure`);
  measured: True if `kl` was measured, False if it was inferred from another option.
  """
  axis: str
  method: Any
  error: float | None
  kl: float | None
  measured: bool


@dataclasses.dataclass(frozen=True)
class Step:
  """Why a plan uses a method in a block: a row of `Report.explain`.

  saves: share of the dense model's MACs; runner_up: what the best plan without this method would
  use here; more: how much the KL would grow then.
  """
  block: str
  method: str
  saves: float
  kl: float
  measured: bool
  runner_up: str
  more: float


@dataclasses.dataclass(frozen=True)
class Explanation:
  """What a plan is predicted to cost. macs, params: shares of the dense model's; kl: the sum of its
  options' KLs, each for that option alone, in nats per image; unit: name of that measure."""
  plan: Plan
  macs: float
  params: float
  kl: float
  steps: tuple[Step, ...]
  unit: str = "KL"

  def __str__(self) -> str:
    lines = [f"MACs {self.macs:.1%}, parameters {self.params:.1%} of the dense model; predicted "
             f"{self.unit} {self.kl:.2g}"]
    for step in self.steps:
      lines.append(f"{step.block}: {step.method}: saves {step.saves:.1%} for {self.unit} "
                   f"{step.kl:.2g}"
                   f"{'' if step.measured else ' (inferred)'}; instead {step.runner_up}"
                   f" ({step.more:+.2g})")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Report:
  """The measured redundancy of one dense model.

  model, fields: how it is built; digest: of its variables. blocks: [{"name", "tokens", "options",
  "tables"}]; tokens: options for the whole model. params, macs: of the dense model.
  """
  vitcompact: str
  model: str
  fields: Mapping[str, Any]
  digest: str
  images: int
  images_digest: str
  sensitivity: str
  params: int
  macs: int
  blocks: tuple
  tokens: tuple[Option, ...]

  def plan(self, *, macs: float | None = None, params: float | None = None,
           speedup: float | None = None, latency_ms: float | None = None, batch: int = 1,
           axes=("heads", "attention", "ffn", "tokens")) -> Plan:
    """The plan with the least predicted loss that meets one goal.

    A knapsack over blocks and axes: the predicted loss is the sum of the options' KLs. Reducers are
    tried one by one; for each, blocks are searched with the tokens that it leaves them. Blocks that
    were not timed before are timed now: see `latency.Times`; on a CPU, in CPU seconds.

    Args:
      macs, params: share of the dense model's MACs or parameters, at most.
      speedup: how many times as fast as the dense model on this device, at least.
      latency_ms: milliseconds for a batch of `batch` images on this device, at most.
      axes: axes that the plan may use.
    Raises:
      ValueError: no plan of these axes meets the goal; the error says how close plans come.
    """
    goal, target = self._goal(macs=macs, params=params, speedup=speedup, latency_ms=latency_ms)
    self._check(axes)
    times, share = None, target
    if goal in ("speedup", "latency_ms"):
      times = self.times(batch)
      share = 1 / target if goal == "speedup" else target / (1e3 * times.dense)
    best, most = None, 1.0
    for reducer, kl in self._reducers(axes):
      if best is not None and kl >= best[0] - 1e-9:   # the reducer alone loses as much
        break
      search = self._search(goal if times is None else "seconds", reducer, axes, batch)
      most = min(most, 1 - search.saved - search.knapsack.most_saved() / search.total)
      need = (1 - share - search.saved) * search.total
      found = search.knapsack.best(need)
      if found is not None and (best is None or found[1] + kl < best[0] - 1e-9):
        best = found[1] + kl, search.plan(found[0])
    if best is None:
      nearest = {"speedup": f"above speedup={0.999 / max(most, 1e-9):.3f}"}.get(
          goal, f"below {goal}={(most + 5e-4) * (target / share):.3f}")
      raise ValueError(f"{goal}={target}: no plan of {', '.join(axes)} goes {nearest}")
    return best[1]

  def times(self, batch: int = 1) -> Times:
    """Times of this model's blocks on this device."""
    if batch not in self._times:
      self._times[batch] = Times(self.costs, batch)
    return self._times[batch]

  def milliseconds(self, plan: Plan, batch: int = 1) -> float:
    """Predicted time of a batch under a plan, on this device."""
    search = self._search("seconds", plan.tokens, (*BY_BLOCK, "tokens"), batch)
    picks = search.picks(plan)
    saved = sum(search.choices[name][i].saved for name, i in picks.items())
    return 1e3 * (self.times(batch).total(plan.tokens) - saved)

  def explain(self, plan: Plan) -> Explanation:
    """What a plan is predicted to cost; the plan may be this report's or edited by hand."""
    self._check(())
    self.costs.model.clone(plan=plan, deploy=False).check()
    axes = (*BY_BLOCK, "tokens")
    search = self._search("macs", plan.tokens, axes)
    picks, kl = search.picks(plan), self._kl_of(plan.tokens)
    need = sum(search.choices[name][i].saved for name, i in picks.items())
    steps = []
    if plan.tokens is not None:
      steps.append(Step("all", describe_method(plan.tokens), search.saved, kl, True,
                        *self._best_other_reducer(plan.tokens, picks, search)))
    for name, i in picks.items():
      choice = search.choices[name][i]
      kl += choice.kl
      if choice.options:
        steps.append(Step(name, _describe_choice(choice), choice.saved / search.total, choice.kl,
                          all(option.measured for option in choice.options.values()),
                          *search.runner_up(picks, name)))
    params = sum(search.choices[name][i].params for name, i in picks.items())
    return Explanation(plan, 1 - search.saved - need / search.total, 1 - params / self.params, kl,
                       tuple(steps), self.unit)

  @property
  def unit(self) -> str:
    """Name of what `kl` holds: "KL" of logits, or "error" of features."""
    return "KL" if self.fields.get("num_classes", 1) else "error"

  @functools.cached_property
  def costs(self) -> Costs:
    return Costs(create_model(self.model, **self.fields))

  def _goal(self, **goals) -> tuple[str, float]:
    given = {name: value for name, value in goals.items() if value is not None}
    if len(given) != 1:
      raise ValueError(f"plan({', '.join(f'{k}={v}' for k, v in given.items())}): give one of "
                       f"{', '.join(goals)}")
    name, value = next(iter(given.items()))
    least, most, rule = {"speedup": (1, math.inf, "a number of at least 1"),
                         "latency_ms": (0, math.inf, "a number of milliseconds above 0")}.get(
                             name, (0, 1, "a share of the dense model's in (0, 1]"))
    fits = not isinstance(value, bool) and isinstance(value, int | float)
    if not fits or not least <= value <= most or not value:
      raise ValueError(f"plan({name}={value!r}): must be {rule}")
    return name, float(value)

  def _check(self, axes):
    if self.sensitivity == "none":
      raise ValueError("this report was made with sensitivity='none', without the cost of any "
                       "option; measure again with sensitivity='quick'")
    for axis in axes:
      if axis not in (*BY_BLOCK, "tokens"):
        raise ValueError(f"axes: unknown axis {axis!r}; use {', '.join((*BY_BLOCK, 'tokens'))}")

  def _reducers(self, axes):
    """Yields (reducer, its KL): no reducer first, then by increasing KL."""
    yield None, 0.0
    if "tokens" in axes:
      for option in sorted(self.tokens, key=lambda option: option.kl):
        yield option.method, option.kl

  def _kl_of(self, reducer) -> float:
    if reducer is None:
      return 0.0
    known = {option.method: option.kl for option in self.tokens}
    if reducer not in known:
      raise ValueError(f"this report has not tried {describe_method(reducer)}; it has tried "
                       f"{', '.join(map(describe_method, known)) or 'no reducer'}")
    return known[reducer]

  def _best_other_reducer(self, reducer, picks, search) -> tuple[str, float]:
    """(name of the best other reducer or "no reducer", how much the KL grows with it) for the same
    savings in MACs."""
    need = search.saved * search.total + search.knapsack.saved(picks)
    current, best = self._kl_of(reducer) + search.kl(picks), None
    for other, kl in self._reducers(("tokens",)):
      if other == reducer:
        continue
      if best is not None and kl >= best[1]:
        break
      other_search = self._search("macs", other, (*BY_BLOCK, "tokens"))
      found = other_search.knapsack.best(need - other_search.saved * other_search.total)
      if found is not None and (best is None or found[1] + kl < best[1]):
        best = ("no reducer" if other is None else describe_method(other)), found[1] + kl
    if best is None:
      return "nothing else reaches it", float("inf")
    return best[0], best[1] - current

  @functools.cached_property
  def _searches(self) -> dict:
    return {}

  @functools.cached_property
  def _times(self) -> dict:
    return {}

  def _search(self, goal: str, reducer, axes, batch: int = 1) -> "Search":
    key = goal, reducer, tuple(axes), batch
    if key not in self._searches:
      self._searches[key] = Search(self, *key)
    return self._searches[key]

  def to_json(self) -> str:
    out = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    out["blocks"] = [{**row, "options": [_option_to_dict(option) for option in row["options"]]}
                     for row in self.blocks]
    out["tokens"] = [_option_to_dict(option) for option in self.tokens]
    return json.dumps(out, indent=1)

  @classmethod
  def from_json(cls, text: str) -> "Report":
    """Inverse of `to_json`; ValueError, one line, if `text` is no report."""
    try:
      tree = json.loads(text)
      known = {field.name for field in dataclasses.fields(cls)}
      if not isinstance(tree, dict) or set(tree) != known:
        raise ValueError(f"it does not have the keys {', '.join(sorted(known))}")
      tree["blocks"] = tuple({**row, "options": tuple(map(_option_from_dict, row["options"]))}
                             for row in tree["blocks"])
      tree["tokens"] = tuple(map(_option_from_dict, tree["tokens"]))
      report = cls(**tree)
      report._check_contents()
      return report
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
      raise ValueError(f"not a report of vitcompact.measure: {error}; measure again") from None

  def _check_contents(self):
    """Raises ValueError if a report has contents that `measure` could not have written."""
    from vitcompact.measure import SENSITIVITIES

    model = create_model(self.model, **self.fields)
    names = [name for name, module in model.submodules().items() if hasattr(module, "methods")]
    if [row["name"] for row in self.blocks] != names:
      raise ValueError(f"its blocks are not those of {self.model}")
    if self.sensitivity not in SENSITIVITIES:
      raise ValueError(f"sensitivity={self.sensitivity!r}")
    for row in self.blocks:
      dict(row["tables"]), int(row["tokens"])
    for option in (*self.tokens, *(option for row in self.blocks for option in row["options"])):
      if option.kl is None and self.sensitivity == "none":
        continue
      if not isinstance(option.kl, int | float) or not 0 <= option.kl < math.inf:
        raise ValueError(f"kl={option.kl!r} of {describe_method(option.method)}")
    if not all(isinstance(x, int) and x > 0 for x in (self.params, self.macs)):
      raise ValueError("params and macs must be whole numbers above 0")

  def save(self, path) -> pathlib.Path:
    """Writes report.json and report.html into a folder, each atomically."""
    from vitcompact.draw.report import page

    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("report.json", self.to_json()), ("report.html", page(self))):
      partial = folder / f"{name}.partial"
      partial.write_text(text, encoding="utf-8")
      os.replace(partial, folder / name)
    return folder / "report.json"

  @classmethod
  def load(cls, path) -> "Report":
    """The report in a folder or a report.json."""
    path = pathlib.Path(path)
    path = path / "report.json" if path.is_dir() else path
    try:
      return cls.from_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
      raise ValueError(f"{path}: not a report of vitcompact.measure: {error}") from None
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from None

  def check_model(self, model, digest: str):
    """Raises ValueError unless the report was made of this model and these weights."""
    reported = create_model(self.model, **self.fields)
    same = reported == model.clone(plan=Plan(), execution=Execution())
    if not same or self.digest != digest:
      raise ValueError(f"this report is of {self.model} with weights {self.digest[:12]}, not of "
                       f"{model.variant} with {digest[:12]}; measure again")


class Search:
  """The search for the best plan of one report with one reducer."""

  def __init__(self, report: Report, goal: str, reducer, axes, batch: int):
    costs, timed = report.costs, goal == "seconds"
    self.goal, self.reducer, self.report = goal, reducer, report
    self.times = report.times(batch) if timed else None
    self.total = self.times.dense if timed else getattr(costs.dense, goal)
    self.saved, lengths = 0.0, {}
    model = costs.model
    if reducer is not None:
      small = model.clone(plan=Plan(tokens=reducer))
      now = self.times.total(reducer) if timed else getattr(count(small), goal)
      self.saved = 1 - now / self.total
      lengths = {name: module.site.tokens_left
                 for name, module in small.submodules().items() if hasattr(module, "methods")}
    self.choices = {row["name"]: self._choices(costs, row, axes, lengths.get(row["name"]))
                    for row in report.blocks}
    self.numbers = {name: module.site.block for name, module in costs.blocks().items()}
    self.knapsack = Knapsack(self.choices, self.total)

  def _choices(self, costs, row, axes, tokens) -> list[Choice]:
    site = costs.blocks()[row["name"]].site
    if tokens is not None:
      site = site._replace(tokens_left=tokens)
    by_axis = {axis: [option for option in row["options"] if option.axis == axis
                      and protocol.acts(option.method, site)]
               for axis in BY_BLOCK if axis in axes}

    @functools.cache
    def saved(*options) -> tuple[int, int]:
      methods = {option.axis: option.method for option in options}
      return costs.saved(row["name"], methods, tokens, self.reducer) if options else (0, 0)

    @functools.cache
    def legal(*options) -> bool:
      """Whether these options can be combined with each other and with the reducer."""
      methods = {option.axis: option.method for option in options}
      plan = Plan(tokens=self.reducer, blocks={site.block: methods})
      try:
        costs.model.clone(plan=plan).check()
      except ValueError:
        return False
      return True

    out = []
    for combination in combinations(by_axis):
      options = list(combination.values())
      if not legal(*(option for option in options if option.axis != "ffn")):
        continue
      parts = [saved(*(option for option in options if option.axis != "ffn")),
               saved(*(option for option in options if option.axis == "ffn"))]
      macs, params = (sum(part) for part in zip(*parts, strict=True))
      gain = {"macs": macs, "params": params}.get(self.goal)
      if gain is None:
        gain = sum(self.times.saved(row["name"], option.axis, option.method, tokens, self.reducer)
                   for option in options)
      out.append(Choice(combination, sum(option.kl for option in options), gain, params))
    return out

  def plan(self, picks: dict[str, int]) -> Plan:
    blocks = {}
    for name, i in picks.items():
      if options := self.choices[name][i].options:
        blocks[self.numbers[name]] = {axis: option.method for axis, option in options.items()}
    return Plan(tokens=self.reducer, blocks=blocks)

  def picks(self, plan: Plan) -> dict[str, int]:
    """{block: index of the choice that a plan makes}; ValueError if the report has no such choice.
    """
    found = {}
    for name, choices in self.choices.items():
      site = self.report.costs.blocks()[name].site
      planned = plan.at(site)._asdict() | {"tokens": None}
      for i, choice in enumerate(choices):
        methods = {axis: option.method for axis, option in choice.options.items()}
        if BlockMethods(**methods)._asdict() == planned:
          found[name] = i
          break
      else:
        methods = ", ".join(describe_method(method) for method in planned.values()
                            if method is not None)
        raise ValueError(f"{name}: this report has not tried {methods}; edit the plan to options "
                         "that it lists, or measure again")
    return found

  def runner_up(self, picks: dict[str, int], name: str) -> tuple[str, float]:
    """(what the best plan without this choice would use in a block, how much the KL grows) for the
    same total savings. The growth is negative if a plan made by hand is not the best."""
    other = self.knapsack.best(self.knapsack.saved(picks), forbidden=(name, picks[name]))
    if other is None:
      return "nothing else reaches it", float("inf")
    choice = self.choices[name][other[0][name]]
    return _describe_choice(choice) or "dense", other[1] - self.kl(picks)

  def kl(self, picks: dict[str, int]) -> float:
    return sum(self.choices[name][i].kl for name, i in picks.items())


def _describe_choice(choice: Choice) -> str:
  return " + ".join(describe_method(option.method) for option in choice.options.values())


def _option_to_dict(option: Option) -> dict:
  tree = json.loads(Plan(**({"tokens": option.method} if option.axis == "tokens" else
                            {option.axis: option.method})).to_json())
  return {**option._asdict(), "method": tree[option.axis]}


def _option_from_dict(tree: Mapping) -> Option:
  plan = Plan.from_dict({tree["axis"]: tree["method"]})
  return Option(**{**tree, "method": getattr(plan, tree["axis"])})
