"""What tests/test_commands.py does with each complete command of the docs.

RUN has an entry for each command that it runs, ELSEWHERE for each that another test runs, and
NOT_RUN for each that nothing runs, with the reason.
"""
import re
from types import MappingProxyType
from typing import NamedTuple

from vitcompact.export import page


class Run(NamedTuple):
  """How a command runs here, and what must come of it.

  smaller: {text: its replacement}; more: further words; after: commands whose files it needs;
  leaves: a file that it writes; prints: a regular expression of what it says, in which a dot is any
  character.
  """
  smaller: dict[str, str] = MappingProxyType({})
  more: str = ""
  after: tuple[str, ...] = ()
  leaves: str = ""
  prints: str = ""


STEPS = ("--config.total_steps=2 --config.checkpoint_every=2 --config.log_every=1 "
         "--config.batch_size=16 --config.model.depth=1 --config.ema_half_life=0.0 "
         "--config.eval_params=raw --config.data.smoothing=0.0")
# Without what takes long to compile, and without repeats, which need many images.
PLAIN = (f"{STEPS} --config.data.mixup=0.0 --config.data.cutmix=0.0 --config.data.erase=0.0 "
         "--config.model.drop_path_rate=0.0 --config.data.repeats=1")
COMPACTING = f"{PLAIN} --config.compact.images=32"
FEW = "--images 32 --batch-size 16 --augment none"
MEMORY = "--config.model.depth=1 --config.eval_batch_size=64"
IMAGES = {"folder:/data/imagenet": "folder:imagenet", "folder:DATA": "folder:imagenet"}
TRAINED = r"test accuracy.*Folding: same function"
UNDISTILLED = r"\| compacted .*\| deployed .*same function"
COMPACTED = r"\| distilled .*\| deployed .*same function"


def local(name: str) -> dict[str, str]:
  """Returns the replacement that gives a config its argument `runlocal`."""
  return {f"configs/{name}": f"configs/{name}{',' if ':' in name else ':'}runlocal"}


def runtimes(*names: str) -> str:
  """Returns a pattern for a table with rows of these runtimes, the dense model first."""
  return r".*".join(rf"\| {re.escape(name)} \|" for name in names)


TRAIN = "python main.py --config=configs/digits.py --workdir=DIR"
TRAIN_PLAN = f"{TRAIN}2 --config.total_steps=400 --config.plan=plan.json"
COMPACT_IMAGENET, COMPACT_DATA = (
    f"vitcompact compact deit_s.safetensors --data folder:{data} --macs 0.7 --out small "
    "--distil 5ep" for data in ("/data/imagenet", "DATA"))
COMPACT_DIGITS = ("python main.py --config=configs/compact_deit_s.py "
                  "--config.init_from=deit_s.safetensors --workdir=")
EXPORT = "vitcompact export deploy.safetensors deploy.onnx"
EXPORT_BOTH = ("vitcompact export dense.safetensors dense.onnx",
               "vitcompact export deploy.safetensors small.onnx --tokens")
BENCH = "vitcompact bench deit_small_patch16_224 --"
COMPACT_RUN = Run(IMAGES, FEW, leaves="small/deploy.safetensors", prints=COMPACTED)
DIGITS_RUN = Run({**local("compact_deit_s.py"), "DIR3": "small"}, COMPACTING,
                 leaves="small/deploy.safetensors", prints=COMPACTED)
MEASURED = r"Accuracy: [\d.]+% of 20 test images"

