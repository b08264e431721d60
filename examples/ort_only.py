"""An artifact needs no grood_edge. Unlike grood_edge this takes PNGs of 16 bits too, and cuts their levels off.

python ort_only.py model.onnx image.png
"""

import json
import sys
from fractions import Fraction

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
contract = json.loads(session.get_modelmeta().custom_metadata_map["grood_edge.contract"])
p, camera = contract["preprocessing"], contract["preprocessing"]["camera"]
size = ((camera or p)["width"], (camera or p)["height"])
grey = camera["layout"] == "gray" if camera else p["channels"] == 1
image = ImageOps.exif_transpose(Image.open(sys.argv[2])).convert("L" if grey else "RGB")
if camera and image.size != size:  # the graph resizes and crops, and takes frames of that camera alone
    sys.exit(f"the image has {image.size} pixels (width, height); this artifact takes its camera's {size}")
how, fit = Image.Resampling[p["filter"].upper()], min(Fraction(size[0], image.width), Fraction(size[1], image.height))
resized = {  # docs/format.md has the arithmetic
    "center": [side * (p["short_side"] or 0) // min(image.size) for side in image.size],
    "letterbox": [max(1, int(side * fit + Fraction(1, 2))) for side in image.size],
    "stretch": size,
}["stretch" if camera else p["crop"]]
left, top = ((w - r) // 2 if r < w else -round((r - w) / 2) for r, w in zip(resized, size, strict=True))
page = Image.new(image.mode, size, tuple(min(255, max(0, int(m + 0.5))) for m in 3 * p["mean"])[: 1 if grey else 3])
page.paste(image.resize((resized[0], image.height), how).resize(resized, how), (left, top))  # columns first
pixels = np.asarray(page).reshape(1, size[1], size[0], -1)[..., :: -1 if camera and camera["layout"] == "bgr" else 1]
class_id, p_value, is_ood = (v[0] for v in session.run(["class_id", "p_value", "is_ood"], {"image": pixels}))
print(f"{'unknown; nearest class ' if is_ood else ''}{contract['classes'][class_id]} (p {p_value:.3f})")
