"""A workdir belongs to one run at a time, of one config, and says at once if it cannot be used."""
import pytest
from PIL import Image

from vitcompact.run import loop, workdir


def test_checkpoints_of_nobody_are_refused_and_left_alone(config, tmp_path):
  (tmp_path / "checkpoints" / "20").mkdir(parents=True)
  with pytest.raises(ValueError, match=r"holds checkpoints but no config.json, which says whose"):
    loop.train(config, tmp_path)
  assert [path.name for path in tmp_path.rglob("*")] == ["checkpoints", "20"]


def test_a_second_run_in_the_same_workdir_is_refused(tmp_path):
  words = r"is being written by another run, process \d+ of"
  with workdir.locked(tmp_path), pytest.raises(ValueError, match=words), workdir.locked(tmp_path):
    pass
  with workdir.locked(tmp_path):   # free again
    pass


@pytest.mark.parametrize("path", ["/dev/null/run", "/proc/run"])
def test_a_workdir_that_cannot_be_written_is_refused(config, path):
  with pytest.raises(ValueError, match=f"--workdir={path} "):
    workdir.check_writable(workdir.pathlib.Path(path))
    workdir.claim(workdir.pathlib.Path(path), loop.resolve(config))


def test_val_that_does_not_fit_train_is_found_before_anything_is_computed(
    config, tmp_path, monkeypatch):
  """Not after the first steps, when the first evaluation reads it."""
  for name in ("train/cat", "val/fish"):
    (tmp_path / "images" / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "0.png")
  config.data.name = f"folder:{tmp_path / 'images'}"
  monkeypatch.setattr(loop, "build", lambda config: pytest.fail("built already"))
  with pytest.raises(ValueError, match=r"val/fish is a class that .*/train does not have"):
    loop.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_lack_of_permission_is_found_before_anything_is_computed(config, tmp_path, monkeypatch):
  """The system is made to say no: who runs tests as root is permitted everything."""
  monkeypatch.setattr(workdir.os, "access", lambda path, mode: path != tmp_path)
  monkeypatch.setattr(loop, "build", lambda config: pytest.fail("built already"))
  with pytest.raises(ValueError, match=f"cannot be written: {tmp_path} gives no permission"):
    loop.train(config, tmp_path / "new" / "run")
