"""InLine's DeiT and PVT (Han et al., arXiv 2412.06590), under the authors' names.

Their sizes differ from those of the original DeiT and PVT: they have more heads, and use what
linear attention saves for a higher resolution. The attention is the method in PLAN.
"""
from vitcompact.models.pvt import PyramidVisionTransformer
from vitcompact.models.variant import Variant
from vitcompact.models.vit import VisionTransformer

PLAN = {"attention": {"method": "inline"}}

VARIANTS = {
    f"inline_deit_{size}": Variant(VisionTransformer, {"width": width, "heads": heads,
                                                       "image_size": image_size,
                                                       "antialias": False}, crop=0.875, plan=PLAN)
    for size, width, heads, image_size in (("tiny", 192, 6, 224), ("small", 320, 10, 288),
                                           ("base", 384, 12, 448))
} | {
    f"inline_pvt_{size}": Variant(PyramidVisionTransformer, {
        "depths": depths, "heads": (2, 4, 10, 16), "sr_ratios": (1, 1, 1, 1), "class_token": False,
        "drop_path_rate": rate}, crop=0.875, plan=PLAN)
    for size, depths, rate in (("tiny", (2, 2, 2, 2), 0.1), ("small", (3, 4, 6, 3), 0.1),
                               ("medium", (3, 4, 18, 3), 0.3), ("large", (3, 8, 27, 3), 0.3))
}
