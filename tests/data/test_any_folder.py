"""Any folder layout: each entry is used or named in a message, and nothing on disk changes."""
import contextlib
import io
import logging
import os
import pathlib
import re
import tempfile

from hypothesis import event, given
from hypothesis import strategies as st
from PIL import Image

from vitcompact.data import pipeline, prepare
from vitcompact.data.decode import SUFFIXES, printable

_file = io.BytesIO()
Image.new("RGB", (3, 2), (1, 2, 3)).save(_file, "PNG")
GOOD = _file.getvalue()

TEXT = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1,
               max_size=8).filter(lambda name: name not in (".", ".."))
NAMES = st.sampled_from(("cat", "Cat", "dog", "1", "2", "10", ".ipynb_checkpoints", ".git", "train",
                         "__MACOSX", "a b", "é", "e\u0301", "caf\udce9", "x\ny", "-", "%s")) | TEXT
FILES = st.builds("".join, st.tuples(NAMES, st.sampled_from(
    ("", ".png", ".PNG", ".jpg", ".tif", ".gif", ".txt", ".npy", ".jpg.txt", ".tar.png"))))
CLASS = st.dictionaries(FILES, st.sampled_from((GOOD,) * 9 + (b"", b"text", None)), max_size=4)


@st.composite
def layouts(draw):
  """Draws {split: ({class: {file: contents}}, files next to the classes)}; most can be read."""
  names = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
  layout = {}
  often = st.sampled_from((True,) * 9 + (False,))
  others = st.sampled_from((["val"], ["test"], ["val", "test"], ["test", "val", "valid"],
                            ["valid"]))
  for split in ["train", *draw(others)]:
    here = draw(st.lists(st.sampled_from(names), min_size=split == "val", unique=True))
    if split == "train":
      here = names
    elif not draw(often):
      here.append(draw(NAMES))
    classes = {name: draw(CLASS) for name in here}
    for files in classes.values():
      if draw(often):
        files["0.png"] = GOOD
    layout[split] = classes, draw(st.lists(FILES, max_size=2))
  return layout


def hidden(name):
  return name.startswith(".") or name == "__MACOSX"


def write(root, layout):
  """Writes a layout. None as contents makes a folder in place of a file."""
  for split, (classes, stray) in layout.items():
    for name, files in classes.items():
      (root / split / name).mkdir(parents=True, exist_ok=True)
      for file, data in files.items():
        if data is None:
          (root / split / name / file).mkdir()
        else:
          (root / split / name / file).write_bytes(data)
    (root / split).mkdir(parents=True, exist_ok=True)
    for file in stray:
      if not (root / split / file).exists():
        (root / split / file).write_bytes(GOOD)


def contents(root):
  return {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


@contextlib.contextmanager
def warnings_of():
  """Collects the text of log messages instead of showing them."""
  texts, logger = [], logging.getLogger("absl")
  handler = logging.Handler()
  handler.emit = lambda record: texts.append(record.getMessage())
  logger.addHandler(handler)
  shown, logger.propagate = logger.propagate, False
  try:
    yield texts
  finally:
    logger.removeHandler(handler)
    logger.propagate = shown


def check_text(text, root):
  assert str(root) in text and not re.search(r"[\x00-\x1f\x7f]", text)
  text.encode("utf-8")


def list_by_walking(root, split, classes):
  """Returns [(path, label)] and the number of skipped entries, by walking, without the library."""
  used, left = [], 0
  for entry in os.listdir(root / split):
    left += hidden(entry) or not (root / split / entry).is_dir()
  for label, name in enumerate(classes):
    if not (root / split / name).is_dir():
      continue
    for file in sorted(os.listdir(root / split / name)):
      path = root / split / name / file
      if hidden(file) or path.is_dir() or os.path.splitext(file)[1].lower() not in SUFFIXES:
        left += 1
      else:
        used.append((str(path), label))
  return used, left


@given(layouts())
def test_any_layout_is_read_as_it_is_or_rejected_in_one_line(layout):
  with tempfile.TemporaryDirectory() as root, warnings_of() as texts:
    root = pathlib.Path(root).resolve()
    write(root, layout)
    before = contents(root)
    name = f"folder:{root}"
    classes = sorted(entry for entry in os.listdir(root / "train")
                     if (root / "train" / entry).is_dir() and not hidden(entry))
    try:
      assert pipeline.class_names(name) == tuple(map(printable, classes))
      for split in pipeline.SPLITS:
        images = pipeline.source(name, split, image_size=8)
        used, left = list_by_walking(root, images.folder.name, classes)
        assert [(images.path(i), int(images.labels[i])) for i in range(len(images))] == used
        messages = [text for text in texts if text.startswith(f"{images.folder}: ")]
        assert len(messages) == (left > 0)
        assert left == sum(int(count) for text in messages
                           for count in re.findall(r"(?:left out:|\),) (\d+) ", text))
        read_all(images, used)
      for text in texts:
        check_text(text, root)
      event("read")
    except ValueError as error:
      check_text(str(error), root)
      event("refused")
    assert contents(root) == before


def read_all(images, used):
  """Checks that each file is an image with the label of its folder, or is named in an error."""
  for i, (path, label) in enumerate(used):
    try:
      example = images[i]
      assert example["image"].shape == (2, 3, 3) and example["label"] == label
      assert pathlib.Path(path).read_bytes() == GOOD
    except ValueError as error:
      assert pathlib.Path(path).read_bytes() != GOOD
      assert printable(path) in str(error) and "\n" not in str(error)


@given(layouts())
def test_any_layout_is_prepared_as_it_is_read_or_rejected_in_one_line(layout):
  with tempfile.TemporaryDirectory() as root, warnings_of():
    root = pathlib.Path(root).resolve()
    write(root / "in", layout)
    before = contents(root / "in")
    try:
      prepare.prepare_folder(root / "in", root / "out", say=lambda text: None)
    except ValueError as error:
      check_text(str(error), root)
      event("refused")
    else:
      event("prepared")
      folder, records = f"folder:{root}/in", f"arrayrecord:{root}/out"
      assert pipeline.class_names(folder) == pipeline.class_names(records)
      for split in pipeline.SPLITS:
        a, b = (pipeline.source(n, split, image_size=8) for n in (folder, records))
        assert [int(label) for label in a.labels] == [b[i]["label"] for i in range(len(b))]
    assert contents(root / "in") == before
