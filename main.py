"""Trains or evaluates the model of a config, or estimates the memory that training would take.

  python main.py --config=configs/digits.py --workdir=runs/digits
  python main.py --config=configs/digits.py --workdir=runs/digits --mode=eval
  python main.py --config=configs/deit_s.py:deit_base_patch16_224 --mode=memory --devices=32

Running the same command again resumes from the newest checkpoint. Any value of the config can be
overridden: --config.total_steps=40 --config.plan=plan.json --config.plan.tokens.keep=0.5

Exit codes: 0 finished; 2 a mistake, explained in one line; 75 stopped by SIGTERM or Ctrl-C, with
everything saved; 76 another process of the run died; 130 stopped by a second Ctrl-C. After 75 and
76, run the same command again to resume.
"""
import os
import sys

from absl import app, flags, logging

from vitcompact.run import (  # do not import JAX, so SIGTERM is handled while JAX loads
  config_file,
  preemption,
)

CONFIG = flags.DEFINE_string("config", None, "FILE or FILE:ARGUMENT, a file of configs/; override "
                             "values with --config.KEY=VALUE")
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run; created if missing")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval", "memory"], "what to do")
RESTORE = flags.DEFINE_enum("restore", "newest", ["newest", "last_good"], "last_good: if the "
                            "newest checkpoint is damaged, set it aside and use an earlier one")
ALLOW = flags.DEFINE_list("allow", [], "keys of the config, such as total_steps, that may differ "
                          "from those the run was started with")
COORDINATOR = flags.DEFINE_string("coordinator", "", "several processes as one run: auto (Cloud "
                                  "TPU, SLURM, Open MPI) or HOST:PORT of process 0")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "with --coordinator=HOST:PORT: 0, 1, ...")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "with --coordinator=HOST:PORT")
PROFILE = flags.DEFINE_string("profile", "", "START:STEPS, traced into WORKDIR/profile")
WANDB = flags.DEFINE_string("wandb", "", "project of Weights & Biases (pip install wandb)")
PEAK_TFLOPS = flags.DEFINE_float("peak_tflops", 0.0, "of one device, for mfu; 0: look it up")
DEVICES = flags.DEFINE_integer("devices", None, "with --mode=memory: the number of devices")

# Errors that a user can cause. Others are bugs, and keep their traceback.
USER_ERRORS = (ValueError, OSError, FloatingPointError, MemoryError, flags.Error)


def fail(error: Exception, code: int = 2):
  """Prints the error in one line and exits; with --verbosity=1 raises it with its traceback."""
  if logging.get_verbosity() >= logging.DEBUG or "--verbosity=1" in sys.argv:
    raise error
  print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
  leave(code)


def leave(code: int):
  """Ends the process. One of several exits at once, because an orderly exit would wait for the
  others."""
  processes = sys.modules.get("vitcompact.run.processes")
  if processes and processes.is_multiprocess():
    sys.stdout.flush()
    preemption.exit_now(code)
  sys.exit(code)


def parse(argv):
  """Parses flags as absl does, with our error format. Returns the program name and the
  --config.KEY=VALUE overrides."""
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
      raise ValueError("--mode=memory and --devices=N (the number of devices) go together")
    return rest + overrides
  except USER_ERRORS as error:
    fail(error)


def simulate_devices(devices: int):
  """Makes JAX see this many devices on the CPU. Call it before JAX is imported."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") +
                             f" --xla_force_host_platform_device_count={devices}")


def train(config, stopping):
  from vitcompact.run import loop, path, report, watch  # here, so that flag errors need no JAX

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
  """Does what --mode says. This is where JAX is imported."""
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
    if not processes.is_multiprocess():
      raise
    fail(processes.collective_error(error), processes.LOST)


def from_us(record) -> bool:
  """Returns False for Orbax's records: it logs an error at length before raising it (a full disk,
  in a hundred lines), and we print it in one."""
  return "orbax" not in record.pathname


def main(argv):
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # INFO would log every stage of a save
    logging.get_absl_handler().addFilter(from_us)
  if MODE.value == "memory":
    simulate_devices(DEVICES.value)
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
