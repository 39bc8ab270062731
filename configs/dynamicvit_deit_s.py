"""DynamicViT on DeiT-S: 30 epochs from a trained dense model, also the teacher (NeurIPS 2021).

Command:  python main.py --config=configs/dynamicvit_deit_s.py --workdir=runs/dynamicvit_deit_s \\
            --config.init_from=deit_small.safetensors --config.teacher.file=deit_small.safetensors
          with --config.plan.tokens.keep=0.5 for another keep rate,
          configs/dynamicvit_deit_s.py:deit_base_patch16_224 for DeiT-B.
Data:     ImageNet-1k, as configs/deit_s.py.
Hardware: the authors used 8 GPUs with 128 images each; training computes every token.
Cost:     1.06 EFLOP, forward and backward of 38.4 M images through the dense model; a third as much
          for the teacher.
Result:   not run here. The authors publish 79.32 % top-1 for DeiT-S (dense: 79.8 %) and 81.43 %
          for DeiT-B (dense: 81.8 %) at keep 0.7. They also evaluate the averages: --mode=eval
          --config.eval_params=ema.
At 384:   the authors evaluate the whole image, distorting its aspect ratio: convert the file with
          --image-size 384, then --config.model.image_size=384 --config.data.eval_fit=warp.
"""
from configs import base, deit_s

STEPS_PER_EPOCH = 1251            # 1,281,167 images in batches of 1024


def get_config(argument=""):
  options = base.parse(argument, model="deit_small_patch16_224")
  is_base = options.model == "deit_base_patch16_224"
  config = deit_s.get_config()
  config.total_steps = 30 * STEPS_PER_EPOCH
  config.checkpoint_every = STEPS_PER_EPOCH
  config.ema_half_life = 0.1847   # of the run: a decay of 0.9999 per step
  config.plan = {"tokens": {"method": "dynamicvit", "keep": 0.7, "blocks": (3, 6, 9)}}
  config.model.name = options.model
  config.model.drop_path_rate = 0.2 if is_base else 0.0
  config.model.dtype = "float32"
  config.data.replicas = 8        # of 128 images
  config.data.repeats = 1
  config.optim.schedule = "after_warmup"
  config.optim.learning_rate = 1e-3         # of the predictors, absolute
  config.optim.warmup_steps = 5 * STEPS_PER_EPOCH
  config.optim.warmup_learning_rate = 0.0
  config.optim.final_learning_rate = 1e-6
  config.optim.rates = (
      (r".*/predict_tokens/.*", 1.0, 0),
      (r"cls_token|pos_embed", 0.0, 0),     # frozen
      (r".*", 0.01, 5 * STEPS_PER_EPOCH))
  config.loss.kept_ratio = 5.0 if is_base else 2.0
  config.loss.logits = 0.5
  config.loss.patches = 0.5
  return base.finish(config, options, {"plan.tokens.blocks": (1, 2)})
