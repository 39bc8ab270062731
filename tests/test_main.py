"""A user's mistake is reported in one line with the value and a remedy, and exit code 2."""
import logging
import pathlib
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

import main
from vitcompact.run import loop, preemption, report

DIGITS = "--config=configs/digits.py"
ROOT = pathlib.Path(main.__file__).parent


@pytest.fixture
def run(monkeypatch, tmp_path):
  """A function that runs `python main.py ARGUMENTS` in this process."""
  monkeypatch.chdir(ROOT)

  def call(*arguments, workdir=tmp_path / "run"):
    arguments = ["main.py", *arguments, f"--workdir={workdir}"]
    monkeypatch.setattr(sys, "argv", arguments)
    main.main(main.parse(arguments))

  with flagsaver.flagsaver():
    yield call
  flags.FLAGS.unparse_flags()


@pytest.mark.parametrize("arguments, words", [
    (["--config=configs/digits.py", "--config.totl_steps=3"],
     "unknown key config.totl_steps; did you mean total_steps"),
    (["--config=configs/digits.py", "--config.total_steps=many"],
     "config.total_steps='many': must be a whole number"),
    (["--config=configs/digts.py"],
     "configs/digts.py: no such file; there are configs/base.py, configs/biformer"),
    (["--config=configs/sparse_digits.py:foo"], "sparse_digits.py:foo: KeyError: 'foo'; the text"),
    (["--config=configs/evit_deit_s.py:half"],
     "'half' is not an argument of this config, which takes scratch, runlocal"),
    (["--config=configs/digits.py:x"],
     "'x' is not an argument of this config, which takes dense, runlocal"),
    (["--mode=train"], "--config is missing"),
    ([DIGITS, "--mode=test"], "train|eval|memory"),
    ([DIGITS, "--config.seed=9223372036854775808"], "config.seed=9223372036854775808: must be"),
    ([DIGITS, "--config.optim.rates=[['(', 1.0, 0]]"], "with a regular expression: missing )"),
    ([DIGITS, '--config.plan={"tokens": {"method": "evit", "blocks": [[1]]}}'], "EViT(blocks=((1"),
    ([DIGITS, "--config.plan.tokens.keep=0.5"], 'tokens={\'keep\': 0.5}: must be null or an obj'),
    ([DIGITS, "--config.plan.heads.layout=hexagon"], "layout='hexagon'"),
    ([DIGITS, "--config.eval_batch_size=1000000000"], "eval_batch_size=1000000000: must be a who"),
    ([DIGITS, "--config.eval_batch_size=100000000000000"], "eval_batch_size=100000000000000: must"),
    ([DIGITS, "--config.reconstruct.steps=5"], "is a setting of Sparsifiner, which the plan does"),
    ([DIGITS, "--config.optim.warmup_steps=1001"], "longer than config.total_steps=1000"),
    ([DIGITS, "--allow=totl_steps"], "--allow=totl_steps is not a key of a config"),
    ([DIGITS, "--workdr=x"], "Did you mean: workdir"),
    ([DIGITS, "config.total_steps=3"], "unexpected arguments ['config.total_steps=3']"),
    ([DIGITS, "--config.model.name=deit_tny_patch16_224"], "deit_tiny_patch16_224"),
    ([DIGITS, "--config.data.name=digit"], "digits"),
    ([DIGITS, "--config.data.name=folder:/nowhere/at/all"], "/nowhere/at/all"),
    ([DIGITS, "--config.model.image_size=25"], "image_size=25"),
    ([DIGITS, "--config.model.heads=5"], "heads=5"),
    ([DIGITS, "--config.model.heads=0"], "heads=0: must be a whole number of at least 1"),
    ([DIGITS, "--config.model.dtype=float33"], "dtype='float33': must be one of"),
    ([DIGITS, '--config.plan={"ffn": {"method": "cffn", "rank_ratio": "half"}}'],
     "CFFN(rank_ratio='half')"),
    ([DIGITS, "--config.init_from=nowhere.safetensors"], "nowhere.safetensors"),
    (["--config", "configs/digts.py"], "--config=configs/digts.py: no such file"),
    ([DIGITS, "--config.plan=nowhere.json"], "nowhere.json"),
    ([DIGITS, '--config.plan={"heds": {}}'], "did you mean 'heads'"),
    ([DIGITS, '--config.plan={"blocks": {"12": {"heads": null}}}'], "block 12"),
    ([DIGITS, "--config.mesh.data=3"], "does not multiply out"),
    ([DIGITS, "--config.batch_size=4000"], "batch_size=4000"),
    ([DIGITS, "--config.batch_size=60"], "60 cannot be split over 8 devices"),
    ([DIGITS, "--config.eval_batch_size=60"], "eval_batch_size=60 cannot be split over 8 devices"),
    ([DIGITS, "--mode=eval"], "holds no checkpoints"),
    ([DIGITS, "--mode=memory"], "--mode=memory and --devices=N"),
    ([DIGITS, "--devices=4"], "--mode=memory and --devices=N"),
    ([DIGITS, "--profile=5"], "--profile='5' must be START:STEPS"),
    ([DIGITS, "--restore=oldest"], "newest|last_good"),
    ([DIGITS, "--process_id=1"], "need --coordinator=HOST:PORT"),
    ([DIGITS, "--coordinator=here"], "--coordinator='here' is neither 'auto' nor HOST:PORT"),
    ([DIGITS, "--coordinator=h:1"], "--coordinator=h:1 needs --process_id and --num_processes"),
    ([DIGITS, "--coordinator=h:1", "--process_id=2", "--num_processes=2"], "must be 0 to 1"),
    ([DIGITS, "--config.optim.skip_nonfinite=-1"], "skip_nonfinite=-1: must be a whole number of"),
])
def test_a_mistake_gives_one_line_and_leaves_no_directory(run, capsys, tmp_path, arguments, words):
  with pytest.raises(SystemExit) as stop:
    run(*arguments)
  assert stop.value.code == 2
  lines = capsys.readouterr().err.splitlines()
  lines = [line for line in lines if line.startswith("error: ")]
  assert len(lines) == 1
  assert words in lines[0]
  assert not list(tmp_path.iterdir())


