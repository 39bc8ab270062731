"""vitcompact predict: the classes of an image, by name."""
import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import vitcompact as vc
from tests import tiny
from tests.cli import command
from vitcompact import cli
from vitcompact.cli import predict
from vitcompact.data.classes import imagenet_1k

NAMES = ["ant", "bee", "cat", "dog", "elk"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Models and images: photos/{a,b}.png, photos/more/c.jpg, and files that are not images."""
  root = tmp_path_factory.mktemp("serving")
  model = tiny.deit(depth=1)
  vc.save(root / "named.safetensors", model, tiny.init(model), classes=NAMES)
  vc.save(root / "unnamed.safetensors", model, tiny.init(model))
  (root / "photos" / "more").mkdir(parents=True)
  rng = np.random.default_rng(0)
  for name in ("a.png", "b.png", "more/c.jpg"):
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(root / "photos" / name)
  (root / "photos" / ".hidden.png").write_bytes(b"")
  (root / "photos" / "notes.txt").write_text("no image")
  return root


def fails_partly(*arguments):
  """Returns (stdout, stderr) of a command whose exit code must be 1."""
  done = CliRunner().invoke(cli.main, [str(argument) for argument in arguments],
                            catch_exceptions=False)
  assert done.exit_code == 1, done.output
  return done.stdout, done.stderr


def objects(text):
  return [json.loads(line) for line in text.splitlines()]


def test_classes_have_the_names_in_the_file(folder):
  line = command.succeeds("predict", folder / "named.safetensors", folder / "photos" / "a.png")
  path, *best = line.rstrip("\n").split("\t")
  assert path == str(folder / "photos" / "a.png") and len(best) == 5
  assert sorted(text.split()[0] for text in best) == NAMES
  shares = [float(text.split()[1]) for text in best]
  assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=0.05)
  unnamed = command.succeeds("predict", folder / "unnamed.safetensors", path).split("\t")[1:]
  assert [NAMES[int(text.split()[0])] for text in unnamed] == [text.split()[0] for text in best]


def test_control_characters_are_escaped_so_that_a_line_stays_one():
  line = predict.as_line("a\n.png", [(0, "two\twords", 0.5)])
  assert line == "a\\n.png\ttwo\\twords 50.00"


def test_json_output_has_one_object_per_line(folder):
  shown = objects(command.succeeds("predict", folder / "named.safetensors", folder / "photos",
                                   "--json", "--top", 2))
  assert [row["image"] for row in shown] == [
      str(folder / "photos" / name) for name in ("a.png", "b.png", "more/c.jpg")]
  for row in shown:
    first, second = row["classes"]
    assert NAMES[first["index"]] == first["name"] and first["probability"] > second["probability"]


def test_folders_and_patterns_expand_to_their_images(folder):
  named, photos = folder / "named.safetensors", folder / "photos"
  def shown(*images):
    return [line.split("\t")[0].removeprefix(f"{photos}/")
            for line in command.succeeds("predict", named, *images).splitlines()]
  assert shown(photos) == ["a.png", "b.png", "more/c.jpg"]    # hidden files are skipped
  assert shown(photos / "*.png") == ["a.png", "b.png"]
  assert shown(photos / "**" / "*.jpg", photos / "a.png") == ["more/c.jpg", "a.png"]
  assert shown(photos / "**" / "?.png") == ["a.png", "b.png"]
  (folder / "empty").mkdir()
  assert f"no images in {folder}/empty" in command.fails("predict", named, photos, folder / "empty")


def test_a_broken_image_is_named_and_the_others_are_still_predicted(folder, tmp_path):
  named, (a, b) = folder / "named.safetensors", (folder / "photos" / f"{n}.png" for n in "ab")
  broken = tmp_path / "broken.png"
  broken.write_bytes(a.read_bytes()[:900])
  whole = command.succeeds("predict", named, a, b)
  for batch in (1, 3):
    printed, message = fails_partly("predict", named, a, broken, tmp_path / "no.png", b,
                                    "--batch", batch)
    assert printed == whole
    first, second = message.splitlines()
    assert first.startswith(f"error: cannot read {broken}: ")
    assert second == f"error: cannot read {tmp_path}/no.png: No such file or directory; " \
                     "check the file"
  rows = objects(fails_partly("predict", named, broken, b, "--json")[0])
  assert [sorted(row) for row in rows] == [["error", "image"], ["classes", "image"]]
  assert rows[0]["image"] == str(broken) and f"cannot read {broken}" in rows[0]["error"]
  assert command.fails("predict", named, broken).startswith(f"error: cannot read {broken}")


def test_on_a_terminal_the_output_is_an_aligned_table(folder, monkeypatch):
  shown = predict.as_table("a.png", [(2, "cat", 0.9731), (0, "ant\x1b[2J", 0.02)])
  assert shown.endswith("\n  97.31%  cat\n   2.00%  ant\\x1b[2J") and "a.png" in shown
  monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda _: True)
  lines = command.succeeds("predict", folder / "named.safetensors", folder / "photos", "--top", 2)
  lines = lines.splitlines()
  assert len(lines) == 9 and lines[3].endswith("b.png")
  assert {line.index("%") for line in lines if "%" in line} == {7}


def test_labels_are_used_with_a_note_and_a_mere_reordering_is_refused(folder, tmp_path):
  named, image, labels = folder / "named.safetensors", folder / "photos/a.png", tmp_path / "l.txt"
  labels.write_text("Ameise\nBiene\nKatze\nHund\nElch\n\n", encoding="utf-8-sig")
  done = CliRunner().invoke(cli.main, ["predict", str(named), str(image), "--labels", str(labels)])
  assert done.exit_code == 0 and "Ameise " in done.stdout
  assert f"output 0 is 'ant' there and 'Ameise' in {labels}" in done.stderr
  labels.write_text("\n".join(NAMES))
  assert not CliRunner().invoke(cli.main, ["predict", str(named), str(image), "--labels",
                                           str(labels)]).stderr
  labels.write_text("\n".join(reversed(NAMES)))
  message = command.fails("predict", named, image, "--labels", labels)
  assert "output 0 is 'ant' there and 'elk'" in message and "in another order" in message
  labels.write_bytes(b"caf\xe9\n" * 5)
  assert "is not UTF-8 text" in command.fails("predict", named, image, "--labels", labels)


def test_a_model_of_imagenets_classes_without_names_gets_imagenets(folder, tmp_path):
  model = tiny.deit(num_classes=1000, depth=1)
  variables, path = tiny.init(model), tmp_path / "imagenet.safetensors"
  vc.save(path, model, variables)
  image = str(folder / "photos" / "a.png")
  done = CliRunner().invoke(cli.main, ["predict", str(path), image, "--json"])
  row, = objects(done.stdout)
  assert [item["name"] for item in row["classes"]] == [
      imagenet_1k()[item["index"]] for item in row["classes"]]
  assert f"{path} has no class names: using those of ImageNet-1k" in done.stderr
  vc.save(path, model, variables, classes=[f"c{i}" for i in range(1000)], force=True)
  done = CliRunner().invoke(cli.main, ["predict", str(path), image])
  assert "\tc" in done.stdout and not done.stderr


@pytest.mark.parametrize("name, imagenets", [
    ("deit_tiny_patch16_224", True), ("vit_base_patch16_clip_224", False),
    ("vit_base_patch16_clip_224.laion2b_ft_in1k", True),
    ("eva02_tiny_patch14_336.mim_in22k_ft_in1k", True)])
def test_a_thousand_outputs_are_imagenets_only_if_the_weights_say_so(name, imagenets):
  """CLIP's heads are projections, and heads without a tag may be of any classes."""
  model = vc.create_model(name)
  assert model.num_classes == 1000
  names, note = predict.class_names("a.safetensors", model, None, None)
  assert (names[0] == imagenet_1k()[0], bool(note)) == (imagenets, imagenets)
  assert imagenets or names == [str(i) for i in range(1000)]


@pytest.mark.parametrize("fields", [{"in_chans": 1}, {"image_size": (16, 48)}])
def test_models_for_grey_or_rectangular_images_predict(folder, tmp_path, fields):
  model = tiny.deit(depth=1, **fields)
  variables = tiny.init(model)
  vc.save(tmp_path / "m.safetensors", model, variables)
  path = folder / "photos" / "a.png"
  row, = objects(command.succeeds("predict", tmp_path / "m.safetensors", path, "--json"))
  logits = tiny.apply(model, variables, vc.preprocess(model)(path)[None])[0]
  assert [item["index"] for item in row["classes"]] == np.argsort(-logits).tolist()


def test_a_photograph_is_rotated_by_its_exif_data_on_request(folder, tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6
  with Image.open(folder / "photos" / "a.png") as image:
    image.save(tmp_path / "turned.png", exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
  def shares(name, *options):
    row, = objects(command.succeeds("predict", folder / "named.safetensors", tmp_path / name,
                                    "--json", *options))
    return row["classes"]
  assert shares("turned.png", "--exif-transpose") == shares("upright.png")
  assert shares("turned.png") != shares("upright.png")