RUN = {
    # Training
    TRAIN: Run(local("digits.py"), STEPS, leaves="DIR/receipt.md", prints=TRAINED),
    f"{TRAIN} --mode=eval": Run(local("digits.py"), STEPS, (TRAIN,), prints="test_accuracy"),
    TRAIN_PLAN: Run({**local("digits.py"), "=400": "=2"}, STEPS, leaves="DIR2/deploy.safetensors",
                    prints=TRAINED),
    "python main.py --config=configs/compact_deit_s.py:scratch "
    "--config.data.name=folder:/data/imagenet --workdir=DIR":
        Run({**IMAGES, **local("compact_deit_s.py:scratch")}, PLAIN, leaves="DIR/receipt.md",
            prints=TRAINED),
    "python main.py --config=configs/deit_s.py --workdir=runs/deit_s "
    "--config.data.name=folder:/data/imagenet --config.accumulate=4":
        Run({**IMAGES, **local("deit_s.py")}, f"{PLAIN} --config.data.replicas=4",
            leaves="runs/deit_s/receipt.md", prints=TRAINED),
    "python main.py --config=configs/sparsifiner_deit_s.py --config.init_from=deit_s.safetensors "
    "--config.teacher.file=deit_s.safetensors --workdir=DIR4":
        Run(local("sparsifiner_deit_s.py"), f"{PLAIN} --config.loss.logits=0.5 "
            "--config.reconstruct.steps=1 --config.reconstruct.warmup_steps=1 "
            "--config.optim.warmup_steps=1", leaves="DIR4/deploy.safetensors", prints=TRAINED),
    "python main.py --config=configs/deit_s.py --mode=memory --devices=64":
        Run(local("deit_s.py"), f"{MEMORY} --config.batch_size=64",
            prints=r"on 64 devices.*working memory"),
    "python main.py --config=configs/deit_s.py:deit_base_patch16_224 --mode=memory --devices=32 "
    "--config.batch_size=4096":
        # On the devices that these tests have, without another process.
        Run({**local("deit_s.py:deit_base_patch16_224"), "4096": "64", "=32": "=8"}, MEMORY,
            prints=r"deit_base_patch16_224.*on 8 devices.*working memory"),
    "vitcompact prepare imagenet --tars TARS --out IMAGENET":
        Run(more="--unofficial", leaves="IMAGENET", prints="3 classes"),
    "vitcompact compare runs/a runs/b --out curves.png":
        Run({"runs/a": "DIR", "runs/b": "DIR2"}, after=(TRAIN, TRAIN_PLAN), leaves="curves.png",
            prints=r"test_accuracy.*DIR2"),

    # From a dense model to a smaller one
    COMPACT_IMAGENET: COMPACT_RUN, COMPACT_DATA: COMPACT_RUN,
    "vitcompact compact deit_small_patch16_224.fb_in1k --data folder:/data/imagenet --macs 0.7 "
    "--out small": Run(IMAGES, FEW, leaves="small/deploy.safetensors", prints=UNDISTILLED),
    f"{COMPACT_DIGITS}DIR3": DIGITS_RUN,
    f"{COMPACT_DIGITS}small": DIGITS_RUN,
    COMPACT_DIGITS.replace("deit_s.safetensors", "deit_small_patch16_224.fb_in1k") + "small":
        Run(local("compact_deit_s.py"), f"{COMPACTING} --config.compact.distil=False",
            leaves="small/deploy.safetensors", prints=UNDISTILLED),

    # Weights
    "vitcompact convert deit_small_patch16_224.pth --model deit_small_patch16_224 "
    "--out deit_s.safetensors": Run(more="--force", leaves="deit_s.safetensors"),
    "vitcompact convert deit_s.safetensors --image-size 384 --out deit_s_384.safetensors":
        Run({"384 ": "32 "}, leaves="deit_s_384.safetensors"),
    "vitcompact convert hf-hub:org/name --out name.safetensors": Run(leaves="name.safetensors"),
    "vitcompact models 'vit_small*' --pretrained":
        Run(prints=r"vit_small_patch16_224\.augreg_in1k\n"),
    "vitcompact predict deit_small_patch16_224 photo.jpg": Run(prints=r"photo\.jpg\t\d \d"),
    "vitcompact push runs/small/deploy.safetensors --out release --receipt runs/small "
    "--repo org/name":
        Run({"runs/small": "small"}, after=(COMPACT_DATA,), leaves="release/README.md",
            prints="uploaded to hf-hub:org/name"),
    "vitcompact card --all --out cards": Run(leaves="cards/pvt_v2_b2.md", prints="5 cards"),
    "vitcompact card deit_small_patch16_224": Run(prints="heads: `HMHSA"),
    "vitcompact card pvt_v2_b2 --plan plan.json --out card.md": Run(leaves="card.md"),
    "vitcompact card deploy.safetensors --receipt small":
        Run({"card ": "card small/"}, after=(COMPACT_DATA,), prints=MEASURED),
    "vitcompact card small/deploy.safetensors --receipt small":
        Run(after=(COMPACT_DATA,), prints=MEASURED),

    # Predicting and drawing
    "vitcompact predict deploy.safetensors cat.jpg": Run(prints=r"cat\.jpg(\t[a-z]+ [\d.]+){5}\n"),
    "vitcompact predict deploy.safetensors cat.jpg dog.jpg":
        Run(prints=r"cat\.jpg(\t\w+ [\d.]+){5}\ndog\.jpg(\t\w+ [\d.]+){5}\n"),
    "vitcompact predict deploy.safetensors photos --json > classes.jsonl":
        Run(leaves="classes.jsonl", prints=r'"image": "photos/more/b\.jpg"'),
    "vitcompact predict deploy.safetensors photos --top 1":
        Run(prints=r"photos/a\.jpg\t\w+ [\d.]+\nphotos/more/b\.jpg"),
    "vitcompact draw attention sparse.safetensors cat.jpg --out drawings":
        Run(leaves="drawings/matrices.png"),
    "vitcompact draw tokens evit.safetensors cat.jpg --out tokens.png": Run(leaves="tokens.png"),

    # Exporting and timing
    EXPORT: Run(leaves="deploy.onnx"),
    EXPORT_BOTH[0]: Run(leaves="dense.onnx"),
    EXPORT_BOTH[1]: Run(leaves="small.onnx"),
    "vitcompact export deploy.safetensors deploy.xml --half": Run(leaves="deploy.xml"),
    "vitcompact export deit_small_patch16_224.fb_in1k --to stablehlo --out deit.stablehlo":
        Run(leaves="deit.stablehlo"),
    "vitcompact page compare.html dense=dense.onnx small=small.onnx "
    "--runtime node_modules/onnxruntime-web/dist":
        Run(after=EXPORT_BOTH, leaves="compare.html", prints="open it in a browser"),
    f"taskset -c 0 {BENCH}plan plan.json --batch 8":
        Run(prints=r"\| dense \| XLA \|.*\| plan.json \| XLA \|.*batch 8;"),
    f"{BENCH}plan plan.json --runtime xla,ort,openvino,torch --threads 1":
        Run(prints=runtimes("XLA", "ONNX Runtime", "OpenVINO", "PyTorch") +
            r".*PyTorch has no row for plan\.json"),
    f"{BENCH}runtime xla-bf16,openvino-bf16,torch-bf16,torch-compile --wall":
        Run(prints=runtimes("XLA, bfloat16", "OpenVINO, bfloat16", "PyTorch, bfloat16",
                            "PyTorch, compiled")),
    "vitcompact bench deploy.onnx --runtime ort,openvino --threads 1 --batch 1":
        Run(after=(EXPORT,), prints=runtimes("ONNX Runtime", "OpenVINO")),
    "vitcompact bench deploy.safetensors --runtime xla,ort,openvino --threads 1":
        Run(prints=runtimes("XLA", "ONNX Runtime", "OpenVINO")),

    # Experiments
    "python -m experiments.gallery": Run(more="--only photo_attention",
                                         leaves="gallery_photo_attention.webp"),
    "python -m experiments.survive --kills 50":
        Run({"50": "2"}, after=(TRAIN,), prints=r"lost: 0\n.*resumed from the newest: 1\n"),
    "python -m experiments.survive --flips 100":
        Run({"100": "2"}, after=(TRAIN,), prints=r"flips: 2\n"),
}
PATH = ("tests/run/test_path.py::test_each_stage_writes_its_file", "compact_digits")
SLICE = ("tests/test_launch.py::test_a_slice_is_created_prepared_and_trained_on", "tpu.sh")
SERVED = ("tests/export/test_serve.py::test_answers_on_photographs_are_those_of_the_library",
          "examples/serve.py")
