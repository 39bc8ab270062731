"""receipt: the contents of its page."""
import json

from vitcompact.count import Count
from vitcompact.receipt import Receipt, Row
from vitcompact.verify import Proof


def receipt(**changes):
  count = Count(**dict.fromkeys(Count._fields, 7))
  proof = Proof(**{field: 0 for field in Proof.__dataclass_fields__})
  return Receipt("a run", (Row("dense", count, 0.5),), proof, {"data": "folder:x"}, **changes)


def test_a_receipt_maps_outputs_to_classes():
  page = receipt(classes=("1", "10", "2"))
  assert json.loads(page.to_json())["classes"] == ["1", "10", "2"]
  assert "| classes | 3 classes: 0 1, 1 10, 2 2 |" in page.to_markdown()


def test_a_receipt_of_many_classes_fits_a_page_and_its_json_has_all():
  names = tuple(f"n{i:04d}" for i in range(1000))
  page = receipt(classes=names)
  assert json.loads(page.to_json())["classes"] == list(names)
  assert "1000 classes: 0 n0000, 1 n0001" in page.to_markdown()
  assert len(page.to_markdown()) < 2000


def test_a_receipt_without_class_names_lists_none():
  assert "classes" not in json.loads(receipt().to_json())
  assert "| classes |" not in receipt().to_markdown()
