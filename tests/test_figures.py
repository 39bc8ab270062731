"""Every figure of a page has a source, and what pages say in words follows from results/.

Tables between markers are written by commands; the tests of these compare them with results/. The
rest of a page is scanned for figures. Each has to be inside a phrase of `computed`, where figures
come from results/, a config or a constant, or of `STATED`, for examples and facts that nothing here
computes. A phrase that is no longer on its page fails too.
"""
import collections
import functools
import importlib
import itertools
import json
import math
import re
import statistics

import numpy as np
import pytest

import vitcompact as vc
from configs import (
    compact_deit_s,
    compact_digits,
    compact_fashion_mnist,
    deit_s,
    digits,
    fashion_mnist,
    sparse_digits,
)
from experiments import accuracy, compaction, fine_tuning, one_shot, resolution
from experiments.benchmarks import axis_tables, results
from experiments.benchmarks.results import cases, speed
from tests.test_docs import DOCS, FENCE, PAGES, ROOT, text_of
from vitcompact import bench
from vitcompact.data import pipeline

# Pages that a command writes as a whole, see tests/test_gallery.py.
WRITTEN = {DOCS / "gallery.md"}
SCANNED = sorted({*PAGES, *(ROOT / "notebooks").glob("*.ipynb")} - WRITTEN)
WORDS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
         "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen"]
SHARES = {10: "a tenth", 20: "a twentieth", 50: "a fiftieth"}

# Figures


SHORT = r"%|(?:ms|s|GiB|MiB|MB|GB|kB|GFLOP|G|M|MACs)\b|x(?! ?\d)"
LONG = (r"(?:milli)?seconds?|minutes?|hours?|points?|times|epochs|seeds|folds|runs|variants|widths|"
        r"nats?")
NUMBER = (r"(?<![\w.,/@^=-])[-+±]?\d+(?:[.,]\d+)*(?:e-?\d+)?"
          rf"(?: ?(?:{SHORT}|(?:{LONG}|steps|tokens|pixels|images|bits?)\b)|(?!\w))")
IN_WORDS = (rf"\b(?:an?(?! second\b)|half an?|{'|'.join(WORDS[1:])}|twenty|thirty|sixty) "
            rf"(?:{LONG}|third|fifth|tenth|twentieth|fiftieth)\b|\btwice\b")
FIGURE = re.compile(f"{NUMBER}|{IN_WORDS}", re.IGNORECASE)


@functools.cache
def prose(page) -> str:
  """Returns the text of a page and the comments of its code, without tables that commands write,
  addresses of links, and papers' numbers; code spans stay."""
  text = text_of(page)
  if page.suffix == ".ipynb":
    text = "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"]
                       if cell["cell_type"] == "markdown")
  text = re.sub(r"<!-- ([\w -]+): written by .*?<!-- end of \1 -->", "", text, flags=re.DOTALL)
  for path in (ROOT / "results").glob("accuracy_*.json"):
    text = text.replace(accuracy.table(results.read(path)["rows"]), "")
  text = FENCE.sub(lambda block: "\n".join(re.findall(r"(?:^|\s)# (.*)", block[3])), text)
  text = re.sub(r"\]\([^)]*\)", "]", text)
  text = re.sub(r"\barXiv [\d., ]*\d|^ *\d+\. ", "", text, flags=re.MULTILINE)
  return " ".join(text.split())


def figures(text: str) -> list[re.Match]:
  """Returns the figures outside code spans; a bare number of one digit is none."""
  hidden = re.sub(r"`[^`]*`", lambda span: "`" * len(span[0]), text)
  return [found for found in FIGURE.finditer(hidden) if not re.fullmatch(r"[-+]?\d", found[0])]


def unexplained(text: str, phrases: list[str]) -> list[str]:
  """Returns the figures of a text that are in none of the phrases, and the phrases that it lacks;
  `#` in a phrase stands for a number that another test compares."""
  spans, wrong = [], []
  for phrase in phrases:
    pattern = re.escape(phrase).replace(r"\#", r"[\d.,]*\d")
    found = [one.span() for one in re.finditer(rf"(?<![\d.,]){pattern}(?![.,]?\d)", text)]
    spans += found
    wrong += [] if found else [f"the page does not say: {phrase}"]
  return wrong + [f"no source: {text[max(one.start() - 50, 0):one.end() + 30]}"
                  for one in figures(text)
                  if not any(start <= one.start() and one.end() <= stop for start, stop in spans)]


