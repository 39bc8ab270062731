"""Fewer links, fewer tokens, or both at 577 tokens, on drawn scenes, from a dense model.

Command:  python main.py --config=configs/sparse_shapes.py:small --workdir=runs/small
Then:     middle, dense, and of token, block, evit, sparsif_evit and tuned (dense, fine-tuned alike)
          those that are of interest, each from the one before:
          python -m experiments.convert runs/small/trained.safetensors --image-size 96 \\
            --out small96.safetensors
          python main.py --config=configs/sparse_shapes.py:middle --workdir=runs/middle \\
            --config.init_from=small96.safetensors
          The last step takes --config.teacher.file as well, the dense model that it starts from.
Data:     drawn scenes whose label is where one object lies as seen from another; no download.
Result:   python -m experiments.accuracy shapes trains all with three seeds, and prints a table.
"""
from configs import shapes
from configs.sparse_digits import LINKS, TOKEN, fine_tune

SIZES = {"small": 48, "middle": 96}   # pixels; objects grow with the image
BLOCK = LINKS % '"granularity": "block"'
EVIT = '"tokens": {"method": "evit", "keep": 0.7, "blocks": [0, 1]}'
PLANS = {"small": "", "middle": "", "dense": "", "tuned": "", "token": f"{{{TOKEN}}}",
         "block": f"{{{BLOCK}}}", "evit": f"{{{EVIT}}}", "sparsif_evit": f"{{{TOKEN}, {EVIT}}}"}


def get_config(plan="block"):
  config = shapes.get_config()
  config.plan = PLANS[plan]
  config.model.image_size = SIZES.get(plan, 192)
  config.model.patch_size = 8     # pixels: 36, 144 and 576 patches
  config.model.width = 64
  config.model.depth = 3
  config.model.heads = 2
  config.model.position_std = 0.5
  config.data.name = "directions"
  config.data.smoothing = 0.0
  config.log_every = 50
  config.eval_params = "raw"
  config.optim.learning_rate = 2e-3
  config.batch_size = {"small": 128, "middle": 64}.get(plan, 16)
  if plan not in ("small", "middle", "dense"):
    return fine_tune(config, steps=50)
  config.total_steps = {"small": 800, "middle": 200, "dense": 150}[plan]
  config.checkpoint_every = config.total_steps
  config.optim.warmup_steps = config.total_steps // 10
  return config
