"""An artifact needs no grood_edge. Unlike grood_edge this takes PNGs of 16 bits too, and cuts their levels off.

python ort_only.py model.onnx image.png
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
contract = json.loads(session.get_modelmeta().custom_metadata_map["grood_edge.contract"])
p = contract["preprocessing"]
camera, size, how = p["camera"], (p["width"], p["height"]), Image.Resampling[p["filter"].upper()]
grey = camera["layout"] == "gray" if camera else p["channels"] == 1
image = ImageOps.exif_transpose(Image.open(sys.argv[2])).convert("L" if grey else "RGB")
if camera:  # the graph resizes and crops, and takes frames of that camera alone
    size = (camera["width"], camera["height"])
    if image.size != size:
        sys.exit(f"the image has {image.size} pixels (width, height); this artifact takes its camera's {size}")
elif p["crop"] == "letterbox":  # docs/format.md has the arithmetic of both
    fit = min(size[0] / image.width, size[1] / image.height)
    small = image.resize([max(1, int(side * fit + 0.5)) for side in image.size], how)
    image = Image.new(image.mode, size, tuple(min(255, max(0, int(level + 0.5))) for level in p["mean"]))
    image.paste(small, ((size[0] - small.width) // 2, (size[1] - small.height) // 2))
elif p["crop"] == "center":
    image = image.resize([side * p["short_side"] // min(image.size) for side in image.size], how)
    left, top = round((image.width - size[0]) / 2), round((image.height - size[1]) / 2)
    image = image.crop((left, top, left + size[0], top + size[1]))
pixels = np.asarray(image.resize(size, how)).reshape(1, size[1], size[0], -1)
pixels = pixels[..., ::-1] if camera and camera["layout"] == "bgr" else pixels
outputs = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"image": pixels}), strict=True))
name, p_value = contract["classes"][outputs["class_id"][0]], outputs["p_value"][0]
print(f"unknown (p {p_value:.3f}); nearest class {name}" if outputs["is_ood"][0] else f"{name} (p {p_value:.3f})")
