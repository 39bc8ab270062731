"""Trains or evaluates what a config describes, or says what memory that would take.

  python main.py --config=configs/digits.py --workdir=runs/digits
  python main.py --config=configs/digits.py --workdir=runs/digits --mode=eval
  python main.py --config=configs/deit_s.py:deit_base_patch16_224 --mode=memory --devices=32

The same command again goes on from the newest checkpoint. Any value of the config can be given on
the command line: --config.total_steps=40 --config.plan=plan.json --config.plan.tokens.keep=0.5

Exit codes: 0 done; 2 a mistake, with one line that says which; 75 stopped by SIGTERM or Ctrl-C with
all saved, and 76 another process of the run is gone: for both the same command goes on; 130 ended
by a second Ctrl-C.
"""
import os
import sys

from absl import app, flags, logging

from vitcompact.run import (  # need no JAX: SIGTERM is heard while that is loaded
  config_file,
  preemption,
)

CONFIG = flags.DEFINE_string("config", None, "FILE or FILE:ARGUMENT, a file of configs/; and "
                             "--config.KEY=VALUE for each value that is to be another")
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run; made when missing")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval", "memory"], "what to do")
RESTORE = flags.DEFINE_enum("restore", "newest", ["newest", "last_good"], "last_good: where the "
                            "newest checkpoint is damaged, set it aside and take one before it")
ALLOW = flags.DEFINE_list("allow", [], "keys of the config, such as total_steps, by which a run "
                          "may differ from how it began")
COORDINATOR = flags.DEFINE_string("coordinator", "", "several processes as one run: auto (Cloud "
                                  "TPU, SLURM, Open MPI) or HOST:PORT of process 0")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "with --coordinator=HOST:PORT: 0, 1, ...")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "with --coordinator=HOST:PORT")
PROFILE = flags.DEFINE_string("profile", "", "START:STEPS, traced into WORKDIR/profile")
WANDB = flags.DEFINE_string("wandb", "", "project of Weights & Biases (pip install wandb)")
PEAK_TFLOPS = flags.DEFINE_float("peak_tflops", 0.0, "of one device, for mfu; 0: where it is known")
DEVICES = flags.DEFINE_integer("devices", None, "with --mode=memory: how many there would be")

# What a user can cause. Others are mistakes of ours, and show where they happened.
USER_ERRORS = (ValueError, OSError, FloatingPointError, MemoryError, flags.Error)


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
    preemption.exit_now(code)
  sys.exit(code)


def parse(argv):
  """absl's own parser, with errors in our form. Returns the program and the --config.KEY=VALUEs."""
  try:
    argv, overrides = config_file.split(argv)
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      raise ValueError(f"unexpected arguments {rest[1:]}; options are --config, --workdir, --mode")
    for flag in (CONFIG, WORKDIR):
      if not flag.value and not (flag is WORKDIR and MODE.value == "memory"):
        raise ValueError(f"--{flag.name} is missing, as in: python main.py "
                         "--config=configs/digits.py --workdir=runs/digits")
    if (MODE.value == "memory") != DEVICES.present:
      raise ValueError("--mode=memory and --devices=N (how many there would be) go together")
    return rest + overrides
  except USER_ERRORS as error:
    fail(error)


def pretend(devices: int):
  """Makes JAX see that many devices, on the processor. Before JAX is imported."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") +
                             f" --xla_force_host_platform_device_count={devices}")


def train(config, stopping):
  from vitcompact.run import loop, path, report, watch  # late: a mistake in a flag needs no JAX

  watching = watch.Watching(PROFILE.value, WANDB.value, PEAK_TFLOPS.value)
  options = {"stopping": stopping, "restore_from": RESTORE.value, "watching": watching,
             "allow": ALLOW.value}
  if path.budget_of(config):
    receipt = path.run(config, WORKDIR.value, **options)
  else:
    result = loop.train(config, WORKDIR.value, **options)
    receipt = report.report(result, WORKDIR.value)
  if loop.process_ids()["process_index"] == 0:
    print(receipt.to_markdown())


def run(config, stopping):
  """Does what --mode says; from here on JAX is loaded."""
  from vitcompact.run import loop, memory, processes

  processes.connect(COORDINATOR.value, PROCESS_ID.value, NUM_PROCESSES.value)
  try:
    if MODE.value == "memory":
      print(memory.table(config))
    elif MODE.value == "eval":
      loop.evaluate(config, WORKDIR.value, restore_from=RESTORE.value, allow=ALLOW.value)
    else:
      train(config, stopping)
  except processes.PEER_ERRORS as error:
    if not processes.several():
      raise
    fail(processes.lost(error), processes.LOST)


def from_us(record) -> bool:
  """Not what Orbax logs before it raises it: of a full disk, a hundred lines before our one."""
  return "orbax" not in record.pathname


def main(argv):
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # absl's INFO would tell every step of a save
    logging.get_absl_handler().addFilter(from_us)
  if MODE.value == "memory":
    pretend(DEVICES.value)
  with preemption.on_signal() as stopping:
    try:
      run(config_file.load(CONFIG.value, argv[1:]), stopping)
    except USER_ERRORS as error:
      fail(error)
    except preemption.Stopped as stopped:
      print(stopped, file=sys.stderr, flush=True)
      leave(preemption.STOPPED)


if __name__ == "__main__":
  app.run(main, flags_parser=parse)
