"""What a config may hold: every key with its default and the values that it may have.

A key that is absent has its default, so that a new key breaks no run that was begun before. Keys of
methods (their losses' weights, their phases) are the methods' own, and count where a plan has them.
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
STEPS = 2 ** 31 - 1   # a step is counted in 32 bits

KEYS = {
    "seed": Setting(0, low=0, high=2 ** 63 - 1),
    "init_from": Setting(""),        # weights to start from, a file or a name (docs/weights.md);
                                     # dense ones are made compact first
    "total_steps": Setting(1000, low=1, high=STEPS, unit="of steps"),
    "batch_size": Setting(64, low=1, unit="of images"),   # of all devices and microbatches together
    "accumulate": Setting(1, low=1, unit="of microbatches"),
    "eval_batch_size": Setting(64, low=1, high=2 ** 16, unit="of images"),
    "checkpoint_every": Setting(1000, low=1, high=STEPS, unit="of steps"),
    "keep_last": Setting(2, low=1, unit="of checkpoints"),   # besides the best on val
    "log_every": Setting(50, low=1, unit="of steps"),
    "ema_half_life": Setting(0.0, low=0),   # of the run; 0: no averages
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
    "data.replicas": Setting(1, low=1),     # of the recipe, not of the hardware: each mixes alone
    "data.repeats": Setting(1, low=1),      # showings of an image in a row
    "data.on_bad": Setting("stop", choices=("stop", "skip")),
    "data.max_bad": Setting(0, low=0, unit="of records"),
    "optim.name": Setting("adamw", choices=OPTIMIZERS),
    "optim.schedule": Setting("step", choices=SCHEDULES),
    "optim.epoch_steps": Setting(1, low=1, unit="of steps"),
    "optim.learning_rate": Setting(1e-3, low=0),              # the peak
    "optim.warmup_steps": Setting(0, low=0, unit="of steps"),
    "optim.warmup_learning_rate": Setting(1e-6, low=0),       # of step 0
    "optim.final_learning_rate": Setting(1e-5, low=0),
    "optim.cooldown_steps": Setting(0, low=0, unit="of steps"),
    "optim.weight_decay": Setting(0.05, low=0),
    "optim.b1": Setting(0.9, low=0, below=1),
    "optim.b2": Setting(0.999, low=0, below=1),
    "optim.eps": Setting(1e-8, above=0),
    "optim.clip_norm": Setting(0.0, low=0),                   # 0: no clipping
    "optim.adaptive_clip": Setting(0.0, low=0),               # likewise
    "optim.skip_nonfinite": Setting(0, low=0, unit="of steps"),   # 0 stops at the first NaN
    "optim.rates": Setting(()),     # (pattern, factor of the rate, first step); the first match
    "loss.labels": weight(1.0),
    "loss.patch_labels": weight(1.0),       # of models with patch logits
    "loss.hard": weight(),
    "loss.soft": weight(),
    "loss.temperature": Setting(1.0, above=0),
    "loss.logits": weight(),
    "loss.patches": weight(),
    "loss.patch_error": Setting("square", choices=PATCH_ERRORS),
    "loss.attention": weight(),
    "export": Setting(""),    # formats of `vc.export` that a run ends with, commas between
    "keep_start": Setting(False),   # of a run with init_from: end with its start if that is better
    "compact.macs": Setting(0.0, low=0, high=1),      # share of the dense model's for which a plan
    "compact.params": Setting(0.0, low=0, high=1),    # is chosen from data; 0: the plan as it is
    "compact.images": Setting(512, low=8, unit="of images"),
    "compact.sensitivity": Setting("quick", choices=("quick", "full")),
    "compact.distil": Setting(True),        # then, for total_steps
    "compact.dense_steps": Setting(0, low=0, unit="of steps"),    # where init_from is empty
    "compact.dense_learning_rate": Setting(1e-3, low=0),
    "teacher.file": Setting(""),
    "teacher.name": Setting(""),            # "": the dense form of the model itself
    "mesh.data": Setting(-1, low=-1, unit="of devices"),      # -1: all the rest
    "mesh.fsdp": Setting(1, low=1, unit="of devices"),
    "mesh.tensor": Setting(1, low=1, unit="of devices"),
}
# These change where and how often, not what: a run may be resumed with others.
# on_bad too: a run that stopped at a bad record may go on passing it over.
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
  """The keys whose value is an empty section, of which `flat` has none."""
  keys = []
  for key, value in config.items():
    if isinstance(value, (ConfigDict, dict)) and prefix + key != "plan":
      keys += empty(value, f"{prefix}{key}.") if len(value) else [prefix + key]
  return keys


def nested(values: Mapping) -> dict:
  """Inverse of `flat`."""
  tree = {}
  for key, value in values.items():
    *sections, name = key.split(".")
    section = tree
    for part in sections:
      section = section.setdefault(part, {})
    section[name] = value
  return tree


def plain(value):
  """A config's value without the classes of ml_collections."""
  return value.to_dict() if isinstance(value, ConfigDict) else value


def method_settings(methods) -> dict[str, Setting]:
  """The keys of these methods, or classes of them."""
  return {key: setting for method in methods for key, setting in protocol.settings(method).items()}


def all_settings() -> dict[str, Setting]:
  """Every key of every method that is listed."""
  return method_settings(kind for kinds in METHODS.values() for kind in kinds.values())


