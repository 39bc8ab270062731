"""The keys of a config, with their defaults and allowed values, and the checks of a config.

An absent key has its default, so that a new key does not break runs that began before it existed.
Methods define keys of their own (weights of their losses, their phases), which are allowed in a
config whose plan has the method.
"""
import difflib
import json
import math
import re
from collections.abc import Mapping

from ml_collections import ConfigDict

from vitcompact.export import FORMATS
from vitcompact.methods import METHODS, protocol
from vitcompact.plan import Plan
from vitcompact.settings import Setting, weight

OPTIMIZERS = ("adamw", "muon", "sgd")
SCHEDULES = ("step", "epoch", "late_epoch", "after_warmup")
PATCH_ERRORS = ("square", "divergence")
STEPS = 2 ** 31 - 1   # steps are counted in 32 bits

KEYS = {
    "seed": Setting(0, low=0, high=2 ** 63 - 1),
    "init_from": Setting(""),        # weights to start from, a file or a name (docs/weights.md);
                                     # dense ones are compacted first
    "total_steps": Setting(1000, low=1, high=STEPS, unit="of steps"),
    "batch_size": Setting(64, low=1, unit="of images"),   # over all devices and microbatches
    "accumulate": Setting(1, low=1, unit="of microbatches"),
    "eval_batch_size": Setting(64, low=1, high=2 ** 16, unit="of images"),
    "checkpoint_every": Setting(1000, low=1, high=STEPS, unit="of steps"),
    "keep_last": Setting(2, low=1, unit="of checkpoints"),   # and the best on val
    "log_every": Setting(50, low=1, unit="of steps"),
    "ema_half_life": Setting(0.0, low=0),   # as a fraction of the run; 0: no averages
    "eval_params": Setting("raw", choices=("raw", "ema")),
    "data.name": Setting("digits"),
    "data.augment": Setting("none"),
    "data.workers": Setting(0, low=0, unit="of processes"),   # 0: threads
    "data.erase": Setting(0.0, low=0, high=1),                # probability
    "data.smoothing": Setting(0.0, low=0, below=1),
    "data.mixup": Setting(0.0, low=0),                        # alpha
    "data.cutmix": Setting(0.0, low=0),                       # alpha
    "data.eval_fit": Setting("crop", choices=("crop", "warp")),
    "data.eval_crop": Setting(0.0, low=0, high=1),            # 0: the model's own
    "data.replicas": Setting(1, low=1),     # of the recipe, not of the hardware: mixing groups
    "data.repeats": Setting(1, low=1),      # how many times in a row an image is shown
    "data.on_bad": Setting("stop", choices=("stop", "skip")),
    "data.max_bad": Setting(0, low=0, unit="of records"),
    "optim.name": Setting("adamw", choices=OPTIMIZERS),
    "optim.schedule": Setting("step", choices=SCHEDULES),
    "optim.epoch_steps": Setting(1, low=1, unit="of steps"),
    "optim.learning_rate": Setting(1e-3, low=0),              # the peak
    "optim.warmup_steps": Setting(0, low=0, unit="of steps"),
    "optim.warmup_learning_rate": Setting(1e-6, low=0),       # at step 0
    "optim.final_learning_rate": Setting(1e-5, low=0),
    "optim.cooldown_steps": Setting(0, low=0, unit="of steps"),
    "optim.weight_decay": Setting(0.05, low=0),
    "optim.b1": Setting(0.9, low=0, below=1),
    "optim.b2": Setting(0.999, low=0, below=1),
    "optim.eps": Setting(1e-8, above=0),
    "optim.clip_norm": Setting(0.0, low=0),                   # 0: no clipping
    "optim.adaptive_clip": Setting(0.0, low=0),               # 0: no clipping
    "optim.skip_nonfinite": Setting(0, low=0, unit="of steps"),   # 0 stops at the first NaN
    "optim.rates": Setting(()),     # (pattern, factor of the rate, first step); first match counts
    "loss.labels": weight(1.0),
    "loss.patch_labels": weight(1.0),       # only for models with patch logits
    "loss.hard": weight(),
    "loss.soft": weight(),
    "loss.temperature": Setting(1.0, above=0),
    "loss.logits": weight(),
    "loss.patches": weight(),
    "loss.patch_error": Setting("square", choices=PATCH_ERRORS),
    "loss.attention": weight(),
    "export": Setting(""),    # formats of `vc.export` to write at the end, separated by commas
    "keep_start": Setting(False),   # with init_from: keep the initial weights if they are better
    "compact.macs": Setting(0.0, low=0, high=1),      # share of the dense model's: a plan is chosen
    "compact.params": Setting(0.0, low=0, high=1),    # from data; all 0: config.plan is used
    "compact.speedup": Setting(0.0, low=0),           # over the dense model
    "compact.latency_ms": Setting(0.0, low=0, unit="of milliseconds"),
    "compact.latency_batch": Setting(1, low=1, unit="of images"),   # for these two
    "compact.images": Setting(512, low=8, unit="of images"),
    "compact.sensitivity": Setting("quick", choices=("quick", "full")),
    "compact.distil": Setting(True),        # train the compacted model for total_steps
    "compact.dense_steps": Setting(0, low=0, unit="of steps"),    # if init_from is empty
    "compact.dense_learning_rate": Setting(1e-3, low=0),
    "teacher.file": Setting(""),
    "teacher.name": Setting(""),            # "": the dense form of the model itself
    "mesh.data": Setting(-1, low=-1, unit="of devices"),      # -1: all remaining devices
    "mesh.fsdp": Setting(1, low=1, unit="of devices"),
    "mesh.tensor": Setting(1, low=1, unit="of devices"),
}
# A run may be resumed with other values of these: they do not change what is computed, except for
# on_bad, so that a run that stopped at a bad record may be resumed and skip it.
FREE = ("mesh.data", "mesh.fsdp", "mesh.tensor", "data.workers", "data.on_bad", "data.max_bad",
        "log_every", "checkpoint_every", "eval_batch_size", "keep_last", "optim.skip_nonfinite",
        "export")


