"""The gallery: its command wrote the page and pictures, and the captions state measured numbers."""
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

import vitcompact as vc
from experiments import gallery
from tests import tiny

TEXT = gallery.PAGE.read_text()
RESULTS = json.loads(gallery.RESULTS.read_text())
NUMBERS = RESULTS["pictures"]


def test_the_page_is_the_output_of_the_command():
  assert gallery.page(RESULTS) == TEXT
  assert RESULTS["command"] in TEXT


def test_every_picture_is_shown_once_and_small():
  shown = re.findall(r"pictures/gallery_(\w+)\.webp", TEXT)
  there = sorted(gallery.PICTURES.glob("gallery_*.webp"))
  assert sorted(shown) == sorted(gallery.drawings(1)) == [path.stem[8:] for path in there]
  assert sum(path.stat().st_size for path in there) < 600_000
  for path in there:
    with Image.open(path) as image:
      assert image.format == "WEBP" and np.asarray(image).std() > 10     # not blank


def test_the_claims_of_the_captions_hold():
  seen = NUMBERS["class_token"]
  assert min(seen["on_garment_0"], seen["on_garment_1"]) > 1.2
  assert 0 < max(seen["alike_2"], seen["alike_most"]) < 0.5    # attention differs by image
  assert NUMBERS["pairs"]["least_held"] > NUMBERS["pairs"]["kept"]
  for name in ("hallucinated", "photo_hallucinated"):
    assert 0.4 < NUMBERS[name]["least_likeness"] <= NUMBERS[name]["most_likeness"] < 1
  kept = NUMBERS["granularities"]
  assert kept["kept_Sparsifiner_block"] == pytest.approx(2 / 9, abs=1e-3)
  assert kept["kept_BiFormer_region"] == pytest.approx(12 / 49, abs=1e-3)


@pytest.fixture(scope="module")
def scene():
  """A tiny network and two black images with one bright half each."""
  model = tiny.deit(depth=2)
  variables, prepare = tiny.init(model), vc.preprocess(model)
  picture = np.zeros((32, 32, 3), np.uint8)
  picture[:, 16:] = 200
  return gallery.Scene(model, variables, prepare,
                       {"right": prepare(picture), "left": prepare(picture[:, ::-1].copy())})


def test_uniform_attention_is_on_the_garment_as_often_as_elsewhere(scene, tmp_path):
  images = list(scene.images.values())
  mask = gallery.on_garment(scene, images)
  np.testing.assert_array_equal(mask[0].reshape(4, 4), [[False, False, True, True]] * 4)
  np.testing.assert_array_equal(mask[1], ~mask[0])
  even = scene._replace(variables=jax.tree.map(np.zeros_like, scene.variables))
  picture = gallery.class_token(even, images + images[:1])
  assert picture.numbers["on_garment_0"] == pytest.approx(1)
  assert len(picture.panels) == 2 * picture.columns == 2 * (1 + 2)
  drawn = gallery.class_token(scene)
  assert not drawn.numbers      # no number is claimed
  gallery.write(drawn, tmp_path / "out.webp")
  with Image.open(tmp_path / "out.webp") as image:
    assert image.format == "WEBP" and image.width > image.height


def test_an_unfitted_hallucinated_map_equals_its_source(scene):
  small = gallery.compacted(scene, vc.Plan(heads=vc.HMHSA()))
  picture = gallery.hallucinated(small, "left", 0)
  assert picture.numbers["least_likeness"] == pytest.approx(1, abs=1e-5)
  titles = [title for title, _ in picture.panels]
  assert titles == ["head 0, computed", "head 1, computed", "head 2, hallucinated",
                    "head 3, hallucinated"] and picture.columns == 2
  np.testing.assert_allclose(picture.panels[0][1], picture.panels[2][1], atol=0.02)
  assert gallery.hallucinated(small, "left", 0, (1, 2)).panels[3][1].shape == (4, 4, 3)


def test_least_and_most_are_taken_over_the_numbers_of_blocks():
  found = gallery.summed_up({"held_0": 0.4, "held_1": 0.6, "alike_0": 0.1, "alike_2": 0.9,
                             "alike_3": 0.3})
  assert (found["least_held"], found["most_held"]) == (0.4, 0.6)
  assert (found["alike_least"], found["alike_most"]) == (0.1, 0.3)
