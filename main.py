"""Trains or evaluates what a config describes, or says what memory that would take.

  python main.py --config=configs/digits.py --workdir=runs/digits
  python main.py --config=configs/digits.py --workdir=runs/digits --mode=eval
  python main.py --config=configs/deit_b.py --mode=plan --devices=32 --config.batch_size=4096

The same command again goes on from the newest checkpoint. Any value of the config can be given on
the command line: --config.total_steps=40 --config.plan=plan.json

Exit codes: 0 done; 2 a mistake, with one line that says which; 75 stopped by SIGTERM with all
saved, and 76 another process of the run is gone: for both the same command goes on.
"""
import ast
import os
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from vitcompact.run import preemption  # needs no JAX: SIGTERM is heard while that is loaded

CONFIG = config_flags.DEFINE_config_file("config", help_string="a file of configs/")
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run; made when missing")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval", "plan"], "what to do")
RESTORE = flags.DEFINE_enum("restore", "newest", ["newest", "last_good"], "last_good: where the "
                            "newest checkpoint is damaged, set it aside and take one before it")
COORDINATOR = flags.DEFINE_string("coordinator", "", "several processes as one run: auto (Cloud "
                                  "TPU, SLURM, Open MPI) or HOST:PORT of process 0")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "with --coordinator=HOST:PORT: 0, 1, ...")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "with --coordinator=HOST:PORT")
PROFILE = flags.DEFINE_string("profile", "", "START:STEPS, traced into WORKDIR/profile")
WANDB = flags.DEFINE_string("wandb", "", "project of Weights & Biases (pip install wandb)")
PEAK_TFLOPS = flags.DEFINE_float("peak_tflops", 0.0, "of one device, for mfu; 0: where it is known")
DEVICES = flags.DEFINE_integer("devices", None, "with --mode=plan: how many there would be")

# What a user can cause. Others are mistakes of ours, and show where they happened.
USER_ERRORS = (ValueError, OSError, FloatingPointError, flags.Error)


def fail(error: Exception, code: int = 2):
  """One line and the exit code; with --verbosity=1 the whole traceback."""
  if logging.get_verbosity() >= logging.DEBUG or "--verbosity=1" in sys.argv:
    raise error
  print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
  leave(code)


def leave(code: int):
  """Ends the process; one of several at once: an orderly exit would wait for all the others."""
  processes = sys.modules.get("vitcompact.run.processes")
  if processes and processes.several():
    sys.stdout.flush()
    preemption.leave(code)
  sys.exit(code)


def unquoted(text: str) -> str:
  """The text itself where it is a literal of Python (ml_collections quotes its errors twice)."""
  try:
    return str(ast.literal_eval(text))
  except (ValueError, SyntaxError):
    return text


def parse(argv):
  """absl's own parser, with errors in our form."""
  try:
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
      flag, equals, value = argument.partition("=")
      path = value if equals else following   # absl also takes "--config FILE"
      if flag == "--config" and not pathlib.Path(path.partition(":")[0]).is_file():
        there = sorted(str(path) for path in pathlib.Path("configs").glob("*.py"))
        raise ValueError(f"--config={path}: no such file; there are {', '.join(there)}")
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      raise ValueError(f"unexpected arguments {rest[1:]}; options are --config, --workdir, --mode")
    for flag in (CONFIG, WORKDIR):
      if not flag.present and not (flag is WORKDIR and MODE.value == "plan"):
        raise ValueError(f"--{flag.name} is missing, as in: python main.py "
                         "--config=configs/digits.py --workdir=runs/digits")
    if (MODE.value == "plan") != DEVICES.present:
      raise ValueError("--mode=plan and --devices=N (how many there would be) go together")
    return rest
  except AttributeError as error:  # ml_collections: an unknown key; its text names close ones
    fail(ValueError(f"--config has no key {unquoted(str(error))}"))
  except LookupError as error:     # of get_config, which ml_collections passes on
    fail(ValueError(refused_by_config(argv, f"{type(error).__name__}: {error}")))
  except USER_ERRORS as error:
    if "Error whilst parsing config file" in str(error):   # with the whole traceback
      error = ValueError(refused_by_config(argv, str(error).strip().splitlines()[-1]))
    fail(error)


def refused_by_config(argv, why: str) -> str:
  flag = next((argument for argument in argv if argument.startswith("--config=")), "--config")
  return f"{flag}: {why}; what follows the colon is for the file's get_config, see its docstring"


def pretend(devices: int):
  """Makes JAX see that many devices, on the processor. Before JAX is imported."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") +
                             f" --xla_force_host_platform_device_count={devices}")


def train(stopping):
  from vitcompact.run import loop, report, watch  # late: a mistake in a flag needs no JAX

  watching = watch.Watching(PROFILE.value, WANDB.value, PEAK_TFLOPS.value)
  result = loop.train(CONFIG.value, WORKDIR.value, stopping=stopping, restore_from=RESTORE.value,
                      watching=watching)
  receipt = report.report(result, WORKDIR.value)
  if loop.process_ids()["process_index"] == 0:
    print(receipt.to_markdown())


def run(stopping):
  """Does what --mode says; from here on JAX is loaded."""
  from vitcompact.run import loop, memory, processes

  processes.connect(COORDINATOR.value, PROCESS_ID.value, NUM_PROCESSES.value)
  try:
    if MODE.value == "plan":
      print(memory.plan(CONFIG.value))
    elif MODE.value == "eval":
      loop.evaluate(CONFIG.value, WORKDIR.value, restore_from=RESTORE.value)
    else:
      train(stopping)
  except processes.PEER_ERRORS as error:
    if not processes.several():
      raise
    fail(processes.lost(error), processes.LOST)


def from_us(record) -> bool:
  """Not what Orbax logs before it raises it: of a full disk, a hundred lines before our one."""
  return "orbax" not in record.pathname


def main(_):
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # absl's INFO would tell every step of a save
    logging.get_absl_handler().addFilter(from_us)
  if MODE.value == "plan":
    pretend(DEVICES.value)
  with preemption.on_sigterm() as stopping:
    try:
      run(stopping)
    except USER_ERRORS as error:
      fail(error)
    except preemption.Stopped as stopped:
      print(stopped, file=sys.stderr, flush=True)
      leave(preemption.STOPPED)


if __name__ == "__main__":
  app.run(main, flags_parser=parse)
