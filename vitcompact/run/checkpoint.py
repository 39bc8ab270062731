"""Checkpoints with Orbax: WORKDIR/checkpoints/STEP/, written in the background, restored exactly.

Orbax makes a step visible by a rename, so a killed save never looks complete. But it silently casts
to another dtype and restores flipped bits without an error. Therefore every checkpoint stores the
name, shape, dtype and checksum of each leaf, and restoring compares all of them; JSON files contain
their own sha256. Steps are renamed before they are deleted, so that a kill leaves each of them
either complete or gone.

  checkpoints/STEP/state, meta     a step: the arrays; progress and checksums
  checkpoints/scores.json          accuracy on val of the existing steps
  checkpoints/damaged.STEP         set aside by --restore=last_good; never read, never deleted
"""
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import args as ocp_args

from vitcompact import trees
from vitcompact.run import processes

ITEMS = ("state", "meta")
TEMPORARY = ".orbax-checkpoint-tmp"   # part of the name of an unfinished save
REMOVED = "removed."                  # prefix of the name of a step that is being deleted


class Damaged(ValueError):
  """A checkpoint differs from what was written; another one may be intact."""


def checksum(array: jax.Array) -> jax.Array:
  """uint32: the sum of an array's bits, each element times an odd weight by position, mod 2**32.

  Integer sums are the same on any number of devices, and a single flipped bit always changes it.
  """
  if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
    array = jax.random.key_data(array)
  bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")
  bits, position = bits.astype(jnp.uint32), jnp.zeros(array.shape, jnp.uint32)
  for dimension, size in enumerate(array.shape):
    position = position * size + jax.lax.broadcasted_iota(jnp.uint32, array.shape, dimension)
  return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)


@jax.jit
def checksums(tree):
  return jax.tree.map(checksum, tree)


def describe(state) -> dict:
  """{name: {shape, dtype, checksum}} of every leaf, for JSON."""
  sums = trees.named_leaves(jax.device_get(checksums(state)))
  return {name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "checksum": int(sums[name])}
          for name, leaf in trees.named_leaves(state).items()}


def leaf_differences(found: dict, expected) -> list[str]:
  """How the leaves in a checkpoint's description differ from a state's shapes and dtypes."""
  found = {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in found.items()}
  expected = {name: f"{leaf.dtype}{list(leaf.shape)}"
              for name, leaf in trees.named_leaves(expected).items()}
  lines = [f"{name} {expected[name]} is missing" for name in expected if name not in found]
  lines += [f"{name} {found[name]} is unknown" for name in found if name not in expected]
  lines += [f"{name} is {found[name]}, not {expected[name]}"
            for name in expected if name in found and found[name] != expected[name]]
  return lines


def without_closed_loop_errors(hook):
  """An excepthook that suppresses one error: after a read has failed and was reported, TensorStore
  raises it in its own threads for dozens of unfinished reads (orbax 0.12)."""
  def filtered(kind, error, trace):
    if str(error) != "Event loop is closed":
      hook(kind, error, trace)
  return filtered


def with_digest(values: dict) -> dict:
  """JSON values with their own sha256 added. Keys must be strings, as JSON reads them back."""
  text = json.dumps(values, sort_keys=True).encode()
  return {**values, "sha256": hashlib.sha256(text).hexdigest()}


def read_with_digest(path: pathlib.Path) -> dict:
  """The values of a file written by `with_digest`; raises Damaged if a single bit has changed."""
  try:
    values = json.loads(path.read_bytes())
    digest = values.pop("sha256")
    if with_digest(values)["sha256"] != digest:
      raise ValueError("its sha256 does not match")
  except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
    raise Damaged(f"{path} is damaged: {processes.first_line(error)}") from error
  return values