def constant(name: str):
  """Returns what vitcompact has under this name, such as "measure.KL_EXPONENT"."""
  module, _, last = name.rpartition(".")
  return getattr(importlib.import_module(f"vitcompact.{module}"), last)


def found_in(path: str, pattern: str) -> list[str]:
  """Returns what a pattern finds in a file from which nothing can be imported."""
  return re.findall(pattern, (ROOT / path).read_text(encoding="utf-8"))


def rows_of(suite: str, *keys: str):
  return cases(results.load(suite, "cpu"), *keys)


def model_of(config):
  sizes = config.model.to_dict()
  return vc.create_model(sizes.pop("name"), **sizes)


def sizes_of(config) -> str:
  """Returns the sizes of a config's model in the words of docs/compaction.md."""
  model = model_of(config)
  return (f"{config.model.image_size} pixels, {accuracy.tokens(model)} tokens, "
          f"{WORDS[model.depth]} blocks, {model.width} wide, {WORDS[model.heads]} heads")


def computed() -> dict[str, list[str]]:
  """Returns {page: phrases}, whose figures are computed."""
  pythons, = found_in("Makefile", r"# The first of these that is a (Python 3\.\d+ or 3\.\d+)")
  old, new, newer = found_in(".ci/ranges", r"(?:-|echo )python(3\.\d+)")
  ours, shapes = (results.read(ROOT / f"results/accuracy_{name}.json")["rows"]
                  for name in ("digits", "shapes"))
  plans, tiny = sparse_digits.PLANS, model_of(sparse_digits.get_config("dense"))
  per_epoch = pipeline.num_examples("digits", "train") / sparse_digits.get_config().batch_size
  fashion, small = fashion_mnist.get_config(), digits.get_config("dense")
  garments, deit = model_of(fashion), vc.create_model("deit_small_patch16_224")
  distilling, short = compact_digits.get_config(), fine_tuning.load()
  (tenth,), (twentieth,) = ({*pair} for pair in zip(*(
      (round(steps / each.total_steps), round(rate / each.optim.learning_rate))
      for each, steps, rate in (
          (distilling, distilling.compact.dense_steps, small.optim.learning_rate),
          (compact_fashion_mnist.get_config(), fashion.total_steps, fashion.optim.learning_rate),
          (compact_deit_s.get_config(), deit_s.get_config().total_steps,
           deit_s.get_config().optim.learning_rate))), strict=True))
  kept = [36]     # patches of the picture
  for _ in range(3):
    kept.append(math.ceil(vc.EViT().keep * kept[-1]))
  faster = [tokens for (tokens,), rows in rows_of("tokens", "tokens").items()
            if speed(rows, "attention", "dense")[1] > 1]
  layers = [tokens for (tokens,) in rows_of("layer", "tokens")]
  seeds = collections.Counter(fold["seed"] for fold in
                              compaction.load(compaction.results_of("digits")))
  stopped, abandoned, lost = map(constant, (
      "run.preemption.STOPPED", "run.preemption.ABANDONED", "run.processes.LOST"))
  siglip = vc.create_model("vit_so400m_patch14_siglip_384")
  patches, rest = divmod(siglip.image_size, siglip.patch_size)
  files = np.load(ROOT / "tests/data/references/preprocessed.npz").files
  larger, tokens = resolution.SIZES[1], accuracy.tokens(garments)
  large_images, small_images = re.findall(r"[\d,]+\d", constant("compact.ENOUGH"))
  return {
      "README": [
          f"need only {pythons} and make",
          f"dense models of {WORDS[1 + len(compaction.NARROWER)]} widths",
          f"accuracy of {WORDS[len(ours)]} variants",
          f"({sum(pipeline.num_examples('digits', split) for split in pipeline.SPLITS):,} real"],
      "CONTRIBUTING": [
          f"{pythons} and make are enough", f"on Python {old}, the newest on {new} or {newer}",
          f"at most {found_in('pyproject.toml', r'line-length = (.*)')[0]} characters"],
      "results/README": [
          f"({WORDS[ours[0]['pairs']]} folds; {ours[0]['tokens']} tokens, {WORDS[tiny.depth]} "
          f"blocks of {WORDS[tiny.heads]} heads; attention at keep {sparse_digits.SPARSE['keep']}; "
          f"EViT and DynamicViT at {plans['evit']['tokens']['keep']}, evit_half at "
          f"{plans['evit_half']['tokens']['keep']}; {ours[0]['steps'] / per_epoch:.0f} epochs",
          f"`shapes` at {shapes[-1]['tokens']} tokens, {WORDS[shapes[0]['pairs']]} seeds",
          f"block-sparse attention at keep {sparse_digits.SPARSE['keep']})",
          f"about {WORDS[deit.heads]} heads and "
          f"{deit_s.get_config().total_steps // deit_s.STEPS_PER_EPOCH} epochs, as in DeiT-S",
          f"a DeiT of {WORDS[garments.depth]} blocks and {WORDS[garments.heads]} heads, "
          f"{tokens} tokens)", f"With {tokens} tokens sparse attention is slower",
          f"distilled for {SHARES[tenth]} of the dense model's steps",
          f"for {SHARES[fashion.total_steps // short['steps']]} of its steps, with "
          f"{WORDS[len(short['rows']['dense']['seeds'])]} seeds",
          *(f"At {share}, the measured plan" for share in fine_tuning.EQUAL_MACS),
          f"at {larger} pixels, where it has {resolution.tokens_at(larger)} tokens",
          f"no more detail at {larger} pixels"],
      "attention": [f"from about {round(min(faster), -2)} tokens",
                    f"rows for {min(layers)} and {max(layers):,} tokens"],
      "compaction": [
          f"for {WORDS[constant('calibration.ROWS_PER_CHANNEL')]} tokens per hidden channel and "
          f"for {constant('calibration.SUM_TOKENS'):,} in all",
          f"to the power {constant('measure.KL_EXPONENT')};",
          f"heads x width = {constant('methods.heads.refit.MAX_FEATURES'):,} the maps",
          f"network of {WORDS[small.model.depth]} blocks, {small.model.width} wide, with "
          f"{WORDS[small.model.heads]} heads, trained for {distilling.compact.dense_steps:,} steps",
          f"has {WORDS[fashion.model.depth]} blocks, {fashion.model.width} wide, with "
          f"{WORDS[fashion.model.heads]} heads, and was trained for {fashion.total_steps:,} steps",
          f"about {small_images} small images or about {large_images} large ones",
          f"about {constant('calibration.SUM_TOKENS'):,} tokens, from evenly",
          f"layers of {constant('regression.WIDE'):,} hidden channels or more",
          f"On digits ({sizes_of(small)}; {WORDS[seeds[0]]} folds of "
          f"{pipeline.num_examples('digits', 'test')} test images each; dense models from "
          f"{WORDS[len(seeds)]} seeds, the third for {WORDS[seeds[2]]} of the folds",
          f"On Fashion-MNIST ({sizes_of(fashion)}; "
          f"{one_shot.load()['rows']['dense']['images']:,} test images;",
          f"takes {WORDS[tenth]} times as many steps as distilling",
          f"lose after {SHARES[tenth]} of these steps",
          f"learning rate is {SHARES[twentieth]} of the dense model's"],
      "deploying": [
          f"more than {constant('export.TOLERANCE'):.0e} of the".replace("e-0", "e-"),
          f"(opset {constant('export.onnx_file.OPSET')})",
          f"of {WORDS[int(*found_in('vitcompact/export/page.html', r'RUNS = (.)'))]} runs"],
      "models": [f"last {rest} rows and columns, which do not fill a {patches + 1}th patch of "
                 f"{siglip.patch_size} pixels"],
      "predicting": [
          f"compares {sum(name.startswith('file/') for name in files)} files of unusual kinds",
          f"up to {constant('data.augment.SMALL')} pixels",
          f"more than {constant('data.augment.MUCH_LARGER')} times as long as wide",
          f"have these {len(constant('data.classes.imagenet_1k')()):,} classes"],
      "scale": [
          f"(exit code {lost})", f"after {constant('run.processes.HEARTBEAT')} seconds without",
          f"{WORDS[int(*found_in('launch/slurm.sh', r'TERM@(.*)')) // 60]} minutes before the",
          f"asks for {found_in('launch/slurm.sh', r'cpus-per-task=(.*)')[0]} cores"],
      "survival": [
          f"exits with code {stopped};", f"at once with code {abandoned};",
          f"exits with {lost} (or",
          f"{stopped} stopped and saved, {lost} another process died, {abandoned} a second Ctrl-C",
          f"{found_in('experiments/survive.py', r'total_steps=(..)[^0-9]')[0]} steps in one run"],
      "tokens": ["A grid of {} patches, of which {}, {} and {} go on".format(*kept)],
      "troubleshooting": [f"values up to {int(np.finfo(np.float16).max):,};",
                          f"224 / 256 = {224 / 256}, not 256 / 224"],
      "weights": [f"timm ({found_in('experiments/pretrained_tags.py', r'timm .(.*?) made')[0]})"],
  }


