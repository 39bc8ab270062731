"""A training run: resume from the newest checkpoint, train, evaluate and return the result."""
import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import FrozenConfigDict

from vitcompact import trees
from vitcompact.data import pipeline
from vitcompact.run import nonfinite, processes, watch, workdir
from vitcompact.run.checkpoint import Checkpoints, Damaged
from vitcompact.run.log import Log, Meter
from vitcompact.run.preemption import Stop, Stopped
from vitcompact.train import config as configs
from vitcompact.train import phases, sharding
from vitcompact.train import step as steps
from vitcompact.train.build import Run, batch_shapes, build, fresh_state, resolve

RESTORE = ("newest", "last_good")


@dataclasses.dataclass(frozen=True)
class Result:
  """The result of a run. `variables` are those that the config's `eval_params` selects."""
  config: FrozenConfigDict
  model: Any
  state: steps.TrainState
  variables: dict
  metrics: dict


@dataclasses.dataclass
class RunState:
  """The state of a run in progress, besides its TrainState.

  per_image: utilisation of the devices at one image per second; skipped: the number of steps
  without an update since the run began.
  """
  run: Run
  directory: pathlib.Path
  data: Any
  checkpoints: Checkpoints
  log: Log
  stopping: Stop
  profile: watch.Profile
  per_image: float
  skipped: int = 0

  def progress(self) -> dict:
    """The part of a checkpoint that is not the TrainState."""
    return {"data": self.data.get_state(), "skipped": self.skipped}


def process_ids() -> dict[str, int]:
  return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def evaluate_split(run: Run, variables, split: str, stopping: Stop | None = None, *, teacher=None
                   ) -> dict[str, float]:
  """{"val_accuracy", "val_loss"}: means over exactly the images of a split.

  A model without a classifier has only "val_loss", the error of its features against those of the
  teacher with the variables `teacher`; without a teacher the result is {}.
  """
  names = ("accuracy", "loss") if run.model.num_classes else ("loss",)
  if not run.model.num_classes:
    if not teacher:
      return {}
    variables = variables, teacher
  sums = dict.fromkeys((*names, "count"), 0.0)
  batches = pipeline.eval_batches(run.config.data, split, run.preprocess,
                                  batch_size=run.config.eval_batch_size, **process_ids())
  with contextlib.closing(batches):
    for batch in batches:
      if stopping and stopping.requested():
        raise Stopped
      part = jax.device_get(run.eval_step(variables, sharding.put_batch(batch, run.mesh)))
      sums = {name: total + float(part[name]) for name, total in sums.items()}
  return {f"{split}_{name}": sums[name] / sums["count"] for name in names}


def score(scores: dict[str, float]) -> float:
  """The number that selects checkpoints, higher is better: val accuracy, or minus the val loss."""
  return scores.get("val_accuracy", -scores.get("val_loss", 0.0))


def fit(run_state: RunState, state, stop: int):
  """Trains from the state's step to `stop`, saving and evaluating along the way and at the end."""
  run, config, start = run_state.run, run_state.run.config, int(state.step)
  if start in unscored_steps(run_state, stop):   # the last run stopped during this evaluation
    evaluate_saved(run_state, start, state)
  pending, meter = [], Meter()
  for step in range(start + 1, stop + 1):
    if run_state.stopping.requested():
      save_and_stop(run_state, step - 1, state, pending, meter)
    meter.start += run_state.profile.before(step, state)
    try:
      batch = meter.next_batch(run_state.data, pending[-1] if pending else None)
    except Exception:
      if run_state.stopping.requested():   # the signal also reached the workers and ended them
        save_and_stop(run_state, step - 1, state, pending, meter)
      raise
    if step == 1:
      run_state.log.picture(1, "augmented", watch.augmented(run, state.key, batch))
    batch = sharding.put_batch(batch, run.mesh)
    if len(pending) > 1:  # limits how many steps are dispatched ahead of the device
      jax.block_until_ready(pending[-2])
    state, metrics = run.step_at(step - 1)(state, batch)
    run_state.stopping.saved = False   # set after the call: the first step compiles for minutes
    pending.append(metrics)
    meter.images += config.batch_size
    run_state.log.progress(step)
    if step == start + 1:  # exclude compilation from the measured speed
      jax.block_until_ready(metrics)
      meter.reset()
    save = step % config.checkpoint_every == 0 or step == stop
    if save or step % config.log_every == 0:
      log_metrics(run_state, step, pending, meter)
      pending = []
    if save:
      save_checkpoint(run_state, step, state)
      evaluate_saved(run_state, step, state)
    if not pending:
      meter.reset()
  return state


