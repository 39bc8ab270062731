"""Checkpoints with Orbax: WORKDIR/checkpoints/STEP/, written in the background, restored exactly.

Orbax makes a step visible by a rename, so a killed save leaves nothing that looks whole. It casts
silently to another dtype, though, and restores flipped bits without a word: so every checkpoint
carries names, shapes, dtypes and a checksum of each leaf, and restoring compares all of them.
"""
import pathlib

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import args as ocp_args
from orbax.checkpoint import checkpoint_managers as policies

from vitcompact import trees

ITEMS = ("state", "data", "meta")


def checksum(array: jax.Array) -> jax.Array:
  """uint32: the sum of an array's bits times an odd weight by position, modulo 2**32.

  Integers, so it is the same on any number of devices; a single flipped bit always changes it.
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


def first(lines, count: int = 3) -> str:
  """The first few of a list of complaints, in one line."""
  more = f"; and {len(lines) - count} more" if len(lines) > count else ""
  return "; ".join(lines[:count]) + more


def leaf_differences(found: dict, wanted) -> list[str]:
  """How the leaves that a checkpoint describes differ from a state's shapes and dtypes."""
  found = {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in found.items()}
  wanted = {name: f"{leaf.dtype}{list(leaf.shape)}"
            for name, leaf in trees.named_leaves(wanted).items()}
  lines = [f"{name} {wanted[name]} is missing" for name in wanted if name not in found]
  lines += [f"{name} {found[name]} is unknown" for name in found if name not in wanted]
  lines += [f"{name} is {found[name]}, not {wanted[name]}"
            for name in wanted if name in found and found[name] != wanted[name]]
  return lines


def accuracy(metrics: dict) -> float:
  return metrics["val_accuracy"]


class Checkpoints:
  """The checkpoints of one run: the last `keep_last`, and the best by accuracy on val."""

  def __init__(self, workdir, *, keep_last: int):
    self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
    keep = policies.AnyPreservationPolicy([
        policies.LatestN(keep_last),
        policies.BestN(get_metric_fn=accuracy, n=1, keep_checkpoints_without_metrics=False)])
    self.manager = ocp.CheckpointManager(  # without a best_fn it writes no metrics
        self.directory, item_names=ITEMS,
        options=ocp.CheckpointManagerOptions(preservation_policy=keep, best_fn=accuracy))

  def steps(self) -> list[int]:
    """The steps that can be restored. A clean-up that was killed leaves others, without a part."""
    return [step for step in sorted(self.manager.all_steps())
            if all((self.directory / str(step) / item).is_dir() for item in ITEMS)]

  def best(self) -> tuple[int, float] | None:
    """(step, accuracy on val) of the best of the steps that are still there."""
    found = [(accuracy(self.manager.metrics(step)), step) for step in self.steps()]
    return max(found)[::-1] if found else None

  def save(self, step: int, state, data, val_accuracy: float):
    """Returns once the state is copied; what follows in the background ends with `wait`.

    data: the iterator, of which the position is saved. It is the same in every process, so that a
    run may go on with another number of them.
    """
    metrics = {"val_accuracy": val_accuracy}
    meta = {"leaves": describe(state), **metrics}
    self.manager.save(step, metrics=metrics, args=ocp_args.Composite(
        state=ocp_args.StandardSave(state), data=ocp_args.JsonSave(data.get_state()),
        meta=ocp_args.JsonSave(meta)))

  def restore(self, step: int, shapes, shardings, data=None):
    """The state of a step, laid out as `shardings`; sets the position of `data` where given."""
    where = self.directory / str(step)
    meta = self.manager.restore(step, args=ocp_args.Composite(meta=ocp_args.JsonRestore())).meta
    if lines := leaf_differences(meta["leaves"], shapes):
      raise ValueError(f"{where} holds another state: {first(lines)}. Use the config that it was "
                       "trained with, or another --workdir")
    target = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings)
    remedy = "remove that directory to go on from the checkpoint before it"
    try:
      found = self.manager.restore(step, args=ocp_args.Composite(
          state=ocp_args.StandardRestore(target), data=ocp_args.JsonRestore()))
    except Exception as error:  # Orbax passes on whatever its reader raised, a plain Exception too
      cause = next(iter(str(error.__cause__ or error).splitlines()), "")
      raise ValueError(f"{where} cannot be read, {type(error).__name__}: {cause[:200]}; "
                       f"if it is damaged, {remedy}") from error
    read = describe(found.state)
    if damaged := [name for name in read if read[name] != meta["leaves"][name]]:
      raise ValueError(f"{where} is damaged: {first(damaged)} changed since it was written; "
                       f"{remedy}")
    if data is not None:
      data.set_state(found.data)
    return found.state

  def wait(self):
    """Until all that was saved is on disk; raises what went wrong in the background."""
    self.manager.wait_until_finished()

  def close(self):
    self.manager.close()