# {page: {why nothing here computes the figures: phrases}}
STATED = {
    "notebooks/01_first_compact_vit": {"configs, see compaction": ["a tenth of the dense model's"]},
    "results/README": {
        "a share of steps in experiments.fine_tuning and configs": ["a fifth more steps"],
        "a setting, its rows are tested below": ["half of the patches twice"]},
    "attention": {"a setting": ["512 pixels", "224 pixels"]},
    "compaction": {
        "tests/test_compaction.py": ["between # and #", "once: # for DeiT-S, # with"],
        "a definition": ["its 95 % interval"],
        "tested below": ["about half a point below the dense model"]},
    "deploying": {
        "a format": ["16 bits", "8 bits", "16-bit", "pixels / 255"],
        "Base64": ["a third larger than its models"],
        "tests/export": ["in Python to 1e-4", "to 1e-5"]},
    "heads": {
        "tested below": ["In inference with 577 tokens or more", "less than a point if"],
        "tests/test_compaction.py": ["about twice as much", "four to five times as much"]},
    "methods": {"the paper's": ["The paper's 7 x 7 regions are small at 224 pixels"]},
    "models": {"tests/models": ["equal timm's to 1e-4"]},
    "predicting": {"a format": ["1 bit", "16-bit", "8 bits", "255 of 65,535", "32-bit"]},
    "scale": {
        "JAX's": ["(JAX ends them, 134)"], "Google's": ["about thirty seconds before preemption"],
        "a format": ["16 bits"]},
    "survival": {"JAX's": ["134, by JAX"]},
    "troubleshooting": {
        "an example": ["1, 10, 11, 12, 2", "01, 02, ..., 12", "1,000 classes", "1,000 other"],
        "a format": ["32-bit", "8 bits", "16-bit", "to 255"]},
    "watching": {"an example": ["100 to 104"]},
}


