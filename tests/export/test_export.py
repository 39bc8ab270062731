"""Exported files: the same function in each runtime, graphs with fast kernels, and refusals."""
import collections
import json
import os
import re
import sys
import warnings
import zipfile

import jax
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from tests.cli import command
from tests.combinations import COVERING, combined, words
from vitcompact import bench, runtimes
from vitcompact.attention import Device
from vitcompact.execution import Execution
from vitcompact.export import int8, onnx_file, stablehlo_file
from vitcompact.export.program import Program

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("jax2onnx")

NAME = "deit_tiny_patch16_224"
SMALL = {"depth": 2, "width": 24, "heads": 2, "image_size": 64, "num_classes": 10}
HEADS, FFN = vc.HMHSA(), vc.CFFN(branches=2)
BLOCKS = vc.Sparsifiner(keep=0.5, granularity="block", min_tokens=4, window=2)
PLANS = {
    "heads, ffn": vc.Plan(heads=HEADS, ffn=FFN),
    "grid, EViT, blocks": vc.Plan(tokens=vc.EViT(keep=0.7, blocks=(1,)), attention=BLOCKS),
    "logits, DynamicViT": vc.Plan(heads=vc.HMHSA(site="logits"),
                                  tokens=vc.DynamicViT(keep=0.7, blocks=(1,))),
    "ToMe, tokens": vc.Plan(tokens=vc.ToMe(3), attention=vc.Sparsifiner(keep=0.5, min_tokens=4)),
    "MCTF": vc.Plan(tokens=vc.MCTF(3)),
    "MCTF of one token": vc.Plan(tokens=vc.MCTF(1)),
    "FastPath, keys": vc.Plan(tokens=vc.FastPath(keep=(0.6, 0.3), blocks=(0, 1)), heads=HEADS,
                              attention=vc.KeyMerging(keep=0.5, min_tokens=0)),
    "grid, regions": vc.Plan(heads=vc.HMHSA(layout="grid"), attention=vc.BiFormer(
        keep=0.3, regions=3, lce=True, min_tokens=0)),
    "mixture, linear": vc.Plan(heads=vc.MoH(active=2, shared=1), attention=vc.InLine(),
                               ffn=vc.ConvGLU()),
    "capacity, channels": vc.Plan(heads=vc.MoH(active=2, shared=1, capacity=0.7), ffn=vc.GLU(),
                                  blocks={1: {"attention": vc.ChannelAttention()}}),
    "pruned": vc.Plan(heads=vc.HeadPruning(kept_heads=1)),
}


def model_of(plan=None, name=NAME, **fields):
  """Returns a small model in training form, with random leaves."""
  model = vc.create_model(name, plan=plan or vc.Plan(), **{**SMALL, **fields})
  return model, tiny.init(model)


@pytest.fixture(scope="module")
def small():
  return model_of(PLANS["heads, ffn"])


@pytest.mark.parametrize("plan", PLANS)
def test_onnx_files_compute_every_method(plan, tmp_path):
  done = vc.export(*model_of(PLANS[plan]), tmp_path / "a.onnx")
  assert done.max_rel < 3e-6 and done.images == 4 and done.folded and "Runtime" in done.runtime
  assert os.listdir(tmp_path) == ["a.onnx"]
  operators = {node.op_type for node in onnx.load(tmp_path / "a.onnx").graph.node}
  assert bool(operators & {"Loop", "Scan", "If"}) == plan.startswith("MCTF")


def test_the_graph_is_asked_for_values_as_jax2onnx_would_search_it(monkeypatch, tmp_path):
  """`export.onnx_operators` replaces the search by a shortcut, except for values that it lacks."""
  import onnx_ir

  from vitcompact.export import onnx_operators  # needs jax2onnx

  searched, answers, contexts = [], [], []
  theirs, shortcut = onnx_operators.SEARCH, onnx_operators.is_in_graph

  def both(ctx, value):
    answers.append((shortcut(ctx, value), theirs(ctx, value)))
    contexts.append(ctx)
    return answers[-1][0]

  monkeypatch.setattr(onnx_operators, "SEARCH", lambda *of: searched.append(of) or theirs(*of))
  monkeypatch.setattr(onnx_operators, "is_in_graph", both)
  model = tiny.deit(depth=1, plan=vc.Plan(tokens=vc.ToMe(r=2)))
  onnx_file.write(Program(model, tiny.init(model), vc.preprocess(model)), tmp_path / "a.onnx")
  assert len(answers) > 100 and all(ours == theirs for ours, theirs in answers)
  assert len(searched) < len(answers) / 10
  assert not shortcut(contexts[0], onnx_ir.Value(name="of another graph"))


