"""`draw tokens` shows what the model did."""
import jax
import numpy as np
import pytest
from PIL import Image

import vitcompact as vc
from tests import tiny
from vitcompact import convert
from vitcompact.draw import tokens as drawing


def test_dropped_patches_are_white_and_merged_ones_are_averaged_and_outlined():
  image = np.random.default_rng(0).uniform(0.2, 0.8, (8, 12, 3))      # 2 x 3 patches of 4
  holder = np.array([[1, 2, 2], [drawing.DROPPED, 4, 5]])
  before = image.copy()
  picture = drawing.coloured_by_token(image, holder)
  np.testing.assert_array_equal(image, before)
  np.testing.assert_array_equal(picture[5:8, :3], np.ones((3, 3, 3)))
  np.testing.assert_array_equal(picture[:4, :4], image[:4, :4])
  np.testing.assert_array_equal(picture[5:8, 5:8], image[5:8, 5:8])
  mean = image[:4, 4:].mean(axis=(0, 1))
  inner = np.ones((4, 7), bool)
  np.testing.assert_allclose(picture[:4, 5:][inner], np.tile(mean, (28, 1)))
  assert (picture[:4, 4] == drawing.OUTLINE).all() and (picture[4, 4:] == drawing.OUTLINE).all()
  assert not (picture[5:] == drawing.OUTLINE).any()
  assert not (picture[4, :4] == drawing.OUTLINE).any()


def test_stages_give_the_token_of_each_patch():
  model = tiny.deit(vc.Plan(tokens=vc.EViT(keep=0.5, blocks=(0, 1))))
  variables, image = tiny.init(model), tiny.images(model)[0]
  (first, before), (second, after) = drawing.stages(model, variables, image)
  assert first == "block 0: 8 of 16"
  assert sorted(before[before >= 0]) == list(range(1, 9)) and (before == drawing.DROPPED).sum() == 8
  left = int(second.split()[2])
  assert left in (4, 5) and (after >= 0).sum() == left and (after[before < 0] < 0).all()


def test_picture_is_drawn_from_a_checkpoint(tmp_path):
  model = tiny.deit()
  checkpoint, image, out = (tmp_path / name for name in ("a.safetensors", "a.png", "out.png"))
  convert.save(checkpoint, model, jax.tree.map(np.asarray, tiny.init(model)))
  Image.fromarray(np.full((40, 50, 3), 99, np.uint8)).save(image)
  with pytest.raises(ValueError, match="no block reduces tokens"):
    drawing.run(checkpoint, image, out)
  plan = '{"tokens": {"method": "tome", "r": 4}}'
  assert "block 0: 12 of 16; block 1: 8 of 16" in drawing.run(checkpoint, image, out, plan=plan)
  assert Image.open(out).size[0] > 300
  for call, words in ((lambda: drawing.run(checkpoint, image, out, plan=plan), "--force"),
                      (lambda: drawing.run(checkpoint, image, "out.pdf", plan=plan), ".png"),
                      (lambda: drawing.load(checkpoint, '{"tokens": {"method": "dynamicvit"}}'),
                       "trained with the model")):
    with pytest.raises(ValueError, match=words):
      call()