@functools.cache
def phrases() -> dict[str, list[str]]:
  found = computed()
  for page, by_reason in STATED.items():
    found.setdefault(page, []).extend(itertools.chain(*by_reason.values()))
  return found


def name_of(page) -> str:
  return str(page.relative_to(ROOT).with_suffix("")).removeprefix("docs/")


@pytest.mark.parametrize("page", SCANNED, ids=name_of)
def test_every_figure_has_a_source(page):
  assert unexplained(prose(page), phrases().get(name_of(page), [])) == []


def test_every_phrase_belongs_to_a_page_that_is_scanned():
  """And has a figure."""
  assert phrases().keys() <= {name_of(page) for page in SCANNED}
  assert [phrase for phrase in itertools.chain(*phrases().values())
          if not figures(phrase.replace("#", "10"))] == []


@pytest.mark.parametrize("text", [
    "loses 3 %", "2.5x as fast", "12 ms", "3 points", "an hour", "half a point", "twice as fast",
    "a tenth less", "1,797 images", "1e-5", "4.6 G", "9 GiB", "0.97", "five seeds", "-1.2 points"])
def test_a_figure_without_a_source_is_found(text):
  assert unexplained(f"It {text}.", []) == [f"no source: It {text}."]
  assert unexplained(f"It {text}.", [text]) == []
  assert unexplained("It is.", [text]) == [f"the page does not say: {text}"]


