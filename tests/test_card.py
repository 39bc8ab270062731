"""Model cards: counts are vc.count's, unknown facts are left out, and `push` writes the same card.
"""
import ast
import json
import pathlib
import re

import pytest

import vitcompact as vc
from tests import tiny
from tests.cli import command
from tests.test_docs import bind
from vitcompact import convert
from vitcompact.cli import card as cli_card
from vitcompact.hub import card
from vitcompact.models import VARIANTS, tags

ROOT = pathlib.Path(__file__).parents[1]
SMALL = {key: value for key, value in tiny.SIZES.items() if key != "heads"} | {
    "depth": 1, "heads": 4}
PLAN = vc.Plan(heads=vc.HMHSA(), attention=vc.Sparsifiner(keep=0.25), ffn=vc.CFFN())


def row(text, what) -> list[int]:
  """Returns the counts in a row of a card's table."""
  found, = re.findall(rf"^\| {what} \| (.*) \|$", text, re.MULTILINE)
  return [int(number.replace(",", "")) for number in found.split(" | ")]


def test_the_card_of_a_named_model_has_the_numbers_of_count():
  text = card.model_card("deit_small_patch16_224.fb_in1k", PLAN, **SMALL)
  model = vc.create_model("deit_small_patch16_224", plan=PLAN, deploy=True, **SMALL)
  found, dense = vc.count(model), vc.count(model.clone(plan=vc.Plan()))
  assert row(text, "this model") == [found.params, found.macs, found.ideal_macs]
  assert row(text, "the dense one") == [dense.params, dense.macs, dense.ideal_macs]
  assert found.macs > found.ideal_macs and "executes more multiply-accumulates than" in text
  shown = re.search(r"```json\n(.*?)```", text, re.DOTALL)[1]
  assert vc.Plan.from_dict(json.loads(shown)) == PLAN
  for words in ("DeiT (Touvron et al., arXiv 2012.12877)", "Accuracy: not measured;",
                "`fb_in1k` (timm/deit_small_patch16_224.fb_in1k; licence apache-2.0)",
                "heads: `HMHSA()`: arXiv 2306.10875, of which only the abstract is public; our",
                "attention: `Sparsifiner()`: arXiv 2303.13755;", "width=24",
                "Images: 32 x 32, resized, and 0.9 of it cropped (bicubic); mean 0.485, 0.456"):
    assert words in text, words
  calls = [node for node in ast.walk(ast.parse(re.search(r"```python\n(.*?)```", text, re.S)[1]))
           if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("vc.")]
  for call in calls:
    if ast.unparse(call.func) != "vc.Plan.parse":
      bind(call)
  assert len(calls) == 3 and "vc.pretrained('deit_small_patch16_224.fb_in1k')" in text


def test_a_network_named_after_a_method_is_published_with_it():
  sizes = {"image_size": 32, "patch_size": 8, "width": 24, "depth": 1, "heads": 4}
  text = card.model_card("inline_deit_tiny", **sizes)
  assert "the deployed (folded) form, as published." in text and "without the plan" not in text
  assert "Weights: none is known by name." in text and "vc.from_torch(model" in text
  smaller = card.model_card("inline_deit_tiny", vc.Plan(ffn=vc.CFFN()), **sizes)
  assert row(smaller, "without the plan") == row(text, "this model") > row(smaller, "this model")


def test_a_method_that_fits_no_block_is_reported():
  text = card.model_card("shvit_s1", vc.Plan(heads=vc.HMHSA()), **tiny.NETWORKS["shvit_s1"])
  assert "heads: `HMHSA()`: it applies to no block of this model." in text


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  """A folded compact model in a file that records its source."""
  model = tiny.deit(vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN()), depth=1)
  path = tmp_path_factory.mktemp("card") / "small.safetensors"
  model, variables = vc.fold(model, tiny.init(model))
  convert.save(path, model, variables, classes=list("abcde"), about={"source": "hf-hub:a/b@c"})
  return path


def receipt_of(path, **about) -> str:
  model, _ = vc.load(path)
  found = vc.count(model)._asdict()
  return json.dumps({"data": "digits", **about, "models": [
      {**found, "name": "deployed", "test_accuracy": 0.875, "test_images": 1000,
       "accuracy_interval": [0.853, 0.894]}]})


def test_the_card_of_a_file_takes_the_accuracy_from_its_receipt(file, tmp_path):
  beside = file.with_suffix(".json")
  text = command.succeeds("card", file)
  assert "Accuracy: not measured; no receipt of this model was given." in text
  assert row(text, "this model") == list(vc.count(vc.load(file)[0])[:3])
  assert "Weights: from hf-hub:a/b@c; their licence is that of their source." in text
  assert "5 classes: 0 a, 1 b" in text and f"vc.pretrained({str(file)!r})" in text
  try:
    beside.write_text(receipt_of(file))
    expected = ("Accuracy: 87.50% of 1,000 test images of digits (95 % interval 85.30 to 89.40), "
                "from small.json.")
    assert f"{expected}\n" in command.succeeds("card", file)
    beside.write_text(receipt_of(file, params_digest="0" * 64))
    assert f"{expected} The parameters that it was measured with have another digest" in (
        command.succeeds("card", file))
    beside.write_text(receipt_of(file).replace('"params": ', '"params": 1'))   # of another model
    assert "not measured" in command.succeeds("card", file)
    assert "the receipt has no model of" in command.fails("card", file, "--receipt", beside)
  finally:
    beside.unlink()
  (tmp_path / "receipt.json").write_text(receipt_of(file))
  assert "from receipt.json." in command.succeeds("card", file, "--receipt", tmp_path)


