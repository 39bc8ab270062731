"""What a config must hold. Checked whole before a run touches a device or a file."""
import difflib

from ml_collections import ConfigDict

from vitcompact.train import objective, optim

POSITIVE = ("total_steps", "batch_size", "accumulate", "eval_batch_size", "checkpoint_every",
            "keep_last", "log_every")
KEYS = {
    "": {*POSITIVE, "seed", "init_from", "ema_half_life", "eval_params", "model", "plan", "data",
         "optim", "mesh", "loss", "teacher", "reconstruct", "keep_warmup"},
    "data": {"name", "augment", "workers", "erase", "smoothing", "mixup", "cutmix", "eval_fit",
             "eval_crop", "replicas", "repeats", "on_bad", "max_bad"},
    "optim": {"name", "schedule", "epoch_steps", "learning_rate", "warmup_steps",
              "warmup_learning_rate", "final_learning_rate", "cooldown_steps", "weight_decay", "b1",
              "b2", "eps", "clip_norm", "skip_nonfinite", "rates"},
    "loss": {"labels", "patch_labels", "hard", "soft", "temperature", "logits", "patches",
             "patch_error", "kept_ratio", "consistency", "companion_r"},
    "teacher": {"file", "name"},
    "reconstruct": {"steps", "weight", "learning_rate", "warmup_steps", "warmup_learning_rate",
                    "final_learning_rate"},
    "keep_warmup": {"start", "steps"},
    "mesh": {"data", "fsdp", "tensor"},
}
# These change where and how often, not what: a run may be resumed with others.
# on_bad too: a run that stopped at a bad record may go on passing it over.
FREE = ("mesh.data", "mesh.fsdp", "mesh.tensor", "data.workers", "data.on_bad", "data.max_bad",
        "log_every", "eval_batch_size", "keep_last", "optim.skip_nonfinite")


def flat(config) -> dict:
  """{"optim.b1": 0.9, ...}."""
  out = {}
  for key, value in config.items():
    if isinstance(value, (ConfigDict, dict)):
      out |= {f"{key}.{inner}": leaf for inner, leaf in flat(value).items()}
    else:
      out[key] = value
  return out


def check_keys(config):
  """Refuses unknown keys, with the names that are close, and missing ones."""
  for section, known in KEYS.items():
    where = config[section] if section else config
    prefix = f"config.{section}." if section else "config."
    for key in set(where) - known:
      close = difflib.get_close_matches(key, known) or sorted(known)
      raise ValueError(f"unknown key {prefix}{key}; did you mean {', '.join(close)}?")
    if missing := sorted(known - set(where)):
      raise ValueError(f"missing {', '.join(prefix + key for key in missing)}; "
                       "configs/digits.py shows every key")
  for key in ("name", "image_size"):
    if key not in config.model:
      raise ValueError(f"missing config.model.{key}; configs/digits.py shows every key")


def check(config):
  """Refuses a config that cannot mean what it says."""
  check_keys(config)
  for key in POSITIVE:
    if config[key] < 1:
      raise ValueError(f"config.{key}={config[key]} must be at least 1")
  if config.eval_params not in ("raw", "ema"):
    raise ValueError(f"config.eval_params={config.eval_params!r} is neither 'raw' nor 'ema'")
  if config.data.eval_fit not in ("crop", "warp"):
    raise ValueError(f"config.data.eval_fit={config.data.eval_fit!r} is neither 'crop' nor 'warp', "
                     "which squeezes the whole image to the model's size")
  if config.ema_half_life < 0:
    raise ValueError(f"config.ema_half_life={config.ema_half_life} is a fraction of the run; "
                     "0 keeps no averages")
  if config.eval_params == "ema" and not config.ema_half_life:
    raise ValueError("config.eval_params='ema' needs averages: set config.ema_half_life > 0")
  for key, known in (("name", optim.OPTIMIZERS), ("schedule", optim.SCHEDULES)):
    if config.optim[key] not in known:
      raise ValueError(f"config.optim.{key}={config.optim[key]!r} is not one of {known}")
  for key in ("labels", "patch_labels", "hard", "soft", "logits", "patches", "kept_ratio",
              "consistency"):
    if config.loss[key] < 0:
      raise ValueError(f"config.loss.{key}={config.loss[key]} is a weight: 0 or more")
  if config.loss.temperature <= 0:
    raise ValueError(f"config.loss.temperature={config.loss.temperature} must be above 0")
  for key in ("start", "steps"):
    if config.keep_warmup[key] < 0:
      raise ValueError(f"config.keep_warmup.{key}={config.keep_warmup[key]} must be 0 or more")
  if config.loss.patch_error not in objective.PATCH_ERRORS:
    raise ValueError(f"config.loss.patch_error={config.loss.patch_error!r} is not one of "
                     f"{tuple(objective.PATCH_ERRORS)}")
  if config.batch_size % config.accumulate:
    raise ValueError(f"config.batch_size={config.batch_size} does not divide into "
                     f"config.accumulate={config.accumulate} microbatches")
  if config.optim.skip_nonfinite < 0:
    raise ValueError(f"config.optim.skip_nonfinite={config.optim.skip_nonfinite} is a number of "
                     "steps; 0 stops at the first NaN")
  mixes = config.data.mixup or config.data.cutmix
  if mixes and config.data.replicas % config.accumulate:
    raise ValueError(f"config.data.replicas={config.data.replicas} must be a multiple of "
                     f"config.accumulate={config.accumulate}: a microbatch mixes within itself")


def differences(old: dict, new: dict, free=FREE) -> list[str]:
  """One line for each key, except the free ones, by which two flat configs differ."""
  absent = "nothing"
  return [f"{key} is {old.get(key, absent)!r} there and {new.get(key, absent)!r} here"
          for key in sorted(old.keys() | new.keys())
          if key not in free and old.get(key, absent) != new.get(key, absent)]