def flat(config: Mapping) -> dict:
  """{"optim.b1": 0.9, ...}; a plan stays one value."""
  out = {}
  for key, value in config.items():
    if isinstance(value, (ConfigDict, dict)) and key != "plan":
      out |= {f"{key}.{inner}": leaf for inner, leaf in flat(value).items()}
    else:
      out[key] = value
  return out


def empty(config: Mapping, prefix: str = "") -> list[str]:
  """The keys whose value is an empty section, which `flat` leaves out."""
  keys = []
  for key, value in config.items():
    if isinstance(value, (ConfigDict, dict)) and prefix + key != "plan":
      keys += empty(value, f"{prefix}{key}.") if len(value) else [prefix + key]
  return keys


def nested(values: Mapping) -> dict:
  """The inverse of `flat`."""
  tree = {}
  for key, value in values.items():
    *sections, name = key.split(".")
    section = tree
    for part in sections:
      section = section.setdefault(part, {})
    section[name] = value
  return tree


def plain(value):
  """A config's value without ml_collections classes."""
  return value.to_dict() if isinstance(value, ConfigDict) else value


def method_settings(methods) -> dict[str, Setting]:
  """The keys of methods, or of classes of methods."""
  return {key: setting for method in methods for key, setting in protocol.settings(method).items()}


def all_settings() -> dict[str, Setting]:
  """The keys of all methods in METHODS."""
  return method_settings(kind for kinds in METHODS.values() for kind in kinds.values())


def complete(config: Mapping) -> ConfigDict:
  """A checked config with every key: absent keys get their defaults, and keys of methods that are
  not in the plan are dropped. Its plan is JSON text.

  Raises ValueError for unknown keys, for non-default settings of methods that are not in the plan,
  and for values that a key cannot have.
  """
  given, plan = renamed(flat(config)), Plan.parse(plain(config.get("plan", "")))
  known, optional = {**KEYS, **method_settings(plan.methods())}, all_settings()
  out = {"plan": plan.to_json()}
  given |= {key: {} for key in empty(config) if key in known or key in optional}
  for key, value in given.items():
    if key in known or key == "plan" or key.startswith("model."):
      continue
    if key not in optional:
      close = difflib.get_close_matches(key, [*known, *optional]) or sorted(known)[:3]
      raise ValueError(f"unknown key config.{key}; did you mean {', '.join(close)}?")
    optional[key].check(key, value)
    if value != optional[key].default:
      raise ValueError(f"config.{key}={value!r} is a setting of {' or '.join(owners(key))}, which "
                       f"the plan does not have (it has {plan.to_json()}): leave it out, or add it")
  for key, setting in known.items():
    out[key] = given.get(key, setting.default)
    setting.check(key, out[key])
  out |= {key: value for key, value in given.items() if key.startswith("model.")}
  for key in ("model.name", "model.image_size"):
    if key not in out:
      raise ValueError(f"missing config.{key}")
  complete_config = ConfigDict(nested(out))
  check(complete_config)
  return complete_config


def owners(key: str) -> list[str]:
  """The names of the methods that have a key."""
  return [kind.__name__ for kinds in METHODS.values() for kind in kinds.values()
          if key in protocol.settings(kind)]


