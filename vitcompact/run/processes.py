"""Several processes as one run: how they connect, agree, and notice that one of them has died."""
import json

import jax
import numpy as np
from jax.experimental import multihost_utils

from vitcompact import trees

LOST = 76         # exit code: another process of the run has died; start all of them again
HEARTBEAT = 60    # seconds without a heartbeat after which JAX ends the other processes


def connect(coordinator: str, process_id: int | None = None, num_processes: int | None = None,
            patience: int = 300):
  """Connects the processes of a run; to be called before any of them uses a device.

  coordinator: "" (one process), "auto" (Cloud TPU, SLURM or Open MPI, read from the environment),
    or HOST:PORT of process 0; then process_id and num_processes are required.
  patience: seconds to wait for the other processes.
  """
  if not coordinator:
    if process_id is not None or num_processes is not None:
      raise ValueError("--process_id and --num_processes need --coordinator=HOST:PORT")
    return
  waits = {"heartbeat_timeout_seconds": HEARTBEAT, "initialization_timeout": patience}
  if coordinator == "auto":
    if process_id is not None or num_processes is not None:
      raise ValueError("--coordinator=auto reads them from the environment: leave out --process_id "
                       "and --num_processes")
    try:
      jax.distributed.initialize(**waits)
    except ValueError as error:
      raise ValueError("--coordinator=auto found no Cloud TPU, SLURM or Open MPI environment; give "
                       "--coordinator=HOST:PORT --process_id=I --num_processes=N") from error
    return
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal():
    raise ValueError(f"--coordinator={coordinator!r} is neither 'auto' nor HOST:PORT")
  if process_id is None or num_processes is None:
    raise ValueError(f"--coordinator={coordinator} needs --process_id and --num_processes")
  if not 0 <= process_id < num_processes:
    raise ValueError(f"--process_id={process_id} must be 0 to {num_processes - 1}, less than "
                     f"--num_processes={num_processes}")
  try:
    jax.distributed.initialize(coordinator, num_processes, process_id,
                               cluster_detection_method="deactivate", **waits)
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f"process {process_id} of {num_processes} could not connect to the others at "
                     f"{coordinator} within {patience} s: {first_line(error)}") from error


def first_line(error: Exception) -> str:
  return next(iter(str(error).splitlines()), "")[:300]


def gather_values(value) -> list:
  """A list of the JSON values of all processes, by process number."""
  if jax.process_count() == 1:
    return [value]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(text)))
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[:len(text)] = text
  rows = multihost_utils.process_allgather(padded)
  return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def check_agreement(facts: dict):
  """Raises ValueError in every process if their facts ({name: JSON value}) differ."""
  first, *others = gather_values({"jax": jax.__version__, **facts})
  lines = [f"{key} is {first.get(key)!r} in process 0 and {other.get(key)!r} in process {index}"
           for index, other in enumerate(others, 1) for key in sorted(first.keys() | other.keys())
           if other.get(key) != first.get(key)]
  if lines:
    raise ValueError(f"the processes disagree: {trees.excerpt(lines, 5, joint='; ')}. Start all of "
                     "them with the same code, command and data")


def barrier(name: str):
  """Waits until every process has called it."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def is_multiprocess() -> bool:
  return jax.distributed.is_initialized() and jax.process_count() > 1


class PeerLost(RuntimeError):
  """Another process did not arrive where all of them wait for each other."""


# Raised in a process when another one has died; the first one by JAX, during a collective.
PEER_ERRORS = (jax.errors.JaxRuntimeError, PeerLost)


def collective_error(error: Exception) -> RuntimeError:
  """The error to raise when a collective has failed."""
  return RuntimeError(
      f"process {jax.process_index()} of {jax.process_count()} cannot continue: "
      f"{first_line(error)}. If another process ended, its own output says why. Saved checkpoints "
      "are intact: start all processes again, and they resume from the newest one")
