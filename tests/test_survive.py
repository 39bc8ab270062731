"""experiments.survive takes minutes; its functions are tested here."""
from experiments import survive
from vitcompact.data import pipeline


def test_the_folder_that_runs_are_interrupted_on_is_one_that_they_accept(tmp_path):
  """Its splits have every class: digits come in the order of classes."""
  name = f"folder:{survive.write_folder(tmp_path)}"
  assert [pipeline.num_examples(name, split) for split in pipeline.SPLITS] == [400, 100, 100]
  for split in pipeline.SPLITS:
    images = pipeline.source(name, split, image_size=8)
    assert {images[i]["label"] for i in range(len(images))} == set(range(10))