def check(config: ConfigDict):
  """Raises ValueError for combinations of values that do not go together."""
  if config.eval_params == "ema" and not config.ema_half_life:
    raise ValueError("config.eval_params='ema' needs averages: set config.ema_half_life > 0")
  if config.batch_size % config.accumulate:
    raise ValueError(f"config.batch_size={config.batch_size} does not divide into "
                     f"config.accumulate={config.accumulate} microbatches")
  mixes = config.data.mixup or config.data.cutmix
  if mixes and config.data.replicas % config.accumulate:
    raise ValueError(f"config.data.replicas={config.data.replicas} must be a multiple of "
                     f"config.accumulate={config.accumulate}: images are mixed within a microbatch")
  if config.mesh.data == 0:
    raise ValueError("config.mesh.data=0: must be a number of devices, or -1 for the rest")
  check_ramp(config, config.total_steps, f"config.total_steps={config.total_steps}")
  if unknown := [name for name in formats_of(config) if name not in FORMATS]:
    raise ValueError(f"config.export={config.export!r}: must be formats from {', '.join(FORMATS)}; "
                     f"{unknown[0]!r} is not one of them")
  check_rates(config.optim.rates)
  for key, path in {"init_from": config.init_from, "teacher.file": config.teacher.file,
                    "data.name": config.data.name}.items():
    check_local(f"config.{key}", path)


def formats_of(config) -> list[str]:
  """The formats to which the deployed model is exported."""
  return [name.strip() for name in config.export.split(",") if name.strip()]


def check_ramp(config, steps: int, name: str):
  """Raises ValueError if warm-up and cool-down do not fit into the steps of a phase."""
  optim = config.optim
  if optim.warmup_steps + optim.cooldown_steps > steps:
    raise ValueError(f"config.optim.warmup_steps={optim.warmup_steps} and config.optim."
                     f"cooldown_steps={optim.cooldown_steps} are longer than {name}: lower them")


def check_rates(rates):
  """Raises ValueError for rates that are not (pattern, factor, first step)."""
  for rate in rates:
    try:
      pattern, factor, first = rate
      re.compile(pattern)
    except (TypeError, ValueError, re.error) as error:
      raise ValueError(f"config.optim.rates: {rate!r} must be (pattern, factor, first step) with a "
                       f"regular expression: {error}") from None
    numeric = isinstance(factor, (int, float)) and math.isfinite(factor) and factor >= 0
    if not numeric or not isinstance(first, int) or first < 0:
      raise ValueError(f"config.optim.rates: {rate!r} must be (pattern, factor, first step), with "
                       "a factor of at least 0 and a whole number of steps")


def check_local(name: str, path: str):
  """Raises ValueError for the address of a bucket: all files of a run are on mounted disks."""
  if re.search(r"(^|:)[a-z][a-z0-9+.-]*://", str(path)):
    raise ValueError(f"{name}={path}: must be a path on a mounted disk, not the address of a "
                     "bucket; mount it (docs/scale.md), and give the path")


def differences(old: Mapping, new: Mapping, free=FREE) -> list[str]:
  """One line for each key, except the free ones, in which two flat configs differ. An absent key
  has its default; settings of methods that are in neither plan are ignored."""
  return [f"{key} was {before!r} and is now {after!r}"
          for key, (before, after) in changes(old, new).items() if key not in free]


def changes(old: Mapping, new: Mapping) -> dict[str, tuple]:
  """{key: (old value, new value)} of the keys in which two flat configs differ, see above."""
  plans = [Plan.parse(plain(config.get("plan", ""))) for config in (old, new)]
  optional, known = all_settings(), {**KEYS, **method_settings(
      method for plan in plans for method in plan.methods())}
  values = [{**{key: _comparable(setting.default) for key, setting in known.items()},
             **{key: _comparable(value) for key, value in config.items()
                if key in known or key not in optional}, "plan": plan.to_json()}
            for config, plan in zip((old, new), plans, strict=True)]
  pairs = {key: tuple(side.get(key, "nothing") for side in values)
           for key in sorted(values[0].keys() | values[1].keys())}
  return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _comparable(value):
  """Converts tuples to lists, as JSON has no tuples."""
  return [_comparable(item) for item in value] if isinstance(value, (list, tuple)) else value


def from_text(text: str) -> dict:
  """A flat config from the JSON of a workdir's config.json; ValueError for other text."""
  try:
    tree = json.loads(text)
  except RecursionError as error:
    raise ValueError(str(error)) from None
  if not isinstance(tree, dict):
    raise ValueError(f"it has a {type(tree).__name__}, not an object")
  return renamed(flat(tree))


def renamed(values: dict) -> dict:
  """A flat config with the current names of its keys."""
  names = {setting.formerly: key for key, setting in all_settings().items() if setting.formerly}
  return {names.get(key, key): value for key, value in values.items()}