def test_code_names_and_small_counts_are_no_figures():
  text = "`keep=0.25` of 3 blocks in float32, v4-8, deit_small_patch16_224, a second run, 7 x 7"
  assert figures(text) == []


def test_a_phrase_is_no_part_of_a_longer_number():
  assert len(unexplained("after 160 seconds", ["60 seconds"])) == 2
  assert len(unexplained("keep 0.25", ["keep 0.2"])) == 2


# Tables


AXES = pytest.mark.parametrize("axis", vc.METHODS)


@AXES
def test_the_tables_of_an_axis_match_the_results(axis):
  table = axis_tables.axis(axis)
  assert table in text_of(DOCS / f"{axis}.md"), "run python -m experiments.bench tables"


# Statements in words


def rows_of_deit():
  """Returns the rows of every method at its defaults, at 224 and 512 pixels."""
  rows = rows_of("methods", "model", "image_size")
  return [rows["deit_small_patch16_224", pixels] for pixels in (224, 512)]


def test_statements_about_speed_on_the_page_of_heads_hold():
  for rows in rows_of("tokens", "tokens").values():
    assert speed(rows, "heads", "dense")[1] > 1
  for (tokens, _, which), rows in rows_of("layer", "tokens", "batch", "pass").items():
    logits = speed(rows, "hMHSA, logits site", results.best_dense(rows))
    if logits and (tokens >= 577 or which != "forward"):
      assert logits[2] < 1
  other = results.cases(results.read(results.FOLDER / "layer_cpu_amd.json"), "tokens", "pass")
  for (tokens, which), rows in other.items():
    logits = speed(rows, "hMHSA, logits site", results.best_dense(rows))
    if logits and (tokens >= 577 or which != "forward"):
      assert logits[0] < (1.1 if which == "forward" else 1)
  for rows in rows_of_deit():
    assert 0.97 < speed(rows, "MoH", "dense")[0] < 1.03 < speed(rows, "HMHSA", "dense")[0]
    assert speed(rows, "HeadPruning", "dense")[0] > speed(rows, "HMHSA", "dense")[0]
  lost = next(row for row in results.accuracies()["heads"] if row["data"] == "digits")
  assert lost["difference"] + lost["interval"] < 0


def test_statements_about_speed_on_the_page_of_attention_hold():
  for (tokens,), rows in rows_of("tokens", "tokens").items():
    assert (speed(rows, "attention", "dense")[1] > 1) == (tokens >= 401)
  small, large = rows_of_deit()
  assert all(speed(small, name, "dense")[0] < 1 for name in ("Sparsifiner", "BiFormer"))
  assert 1 <= speed(small, "InLine", "dense")[0] < 1.05
  assert speed(large, "Sparsifiner", "dense")[0] < speed(small, "Sparsifiner", "dense")[0]
  assert all(speed(large, name, "dense")[1] > 1 for name in (
      "BiFormer", "InLine", "ChannelAttention", "KeyMerging"))


def test_statements_about_speed_on_the_page_of_tokens_hold():
  by_batch = {batch: rows for (batch,), rows in rows_of("model", "batch").items()}
  for name in ("EViT 0.7", "EViT 0.5", "ToMe 13", "DynamicViT 0.7", "MCTF 16"):
    ratio, expected = speed(by_batch[8], name, "dense")[0], results.macs_ratio(by_batch[8], name)
    assert (ratio > expected) == (name != "MCTF 16") and ratio > 0.9 * expected
    assert speed(by_batch[1], name, "dense")[0] < ratio
  for name in ("evit", "evit_half", "dynamicvit", "tome", "mctf"):
    row, = results.accuracies()[name]
    assert abs(row["difference"]) < row["interval"]


