"""Leaving when asked to: SIGTERM is noticed at once, and costs at most the step under way.

Imports no JAX, so that main.py can listen before it loads anything.

A flag that a loop reads is not enough: Python's own handler waits until the compiler returns, which
can take minutes, and a machine that is taken away gives seconds. So a thread reads the signal from
a pipe, and where everything is on disk already, it ends the process there and then.
"""
import contextlib
import multiprocessing
import os
import signal
import sys
import threading

STOPPED = 75    # exit code: asked to leave, all is saved; the same command goes on (EX_TEMPFAIL)
POLL = 0.05     # seconds


class Stopped(Exception):
  """The run was asked to leave; where `step` is given, everything up to it is on disk."""

  def __init__(self, step: int | None = None):
    where = "in an evaluation" if step is None else f"at step {step}"
    super().__init__(f"stopped by SIGTERM {where}; saved. The same command goes on from it")


class Stop:
  """Whether the run shall end, and whether ending at once would lose anything.

  saved: set by the training loop: nothing has been computed that is not on disk.
  """

  def __init__(self):
    self.signalled = False
    self.saved = True
    self.ticks = 0

  def requested(self) -> bool:
    """Asked at the same places by every process: before a step and before a batch of evaluation.

    With several processes all of them get the same answer, whichever was signalled.
    """
    import jax  # late: see above
    if jax.process_count() == 1:
      return self.signalled
    from jax.experimental import multihost_utils
    self.ticks += 1
    return multihost_utils.reached_preemption_sync_point(self.ticks)


def leave(code: int):
  """Ends the process from any thread, and the data's workers with it: nobody else would."""
  for child in multiprocessing.active_children():
    child.kill()
  os._exit(code)


@contextlib.contextmanager
def on_sigterm():
  """A Stop that SIGTERM triggers, for one process; JAX itself listens in a group of several."""
  stop, over = Stop(), threading.Event()
  read, write = os.pipe()
  os.set_blocking(write, False)

  def watch():
    while (got := os.read(read, 1)) and got[0] != signal.SIGTERM:
      pass                        # another signal, of a child that ended, say
    if not got:
      return                      # the pipe was closed: the run is over
    stop.signalled = True
    while not stop.saved:         # the loop is on its way to saving
      if over.wait(POLL):
        return                    # who catches Stopped decides how to leave
    if not over.is_set():
      print("stopped by SIGTERM; nothing is lost. The same command goes on", file=sys.stderr,
            flush=True)
      leave(STOPPED)

  def handler(*_):
    stop.signalled = True

  old = signal.signal(signal.SIGTERM, handler)
  old_pipe = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  try:
    yield stop
  finally:
    signal.set_wakeup_fd(old_pipe)
    signal.signal(signal.SIGTERM, old)
    over.set()
    os.close(write)
    thread.join()
    os.close(read)
