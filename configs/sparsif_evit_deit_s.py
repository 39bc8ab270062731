"""Both sparsities on DeiT-S: links at keep 0.25 and EViT's tokens at keep 0.7 (or 0.5), trained as
configs/sparsifiner_deit_s.py.

Command:  python main.py --config=configs/sparsif_evit_deit_s.py \\
            --workdir=runs/sparsif_evit_deit_s \\
            --config.init_from=deit_small.safetensors --config.teacher.file=deit_small.safetensors
          with configs/sparsif_evit_deit_s.py:0.5 for the other published row.
Hardware: as configs/sparsifiner_deit_s.py.
Cost:     1.77 EFLOP, forward and backward of 64 M images through the dense model; a third as much
          for the teacher.
Result:   not run here. The authors publish 79.5 % top-1 at 0.7 and 78.7 % at 0.5 (dense: 79.82 %),
          with 68 and 76 % fewer attention MACs.
"""
from configs import sparsifiner_deit_s


def get_config(keep="0.7"):
  config = sparsifiner_deit_s.get_config()
  config.plan = ('{"links": {"method": "sparsifiner", "keep": 0.25}, '
                 f'"tokens": {{"method": "evit", "keep": {float(keep)}, "blocks": [3, 6, 9]}}}}')
  return config