def test_statements_about_speed_on_the_page_of_ffns_hold():
  ratios = [speed(rows, "ffn", "dense")[0] for rows in rows_of("tokens", "tokens").values()]
  assert ratios[0] == max(ratios) and ratios[-1] == min(ratios)
  training, = rows_of("train", "batch").values()
  assert speed(training, "heads + ffn", "dense")[0] < 1
  for name in ("ffn", "ffn_both"):
    assert results.accuracies()[name][0]["difference"] >= 0


def lost(row: dict) -> float:
  """Returns how many points less accurate than the dense model a row is."""
  return 100 * (row["lost"] - row["gained"]) / row["images"]


def is_sorted(values) -> bool:
  return all(one <= other for one, other in itertools.pairwise(values))


def test_statements_of_the_readme_hold():
  assert one_shot.above(one_shot.load()) == []    # "a narrower dense model does better"
  assert "a narrower dense model trained from scratch does better" in (
      prose(ROOT / "README.md"))


def test_statements_about_settings_before_training_hold():
  rows = one_shot.load()["rows"]

  def losses(start: str, order=sorted) -> list[float]:
    names = [name for name in rows if name.startswith(start)]
    return [lost(rows[name]) for name in order(names, key=lambda name: float(name.split()[-1]))]

  merging = [lost(row) for name, row in rows.items() if name.startswith(("ToMe", "MCTF"))]
  dropping = [lost(row) for name, row in rows.items() if name.startswith("EViT")]
  assert len(merging) > 1 and max(merging) < min(1, *dropping)
  masks = [f"{name}, keep " for name in ("Sparsifiner, by token", "Sparsifiner, by block of 2 x 2",
                                         "BiFormer, 4 x 4 regions")]
  factors = [f"cFFN, {factor}, rank " for factor in ("output", "both")]
  assert all(is_sorted(losses(start)[::-1]) for start in (*masks, *factors))
  assert all(lost(rows[f"{mask}0.5"]) < 0.75 for mask in masks)
  half, removed = (lost(rows[name]) for name in ("hMHSA, 3 of 6", "3 of 6 heads stay"))
  assert removed > half > max(max(losses(start)) for start in factors)
  assert all(one_shot.speed(row)[0] < 1 for row in rows.values() if row["axis"] == "attention")


def test_statements_about_a_short_training_hold():
  found = fine_tuning.load()
  end = {name: -statistics.mean(fine_tuning.differences(found, name))
         for name, row in found["rows"].items() if len(row["seeds"]) == fine_tuning.SEEDS}
  before = {name: 100 * (found["rows"]["dense"]["before"] - found["rows"][name]["before"])
            for name in end}
  half = [name for name in end if "3 of 6" in name or "hMHSA + cFFN" in name]
  factors = [name for name in end if name.startswith("cFFN, ")]
  blocks = [name for name in end if name.startswith("Sparsifiner, by block")]
  assert all(end[name] < before[name] / 2 for name in blocks) and blocks and factors and half
  assert all(end[name] > before[name] / 2 for name in (*half, *factors))

  def alike(one, other) -> bool:
    """Whether the 95 % intervals of two settings overlap."""
    margins = [accuracy.interval(fine_tuning.differences(found, name)) for name in (one, other)]
    return abs(end[one] - end[other]) <= sum(margins)

  one_branch = ", one branch without a norm"
  assert alike("hMHSA, 3 of 6", "hMHSA, 3 of 6, rank 2")
  assert alike("hMHSA, 3 of 6", "hMHSA, 3 of 6, frozen copies")
  assert all(alike(name.removesuffix(one_branch), name) for name in end if one_branch in name)
  token = "Sparsifiner, by token, keep 0.25"
  assert end[f"{token}, predictors first"] > end[token]
  assert max(end, key=end.get).startswith("DynamicViT")
  scratch = [lost(fold["models"]["uniform, from scratch"]) for fold in garments()
             if "uniform, from scratch" in fold["models"]]
  assert max(scratch) < end["hMHSA + cFFN"]
  equal = [row.split(" | ")[:2] for row in fine_tuning.equal_macs(found).splitlines()[2:]]
  at_80, at_50 = ([name for share, name in equal if share == f"| {each}"]
                  for each in fine_tuning.EQUAL_MACS)
  assert "measured" in at_80[0] and "ToMe" in at_80[1] and "measured" in at_50[0]
  assert at_80[-1] in half and at_50[-1] == "EViT, keep 0.5 twice"
  speeds = [one_shot.speed(one_shot.load()["rows"][name])[0] for name in at_80
            if name in one_shot.load()["rows"]]
  assert max(speeds) > 1.2 * min(speeds)


