"""Stops a run on SIGTERM or Ctrl-C: signals are noticed at once, and lose at most one step.

Imports no JAX, so that main.py can listen before it loads anything.

A flag that the loop reads is not enough: Python runs its signal handlers only after the compiler
returns, which can take minutes, while preemption gives a notice of seconds. So a thread reads the
signal from a pipe, and ends the process immediately if everything is on disk already.
"""
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import resource_tracker

STOPPED = 75    # exit code: stopped on request, saved; the same command resumes (EX_TEMPFAIL)
ABANDONED = 130 # exit code: ended by a second Ctrl-C, as is usual in a shell
POLL = 0.05     # seconds


class Stopped(Exception):
  """The run was asked to stop; if `step` is given, everything up to it is on disk."""

  def __init__(self, step: int | None = None):
    where = "in an evaluation" if step is None else f"at step {step}"
    super().__init__(f"stopped {where}; saved. Run the same command again to resume")


class Stop:
  """Whether a stop was requested, and whether stopping immediately would lose anything.

  saved: set by the training loop when everything it has computed is on disk.
  """

  def __init__(self):
    self.signalled = False
    self.saved = True
    self.ticks = 0

  def requested(self) -> bool:
    """Whether to stop. Called before each step and each batch of evaluation, in every process.

    With several processes all of them get the same answer, whichever of them got the signal.
    """
    import jax  # not at the top, see the module's docstring
    if jax.process_count() == 1:
      return self.signalled
    from jax.experimental import multihost_utils
    self.ticks += 1
    return multihost_utils.reached_preemption_sync_point(self.ticks)


def exit_now(code: int):
  """Ends the process from any thread, after killing its data workers, which would stay alive."""
  for child in multiprocessing.active_children():
    child.kill()
  os._exit(code)


def second_ctrl_c():
  print("exited immediately; steps since the last checkpoint are lost. Run the same command again "
        "to resume from it", file=sys.stderr, flush=True)
  exit_now(ABANDONED)


def start_tracker():
  """Starts Python's tracker of shared memory, without its warnings. After `exit_now` it removes the
  shared memory of the data workers."""
  sys.warnoptions.append("ignore:resource_tracker:UserWarning")   # inherited by the tracker
  try:
    resource_tracker.ensure_running()
  finally:
    sys.warnoptions.pop()


@contextlib.contextmanager
def on_signal():
  """A context with a Stop that SIGTERM or Ctrl-C triggers; a second Ctrl-C exits immediately.

  This is for one process. With several, JAX itself listens for SIGTERM, and Ctrl-C becomes SIGTERM.
  """
  stop, stop_event, over = Stop(), threading.Event(), threading.Event()
  read, write = os.pipe()
  os.set_blocking(write, False)

  def listen():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    presses = 0
    while number := os.read(read, 1):   # empty if the pipe was closed: the run is over
      if number[0] == signal.SIGTERM:   # ignores other signals, such as SIGCHLD
        stop.signalled = True
        stop_event.set()
      elif number[0] == signal.SIGINT:
        presses += 1
        if presses > 1:
          second_ctrl_c()
        print("stopping; press Ctrl-C again to exit immediately", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

  def exit_when_saved():
    stop_event.wait()
    while not stop.saved and not over.is_set():   # the loop is about to save
      over.wait(POLL)
    if not over.is_set():               # else the handler of Stopped decides how to exit
      print("stopped; nothing is lost. Run the same command again to resume", file=sys.stderr,
            flush=True)
      exit_now(STOPPED)

  def handler(number, _):
    if number == signal.SIGTERM:
      stop.signalled = True

  # A terminal sends Ctrl-C to the data workers too, which would end first, each with a traceback.
  # So SIGINT is blocked, which workers inherit, and only one thread of this process receives it.
  # (Starting Python 3.11's tracker of shared memory unblocks SIGINT, so it is started before.)
  start_tracker()
  signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  old = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
  old_pipe = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  threads = [threading.Thread(target=target, daemon=True) for target in (listen, exit_when_saved)]
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
    stop_event.set()
    os.close(write)
    for thread in threads:
      thread.join()
    os.close(read)