@pytest.mark.slow
@pytest.mark.parametrize("plan", COVERING, ids=words)
def test_onnx_files_compute_every_legal_pair_of_methods(plan, tmp_path):
  model = combined(plan)
  assert vc.export(model, tiny.init(model), tmp_path / "a.onnx").max_rel < 5e-6


@pytest.mark.parametrize("name,fields", [
    ("pvt_v2_b0", {"image_size": 32, "depths": (1, 1, 1, 1)}),
    ("pvt_v2_b0", {"image_size": 32, "depths": (1, 1, 1, 1), "plan": vc.Plan(
        tokens=vc.FastPath(keep=(0.6,), blocks=(1,)))}),
    ("nextvit_small", {"image_size": 32, "depths": (1, 2, 1, 1)}),
    ("davit_tiny", {"image_size": 32, "widths": (8, 16), "depths": (1, 1), "heads": (2, 2)}),
    ("shvit_s1", {**tiny.NETWORKS["shvit_s1"], "image_size": 96}),
    ("biformer_tiny", {"image_size": 32, "depths": (1, 1), "widths": (16, 32), "top_ks": (2,),
                       "head_dim": 8, "regions": 2}),
    ("transnext_micro", {"image_size": 64, "depths": (1, 0, 1, 1)}),
    ("lvvit_s", {"image_size": 32, "depth": 1, "width": 24, "heads": 2}),   # halves the branches
    ("eva02_tiny_patch14_224", {"image_size": 28, "depth": 1, "width": 24, "heads": 2}),
    ("vit_small_patch16_dinov3", {"image_size": 32, "depth": 1, "width": 24, "heads": 2}),
    ("vit_base_patch16_siglip_224", {"image_size": 32, "depth": 1, "width": 24, "heads": 2})])
def test_onnx_files_compute_every_family(name, fields, tmp_path):
  model = vc.create_model(name, num_classes=10, **fields)
  variables = tiny.init(model, spread=0.1)
  assert vc.export(model, variables, tmp_path / "a.onnx").max_rel < 5e-6
  if name in ("nextvit_small", "shvit_s1"):   # OpenVINO supports pooling only as pooling
    pytest.importorskip("openvino")
    assert vc.export(model, variables, tmp_path / "a.xml").max_rel < 5e-6


def test_dense_graphs_use_operations_with_fast_kernels():
  model, variables = model_of()
  model, variables = vc.fold(model, variables)
  graph = onnx_file.model_of(Program(model, variables, vc.preprocess(model))).graph
  counts = collections.Counter(node.op_type for node in graph.node)
  depth = model.depth
  assert not counts.keys() & {"Einsum", "Loop", "Scan", "If", "Exp", "Erf", "ReduceMean"}
  assert counts["LayerNormalization"] == 2 * depth + 1
  assert (counts["Softmax"], counts["Gelu"], counts["Conv"]) == (depth, depth, 1)
  assert counts["MatMul"] == 8 * depth + 1   # q, k, v, scores, values, out, two of the FFN; head
  weights = {tensor.name: tensor.dims for tensor in graph.initializer}
  products = [name for node in graph.node if node.op_type == "MatMul" for name in node.input
              if name in weights]
  assert len(products) == 6 * depth + 1 and all(len(weights[name]) == 2 for name in products)


@pytest.mark.parametrize("suffix", [".onnx", ".xml", ".stablehlo"])
def test_a_file_takes_pixels_and_records_classes_plan_and_preprocessing(suffix, small, tmp_path):
  if suffix == ".xml":
    pytest.importorskip("openvino")
  model, variables = small
  path, names = tmp_path / f"a{suffix}", [f"class {i}" for i in range(10)]
  done = vc.export(model, variables, path, pixels=True, classes=names)
  run = runtimes.load(path)
  assert done.max_rel < 2e-6 and run.dtype == np.uint8 and run.shape == (64, 64, 3)
  assert run.classes == names and run.about["model"] == NAME
  assert vc.Plan.from_json(run.about["plan"]) == model.plan
  assert run.preprocess == vc.preprocess(model)
  pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
  expected = tiny.apply(model, variables, vc.preprocess(model).normalise(pixels))
  np.testing.assert_allclose(run(pixels), expected, atol=2e-5 * np.abs(expected).max())


