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
from vitcompact.plan import BY_BLOCK, Plan, describe_method
from vitcompact.planner import MIN_KL, Choice, Costs, Knapsack, combinations

GOALS = ("macs", "params", "speedup", "latency_ms")
NO_OTHER = "no other plan reaches the goal"


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
  use here and still reach the goal; more: how much the KL would grow then (infinity: no other plan
  reaches it).
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
  options' KLs, each for that option alone, in nats per image; unit: name of that measure; missed:
  the goal that the plan does not reach, such as "macs=0.7", or ""."""
  plan: Plan
  macs: float
  params: float
  kl: float
  steps: tuple[Step, ...]
  unit: str = "KL"
  missed: str = ""

  def __str__(self) -> str:
    missed = f"; this plan does not reach {self.missed}" if self.missed else ""
    lines = [f"MACs {self.macs:.1%}, parameters {self.params:.1%} of the dense model; predicted "
             f"{self.unit} {self.kl:.2g}{missed}"]
    for step in self.steps:
      instead = f"instead {step.runner_up} ({step.more:+.2g})"
      lines.append(f"{step.block}: {step.method}: saves {step.saves:.1%} of the MACs for "
                   f"{self.unit} {step.kl:.2g}{'' if step.measured else ' (inferred)'}; "
                   f"{instead if math.isfinite(step.more) else step.runner_up}")
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
    what, share = self._quantity(goal, target, batch)
    best, most = None, 1.0
    for reducer, kl in self._reducers(axes):
      if best is not None and kl >= best[0] - 1e-9:   # the reducer alone loses as much
        break
      search = self._search(what, reducer, axes, batch)
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

  def explain(self, plan: Plan, batch: int = 1, **goal: float) -> Explanation:
    """What a plan is predicted to cost; the plan may be this report's or edited by hand.

    goal, batch: as of `plan`; the runners-up reach this goal too (default: the plan's own MACs).
    """
    axes = (*BY_BLOCK, "tokens")
    self._check(axes)
    self.costs.model.clone(plan=plan, deploy=False).check()
    by_macs = self._search("macs", plan.tokens, axes)
    search, picks, missed = by_macs, by_macs.picks(plan), ""
    need = search.knapsack.saved(picks)
    if goal:
      name, target = self._goal(**goal)
      what, share = self._quantity(name, target, batch)
      search = self._search(what, plan.tokens, axes, batch)
      own, need = search.knapsack.saved(picks), (1 - share - search.saved) * search.total
      if need > own + 1e-9 * search.total:
        missed, need = f"{name}={target:g}", own
    reducer_kl, inferred = self._kl_of(plan.tokens)
    steps, kl = [], reducer_kl
    if plan.tokens is not None:
      steps.append(Step("all", describe_method(plan.tokens), by_macs.saved, kl, not inferred,
                        *self._best_other_reducer(plan.tokens, picks, search, need)))
    for name, i in picks.items():
      choice = by_macs.choices[name][i]
      kl += choice.kl
      if choice.options:
        steps.append(Step(name, _describe_choice(choice), choice.saved / by_macs.total, choice.kl,
                          all(option.measured for option in choice.options.values()),
                          *search.runner_up(picks, name, need)))
    return Explanation(plan, *self.shares(plan), kl, tuple(steps), self.unit, missed)

  def shares(self, plan: Plan) -> tuple[float, float]:
    """(MACs, parameters) of a plan as shares of the dense model's, deployed, for any legal plan."""
    small = count(self.costs.model.clone(plan=plan))
    return small.macs / self.costs.dense.macs, small.params / self.costs.dense.params

  @property
  def unit(self) -> str:
    """Name of what `kl` holds: "KL" of logits, or "error" of features."""
    return "KL" if self.fields.get("num_classes", 1) else "error"

  @functools.cached_property
  def costs(self) -> Costs:
    return Costs(create_model(self.model, **self.fields))

  def _quantity(self, goal: str, target: float, batch: int) -> tuple[str, float]:
    """(what a goal limits: "macs", "params" or "seconds", to which share of the dense model's)."""
    if goal in ("macs", "params"):
      return goal, target
    dense_ms = 1e3 * self.times(batch).dense
    return "seconds", 1 / target if goal == "speedup" else target / dense_ms

  def _goal(self, **goals) -> tuple[str, float]:
    given = {name: value for name, value in goals.items() if value is not None}
    if len(given) != 1 or not given.keys() <= set(GOALS):
      raise ValueError(f"plan({', '.join(f'{k}={v}' for k, v in given.items())}): give one of "
                       f"{', '.join(GOALS)}")
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
    known = (*BY_BLOCK, "tokens")
    if isinstance(axes, str) or not axes or not set(axes) <= set(known):
      raise ValueError(f"axes={axes!r}: must be a tuple of one or more of {', '.join(known)}")

  def _reducers(self, axes):
    """Yields (reducer, its KL): no reducer first, then by increasing KL."""
    yield None, 0.0
    if "tokens" in axes:
      for option in sorted(self.tokens, key=lambda option: option.kl):
        yield option.method, option.kl

  def _kl_of(self, reducer) -> tuple[float, bool]:
    """(KL, whether it was inferred) of a reducer; (0, False) for None."""
    if reducer is None:
      return 0.0, False
    known = {option.method: (option.kl, not option.measured) for option in self.tokens}
    if reducer not in known:
      raise ValueError(f"this report has not tried {describe_method(reducer)}; it has tried "
                       f"{', '.join(map(describe_method, known)) or 'no reducer'}")
    return known[reducer]

  def _best_other_reducer(self, reducer, picks, search, need) -> tuple[str, float]:
    """(name of the best other reducer or "no reducer", how much the KL grows with it), if the other
    blocks save `need` with this one."""
    need += search.saved * search.total
    current, best = self._kl_of(reducer)[0] + search.kl(picks), None
    for other, kl in self._reducers(("tokens",)):
      if other == reducer:
        continue
      if best is not None and kl >= best[1]:
        break
      other_search = self._search(search.what, other, (*BY_BLOCK, "tokens"), search.batch)
      found = other_search.knapsack.best(need - other_search.saved * other_search.total)
      if found is not None and (best is None or found[1] + kl < best[1]):
        best = ("no reducer" if other is None else describe_method(other)), found[1] + kl
    if best is None:
      return NO_OTHER, math.inf
    return best[0], best[1] - current

  @functools.cached_property
  def _searches(self) -> dict:
    return {}

  @functools.cached_property
  def _times(self) -> dict:
    return {}

  def _search(self, what: str, reducer, axes, batch: int = 1) -> "Search":
    key = what, reducer, tuple(axes), batch
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
      if not isinstance(tree, dict):
        raise ValueError("it is not a JSON object")
      if changed := sorted(known ^ set(tree)):
        raise ValueError(f"it {'lacks' if changed[0] in known else 'has an unknown'} key "
                         f"{changed[0]!r}")
      tree["blocks"] = tuple({**row, "options": tuple(map(_option_from_dict, row["options"]))}
                             for row in tree["blocks"])
      tree["tokens"] = tuple(map(_option_from_dict, tree["tokens"]))
      report = cls(**tree)
      report._check_contents()
      return report
    except KeyError as error:
      raise ValueError("not a report of vitcompact.measure: a block or an option lacks key "
                       f"{error}; measure again") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
      raise ValueError(f"not a report of vitcompact.measure: {error}; measure again") from None

  def _check_contents(self):
    """Raises ValueError if a report has contents that `measure` could not have written."""
    from vitcompact.measure import SENSITIVITIES

    model = create_model(self.model, **self.fields)
    if [row["name"] for row in self.blocks] != list(model.compactable_blocks()):
      raise ValueError(f"its blocks are not those of {self.model}")
    if self.sensitivity not in SENSITIVITIES:
      raise ValueError(f"sensitivity={self.sensitivity!r}")
    for row in self.blocks:
      dict(row["tables"]), int(row["tokens"])
    for option in (*self.tokens, *(option for row in self.blocks for option in row["options"])):
      unknown = option.kl is None and self.sensitivity == "none"
      for name, fits in (("kl", unknown or _is_size(option.kl)),
                         ("error", option.error is None or _is_size(option.error)),
                         ("measured", isinstance(option.measured, bool))):
        if not fits:
          raise ValueError(f"{name}={getattr(option, name)!r} of {describe_method(option.method)}")
    for name in ("params", "macs", "images"):
      if not isinstance(value := getattr(self, name), int) or value is True or value <= 0:
        raise ValueError(f"{name}={value!r}: must be a whole number above 0")
    for name in ("digest", "images_digest", "vitcompact"):
      if not isinstance(value := getattr(self, name), str):
        raise ValueError(f"{name}={value!r}: must be text")

  def save(self, path, *, force: bool = False) -> pathlib.Path:
    """Writes report.json and report.html into a folder, each atomically. ValueError if the folder
    has a report, unless `force`."""
    from vitcompact.draw.report import page

    folder = pathlib.Path(path)
    if (folder / "report.json").exists() and not force:
      raise ValueError(f"{folder / 'report.json'} exists; give another folder, or ask to overwrite "
                       "it with force")
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
    if (self.macs, self.params) != (self.costs.dense.macs, self.costs.dense.params):
      raise ValueError(f"this report says that the dense model has {self.macs} MACs and "
                       f"{self.params} parameters, but it has {self.costs.dense.macs} and "
                       f"{self.costs.dense.params}; measure again")


class Search:
  """The search for the best plan of one report with one reducer."""

  def __init__(self, report: Report, what: str, reducer, axes, batch: int):
    costs, timed = report.costs, what == "seconds"
    self.what, self.reducer, self.report, self.batch = what, reducer, report, batch
    self.times = report.times(batch) if timed else None
    self.total = self.times.dense if timed else getattr(costs.dense, what)
    self.saved, lengths = 0.0, {}
    model = costs.model
    if reducer is not None:
      small = model.clone(plan=Plan(tokens=reducer))
      now = self.times.total(reducer) if timed else getattr(count(small), what)
      self.saved = 1 - now / self.total
      lengths = {name: module.site.tokens_left
                 for name, module in small.compactable_blocks().items()}
    self.choices = {row["name"]: self._choices(costs, row, axes, lengths.get(row["name"]))
                    for row in report.blocks}
    self.numbers = {name: module.site.block for name, module in model.compactable_blocks().items()}
    self.knapsack = Knapsack(self.choices, self.total)

  def _choices(self, costs, row, axes, tokens) -> list[Choice]:
    site = costs.model.compactable_blocks()[row["name"]].site
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
      gain = {"macs": macs, "params": params}.get(self.what)
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
    found, blocks = {}, self.report.costs.model.compactable_blocks()
    for name, choices in self.choices.items():
      site = blocks[name].site
      planned = {axis: method and protocol.explicit(method, site)
                 for axis, method in plan.at(site)._asdict().items() if axis != "tokens"}
      for i, choice in enumerate(choices):
        methods = {axis: option.method for axis, option in choice.options.items()}
        if planned == {axis: methods.get(axis) for axis in planned}:
          found[name] = i
          break
      else:
        methods = ", ".join(describe_method(method) for method in planned.values()
                            if method is not None)
        raise ValueError(f"{name}: this report has not tried {methods}; edit the plan to options "
                         "that it lists, or measure again")
    return found

  def runner_up(self, picks: dict[str, int], name: str, need: float) -> tuple[str, float]:
    """(what the best plan without this choice would use in a block, how much the KL grows) if the
    blocks save `need` together. The growth is negative if a plan made by hand is not the best."""
    other = self.knapsack.best(need, forbidden=(name, picks[name]))
    if other is None:
      return NO_OTHER, math.inf
    choice, growth = self.choices[name][other[0][name]], other[1] - self.kl(picks)
    return _describe_choice(choice) or "dense", 0.0 if abs(growth) < MIN_KL else growth

  def kl(self, picks: dict[str, int]) -> float:
    return sum(self.choices[name][i].kl for name, i in picks.items())


def _is_size(value) -> bool:
  """Whether a value from a file is a finite number of at least 0."""
  number = isinstance(value, int | float) and not isinstance(value, bool)
  return number and 0 <= value < math.inf


def _describe_choice(choice: Choice) -> str:
  return " + ".join(describe_method(option.method) for option in choice.options.values())


def _option_to_dict(option: Option) -> dict:
  tree = json.loads(Plan(**({"tokens": option.method} if option.axis == "tokens" else
                            {option.axis: option.method})).to_json())
  return {**option._asdict(), "method": tree[option.axis]}


def _option_from_dict(tree: Mapping) -> Option:
  plan = Plan.from_dict({tree["axis"]: tree["method"]})
  return Option(**{**tree, "method": getattr(plan, tree["axis"])})