def unscored_steps(run_state: RunState, stop: int) -> list[int]:
  """[the newest step on disk] if it is due for evaluation and has no score yet, else []."""
  checkpoints = run_state.checkpoints
  return [step for step in checkpoints.steps()[-1:] if step not in checkpoints.scores and
          (step % run_state.run.config.checkpoint_every == 0 or step == stop)]


def log_metrics(run_state: RunState, step: int, pending: list, meter: Meter):
  """Checks the metrics of the pending steps for NaNs, and logs them."""
  fetched = jax.device_get(pending)
  nonfinite.check(run_state, step - len(fetched) + 1, fetched)
  rates = meter.read()
  if run_state.per_image:
    rates["mfu"] = run_state.per_image * rates["images_per_second"]
  if run_state.run.config.data.on_bad == "skip":   # counted by this process since it started
    rates["bad_records"] = len(run_state.data.bad_records)
  run_state.log.write(step, summary(fetched, run_state.skipped) | rates)


def summary(metrics: list[dict], skipped: int) -> dict[str, float]:
  """Means of metrics over the steps that were not skipped, and the last learning rate."""
  counted = [values for values in metrics if not values.get("skipped")]
  # The metrics differ between phases of a run; a line has those of its last step.
  means = {name: sum(float(values[name]) for values in counted if name in values) /
                 sum(name in values for values in counted)
           for name in metrics[-1] if any(name in values for values in counted)}
  total = {"skipped": skipped} if "skipped" in metrics[-1] else {}
  return means | {"lr": float(metrics[-1]["lr"])} | total


def save_checkpoint(run_state: RunState, step: int, state):
  """Saves in the background; raises FloatingPointError if the state is not finite."""
  if not steps.all_finite((state.params, state.batch_stats, state.opt_state)):
    raise FloatingPointError(f"the state after step {step} is not finite; it was not saved")
  run_state.checkpoints.save(step, state, run_state.progress())


def evaluate_saved(run_state: RunState, step: int, state):
  """Evaluates a state on val, possibly while it is still being written to disk.

  The score selects the best checkpoint.
  """
  variables = steps.eval_variables(state, run_state.run.config.eval_params)
  try:
    scores = evaluate_split(run_state.run, variables, "val", run_state.stopping,
                            teacher=state.teacher)
  except Stopped:
    run_state.checkpoints.wait()
    raise Stopped(step) from None
  run_state.log.write(step, scores)
  run_state.checkpoints.score(step, score(scores))


def save_and_stop(run_state: RunState, step: int, state, pending: list, meter: Meter):
  """Logs and saves what is not on disk yet, then raises Stopped."""
  if pending:
    log_metrics(run_state, step, pending, meter)
  if step not in run_state.checkpoints.steps() and step:
    save_checkpoint(run_state, step, state)
  run_state.checkpoints.wait()
  raise Stopped(step)


def finish(run: Run, state, checkpoints: Checkpoints, log: Log, mode: str,
           stopping: Stop | None = None) -> Result:
  """Evaluates a finished state on val and on test (used for no choice), and logs the last line."""
  variables = steps.eval_variables(state, run.config.eval_params)
  metrics = {"mode": mode, "eval_params": run.config.eval_params}
  if run.config.keep_start and run.config.init_from and mode == "train":
    variables, kept = better_of_start_and_end(run, variables, stopping)
    metrics |= kept
  if int(state.step) == run.config.total_steps:
    for split in ("val", "test"):
      metrics |= evaluate_split(run, variables, split, stopping, teacher=state.teacher)
  if best := checkpoints.best():
    best_score = ({"best_val_accuracy": best[1]} if run.model.num_classes
                  else {"best_val_loss": -best[1]})
    metrics |= {"best_val_step": best[0], **best_score}
  metrics["params_digest"] = trees.digest(sharding.gather(variables["params"], run.mesh))
  log.write(int(state.step), metrics)
  return Result(run.config, run.model, state, variables, metrics)


