"""receipt: the contents of its page."""
import dataclasses
import json

from tests.tiny import receipt
from vitcompact.receipt import Row


def test_a_receipt_maps_outputs_to_classes():
  page = receipt(classes=("1", "10", "2"))
  assert json.loads(page.to_json())["classes"] == ["1", "10", "2"]
  assert "| classes | 3 classes: 0 1, 1 10, 2 2 |" in page.to_markdown()


def test_a_receipt_says_if_the_test_images_are_those_of_val():
  rows = (Row("dense", receipt().rows[0].count, 0.5, tested=60),)
  told, separate = ({**receipt().facts, **more} for more in ({"val_is_test": True}, {}))
  pages = [dataclasses.replace(receipt(), rows=rows, facts=facts).to_markdown()
           for facts in (told, separate)]
  assert ["which are also those of val" in page for page in pages] == [True, False]


def test_a_small_difference_is_said_to_be_perhaps_rounding():
  for worst, small in ((2e-5, True), (2e-3, False)):
    proof = dataclasses.replace(receipt().proof, max_rel=worst, tolerance=1e-5, top1_agreement=1.0)
    page = dataclasses.replace(receipt(), proof=proof)
    assert not page.ok and ("may be rounding" in page.to_markdown()) == small


def test_a_receipt_of_many_classes_fits_a_page_and_its_json_has_all():
  names = tuple(f"n{i:04d}" for i in range(1000))
  page = receipt(classes=names)
  assert json.loads(page.to_json())["classes"] == list(names)
  assert "1000 classes: 0 n0000, 1 n0001" in page.to_markdown()
  assert len(page.to_markdown()) < 2000


def test_a_receipt_without_class_names_lists_none():
  assert "classes" not in json.loads(receipt().to_json())
  assert "| classes |" not in receipt().to_markdown()
