"""Every figure of a page has a source (tests/test_statements.py has what pages say in words).

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
  faster = [tokens for (tokens,), rows in cases(results.load("tokens", "cpu"), "tokens").items()
            if speed(rows, "attention", "dense")[1] > 1]
  layers = [tokens for (tokens,) in cases(results.load("layer", "cpu"), "tokens")]
  folds = compaction.load(compaction.results_of("digits"))
  seeds = collections.Counter(fold["seed"] for fold in folds)
  tested = sum(fold["models"]["dense"]["images"] for fold in folds if fold["seed"] == 0)
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
          f"On digits ({sizes_of(small)}; {WORDS[seeds[0]]} folds, in which each of the {tested:,} "
          "images is a test image once;", f"dense models from {WORDS[len(seeds)]} seeds;",
          f"On Fashion-MNIST ({sizes_of(fashion)}; "
          f"{one_shot.load()['rows']['dense']['images']:,} test images;",
          f"takes {WORDS[tenth]} times as many steps as distilling",
          f"loses after {SHARES[tenth]} of these steps at",
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


# {page: {what the figures are, or where they are tested: phrases}}
STATED = {
    "notebooks/01_first_compact_vit": {"configs, see compaction": ["a tenth of the dense model's"]},
    "results/README": {
        "a share of steps in experiments.fine_tuning and configs": ["a fifth more steps"],
        "a setting": ["half of the patches twice"],
        "tests/test_compaction.py": ["at # to # times this sum"],
        "a goal": ["Two points better"]},
    "attention": {"a setting": ["512 pixels", "224 pixels"],
                  "tests/test_statements.py": ["less than half a point, and a quarter of the"]},
    "ffn": {"tests/test_statements.py": ["all factors lose less than a point"]},
    "tokens": {"tests/test_statements.py": ["patches costs more than a point after"]},
    "compaction": {
        "tests/test_compaction.py": ["between # and #", "once: # for DeiT-S, # with"],
        "a definition": ["its 95 % interval"],
        "tests/test_statements.py": ["about half a point below the dense model"]},
    "deploying": {
        "a format": ["16 bits", "8 bits", "16-bit", "pixels / 255"],
        "Base64": ["a third larger than its models"],
        "tests/export": ["in Python to 1e-4", "to 1e-5"]},
    "heads": {
        "tests/test_statements.py": ["with 577 tokens or more", "less than a point if"],
        "tests/test_compaction.py": ["about twice as much", "four to five times as much"]},
    "methods": {"the paper's": ["The paper's 7 x 7 regions are small at 224 pixels"]},
    "models": {"tests/models": ["equal timm's to 1e-4"]},
    "predicting": {"a format": ["1 bit", "16-bit", "8 bits", "255 of 65,535", "32-bit"]},
    "scale": {
        "JAX's": ["(JAX ends them, 134)"], "a format": ["16 bits"],
        "Google's": ["Google Cloud sends the hosts SIGTERM about thirty seconds"]},
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
  assert all((ROOT / reason).exists() for by_reason in STATED.values() for reason in by_reason
             if reason.startswith("tests/"))


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


@pytest.mark.parametrize("axis", vc.METHODS)
def test_the_tables_of_an_axis_match_the_results(axis):
  table = axis_tables.axis(axis)
  assert table in text_of(DOCS / f"{axis}.md"), "run python -m experiments.bench tables"