def test_openvino_stores_matrices_in_half_precision_on_request(small, tmp_path):
  pytest.importorskip("openvino")
  whole, half = (vc.export(*small, tmp_path / f"{half}.xml", half=half) for half in (False, True))
  assert half.size < 0.95 * whole.size and whole.max_rel < 1e-5 < half.max_rel < 2e-2
  assert sorted(os.listdir(tmp_path)) == ["False.bin", "False.xml", "True.bin", "True.xml"]


def test_a_file_may_take_a_fixed_number_of_images(small, tmp_path):
  vc.export(*small, tmp_path / "a.onnx", batch=2)
  graph = onnx.load(tmp_path / "a.onnx").graph
  shape = [size.dim_value for size in graph.input[0].type.tensor_type.shape.dim]
  assert shape == [2, 64, 64, 3]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_files_of_weights_keep_the_function_and_refuse_pixels(suffix, small, tmp_path):
  if suffix == ".pth":
    pytest.importorskip("torch")
  done = vc.export(*small, tmp_path / f"a{suffix}")
  assert done.max_rel <= 1e-6
  with pytest.raises(ValueError, match="holds weights, not a program"):
    vc.export(*small, tmp_path / f"b{suffix}", pixels=True)


def test_stablehlo_has_loops_only_for_cpus_and_its_weights_once():
  model, variables = vc.fold(*model_of(image_size=160))   # 101 tokens: CPUs go image by image
  program = stablehlo_file.exported(Program(model, variables, vc.preprocess(model)))
  assert set(program.platforms) == {"cpu", "cuda", "tpu"}
  text = program.mlir_module()
  # One loop over images per block, all in the CPU's branch.
  assert len(re.findall(r"stablehlo\.while", text)) == model.depth
  weights = sum(leaf.size for leaf in jax.tree.leaves(variables))
  assert len(program.serialize()) < 1.5 * 4 * weights   # weights are stored once


def test_the_documented_loader_of_stablehlo_works(small, tmp_path, monkeypatch):
  model, variables = small
  vc.export(model, variables, tmp_path / "model.stablehlo")
  monkeypatch.chdir(tmp_path)
  lines = [line[2:] for line in stablehlo_file.__doc__.splitlines() if line.startswith("  ")]
  images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
  names = {"images": images}
  exec("\n".join(lines), names)
  expected = tiny.apply(model, variables, images)
  np.testing.assert_allclose(names["logits"], expected, atol=1e-5 * np.abs(expected).max())
  assert not any("vitcompact" in line for line in lines)


def test_int8_is_calibrated_and_reports_its_error(small, tmp_path):
  model, variables = small
  images = vc.preprocess(model).normalise(
      np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8))
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    done = vc.export(model, variables, tmp_path / "a.onnx", int8=images, images=images)
  assert 1e-5 < done.max_rel < 0.2
  assert "differs by" in str(done) and "at most" not in str(done)   # no limit was applied
  graph = onnx.load(tmp_path / "a.onnx").graph
  counts = collections.Counter(node.op_type for node in graph.node)
  # Weights and activations of each product with weights, but not in attention products or softmax.
  assert counts["QuantizeLinear"] > 0 and counts["Softmax"] == model.depth
  quantised = {out for node in graph.node if node.op_type == "DequantizeLinear"
               for out in node.output}
  (patches,) = [node for node in graph.node if node.op_type == "Conv"]
  assert set(patches.input[:2]) <= quantised
  products = [node for node in graph.node if node.op_type == "MatMul"]
  assert sum(set(node.input) <= quantised for node in products) == len(products) - 2 * model.depth
  with pytest.raises(ValueError, match=r"more than tolerance=0\.0001; nothing was written"):
    vc.export(model, variables, tmp_path / "b.onnx", int8=images, images=images, tolerance=1e-4)
  with pytest.raises(ValueError, match=r"int8: must be .* and is an array of shape \(2, 8, 8, 3\)"):
    vc.export(model, variables, tmp_path / "b.onnx", int8=images[:2, :8, :8])
  assert os.listdir(tmp_path) == ["a.onnx"]


