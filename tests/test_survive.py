"""experiments.survive takes minutes, so its functions are tested here, and the page that shows its
results."""
import json
import sys

from experiments import survive
from vitcompact.data import pipeline


def test_runs_accept_the_image_folder_that_survive_makes(tmp_path):
  """Its splits contain every class, although digits come sorted by class."""
  name = f"folder:{survive.write_folder(tmp_path)}"
  assert [pipeline.num_examples(name, split) for split in pipeline.SPLITS] == [400, 100, 100]
  for split in pipeline.SPLITS:
    images = pipeline.source(name, split, image_size=8)
    assert {images[i]["label"] for i in range(len(images))} == set(range(10))


def test_the_page_shows_what_was_measured():
  page = survive.PAGE.read_text(encoding="utf-8")
  assert f"{survive.BEGIN}{survive.described(survive.load())}\n{survive.END}" in page
  assert set(survive.load()) == {"kills", "flips", "resume"}


def test_a_run_replaces_its_own_part_of_the_results_only(tmp_path, monkeypatch):
  monkeypatch.setattr(survive, "RESULTS", tmp_path / "found.json")
  for arguments, test, counts in ((["--kills", "3"], "kills", {"kills": 3}),
                                  (["--resume"], "resume", {"digits": "OTHER BITS"}),
                                  (["--kills", "5"], "kills", {"kills": 5})):
    monkeypatch.setattr(sys, "argv", ["survive.py", *arguments])
    survive.save(test, 1, counts)
  found = json.loads(survive.RESULTS.read_text())
  assert {test: part["counts"] for test, part in found.items()} == {
      "kills": {"kills": 5}, "resume": {"digits": "OTHER BITS"}}
  assert found["kills"]["command"] == "python -m experiments.survive --kills 5"


def test_the_page_hides_no_failure():
  """Nor that a test was not run."""
  about = {"command": "x", "seed": 0, "processor": "p", "jax": "j", "commit": "c"}
  text = survive.described({
      "kills": {**about, "counts": {"kills": 9, "lost": 1, "corrupt": 2, "restarts": 8,
                                    "restarts that resumed from the newest": 7}},
      "resume": {**about, "counts": {"digits": "the same bits", "folder": "OTHER BITS"}}})
  assert "After 9 kills, 1 checkpoints were lost and 2 were damaged; 7 of 8 restarts" in text
  assert "1 of 2 interrupted runs" in text and "* `--flips`: not run." in text
  flips = {"flips": 6, "refused": 1, "refused with a traceback": 2, "SILENT": 3}
  assert ("1 were refused; with 0 the saved state was restored bit for bit, with 3 something else "
          "was restored, and with 2 restoring ended in a traceback.") in survive.described(
              {"flips": {**about, "counts": flips}})