def better_of_start_and_end(run: Run, variables, stopping):
  """(variables, {"kept": "start" or "end", both scores}) of the better ones on val, by accuracy and
  then by loss, so that a run never ends with a worse model than it started from."""
  fresh = fresh_state(run)
  start_variables = steps.eval_variables(fresh, run.config.eval_params)
  scores = {name: evaluate_split(run, candidate, "val", stopping, teacher=fresh.teacher)
            for name, candidate in (("start", start_variables), ("end", variables))}
  kept = max(scores, key=lambda name: (score(scores[name]), -scores[name]["val_loss"],
                                       name == "start"))
  metrics = {"kept": kept, **{f"{name}_{key}": value for name, values in scores.items()
                              for key, value in values.items()}}
  return (start_variables if kept == "start" else variables), metrics


def restore(checkpoints: Checkpoints, run: Run, which: str, log: Log, *, set_aside: bool):
  """(state, progress, step) of the newest checkpoint, or (None, None, 0) if there is none.

  which: "last_good" skips damaged checkpoints with a warning; with "newest" they are an error.
  """
  saved_steps = checkpoints.steps()
  for step in reversed(saved_steps):
    try:
      return *checkpoints.restore(step, run.shapes, run.shardings), step
    except Damaged as error:
      if which == "newest":
        older = [known for known in saved_steps if known < step]
        previous = f" (step {older[-1]})" if older else ""
        raise Damaged(f"{error}. To resume from the previous checkpoint{previous}, use "
                      "--restore=last_good") from error
      where = f"; set aside as {checkpoints.set_aside(step)}" if set_aside else ""
      warning = f"WARNING: {error}{where}; falling back to the previous checkpoint"
      print(warning, file=sys.stderr, flush=True)
      log.write(step, {"fallback": warning})
      if jax.process_count() > 1:   # the others may be waiting for this process in the read
        raise Damaged(f"{error}{where}. Start all processes again") from error
  if saved_steps:
    raise Damaged(f"none of the checkpoints {saved_steps} of {checkpoints.directory} is intact; to "
                  "start from scratch, use another --workdir")
  return None, None, 0


def check_start(config, directory: pathlib.Path, which: str):
  """Raises ValueError for missing data, an unknown `which`, or processes that were started with
  different configs."""
  if which not in RESTORE:
    raise ValueError(f"restore={which!r}: must be one of {', '.join(RESTORE)}")
  images = {f"images of {split}": pipeline.num_examples(config.data.name, split)
            for split in pipeline.SPLITS}   # val and test too, so that missing ones fail now
  processes.check_agreement({**configs.flat(json.loads(config.to_json())),
                             "--workdir": str(directory), "--restore": which, **images})


def check_first_step(run: Run):
  """Traces the first step, so that its errors are raised before the workdir is claimed."""
  jax.eval_shape(run.step_at(0), run.shapes, batch_shapes(run))