def test_int8_is_the_same_for_pixels_and_normalised_images(
    small, tmp_path):
  model, variables = small
  pixels = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
  images = vc.preprocess(model).normalise(pixels)
  logits = {}
  for name, given in (("normalised", images), ("pixels", pixels)):
    path = tmp_path / f"{name}.onnx"
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      done = vc.export(model, variables, path, int8=images, pixels=name == "pixels")
    assert 1e-5 < done.max_rel < 0.2
    logits[name] = runtimes.load(path)(given)
  # A value between two steps may round either way.
  most = np.abs(logits["normalised"]).max()
  np.testing.assert_allclose(logits["pixels"], logits["normalised"], atol=0.02 * most)


@pytest.mark.parametrize("count,batch,sizes", [
    (20, None, [8, 8, 8]), (3, None, [8]), (8, None, [8]), (3, 2, [2, 2]), (3, 4, [4])])
def test_int8_is_calibrated_on_every_image(count, batch, sizes):
  """Images of an incomplete last batch are repeated, which changes no range."""
  batches = list(iter(int8.Images(np.arange(float(count)).reshape(-1, 1, 1, 1), batch).get_next,
                      None))
  assert [len(batch["images"]) for batch in batches] == sizes
  assert {x for batch in batches for x in batch["images"].flat} == set(range(count))


def test_the_page_shows_the_measured_cost_of_8_bits():
  from experiments import int8 as experiment

  page = (experiment.ROOT / "docs/deploying.md").read_text()
  found = json.loads(experiment.OUT.read_text())
  assert experiment.table(found) in page and experiment.quantiser_table(found["quantisers"]) in page
  for runtime in ("ONNX Runtime", "OpenVINO"):
    losses = {row["quantiser"]: row["kl"] for row in found["quantisers"]["rows"]
              if row["runtime"] == runtime and row["quantiser"] != "none"}
    assert min(losses, key=losses.get) == "ONNX Runtime" and len(losses) > 3
  for key in ("speed", "speed_small"):   # the median; the range
    speeds = {(row["quantiser"], row["runtime"]): row[key] for row in found["quantisers"]["rows"]}
    ours = {runtime: speeds["ONNX Runtime", runtime] for runtime in ("ONNX Runtime", "OpenVINO")}
    others = {runtime: [speed for (title, where), speed in speeds.items()
                        if where == runtime and title.startswith("NNCF")] for runtime in ours}
    assert ours["ONNX Runtime"][0] > max(speed[0] for speed in others["ONNX Runtime"])
    assert ours["OpenVINO"][2] >= max(others["OpenVINO"])[1]
    for runtime in ours:
      assert ours[runtime][0] > speeds["ONNX Runtime, results too", runtime][0]
  names = [f"node {i}" for i in range(14)]
  found = experiment.kinds(names, depth=2)
  assert found["fc2"] == ["node 6", "node 12"] and found["head"] == ["node 13"]
  assert sorted(name for kind, nodes in found.items() if kind != "all" for name in nodes) == sorted(
      names)


def test_a_file_that_computes_something_else_is_removed(small, tmp_path, monkeypatch):
  real = runtimes.load

  def off(path, **options):
    run = real(path, **options)
    return runtimes.Runner(run.runtime, lambda images: run.call(images) * 1.001, run.about,
                           run.shape, run.dtype)

  monkeypatch.setattr(runtimes, "load", off)
  with pytest.raises(ValueError, match=r"differs from the model by 0\.001 of its largest logit"):
    vc.export(*small, tmp_path / "a.onnx")
  assert os.listdir(tmp_path) == []
  assert vc.export(*small, tmp_path / "a.onnx", tolerance=0.01).max_rel == pytest.approx(
      1e-3, rel=0.01)