def test_push_writes_the_same_card_as_the_command(file, tmp_path):
  folder = tmp_path / "small"
  command.succeeds("push", file, "--out", folder)
  pushed = (folder / "README.md").read_text().splitlines()
  own = [line.replace(str(file), str(folder)) for line in
         command.succeeds("card", file).splitlines()]
  assert [line for line in pushed if not line.startswith("sha256 of the file")] == own


def test_all_cards_are_written_into_a_folder(tmp_path, monkeypatch):
  small = {"deit_tiny_patch16_224": SMALL, "biformer_tiny": tiny.NETWORKS["biformer_tiny"]}
  of_model = card.model_card
  monkeypatch.setattr(card, "model_card", lambda name, *rest, **more: of_model(
      name, *rest, **more, **small[name]))
  monkeypatch.setattr(vc, "list_models", lambda: list(small))
  assert command.succeeds("card", "--all", "--out", tmp_path) == f"{tmp_path}: 2 cards\n"
  deit, biformer = ((tmp_path / f"{name}.md").read_text() for name in small)
  assert "heads: `HMHSA()`" in deit and "ffn: `CFFN()`" in deit
  assert "The default plan, hMHSA and cFFN, is refused for this network (HMHSA()" in biformer
  assert "ffn: `CFFN()`" in biformer and "heads: " not in biformer
  assert "deit_tiny_patch16_224.md exists" in command.fails("card", "--all", "--out", tmp_path)
  command.succeeds("card", "--all", "--out", tmp_path, "--force", "--plan", "")
  assert "form, dense." in (tmp_path / "biformer_tiny.md").read_text()


def test_a_users_mistakes_are_named(file, tmp_path):
  for arguments, words in (
      ((), "give one NAME or FILE, or --all"), (("resnet50",), "unknown model 'resnet50'"),
      (("deit_tiny_patch16_224", "--all"), "--all and no name"), (("--all",), "--out FOLDER"),
      (("--all", "--out", tmp_path, "--receipt", file), "--receipt is for one model"),
      ((file, "--plan", "{}"), "has its own plan"), (("/no/file.safetensors",), "/no/file"),
      (("pvt_tiny", "--plan", '{"tokens": {"method": "evit"}}'), "the plan names block 9")):
    assert words in command.fails("card", *arguments)


def test_every_model_names_its_paper():
  used = {next(pattern for pattern in card.NETWORKS if re.fullmatch(
      pattern.replace("*", ".*"), name)) for name in VARIANTS}
  assert used == card.NETWORKS.keys()
  code = "".join(path.read_text() for path in (ROOT / "vitcompact/models").glob("*.py"))
  for whose in card.NETWORKS.values():
    for paper in re.findall(r"arXiv (\d{4}\.\d{5})", whose):
      assert paper in code, whose


@pytest.mark.parametrize("kind", [kind for kinds in vc.METHODS.values() for kind in kinds.values()])
def test_a_method_and_the_docs_cite_the_same_paper(kind):
  rows = [line for line in (ROOT / "docs/provenance.md").read_text().splitlines()
          if line.startswith("|") and f"`{kind.__name__}`" in line.split("|")[1]]
  cited = set(re.findall(r"\d{4}\.\d{5}", "".join(rows)))
  if "(same abstract)" in "".join(rows):      # the row above: hMHSA's
    cited.add("2306.10875")
  paper, = re.findall(r"\d{4}\.\d{5}", vars(kind)["provenance"][0])
  assert paper in cited


def test_a_users_method_is_not_ours_even_if_it_extends_one_of_ours(monkeypatch):
  class Own(vc.CFFN):
    pass

  monkeypatch.setitem(vc.METHODS["ffn"], "own", Own)
  text = card.model_card("deit_tiny_patch16_224", vc.Plan(ffn=Own()), **SMALL)
  assert "ffn: `Own()`: none; not of this library." in text


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_large_patch14_224"])
def test_the_known_weights_are_those_of_the_table_of_tags(name):
  rows = tags.table().get(name, {})
  line, = card._provenance(vc.create_model(name), None)[1:]
  assert all(f"`{tag}` (" in line for tag in rows) and ("none is known" in line) == (not rows)


def test_the_default_plan_is_the_one_that_count_uses(monkeypatch):
  plans = []
  monkeypatch.setattr(card, "model_card", lambda name, plan, **_: plans.append(plan))
  cli_card.card_text("pvt_v2_b0", None, None)
  assert plans == [vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN())]