class Checkpoints:
  """The checkpoints of one run: the last `keep_last`, and the best by accuracy on val.

  clean: whether to remove what a killed run left behind; only for the run that writes here.
  on_saved: called, from another thread, whenever a save has reached the disk.
  """

  def __init__(self, workdir, *, keep_last: int, clean: bool = False,
               on_saved: Callable[[], None] = lambda: None):
    self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
    self.keep_last = keep_last
    self.saving = None
    if clean:
      if jax.process_index() == 0:
        self.directory.mkdir(exist_ok=True)
        self._clean()
      processes.barrier("checkpoints are clean")
    options = ocp.options.AsyncOptions(post_finalization_callback=on_saved)
    self.writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(*ITEMS),
                                        async_options=options)
    self.scores = self._read_scores()

  def steps(self) -> list[int]:
    """The steps whose directories are complete."""
    return sorted(int(path.name) for path in self._step_folders() if is_complete(path))

  def best(self) -> tuple[int, float] | None:
    """(step, accuracy on val) of the best step that still exists."""
    scored = [(self.scores[step], step) for step in self.steps() if step in self.scores]
    return max(scored)[::-1] if scored else None

  def save(self, step: int, state, progress: dict):
    """Returns once the state is copied; the save finishes in the background, see `wait`.

    progress: JSON values stored with the state, such as the position in the data. They are the same
    in every process, so that a run may be resumed with another number of processes.
    """
    self.wait()
    self.saving = step
    meta = with_digest({"leaves": describe(state), "progress": progress})
    with self._named_save_errors():
      self.writer.save(self.directory / str(step), args=ocp_args.Composite(
          state=ocp_args.StandardSave(state), meta=ocp_args.JsonSave(meta)))

  def score(self, step: int, accuracy: float):
    """Waits for the save, stores the accuracy of its step, and removes steps that are not kept."""
    self.wait()
    steps = self.steps()
    self.scores = {known: value for known, value in self.scores.items() if known in steps}
    self.scores[step] = accuracy
    if jax.process_index() == 0:
      self._write_scores()
      best = self.best()
      for old in steps[:-self.keep_last]:
        if old != best[0]:
          self._remove(old)

  def restore(self, step: int, shapes, shardings) -> tuple:
    """(state sharded as in `shardings`, progress) of a step."""
    path = self.directory / str(step)
    meta = read_with_digest(path / "meta" / "metadata")
    if lines := leaf_differences(meta["leaves"], shapes):
      raise ValueError(f"{path} holds another state: {trees.excerpt(lines, 3, joint='; ')}. Use "
                       "the config that it was trained with, or another --workdir")
    target = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings)
    hook = sys.excepthook
    # After a failure the filter stays in place, as other reads end later.
    sys.excepthook = without_closed_loop_errors(hook)
    try:
      found = self.writer.restore(path, args=ocp_args.Composite(
          state=ocp_args.StandardRestore(target)))
    except Exception as error:  # Orbax passes on whatever its reader raised, a plain Exception too
      cause = processes.first_line(error.__cause__ or error)[:200]
      raise Damaged(f"{path} cannot be read, {type(error).__name__}: {cause}") from error
    sys.excepthook = hook
    read = describe(found.state)
    if damaged := [name for name in read if read[name] != meta["leaves"][name]]:
      raise Damaged(f"{path} is damaged: {trees.excerpt(damaged, 3, joint='; ')} changed since it "
                    "was written")
    return found.state, meta["progress"]

  def set_aside(self, step: int) -> pathlib.Path:
    """Renames a damaged step, so that it is never read again, and returns its new path."""
    count = len(list(self.directory.glob(f"damaged.{step}*")))
    aside = self.directory / f"damaged.{step}{f'.{count}' if count else ''}"
    if jax.process_index() == 0:
      (self.directory / str(step)).rename(aside)
    return aside

  def wait(self):
    """Waits until everything is on disk; raises errors of the background save."""
    with self._named_save_errors():
      self.writer.wait_until_finished()

  def close(self):
    """Closes the writer. Errors of a failed save are suppressed here, as `wait` raises them."""
    with contextlib.suppress(Exception):
      self.writer.close()

  def _step_folders(self):
    if not self.directory.is_dir():
      return []
    return [path for path in self.directory.iterdir() if path.name.isdecimal() and path.is_dir()]

  def _read_scores(self) -> dict[int, float]:
    path = self.directory / "scores.json"
    if not path.exists():
      return {}
    try:
      return {int(step): value for step, value in read_with_digest(path)["scores"].items()}
    except Damaged as error:
      raise Damaged(f"{error}; delete it, and only later checkpoints will be considered for the "
                    "best one") from error

  def _write_scores(self):
    path = self.directory / "scores.json"
    new = path.with_suffix(".tmp")   # renamed, so that a kill leaves the old or the new scores
    scores = {str(known): value for known, value in self.scores.items()}
    try:
      new.write_text(json.dumps(with_digest({"scores": scores})))
      new.replace(path)
    except OSError as error:
      raise OSError(f"{path} cannot be written: {error.strerror}; step {self.steps()[-1]} is "
                    "intact. Free some space and run the same command again") from error

  def _clean(self):
    """Removes what killed saves and removals left behind; sets aside an incomplete step if there is
    no newer one."""
    for path in self.directory.iterdir():
      if path.name.startswith(REMOVED) or TEMPORARY in path.name:
        shutil.rmtree(path)
    newest = max(self.steps(), default=-1)
    for path in self._step_folders():
      if not is_complete(path) and int(path.name) < newest:
        logging.warning("%s was partly deleted; removed the rest", path)
        self._remove(int(path.name))
      elif not is_complete(path):
        logging.warning("%s is incomplete; set aside as %s", path, self.set_aside(int(path.name)))

  def _remove(self, step: int):
    """Removes a step. It is renamed first, so that a kill leaves it complete or gone."""
    trash = self.directory / f"{REMOVED}{step}"
    os.replace(self.directory / str(step), trash)
    shutil.rmtree(trash)

  @contextlib.contextmanager
  def _named_save_errors(self):
    try:
      yield
    except Exception as error:  # Orbax and TensorStore raise many kinds, a plain Exception too
      # Orbax waits for all processes before a step counts as saved.
      if processes.is_multiprocess() and isinstance(error, (TimeoutError, *processes.PEER_ERRORS)):
        raise processes.PeerLost(f"step {self.saving} was not saved: {error}") from error
      good = [step for step in self.steps() if step != self.saving]
      intact = f"step {good[-1]} is intact" if good else "there is no earlier step"
      raise OSError(f"saving step {self.saving} in {self.directory} failed: "
                    f"{type(error).__name__}: {processes.first_line(error)}; {intact}. Free some "
                    "space and run the same command again") from error


def is_complete(path: pathlib.Path) -> bool:
  return all((path / item).is_dir() for item in ITEMS)
