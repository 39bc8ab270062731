"""Fewer links, fewer tokens, or both at 577 tokens, on drawn scenes, from a dense model.

Command:  python main.py --config=configs/sparse_shapes.py:dense --workdir=runs/dense
          python main.py --config=configs/sparse_shapes.py:block --workdir=runs/block \\
            --config.init_from=runs/dense/trained.safetensors \\
            --config.teacher.file=runs/dense/trained.safetensors
          with token, evit, sparsif_evit or tuned (dense, fine-tuned alike) in place of block.
          sparsif_evit has blocks of links: at this length those of tokens take minutes to choose.
Data:     drawn scenes whose label is where one object lies as seen from another; no download.
Cost:     0.859 TFLOP, forward and backward of 960 images through the dense model; a third as much
          for the teacher.
Result:   python -m experiments.accuracy shapes trains all with three seeds, and prints a table.
"""
from configs import shapes
from configs.sparse_digits import LINKS, TOKEN, fine_tune

BLOCK = LINKS % '"granularity": "block"'
EVIT = '"tokens": {"method": "evit", "keep": 0.7, "blocks": [0]}'
PLANS = {"dense": "", "tuned": "", "token": f"{{{TOKEN}}}",
         "block": f"{{{BLOCK}}}", "evit": f"{{{EVIT}}}", "sparsif_evit": f"{{{BLOCK}, {EVIT}}}"}


def get_config(plan="block"):
  config = shapes.get_config()
  config.plan = PLANS[plan]
  config.model.image_size = 192   # pixels
  config.model.patch_size = 8     # pixels: 576 patches
  config.model.width = 64
  config.model.depth = 2
  config.model.heads = 2
  config.model.position_std = 0.5
  config.data.name = "directions"
  config.data.smoothing = 0.0
  config.log_every = 50
  config.eval_params = "raw"
  config.optim.learning_rate = 1e-3
  config.batch_size = 16
  if plan != "dense":
    return fine_tune(config, steps=50, learning_rate=5e-4)
  config.total_steps = 900
  config.checkpoint_every = config.total_steps
  config.optim.warmup_steps = 50
  return config