@pytest.mark.parametrize("options,said", [
    ({"path": "a.bin"}, "its suffix is not that of a format; end it in .onnx"),
    ({"path": "a.onnx", "to": "tflite"}, "to='tflite': must be one of onnx"),
    ({"path": "a.onnx", "to": "openvino"}, "a file for openvino must end in .xml"),
    ({"path": "no/a.onnx"}, "there is no directory"),
    ({"path": "there.onnx"}, "exists; give another name"),
    ({"path": "a.onnx", "batch": 0}, "batch=0: must be a positive whole number"),
    ({"path": "a.onnx", "half": True}, "half=True is only for openvino, not onnx"),
    ({"path": "a.xml", "int8": []}, "int8 is only for onnx, not openvino"),
    ({"path": "a.onnx", "int8": []}, "int8: must be normalised images of shape (n, 64, 64, 3)"),
    ({"path": "a.onnx", "images": np.zeros((0, 64, 64, 3))}, "is an array of shape (0, 64"),
    ({"path": "a.onnx", "images": np.zeros((64, 64, 3))}, "is an array of shape (64, 64, 3)"),
    ({"path": "a.onnx", "images": [], "pixels": True}, "leave images out"),
    ({"path": "a.onnx", "tolerance": -1.0}, "tolerance=-1.0: must be 0 or more"),
    ({"path": "a.onnx", "tolerance": float("nan")}, "tolerance=nan: must be 0 or more"),
    ({"path": "a.onnx", "classes": ["one"]}, "1 names of classes for a model with num_classes=10")])
def test_incompatible_options_are_refused_before_any_file_is_made(options, said, small, tmp_path):
  (tmp_path / "there.onnx").write_text("mine")
  options = {**options, "path": tmp_path / options["path"]}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(onnx_file, "model_of", None)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
      vc.export(*small, **options)
  assert "\n" not in str(error.value)
  assert (tmp_path / "there.onnx").read_text() == "mine" and len(os.listdir(tmp_path)) == 1


def test_an_operation_missing_in_onnx_is_named_with_its_block(monkeypatch, tmp_path):
  """A user's own method may need such an operation."""
  from jax2onnx.plugins import plugin_system

  from vitcompact.export import onnx_operators

  with onnx_operators.translations():
    pass   # the first call registers the translations
  monkeypatch.delitem(plugin_system.PLUGIN_REGISTRY, "top_k")
  with pytest.raises(ValueError, match=r"ONNX has no 'top_k', which blocks_0/links needs") as error:
    vc.export(*model_of(PLANS["grid, EViT, blocks"]), tmp_path / "a.onnx")
  assert "\n" not in str(error.value) and os.listdir(tmp_path) == []


def test_weights_larger_than_an_onnx_file_can_hold_are_refused(small, tmp_path, monkeypatch):
  monkeypatch.setattr(onnx_file, "MAX_BYTES", 1000)
  with pytest.raises(ValueError, match=r"weights, and an ONNX file holds at most 0\.0: export"):
    vc.export(*small, tmp_path / "a.onnx")


def test_export_names_a_missing_extra(small, tmp_path, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "jax2onnx", None)
  with pytest.raises(ValueError, match="need jax2onnx, which is not installed"):
    vc.export(*small, tmp_path / "a.onnx")
  assert os.listdir(tmp_path) == []


def test_int8_names_a_missing_extra(small, tmp_path, monkeypatch):
  images = np.zeros((8, 64, 64, 3), np.float32)
  monkeypatch.setitem(sys.modules, "onnxruntime", None)
  with pytest.raises(ValueError, match=r"int8 needs onnxruntime, which is not installed; pip inst"):
    vc.export(*small, tmp_path / "a.onnx", int8=images)
  assert os.listdir(tmp_path) == []


def test_missing_flatbuffers_are_named_when_reading_and_writing(
    small, tmp_path, monkeypatch):
  def lacking(*_):
    raise ImportError("Please install 'flatbuffers' in order to use Exported serialization")

  path = tmp_path / "a.stablehlo"
  vc.export(*small, path)
  monkeypatch.setattr(jax.export, "deserialize", lacking)
  monkeypatch.setattr(jax.export.Exported, "serialize", lacking)
  message = "StableHLO files need flatbuffers, which is not installed; pip install flatbuffers"
  assert command.fails("bench", path) == f"error: {message}"
  with pytest.raises(ValueError, match=message):
    vc.export(*small, tmp_path / "b.stablehlo")
  assert os.listdir(tmp_path) == ["a.stablehlo"]


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_truncated_stablehlo_file_is_refused_in_one_line(share, small, tmp_path):
  whole, cut = tmp_path / "a.stablehlo", tmp_path / "b.stablehlo"
  vc.export(*small, whole)
  with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(cut, "w") as other:
    for name in archive.namelist():
      data = archive.read(name)
      other.writestr(name, data if name.endswith(".json") else data[:int(share * len(data))])
  assert "is not a StableHLO file of `vitcompact export`" in command.fails("bench", cut)


