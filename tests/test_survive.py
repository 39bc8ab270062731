"""experiments.survive takes minutes, so its functions are tested here."""
from experiments import survive
from vitcompact.data import pipeline


def test_runs_accept_the_image_folder_that_survive_makes(tmp_path):
  """Its splits contain every class, although digits come sorted by class."""
  name = f"folder:{survive.write_folder(tmp_path)}"
  assert [pipeline.num_examples(name, split) for split in pipeline.SPLITS] == [400, 100, 100]
  for split in pipeline.SPLITS:
    images = pipeline.source(name, split, image_size=8)
    assert {images[i]["label"] for i in range(len(images))} == set(range(10))
