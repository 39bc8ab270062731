"""Leaving when asked to: SIGTERM and Ctrl-C are noticed at once, and cost at most a step.

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
from multiprocessing import resource_tracker

STOPPED = 75    # exit code: asked to leave, all is saved; the same command goes on (EX_TEMPFAIL)
ABANDONED = 130 # exit code: left at a second Ctrl-C, as a shell would have it
POLL = 0.05     # seconds


class Stopped(Exception):
  """The run was asked to leave; where `step` is given, everything up to it is on disk."""

  def __init__(self, step: int | None = None):
    where = "in an evaluation" if step is None else f"at step {step}"
    super().__init__(f"stopped {where}; saved. The same command goes on from it")


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


def second_ctrl_c():
  print("left at once; steps since the last checkpoint are lost. The same command goes on from it",
        file=sys.stderr, flush=True)
  leave(ABANDONED)


def start_tracker():
  """Starts Python's tracker of shared memory. `leave` leaves to it what the data's workers had: it
  removes that, and shall not warn of each."""
  sys.warnoptions.append("ignore:resource_tracker:UserWarning")   # which it is started with
  try:
    resource_tracker.ensure_running()
  finally:
    sys.warnoptions.pop()


@contextlib.contextmanager
def on_signal():
  """A Stop that SIGTERM or Ctrl-C triggers; a second Ctrl-C leaves at once.

  Of one process; in a group of several JAX itself listens for SIGTERM, to which Ctrl-C is turned.
  """
  stop, asked, over = Stop(), threading.Event(), threading.Event()
  read, write = os.pipe()
  os.set_blocking(write, False)

  def listen():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    presses = 0
    while got := os.read(read, 1):      # empty: the pipe was closed, the run is over
      if got[0] == signal.SIGTERM:      # others are of a child that ended, say
        stop.signalled = True
        asked.set()
      elif got[0] == signal.SIGINT:
        presses += 1
        if presses > 1:
          second_ctrl_c()
        print("stopping; Ctrl-C again leaves at once", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

  def leave_when_saved():
    asked.wait()
    while not stop.saved and not over.is_set():   # the loop is on its way to saving
      over.wait(POLL)
    if not over.is_set():               # else who catches Stopped decides how to leave
      print("stopped; nothing is lost. The same command goes on", file=sys.stderr, flush=True)
      leave(STOPPED)

  def handler(number, _):
    if number == signal.SIGTERM:
      stop.signalled = True

  # A terminal sends Ctrl-C to the data's workers too, who inherit that it is blocked: they would go
  # first, each with a traceback. One thread of this process hears it. (Python 3.11's tracker of
  # shared memory unblocks it in who starts that one, so it is started before.)
  start_tracker()
  signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  old = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
  old_pipe = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  threads = [threading.Thread(target=target, daemon=True) for target in (listen, leave_when_saved)]
  for thread in threads:
    thread.start()
  try:
    yield stop
  finally:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.set_wakeup_fd(old_pipe)
    for number, before in old.items():
      signal.signal(number, before)
    over.set()
    asked.set()
    os.close(write)
    for thread in threads:
      thread.join()
    os.close(read)