@pytest.mark.parametrize("name,runtime,said", [
    ("a.txt", None, ": no runtime reads .txt files; give one that ends in .stablehlo"),
    ("a.onnx", "xla", "XLA reads no .onnx files; give one that ends in .stablehlo, .safetensors"),
    ("a.onnx", "tvm", "runtime 'tvm': must be one of xla, ort, openvino"),
    ("a.onnx", None, "ONNX Runtime does not take"),
    ("a.stablehlo", None, "is not a StableHLO file of `vitcompact export`")])
def test_files_that_no_runtime_reads_are_refused(name, runtime, said, tmp_path):
  (tmp_path / name).write_text("nothing")
  with pytest.raises(ValueError, match=re.escape(said)) as error:
    runtimes.load(tmp_path / name, runtime)
  assert "\n" not in str(error.value)


def test_tuning_for_one_device_is_left_out_of_files_for_others(tmp_path):
  """Chunks and image-by-image forms are loops, and a vendor's form is not available everywhere."""
  model, variables = vc.fold(*model_of())
  tuned = model.clone(execution=Execution(attention={0: "images", 1: "cudnn"}, chunk=2))
  assert vc.export(tuned, variables, tmp_path / "a.onnx", batch=5).max_rel < 3e-6
  operators = {node.op_type for node in onnx.load(tmp_path / "a.onnx").graph.node}
  assert not operators & {"Loop", "Scan", "If"}
  program = Program(tuned, variables, vc.preprocess(tuned))
  assert program.model_on(Device("cpu")).execution == Execution(attention={0: "images"}, chunk=2)


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_a_bfloat16_model_is_refused_for_runtimes_that_lack_it(suffix, tmp_path):
  model, variables = model_of(dtype="bfloat16")
  with pytest.raises(ValueError, match=r"computes in float32; give model\.clone\(dtype='float3"):
    vc.export(model, variables, tmp_path / f"a{suffix}")
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("taken", ["a.xml", "a.bin"])
def test_an_output_path_that_is_a_directory_is_refused_at_once(taken, small, tmp_path):
  (tmp_path / taken).mkdir()
  with pytest.raises(ValueError, match=f"{taken} is a directory"):
    vc.export(*small, tmp_path / "a.xml", force=True)
  assert os.listdir(tmp_path) == [taken]


def other_file(path, shape, element="FLOAT", inputs=1):
  """Writes an ONNX file unlike ours."""
  element = getattr(onnx.TensorProto, element)
  values = [onnx.helper.make_tensor_value_info(name, element, shape) for name in "xyz"]
  graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["z"])], "graph",
                                 values[:inputs], values[2:])
  onnx.save(onnx.helper.make_model(
      graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.mark.parametrize("runtime", ["ort", "openvino"])
@pytest.mark.parametrize("shape,fields,said", [
    ([1, 8, 8, 3], {}, "takes 1 images at a time: give --batch 1"),
    (["n", "h", "w", 3], {}, "takes images of any size"),
    (["n", 8, 8, 3], {"inputs": 2}, "takes 2 inputs"),
    (["n", 8, 8, 3], {"element": "INT64"}, "takes a tensor(int64)")])
def test_bench_refuses_foreign_files_in_one_line(shape, fields, said, runtime, tmp_path):
  if runtime == "openvino":
    pytest.importorskip("openvino")
  other_file(tmp_path / "a.onnx", shape, **fields)
  if (runtime, fields) == ("openvino", {"element": "INT64"}):   # it converts them
    command.succeeds("bench", tmp_path / "a.onnx", "--runtime", runtime, "--rounds", 1)
  else:
    assert said in command.fails("bench", tmp_path / "a.onnx", "--runtime", runtime, "--batch", 2)


def test_the_error_for_a_wrong_batch_names_the_fixed_number_of_images(small, tmp_path):
  vc.export(*small, tmp_path / "a.stablehlo", batch=2)
  run = runtimes.load(tmp_path / "a.stablehlo")
  with pytest.raises(ValueError, match="takes 2 images at a time, but 3 were given"):
    run(np.zeros((3, *run.shape)))


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize("suffix", [".onnx", ".xml", ".stablehlo"])
def test_images_of_the_wrong_dtype_or_size_are_refused(suffix, pixels, small, tmp_path):
  """Normalised images cast to uint8, or pixels cast to float32, would give meaningless logits."""
  if suffix == ".xml":
    pytest.importorskip("openvino")
  vc.export(*small, tmp_path / f"a{suffix}", pixels=pixels)
  run = runtimes.load(tmp_path / f"a{suffix}")
  right, other = (np.uint8, np.float32) if pixels else (np.float64, np.uint8)
  for images in (np.zeros((1, 64, 64, 3), other), np.zeros((1, 8, 8, 3), right)):
    with pytest.raises(ValueError, match=r"the file takes \(n, 64, 64, 3\) of (uint8|float32)"):
      run(images)
  assert run(np.zeros((1, 64, 64, 3), right)).shape == (1, 10)


@pytest.mark.parametrize("threads", [0, -1, 10 ** 5])
def test_an_impossible_number_of_threads_is_refused(threads, tmp_path):
  """ONNX Runtime takes 0 to mean all cores, and allocates memory for each of 10 ** 5 threads."""
  (tmp_path / "a.stablehlo").write_text("nothing")   # XLA starts no threads for it
  with pytest.raises(ValueError, match=rf"threads={threads}: must be from 1 to {os.cpu_count()}"):
    runtimes.load(tmp_path / "a.stablehlo", threads=threads)


def test_a_runtime_has_one_thread_per_core_of_the_process(small, tmp_path, monkeypatch):
  import onnxruntime

  vc.export(*small, tmp_path / "a.onnx")
  started, session = [], onnxruntime.InferenceSession
  monkeypatch.setattr(onnxruntime, "InferenceSession", lambda path, options, **others: (
      started.append(options.intra_op_num_threads), session(path, options, **others))[1])
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5})
  for threads in (None, 1):
    runtimes.load(tmp_path / "a.onnx", threads=threads)
  assert started == [3, 1]


