"""A run: go on from its newest checkpoint, train, evaluate, say how it went."""
import contextlib
import dataclasses
import math
import pathlib
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from vitcompact import trees
from vitcompact.data import pipeline
from vitcompact.train import settings, sharding, workdir
from vitcompact.train import step as steps
from vitcompact.train.build import Run, build, fresh_state, resolve
from vitcompact.train.checkpoint import Checkpoints
from vitcompact.train.log import Log, Meter


@dataclasses.dataclass(frozen=True)
class Result:
  """What a run ended with. `variables` are those that the config's `eval_params` names."""
  config: FrozenConfigDict
  model: Any
  state: steps.TrainState
  variables: dict
  metrics: dict


def processes() -> dict[str, int]:
  return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def evaluate_split(run: Run, variables, split: str) -> dict[str, float]:
  """{"val_accuracy", "val_loss"}: means over exactly the images of a split."""
  sums = {"accuracy": 0.0, "loss": 0.0, "count": 0.0}
  batches = pipeline.eval_batches(
      run.config.data, split, image_size=run.preprocess.image_size,
      batch_size=run.config.eval_batch_size, crop=run.preprocess.crop,
      interpolation=run.preprocess.interpolation, **processes())
  with contextlib.closing(batches):
    for batch in batches:
      part = jax.device_get(run.eval_step(variables, sharding.put_batch(batch, run.mesh)))
      sums = {name: total + float(part[name]) for name, total in sums.items()}
  return {f"{split}_{name}": sums[name] / sums["count"] for name in ("accuracy", "loss")}


def check_finite(first_step: int, metrics: list[dict]):
  """Refuses the first step whose loss or gradient is not a number that can be trained on."""
  for step, values in enumerate(metrics, first_step):
    for name in ("loss", "grad_norm"):
      if not math.isfinite(values[name]):
        raise FloatingPointError(
            f"{name} is {values[name]} at step {step}; stopped, and nothing was saved since the "
            "last checkpoint. A lower config.optim.learning_rate or a config.optim.clip_norm may "
            "help")


def summary(metrics: list[dict]) -> dict[str, float]:
  """Means since the last line; of the learning rate the last."""
  # Programs of one run differ in what they measure; a line has what its last step measured.
  means = {name: sum(float(values[name]) for values in metrics if name in values) /
                 sum(name in values for values in metrics) for name in metrics[-1]}
  return means | {"lr": float(metrics[-1]["lr"])}


def fit(run: Run, state, data, stop: int, checkpoints: Checkpoints, log: Log):
  """Trains from the state's step to `stop`, saving and evaluating on the way and at the end."""
  config, start = run.config, int(state.step)
  pending, meter = [], Meter()
  for step in range(start + 1, stop + 1):
    batch = sharding.put_batch(meter.next_batch(data), run.mesh)
    if len(pending) > 1:  # steps are dispatched ahead of the device, but not without end
      jax.block_until_ready(pending[-2])
    state, metrics = run.step_at(step - 1)(state, batch)
    pending.append(metrics)
    meter.images += config.batch_size
    log.progress(step)
    if step == start + 1:  # compilation is not speed
      jax.block_until_ready(metrics)
      meter.reset()
    save = step % config.checkpoint_every == 0 or step == stop
    if save or step % config.log_every == 0:
      fetched, pending = jax.device_get(pending), []
      check_finite(step - len(fetched) + 1, fetched)
      log.write(step, summary(fetched) | meter.read())
    if save:
      save_checkpoint(run, step, state, data, checkpoints, log)
    if not pending:
      meter.reset()
  return state


def save_checkpoint(run: Run, step: int, state, data, checkpoints: Checkpoints, log: Log):
  """Evaluates on val, which chooses the best checkpoint, and saves; never a NaN."""
  if not steps.all_finite((state.params, state.batch_stats, state.opt_state)):
    raise FloatingPointError(f"the state after step {step} is not finite; it was not saved")
  scores = evaluate_split(run, steps.selected(state, run.config.eval_params), "val")
  log.write(step, scores)
  checkpoints.save(step, state, data, scores["val_accuracy"])


def finish(run: Run, state, checkpoints: Checkpoints, log: Log, mode: str) -> Result:
  """Evaluates a finished state on test, which has chosen nothing, and writes the last line."""
  variables = steps.selected(state, run.config.eval_params)
  metrics = {"mode": mode, "eval_params": run.config.eval_params}
  if int(state.step) == run.config.total_steps:
    metrics |= evaluate_split(run, variables, "val") | evaluate_split(run, variables, "test")
  if best := checkpoints.best():
    metrics |= {"best_val_step": best[0], "best_val_accuracy": best[1]}
  metrics["params_digest"] = trees.digest(sharding.gather(variables["params"], run.mesh))
  log.write(int(state.step), metrics)
  return Result(run.config, run.model, state, variables, metrics)


def train(config, directory, *, until: int | None = None) -> Result:
  """Runs a config to its `total_steps` in a workdir; called again, goes on where it stopped.

  until: stops after that step, once it is saved (for tests, and before a machine is taken away).
  """
  config, directory = resolve(config), pathlib.Path(directory).absolute()
  workdir.check_claim(directory, config)
  run = build(config)
  data = pipeline.train_batches(
      config.data, image_size=run.preprocess.image_size, batch_size=config.batch_size,
      seed=config.seed, **processes())
  # A file to start from that is missing or does not fit is refused before anything is written.
  new = not (directory / "checkpoints").is_dir()
  state = fresh_state(run) if new else None
  workdir.claim(directory, config)
  checkpoints = Checkpoints(directory, keep_last=config.keep_last)
  log = Log(directory, config.total_steps, active=jax.process_index() == 0)
  try:
    if saved := checkpoints.steps():
      state = checkpoints.restore(saved[-1], run.shapes, run.shardings, data)
      log.say(f"resumed at step {saved[-1]} from {checkpoints.directory / str(saved[-1])}")
    elif state is None:  # killed before its first checkpoint
      state = fresh_state(run)
    stop = min(until or config.total_steps, config.total_steps)
    state = fit(run, state, data, stop, checkpoints, log)
    checkpoints.wait()
    return finish(run, state, checkpoints, log, "train")
  finally:
    data.close()
    checkpoints.close()
    log.close()


def evaluate(config, directory) -> Result:
  """Evaluates the newest checkpoint of a workdir on val and test; changes nothing but the log."""
  config, directory = resolve(config), pathlib.Path(directory).absolute()
  workdir.check_claim(directory, config, (*settings.FREE, "eval_params"))
  if not (directory / "checkpoints").is_dir():
    raise ValueError(f"--workdir={directory} holds no checkpoints; train first, with --mode=train")
  run = build(config)
  checkpoints = Checkpoints(directory, keep_last=config.keep_last)
  log = Log(directory, config.total_steps, active=jax.process_index() == 0)
  try:
    if not (saved := checkpoints.steps()):
      raise ValueError(f"{checkpoints.directory} is empty; train first, with --mode=train")
    state = checkpoints.restore(saved[-1], run.shapes, run.shardings)
    return finish(run, state, checkpoints, log, "eval")
  finally:
    checkpoints.close()
    log.close()
