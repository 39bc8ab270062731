"""`draw attention` draws the pairs that attend in the model."""
import numpy as np
import pytest
from PIL import Image

import vitcompact as vc
from tests import tiny
from vitcompact import convert
from vitcompact.draw import attention as drawing

BLOCKS = vc.Sparsifiner(keep=0.5, granularity="block", window=2, min_tokens=0)
PLAN = vc.Plan(attention=BLOCKS, blocks={0: {"attention": vc.Sparsifiner(keep=0.3)}})


def test_attended_patches_stay_bright_and_the_query_is_framed():
  image = np.random.default_rng(0).uniform(0.2, 0.8, (8, 12, 3))      # 2 x 3 patches of 4
  kept = np.array([[1, 0, 0], [0, 1, 0]], bool)
  picture = drawing.highlight(image, kept, (1, 2))
  np.testing.assert_array_equal(picture[:4, :4], image[:4, :4])
  dark = drawing.DIMMED * image + drawing.BLUE
  np.testing.assert_allclose(picture[:4, 4:], dark[:4, 4:])
  assert (picture[4, 8:] == [1, 0, 0]).all() and (picture[4:, 11] == [1, 0, 0]).all()
  np.testing.assert_allclose(picture[5:7, 9:11], dark[5:7, 9:11])


def test_frames_do_not_cover_small_patches_and_black_patches_are_visible():
  image, kept = np.zeros((12, 12, 3)), np.eye(6, dtype=bool)
  picture = drawing.highlight(drawing.enlarge(image, (6, 6)), kept, (0, 0))
  assert picture.shape == (96, 96, 3) and not picture[1:15, 1:15].any()
  assert (picture[0, :16] == [1, 0, 0]).all() and picture[:16, 16:].any(axis=-1).all()
  assert drawing.enlarge(np.zeros((224, 224, 3)), (14, 14)).shape == (224, 224, 3)


def test_pairs_and_mass_at_both_granularities(tmp_path):
  model = tiny.deit(PLAN)
  variables, image = tiny.init(model), tiny.images(model)[0]
  pairs = drawing.pairs_of(model, variables, image)
  assert (pairs[0][:, 1:].sum(axis=-1) == 6).all() and pairs[0][:, 0].all()    # ceil(0.3 * 17)
  assert (pairs[1][:, 1:].sum(axis=-1) == 1 + 2 * 4).all()     # class token, 2 blocks of 4
  mass = drawing.mass_kept(model, variables, image, keeps=(0.5, 1.0))
  for shares in mass.values():
    assert 0.3 < shares[0][1] < 1 and shares[1] == pytest.approx((1, 1), abs=1e-5)
  assert [shares[0][0] for shares in mass.values()] == pytest.approx([9 / 17, 2 / 4])


def test_files_are_drawn_and_not_overwritten(tmp_path):
  model = tiny.deit(PLAN.map(vc.Sparsifiner.first_phase.method))     # as the first phase leaves it
  convert.save(tmp_path / "sparse.safetensors", model, tiny.init(model))
  Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "image.png")
  args = tmp_path / "sparse.safetensors", tmp_path / "image.png", tmp_path / "out"
  with pytest.raises(ValueError, match="up to 3,3"):
    drawing.run(*args, queries=["4,0"])
  with pytest.raises(ValueError, match="--block 7 has no sparse attention"):
    drawing.run(*args, blocks=[7])
  drawing.run(*args, queries=["1,2"])
  assert {path.name for path in args[2].iterdir()} == {"query_1_2.png", "matrices.png", "mass.png",
                                                       "mass.csv"}
  assert len((args[2] / "mass.csv").read_text().splitlines()) == 1 + 2 * len(drawing.KEEP_RATES)
  with pytest.raises(ValueError, match="--force"):
    drawing.run(*args, queries=["1,2"])


def test_masks_are_drawn_even_if_the_first_phase_left_them_out():
  first = vc.Sparsifiner.first_phase.method(BLOCKS)
  assert drawing.at_keep(first) == BLOCKS != first and drawing.at_keep(first, 0.2).masked
  assert drawing.at_keep(vc.BiFormer(top_k=3)) == vc.BiFormer(top_k=3)
  assert drawing.at_keep(vc.EViT(), 0.2) == vc.EViT()   # keeps tokens, not pairs


def test_model_without_sparse_attention_is_rejected():
  with pytest.raises(ValueError, match="no block has sparse attention"):
    drawing.sparse_blocks(tiny.deit())
  pyramid = vc.create_model("pvt_tiny", plan=vc.Plan(attention=vc.Sparsifiner()), image_size=64)
  with pytest.raises(ValueError, match="hierarchical"):
    drawing.sparse_blocks(pyramid)
