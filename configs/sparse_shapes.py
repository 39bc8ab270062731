"""Sparse attention, token reduction, or both at 577 tokens, on drawn scenes, from a dense model.

Command:  python main.py --config=configs/sparse_shapes.py:coarse --workdir=runs/coarse
          vitcompact convert runs/coarse/trained.safetensors --patch-size 2 \\
            --out runs/coarse/fine.safetensors
          python main.py --config=configs/sparse_shapes.py:dense --workdir=runs/dense \\
            --config.init_from=runs/coarse/fine.safetensors
          python main.py --config=configs/sparse_shapes.py:block --workdir=runs/block \\
            --config.init_from=runs/dense/trained.safetensors \\
            --config.teacher.file=runs/dense/trained.safetensors
          with token, evit, sparsif_evit or tuned (dense, fine-tuned in the same way) instead of
          block.
Data:     drawn scenes whose label is the direction of one object from another; no download.
          With 36 coarse patches the relations are learnt in minutes, with 576 not in hours. So the
          model is trained with coarse patches first, and its patch kernel and positions resized.
Cost:     11.1 TFLOP, forward and backward of 8,640 images through the dense model; a third as much
          for the teacher.
Result:   python -m experiments.accuracy shapes trains all of them with three seeds and prints a
          table.
"""
from configs import base, shapes
from configs.sparse_digits import SPARSE, TOKEN, fine_tune, small

BLOCK = {"attention": {**SPARSE, "granularity": "block"}}
EVIT = {"tokens": {"method": "evit", "keep": 0.7, "blocks": (1,)}}
PLANS = {"coarse": {}, "dense": {}, "tuned": {}, "token": TOKEN, "block": BLOCK, "evit": EVIT,
         "sparsif_evit": {**BLOCK, **EVIT}}


def get_config(argument=""):
  options = base.parse(argument, plan="block")
  config = shapes.get_config()
  config.plan = PLANS[options.plan]
  config.model.image_size = 48    # pixels
  config.model.patch_size = 2     # pixels: 576 patches
  config.model.width = 64
  config.model.depth = 3
  config.model.heads = 2
  config.model.position_std = 0.5
  config.data.name = "directions"
  config.data.smoothing = 0.0
  config.log_every = 50
  config.eval_params = "raw"
  config.optim.learning_rate = 1e-3
  config.batch_size = 16
  if options.plan not in ("coarse", "dense"):
    config = fine_tune(config, steps=500, learning_rate=1e-3)
    if "reconstruct" in config:
      config.total_steps += 40 - config.reconstruct.steps
      config.reconstruct.steps = 40
    return base.finish(config, options, small(config))
  config.total_steps = 300
  if options.plan == "coarse":
    config.model.patch_size = 8   # pixels: 36 patches
    config.total_steps = 1000     # the first few hundred learn nothing
    config.batch_size = 64
    config.log_every = 200
  config.checkpoint_every = config.total_steps
  config.optim.warmup_steps = 50
  return base.finish(config, options)