def complete(config: Mapping) -> ConfigDict:
  """A checked config in which every key stands: those that are absent have their defaults, and
  those of methods that the plan does not have are gone. Its plan is JSON text.

  Raises ValueError, one line, for keys that are unknown or of other methods, and for values that a
  key cannot have.
  """
  given, plan = flat(config), Plan.parse(plain(config.get("plan", "")))
  own, others = {**KEYS, **method_settings(plan.methods())}, all_settings()
  out = {"plan": plan.to_json()}
  given |= {key: {} for key in empty(config) if key in own or key in others}
  for key, value in given.items():
    if key in own or key == "plan" or key.startswith("model."):
      continue
    if key not in others:
      close = difflib.get_close_matches(key, [*own, *others]) or sorted(own)[:3]
      raise ValueError(f"unknown key config.{key}; did you mean {', '.join(close)}?")
    others[key].check(key, value)
    if value != others[key].default:
      raise ValueError(f"config.{key}={value!r} is a setting of {' or '.join(owners(key))}, which "
                       f"the plan does not have (it has {plan.to_json()}): leave it out, or add it")
  for key, setting in own.items():
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
  """Names of the methods that a key belongs to."""
  return [kind.__name__ for kinds in METHODS.values() for kind in kinds.values()
          if key in protocol.settings(kind)]


def check(config: ConfigDict):
  """Raises ValueError where values, each of which may be, do not go together."""
  if config.eval_params == "ema" and not config.ema_half_life:
    raise ValueError("config.eval_params='ema' needs averages: set config.ema_half_life > 0")
  if config.batch_size % config.accumulate:
    raise ValueError(f"config.batch_size={config.batch_size} does not divide into "
                     f"config.accumulate={config.accumulate} microbatches")
  mixes = config.data.mixup or config.data.cutmix
  if mixes and config.data.replicas % config.accumulate:
    raise ValueError(f"config.data.replicas={config.data.replicas} must be a multiple of "
                     f"config.accumulate={config.accumulate}: a microbatch mixes within itself")
  if config.mesh.data == 0:
    raise ValueError("config.mesh.data=0: must be a number of devices, or -1 for all the rest")
  check_ramp(config, config.total_steps, f"config.total_steps={config.total_steps}")
  if unknown := [name for name in formats_of(config) if name not in FORMATS]:
    raise ValueError(f"config.export={config.export!r}: must be formats of {', '.join(FORMATS)}, "
                     f"and {unknown[0]!r} is none")
  check_rates(config.optim.rates)
  for key, path in {"init_from": config.init_from, "teacher.file": config.teacher.file,
                    "data.name": config.data.name}.items():
    check_local(f"config.{key}", path)


def formats_of(config) -> list[str]:
  """What the deployed model is exported to."""
  return [name.strip() for name in config.export.split(",") if name.strip()]


def check_ramp(config, steps: int, name: str):
  """Refuses a warm-up and a cool-down that do not fit into the steps of a phase."""
  optim = config.optim
  if optim.warmup_steps + optim.cooldown_steps > steps:
    raise ValueError(f"config.optim.warmup_steps={optim.warmup_steps} and config.optim."
                     f"cooldown_steps={optim.cooldown_steps} are longer than {name}: lower them")


def check_rates(rates):
  """Refuses what are no (pattern, factor, first step)."""
  for rate in rates:
    try:
      pattern, factor, first = rate
      re.compile(pattern)
    except (TypeError, ValueError, re.error) as error:
      raise ValueError(f"config.optim.rates: {rate!r} must be (pattern, factor, first step) with a "
                       f"regular expression: {error}") from None
    numeric = isinstance(factor, (int, float)) and math.isfinite(factor) and factor >= 0
    if not numeric or not isinstance(first, int) or first < 0:
      raise ValueError(f"config.optim.rates: {rate!r} must be (pattern, factor, first step), the "
                       "factor a number of at least 0 and the step a whole one")


def check_local(name: str, path: str):
  """Refuses the address of a bucket: all files of a run are on disks that the machine mounts."""
  if re.search(r"(^|:)[a-z][a-z0-9+.-]*://", str(path)):
    raise ValueError(f"{name}={path}: only paths of mounted disks are read and written, no "
                     "addresses of buckets; mount it (docs/scale.md), and give the path")


def differences(old: Mapping, new: Mapping, free=FREE) -> list[str]:
  """One line for each key, except the free ones, by which two flat configs differ; a key that one
  of them lacks has its default there. Settings of methods that neither plan has do not count."""
  return [f"{key} is {there!r} there and {here!r} here"
          for key, (there, here) in changes(old, new).items() if key not in free]


def changes(old: Mapping, new: Mapping) -> dict[str, tuple]:
  """{key: (old value, new value)} of the keys by which two flat configs differ, see above."""
  plans = [Plan.parse(plain(config.get("plan", ""))) for config in (old, new)]
  others, own = all_settings(), {**KEYS, **method_settings(
      method for plan in plans for method in plan.methods())}
  values = [{**{key: _comparable(setting.default) for key, setting in own.items()},
             **{key: _comparable(value) for key, value in config.items()
                if key in own or key not in others}, "plan": plan.to_json()}
            for config, plan in zip((old, new), plans, strict=True)]
  pairs = {key: tuple(side.get(key, "nothing") for side in values)
           for key in sorted(values[0].keys() | values[1].keys())}
  return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _comparable(value):
  """Lists and tuples alike, as JSON has no tuples."""
  return [_comparable(item) for item in value] if isinstance(value, (list, tuple)) else value


def from_text(text: str) -> dict:
  """A flat config from the JSON of a workdir's config.json; ValueError where it is none."""
  try:
    tree = json.loads(text)
  except RecursionError as error:
    raise ValueError(str(error)) from None
  if not isinstance(tree, dict):
    raise ValueError(f"it holds a {type(tree).__name__}, not an object")
  return flat(tree)
