"""The page classifies images in a browser as ONNX Runtime does in Python, and times each model."""
import base64
import io
import json
import os
import pathlib
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

import vitcompact as vc
from tests import tiny
from tests.browser import browser
from vitcompact.data.evaluation import Preprocess

onnx = pytest.importorskip("onnx")
pytest.importorskip("jax2onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from vitcompact.export import onnx_file, page  # noqa: E402
from vitcompact.export.program import Program  # noqa: E402

CLASSES = ("tabby", "</script><b>bold", "ÄÖ & co", "@FILES@", "fox")
KEEP = vc.Plan.from_dict({"tokens": {"method": "evit", "keep": 0.6, "blocks": [1]}})


def exported(plan, **fields):
  model = tiny.deit(plan, width=48, image_size=64)
  return Program(model, tiny.init(model, spread=0.1), tiny.preprocess(64, mean=(0.5, 0.4, 0.3)),
                 classes=CLASSES, **fields)


@pytest.fixture(scope="module")
def programs():
  return {"dense": exported(vc.Plan()), "EViT <0.6>": exported(KEEP, tokens=True, pixels=True)}


@pytest.fixture(scope="module")
def files(programs, tmp_path_factory):
  folder = tmp_path_factory.mktemp("onnx")
  for i, program in enumerate(programs.values()):
    onnx_file.write(program, folder / f"{i}.onnx")
  return {label: folder / f"{i}.onnx" for i, label in enumerate(programs)}


@pytest.fixture(scope="session")
def runtime(request, tmp_path_factory) -> pathlib.Path:
  """The two files of onnxruntime-web in a page; fetched once and kept in pytest's cache."""
  cache = getattr(request.config, "cache", None)   # the cache can be disabled
  place = cache.mkdir if cache else tmp_path_factory.mktemp
  folder = place("onnxruntime-web") / page.VERSION
  if not folder.exists():
    if not shutil.which("npm"):
      pytest.skip("no npm on PATH, which fetches onnxruntime-web")
    new = folder.with_name(f"partial-{os.getpid()}")
    new.mkdir(exist_ok=True)
    try:
      done = subprocess.run(["npm", "pack", "--silent", f"onnxruntime-web@{page.VERSION}"], cwd=new,
                            capture_output=True, text=True, timeout=300)
      if done.returncode:
        pytest.skip(f"npm cannot fetch onnxruntime-web: {done.stderr.strip()[-200:]}")
      with tarfile.open(next(new.glob("*.tgz"))) as packed:
        for name in (page.SCRIPT, page.WEBASSEMBLY):
          (new / name).write_bytes(packed.extractfile(f"package/dist/{name}").read())
      next(new.glob("*.tgz")).unlink()
      if not folder.exists():   # another process may have been faster
        new.rename(folder)
    finally:
      shutil.rmtree(new, ignore_errors=True)
  return folder


@pytest.fixture(scope="module")
def opened(files, runtime, tmp_path_factory):
  """A browser without network, showing the page of both models."""
  folder = tmp_path_factory.mktemp("page")
  page.write(folder / "page.html", files, runtime)
  with browser(folder / "profile") as it:
    it.ask("Page.navigate", url=(folder / "page.html").as_uri())
    it.wait("document.readyState === 'complete' && notice.textContent === 'Ready.'")
    yield it
    assert not it.errors


def photograph(width, height, mode="RGB"):
  return Image.fromarray(load_sample_image("china.jpg")).resize((width, height)).convert(mode)


def png(image) -> bytes:
  out = io.BytesIO()
  image.save(out, "png")
  return out.getvalue()


def as_file(content: bytes, name: str) -> str:
  """Returns a JavaScript expression for a File."""
  return (f"new File([Uint8Array.from(atob('{base64.b64encode(content).decode()}'), "
          f"c => c.charCodeAt(0))], {json.dumps(name)})")


def test_an_image_is_classified_and_timed_and_kept_patches_drawn(opened, files, programs, tmp_path):
  image = photograph(64, 64)
  (tmp_path / "china.png").write_bytes(png(image))
  opened.choose("#files", tmp_path / "china.png")
  opened.wait("shown.length === 1 && notice.textContent.startsWith('china.png: dense ')")
  results = opened.run("shown[0].results.map(({logits, kept, times}) => ({logits, kept, times}))")
  seen = opened.run("[...document.querySelectorAll('tbody tr')].map("
                    "row => [...row.cells].map(cell => cell.textContent))")
  for i, (label, program) in enumerate(programs.items()):
    session = onnxruntime.InferenceSession(files[label])
    prepared = program.prepared(program.preprocess.resize(image))
    logits, *kept = session.run(None, {"images": prepared[None]})
    np.testing.assert_allclose(results[i]["logits"], logits[0], rtol=0, atol=1e-4)
    assert len(results[i]["times"]) == 7 and min(results[i]["times"]) > 0
    chances = np.exp(logits[0] - logits.max()) / np.exp(logits[0] - logits.max()).sum()
    order = (-chances).argsort()
    assert [row[i + 1] for row in seen[:5]] == [f"{CLASSES[k]}: {100 * chances[k]:.2f}%"
                                                for k in order]
    if kept:
      assert results[i]["kept"] == kept[0][0].tolist() and 0 < kept[0].sum() < 64
      # Dropped patches are whitened: compare their brightness with the other model's picture.
      same, drawn = (np.array(opened.run(
          f"[...document.querySelectorAll('canvas')[{j}].getContext('2d')"
          ".getImageData(0, 0, 64, 64).data]")).reshape(64, 64, 4)[..., :3] for j in (0, 1))
      np.testing.assert_array_equal(same, np.asarray(image))
      dimmed = np.abs(drawn - same).sum(-1).reshape(8, 8, 8, 8).sum((1, 3)).reshape(-1) > 0
      np.testing.assert_array_equal(dimmed, 1 - kept[0][0])
      assert seen[7] == ["survivors", "not recorded", f"{int(kept[0].sum())} of 64 patches"]
    else:
      assert results[i]["kept"] is None
  medians = [np.median(result["times"]) for result in results]
  assert [row[0] for row in seen] == [*"12345", "milliseconds", "speed", "survivors"]
  np.testing.assert_allclose(list(map(float, seen[5][1:])), medians, atol=0.051)
  np.testing.assert_allclose([float(ratio[:-1]) for ratio in seen[6][1:]],
                             [1, medians[0] / medians[1]], atol=0.0051)


@pytest.mark.parametrize(("size", "mode", "fields"), [
    ((100, 75), "RGB", {"crop": 0.875}), ((75, 100), "RGB", {"interpolation": "bilinear"}),
    ((203, 100), "RGB", {"image_size": [48, 64], "crop": 0.9, "interpolation": "lanczos"}),
    ((100, 75), "L", {"mean": [0.5], "std": [0.5], "crop": 0.95, "interpolation": "box"}),
    ((100, 75), "RGB", {"mean": [0.5], "std": [0.5], "interpolation": "hamming"}),
    ((40, 23), "RGB", {"crop": None}), ((91, 120), "RGB", {"crop": 0.9, "crop_mode": "squash"}),
    ((131, 60), "RGB", {"crop": 0.9, "crop_mode": "border", "mean": [0.5, 0.4, 0.1]}),
    ((300, 60), "RGB", {"crop": 1.0, "crop_mode": "border", "mean": [0.5, 0.4, 0.1]}),
    ((32, 32), "RGB", {"image_size": [32, 32], "crop": 0.875}),
])
def test_images_are_preprocessed_to_the_same_grey_levels(opened, size, mode, fields):
  fields = {"image_size": [64, 64], "crop": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3,
            "interpolation": "bicubic", "crop_mode": "center", **fields}
  content = png(photograph(*size, mode))
  want = Preprocess(**{**fields, "image_size": tuple(fields["image_size"])})
  got = opened.run(f"""(async () => {{
    const image = await decoded({as_file(content, "china.png")});
    const fields = {json.dumps(fields)};
    return [...prepared(fields.mean.length === 1 ? grey(image) : image, fields)];
  }})()""")
  # Newer Pillows resize columns first if those shrink by much more than the rows.
  steps = 1 if size == (91, 120) else 0
  np.testing.assert_allclose(got, want.resize(Image.open(io.BytesIO(content))).reshape(-1), rtol=0,
                             atol=steps)


def test_a_file_that_is_not_an_image_is_reported(opened, tmp_path):
  (tmp_path / "text.png").write_text("text")
  opened.choose("#files", tmp_path / "text.png")
  opened.wait("notice.className === 'error'")
  assert opened.run("notice.textContent").startswith("This browser cannot read text.png as an")
  assert opened.run("notice.getAttribute('role')") == "status"


def test_images_can_be_dropped_on_the_page_and_the_keyboard_works(opened):
  before = opened.run("shown.length")
  opened.run(f"""{{
    const data = new DataTransfer();
    data.items.add({as_file(png(photograph(64, 64)), "<i>dropped</i>")});
    document.body.dispatchEvent(new DragEvent("drop", {{dataTransfer: data, bubbles: true}}));
  }}""")
  opened.wait(f"shown.length === {before + 1}")
  assert opened.run("document.querySelector('#results h2').textContent") == "<i>dropped</i>"
  assert opened.run("chooser.labels[0].textContent") == "Images"
  opened.run("document.activeElement.blur()")
  for key in ("files", "region"):
    opened.ask("Input.dispatchKeyEvent", type="rawKeyDown", key="Tab", windowsVirtualKeyCode=9)
    assert opened.run("document.activeElement.id || document.activeElement.role") == key
  assert opened.run("[...document.querySelectorAll('canvas')].every("
                    "it => it.role === 'img' && it.ariaLabel)")
  assert opened.run("[...document.querySelectorAll('[id]')].map(it => it.id).length") == (
      opened.run("new Set([...document.querySelectorAll('[id]')].map(it => it.id)).size"))


def altered(file, folder, **metadata):
  """Returns a copy of an ONNX file with changed metadata; None removes an entry."""
  model = onnx.load(file)
  values = {entry.key: entry.value for entry in model.metadata_props} | metadata
  onnx.helper.set_model_props(model, {key: value for key, value in values.items()
                                      if value is not None})
  onnx.save(model, folder / "altered.onnx")
  return folder / "altered.onnx"


@pytest.fixture
def no_runtime(tmp_path):
  """A folder with stand-in files of the right names."""
  for name in (page.SCRIPT, page.WEBASSEMBLY):
    (tmp_path / name).write_bytes(b"something")
  return tmp_path


def test_nothing_is_overwritten_without_force_or_partially_written(files, no_runtime):
  path = no_runtime / "page.html"
  path.write_text("mine")
  with pytest.raises(ValueError, match=r"page\.html exists; give another name.*force"):
    page.write(path, files, no_runtime)
  assert path.read_text() == "mine"
  page.write(path, files, no_runtime, force=True)
  assert "EViT &lt;0.6&gt;" in path.read_text()
  # Browsers are slow with longer scripts.
  assert max(map(len, path.read_text().split("<script"))) < 5e5
  path.unlink()
  path.mkdir()
  with pytest.raises(OSError, match=r"page\.html cannot be written.*give another path"):
    page.write(path, files, no_runtime, force=True)
  assert not list(no_runtime.glob("*.partial-*"))


@pytest.mark.parametrize(("metadata", "said"), [
    ({"preprocess": None}, "does not say how its images are prepared.*vc.export"),
    ({"preprocess": json.dumps({"interpolation": "nearest"})}, "'nearest', and the page has only"),
])
def test_a_file_that_the_page_cannot_serve_is_refused(files, no_runtime, metadata, said):
  file = altered(files["dense"], no_runtime, **metadata)
  with pytest.raises(ValueError, match=said):
    page.write(no_runtime / "page.html", {"it": file}, no_runtime)
  assert not (no_runtime / "page.html").exists()


def test_other_mistakes_give_one_line_with_a_remedy(files, no_runtime, tmp_path_factory):
  path, empty = no_runtime / "page.html", tmp_path_factory.mktemp("empty")
  fixed = onnx.load(files["dense"])
  fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8
  onnx.save(fixed, empty / "fixed.onnx")
  (empty / "text.onnx").write_text("text")
  for given, message in (
      ((path, files, empty), f"npm install onnxruntime-web@{page.VERSION}"),
      ((path.with_suffix(".txt"), files, no_runtime), "must end in .html"),
      ((path, {}, no_runtime), "must have at least one"),
      ((path, {"it": empty / "none.onnx"}, no_runtime), "none.onnx cannot be read: No such file"),
      ((path, {"it": empty / "text.onnx"}, no_runtime), "text.onnx is not an ONNX file; give one"),
      ((path, {"it": empty / "fixed.onnx"}, no_runtime), "has batch=8.*or batch=1")):
    with pytest.raises(ValueError, match=message) as caught:
      page.write(*given)
    assert "\n" not in str(caught.value) and not path.exists()


@pytest.mark.parametrize(("model", "said"), [
    (tiny.deit(), "reduces no tokens.*leave tokens out"),
    (vc.create_model("pvt_v2_b0"), "is hierarchical.*leave tokens out")])
def test_only_models_that_drop_tokens_can_return_the_kept_ones(model, said):
  with pytest.raises(ValueError, match=said):
    Program(model, {}, tiny.preprocess(32), tokens=True)