# {command: (the test that runs it, a text of that test's file)}
ELSEWHERE = {
    ".venv/bin/python -m pytest tests/test_plan.py -k json":     # selects this test among others
        ("tests/test_plan.py::test_a_plan_survives_json", "json"),
    "make demo": PATH,
    "python main.py --config=configs/compact_digits.py --workdir=digits": PATH,
    "python main.py --config=... --workdir=... --coordinator=HOST:1234 --num_processes=2 "
    "--process_id=0":
        ("tests/run/test_processes.py::"
         "test_two_processes_end_with_the_numbers_of_one_despite_a_kill", "--num_processes="),
    "SPOT=1 launch/tpu.sh deit us-central2-b v4-32 configs/deit_s.py /mnt/runs/deit_s "
    "--config.mesh.fsdp=4": SLICE,
    "launch/tpu.sh deit us-central2-b v4-8 configs/deit_s.py /mnt/runs/deit_s "
    "--config.data.name=arrayrecord:/mnt/imagenet": SLICE,
    "python examples/serve.py deploy.onnx 8000": SERVED,
    "curl --data-binary @cat.jpg http://127.0.0.1:8000": SERVED,
    f"npm install onnxruntime-web@{page.VERSION}":     # by npm pack
        ("tests/export/test_page.py::"
         "test_an_image_is_classified_and_timed_and_kept_patches_drawn", "onnxruntime-web@{page."),
}
# {command: why nothing runs it}
NOT_RUN = {
    "make lint": "CI runs it", "make test": "CI runs it",
    "make test-all": "it is these tests, with the slow ones",
    ".ci/ranges": "installs two environments",
    "pip install 'jax[cuda13]==0.10.2'": "for machines with a GPU",
    "pip install 'vitcompact[export]'": "make installs these packages, at the pinned versions",
    "pip install torch timm": "large; stand-ins take their place here",
    "python -m experiments.survive --resume":
        "minutes; test_loop.py, test_stop.py and test_processes.py in tests/run/ resume such runs",
}
