"""Sparsifiner on DeiT-S from a trained dense model, also the teacher: 5 epochs for the mask
predictors, then 45 epochs of sparse attention (Wei et al., CVPR 2023).

Command:  python main.py --config=configs/sparsifiner_deit_s.py --workdir=runs/sparsifiner_deit_s \\
            --config.init_from=deit_small.safetensors --config.teacher.file=deit_small.safetensors
          with configs/sparsifiner_deit_s.py:evit for additional token sparsity, EViT at keep 0.7
          (the authors also publish it with --config.plan.tokens.keep=0.5).
Data:     ImageNet-1k, as configs/deit_s.py.
Hardware: the authors used 8 GPUs with 168 images each; both models run forward for 50 epochs.
Cost:     1.77 EFLOP, forward and backward of 64 M images through the dense model; a third as much
          for the teacher.
Result:   not run here. The authors publish 79.83 % top-1 at keep 0.3 and 79.71 % at 0.2 (dense:
          79.82 %), of which about 0.2 points are due to fine-tuning, not sparsity: they report
          80.04 % at keep 1. With EViT it is 79.5 % at 0.7 and 78.7 % at 0.5, with 68 and 76 % fewer
          attention MACs. They also evaluate the averages: --mode=eval --config.eval_params=ema.
At 384:   the authors evaluate the whole image, distorting its aspect ratio: convert the file with
          --image-size 384, then --config.model.image_size=384 --config.data.eval_fit=warp.
Other:    blocks of tokens instead of pairs, for 384 pixels and more:
          --config.plan.attention.granularity=block. The published rows have
          --config.plan.attention.keep from 0.9 to 0.01.
"""
from configs import base, deit_s

STEPS_PER_EPOCH = 953             # 1,281,167 images in batches of 1344
SMALL = {"reconstruct.steps": 5, "reconstruct.warmup_steps": 2}   # with `runlocal`


def get_config(argument=""):
  options, small = base.parse(argument, evit=False), SMALL
  config = deit_s.get_config()
  config.batch_size = 1344
  config.total_steps = 50 * STEPS_PER_EPOCH
  config.checkpoint_every = STEPS_PER_EPOCH
  config.ema_half_life = 0.1455   # of the run: a decay of 0.9999 per step
  config.plan = {"attention": {"method": "sparsifiner", "keep": 0.25}}
  if options.evit:
    config.plan.tokens = {"method": "evit", "keep": 0.7, "blocks": (3, 6, 9)}
    small = {**SMALL, "plan.tokens.blocks": (1, 2)}
  config.model.drop_path_rate = 0.0
  config.model.dtype = "float32"
  config.data.replicas = 8        # of 168 images
  config.data.repeats = 1

  config.optim.schedule = "after_warmup"
  config.optim.learning_rate = 8e-5         # absolute: no scaling with the batch
  config.optim.warmup_steps = 3 * STEPS_PER_EPOCH
  config.optim.warmup_learning_rate = 0.0
  config.optim.final_learning_rate = 2e-6

  config.reconstruct = base.ConfigDict()    # the first phase trains only the mask predictors
  config.reconstruct.steps = 5 * STEPS_PER_EPOCH   # of total_steps
  config.reconstruct.weight = 0.01
  config.reconstruct.learning_rate = 3e-4
  config.reconstruct.warmup_steps = 3 * STEPS_PER_EPOCH
  config.reconstruct.warmup_learning_rate = 0.0
  config.reconstruct.final_learning_rate = 2e-4

  config.loss.logits = 0.5
  config.loss.patches = 0.5
  return base.finish(config, options, small)