def test_the_command_exports_and_refuses_in_one_line(small, tmp_path):
  source, out = tmp_path / "a.safetensors", tmp_path / "a.onnx"
  vc.save(source, *small, classes=[f"class {i}" for i in range(10)])
  message = command.succeeds("export", source, out)
  assert "differs by" in message and runtimes.load(out).classes[9] == "class 9"
  assert "exists; give another name" in command.fails("export", source, out)
  command.succeeds("export", source, "--to", "stablehlo", "--out", tmp_path / "b.stablehlo")
  assert "same class on 100%" in command.succeeds("export", source, tmp_path / "c.onnx", "--tune")
  assert "--tune times ONNX Runtime and OpenVINO, which read .onnx, .xml" in command.fails(
      "export", source, tmp_path / "d.stablehlo", "--tune")
  with pytest.MonkeyPatch.context() as patch:   # refused before tuning
    patch.setattr(vc, "tune", None)
    assert "half=True is only for openvino" in command.fails(
        "export", source, tmp_path / "d.onnx", "--tune", "--half")
  head, _, *rows = command.succeeds("bench", source, out, "--runtime", "xla,ort", "--batch", 1,
                                    "--rounds", 1, "--threads", 1).splitlines()
  cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row[:1] == "|"]
  assert [row[1] for row in cells] == ["XLA", "XLA", *["ONNX Runtime"] * 3]
  assert all(len(row) == len(head.strip("|").split("|")) for row in cells)
  assert [row[6] for row in cells[::2][:2]] == ["1", "1"] and cells[1][7].endswith("%")
  assert "must be one of xla" in command.fails("bench", source, "--runtime", "tensorrt")
  assert "is read by ort, openvino, openvino-bf16, not by xla" in command.fails("bench", out)
  for size in (0, 32):
    assert "leave --plan and --image-size out" in command.fails(
        "bench", out, "--image-size", size, "--runtime", "ort")
  with pytest.MonkeyPatch.context() as patch:   # refused before compiling
    patch.setattr(bench, "compiled", None)
    assert "threads=9999: must be from 1 to" in command.fails("bench", source, "--threads", 9999)
  rows = command.succeeds("bench", out, "--runtime", "ort,ort", "--batch", 1, "--rounds", 1)
  assert rows.count("ONNX Runtime") == 1


def test_metadata_is_plain_json(small):
  model, variables = vc.fold(*small)
  about = Program(model, variables, vc.preprocess(model), classes=("a",) * 10).about()
  preprocess = json.loads(about["preprocess"])
  assert preprocess["image_size"] == [64, 64] and preprocess["crop_mode"] == "center"
  assert all(isinstance(value, str) for value in about.values())