def test_orbaxs_log_of_an_error_that_it_raises_is_not_shown():
  """For a full disk, that is a hundred lines before our one line; our own warnings are shown."""
  record = logging.LogRecord("absl", logging.ERROR, "site-packages/orbax/x.py", 1, "", (), None)
  assert not main.from_us(record)
  record.pathname = "vitcompact/data/pipeline.py"
  assert main.from_us(record)


@pytest.mark.parametrize("text, words", [
    ("def get_config(:", "not Python: invalid syntax, line 1"),
    ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
    ("x = 1", "has no attribute 'get_config'"),
    ("def get_config():\n  return 3", "TypeError: "),
    ("def get_config():\n  return {'totl_steps': 3}", "unknown key config.totl_steps"),
    ("def get_config():\n  return {'data': 3}", "unknown key config.data; did you mean"),
    ("def get_config():\n  return {'total_steps': 3}", "missing config.model.name"),
    ("\0", "not Python"),
])
def test_a_file_that_is_not_a_config_is_named(run, capsys, tmp_path, text, words):
  (tmp_path / "mine.py").write_text(text)
  with pytest.raises(SystemExit) as stop:
    run(f"--config={tmp_path / 'mine.py'}")
  assert stop.value.code == 2
  [line] = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ") and words in line


def test_verbosity_shows_the_traceback(run):
  with pytest.raises(ValueError, match="must be a whole number of steps at least 1"):
    run(DIGITS, "--config.total_steps=0", "--verbosity=1")


def test_the_library_gets_the_mode_the_overrides_and_the_result(run, monkeypatch, tmp_path):
  """Training ends with a report on its result; evaluation does not."""
  plan = tmp_path / "plan.json"
  plan.write_text('{"ffn": {"method": "cffn"}}')
  seen = []

  def record(name):
    def call(config, workdir, restore_from, allow, **more):
      seen.append((name, config.total_steps, config.plan, workdir, restore_from, allow))
      return "result"
    return call

  class Receipt:
    def to_markdown(self):
      return "the receipt"

  monkeypatch.setattr(loop, "train", record("train"))
  monkeypatch.setattr(loop, "evaluate", record("eval"))
  monkeypatch.setattr(report, "report", lambda *arguments: seen.append(arguments) or Receipt())
  for mode in ("train", "eval"):
    run(DIGITS, f"--mode={mode}", "--config.total_steps=7", f"--config.plan={plan}",
        "--restore=last_good", "--allow=total_steps,seed", workdir="w")
  last = (7, str(plan), "w", "last_good", ["total_steps", "seed"])
  assert seen == [("train", *last), ("result", "w"), ("eval", *last)]


@pytest.mark.parametrize("error, code, words", [
    (preemption.Stopped(7), preemption.STOPPED, "stopped at step 7; saved. Run the same command"),
    (MemoryError("Unable to allocate 1 TiB"), 2, "error: Unable to allocate 1 TiB"),
    (FloatingPointError("loss is nan"), 2, "error: loss is nan")])
def test_the_exit_code_says_how_a_run_ended(run, monkeypatch, capsys, error, code, words):
  def ended(*_, **__):
    raise error

  monkeypatch.setattr(loop, "train", ended)
  with pytest.raises(SystemExit) as left:
    run(DIGITS)
  assert left.value.code == code
  assert words in capsys.readouterr().err


def test_a_config_may_follow_its_flag_as_a_separate_word(run, capsys):
  with pytest.raises(SystemExit):
    run("--config", "configs/digits.py", "--config.total_steps=0")
  assert "config.total_steps=0: must be a whole number of steps" in capsys.readouterr().err