def test_statements_about_growth_with_resolution_hold():
  small, large = results.read(resolution.FILE)["sizes"].values()
  blocks, merging = (next(name for name in small if name.startswith(start))
                     for start in ("Sparsifiner", "ToMe"))
  assert large["dense"]["accuracy"] < small["dense"]["accuracy"]
  assert large[blocks]["macs"] < small[blocks]["macs"]
  for rows in (small, large):
    times = {name: bench.ratio(row["rounds"]["dense"], row["rounds"]["this"])
             for name, row in rows.items() if name != "dense"}
    assert times[blocks][0] < 1 and times[merging][1] < 1
    assert min(times, key=lambda name: lost(rows[name])) == merging


@functools.cache
def garments(name: str = "fashion_mnist") -> list[dict]:
  return compaction.load(compaction.results_of(name))


def mean_loss(folds: list[dict], name: str) -> float:
  return statistics.mean(lost(fold["models"][name]) for fold in folds if name in fold["models"])


def test_statements_on_the_page_of_compaction_hold():
  folds, adamw = garments(), garments(compaction.ADAMW)
  digits_folds = compaction.load(compaction.results_of("digits"))
  scratch = [fold["models"]["uniform, from scratch"] for fold in digits_folds
             if "uniform, from scratch" in fold["models"]]
  assert compaction.difference(scratch)[0] == "+"
  for share, uniform in ((80, "uniform, from images"), (50, "uniform, 50 %")):
    measured = f"measured, {share} %"
    assert mean_loss(folds, uniform) > max(mean_loss(folds, name) for name in (
        measured, f"measured quickly, {share} %"))
    assert mean_loss(adamw, measured) < mean_loss(folds, measured)
    for fold in folds:
      plan, depth = fold["models"][measured]["plan"], fashion_mnist.get_config().model.depth
      assert "tokens" in plan
      assert all("ffn" in plan["blocks"][str(block)] for block in range(1, depth - 1))
  # Also on the page of heads: several points without training, less than one from scratch.
  assert mean_loss(folds, "uniform, from scratch") < 1
  assert mean_loss(folds, "uniform, from images") > 2
  distilled = mean_loss(folds, "measured, 50 %, distilled")
  assert 0.4 < distilled < 0.6 and distilled < mean_loss(folds, "uniform, 50 %, distilled")
  narrower = [fold["models"][compaction.NARROWER[0]] for fold in folds
              if compaction.NARROWER[0] in fold["models"]]
  gap, margin = map(float, compaction.difference(narrower).split(" ± "))
  assert abs(gap) < margin
  assert adamw[0]["models"]["dense"]["accuracy"] < min(
      fold["models"]["dense"]["accuracy"] for fold in folds)


def test_statements_on_the_page_of_deploying_hold():
  found = results.read(ROOT / "results/int8_fashion_mnist.json")["quantisers"]
  rows = [row for row in found["rows"] if row["quantiser"] != "none"]
  for runtime in ("ONNX Runtime", "OpenVINO"):
    ours, results_too, *others = (row for row in rows if row["runtime"] == runtime)
    assert (ours["quantiser"], results_too["quantiser"]) == (
        "ONNX Runtime", "ONNX Runtime, results too")
    assert ours["kl"] < min(row["kl"] for row in (results_too, *others))
    for key in ("speed", "speed_small"):
      (middle, low, high), nncf = ours[key], [row[key] for row in others]
      assert middle > results_too[key][0]
      if runtime == "ONNX Runtime":
        assert middle > max(one for one, _, _ in nncf)
      else:
        assert any(low <= most and least <= high for _, least, most in nncf)