def train(config, directory, *, until: int | None = None, stopping: Stop | None = None,
          restore_from: str = "newest", watching: watch.Watching | None = None,
          allow: Sequence[str] = ()) -> Result:
  """Runs a config to its `total_steps` in a workdir; called again, it resumes where it stopped.

  until: the step after which to stop, once it is saved (for tests, or when time is limited).
  stopping: checked before each batch; when a stop is requested, saves and raises Stopped.
  restore_from: "last_good" skips damaged checkpoints with a warning; "newest" raises an error.
  allow: config keys whose values may differ from those the run began with, such as "total_steps".
  """
  config, directory = resolve(config), workdir.path_of(directory)
  check_start(config, directory, restore_from)
  changed = workdir.check_claim(directory, config, allow=allow)
  workdir.check_writable(directory)
  run = build(config)
  data = pipeline.train_batches(
      config.data, image_size=run.preprocess.image_size, batch_size=config.batch_size,
      seed=config.seed, **process_ids())
  # A missing or unsuitable init_from file is refused before anything is written.
  new = not (directory / "checkpoints").is_dir()
  if new or changed:
    phases.check_end(config, run.model)
  state = fresh_state(run) if new else None
  if new or changed:
    check_first_step(run)
  stopping, watching = stopping or Stop(), watching or watch.Watching()
  active = jax.process_index() == 0
  with contextlib.ExitStack() as stack:
    stack.callback(data.close)
    if active:
      workdir.make(directory)
      stack.enter_context(workdir.locked(directory))
      workdir.claim(directory, config, allow)
    check_shared(directory)
    checkpoints = Checkpoints(directory, keep_last=config.keep_last, clean=True,
                              on_saved=lambda: setattr(stopping, "saved", True))
    stack.callback(checkpoints.close)
    mirror = None
    if watching.wandb and active:
      mirror = watch.wandb_mirror(watching.wandb, config, directory)
    log = Log(directory, config.total_steps, active=active, mirror=mirror)
    stack.callback(log.close)
    profile = watch.Profile(watch.profiled_steps(watching.profile), directory)
    stack.callback(profile.close)
    run_state = RunState(run, directory, data, checkpoints, log, stopping, profile,
                     watch.utilisation(run, watching.peak_tflops))
    restored, progress, step = restore(checkpoints, run, restore_from, log, set_aside=True)
    if restored is not None:
      state, run_state.skipped = restored, progress["skipped"]
      data.set_state(progress["data"])
      log.say(f"resumed at step {step} from {checkpoints.directory / str(step)}")
      if step > config.total_steps:
        raise ValueError(f"--workdir={directory} is at step {step} already, after config."
                         f"total_steps={config.total_steps}; set total_steps to at least {step}")
      for line in changed:
        log.say(f"resumed with a changed config: {line}")
      if changed:
        log.write(step, {"changed": "; ".join(changed)})
    elif state is None:  # killed before its first checkpoint
      state = fresh_state(run)
    state = fit(run_state, state, min(until or config.total_steps, config.total_steps))
    checkpoints.wait()
    return finish(run, state, checkpoints, log, "train", stopping)


def check_shared(directory: pathlib.Path):
  """Raises ValueError unless all processes share the workdir: each would save only its own part."""
  processes.barrier("process 0 holds the lock")
  holders = processes.gather_values(workdir.holder(directory))
  if others := [index for index, holder in enumerate(holders) if holder != holders[0]]:
    raise ValueError(f"--workdir={directory} of process 0 is not the directory that processes "
                     f"{others} see; use a directory that all of them share")


def evaluate(config, directory, *, restore_from: str = "newest",
             allow: Sequence[str] = ()) -> Result:
  """Evaluates the newest checkpoint of a workdir on val and test; only the log changes."""
  config, directory = resolve(config), workdir.path_of(directory)
  check_start(config, directory, restore_from)
  workdir.check_claim(directory, config, allow=allow, free=(*configs.FREE, "eval_params"))
  if not (directory / "checkpoints").is_dir():
    raise ValueError(f"--workdir={directory} holds no checkpoints; train first, with --mode=train")
  run = build(config)
  with contextlib.ExitStack() as stack:
    checkpoints = Checkpoints(directory, keep_last=config.keep_last)
    stack.callback(checkpoints.close)
    log = Log(directory, config.total_steps, active=jax.process_index() == 0)
    stack.callback(log.close)
    state, _, _ = restore(checkpoints, run, restore_from, log, set_aside=False)
    if state is None:
      raise ValueError(f"{checkpoints.directory} is empty; train first, with --mode=train")
    return finish(run, state, checkpoints, log, "eval")
