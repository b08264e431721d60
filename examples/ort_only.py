"""An artifact needs no grood_edge.

python ort_only.py model.onnx image.png
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
contract = json.loads(session.get_modelmeta().custom_metadata_map["grood_edge.contract"])
p = contract["preprocessing"]
if p["camera"] or p["crop"] == "letterbox":
    sys.exit("this example does centre crop and stretch on the host; docs/format.md says what your artifact takes")
image = Image.open(sys.argv[2]).convert("L" if p["channels"] == 1 else "RGB")
width, height = p["width"], p["height"]
if p["crop"] == "center":  # short side to short_side, then the middle; docs/format.md has the arithmetic to the pixel
    scale = p["short_side"] / min(image.size)
    image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling[p["filter"].upper()])
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    image = image.crop((left, top, left + width, top + height))
pixels = np.asarray(image.resize((width, height), Image.Resampling[p["filter"].upper()])).reshape(1, height, width, -1)
outputs = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"image": pixels}), strict=True))
name, p_value = contract["classes"][outputs["class_id"][0]], outputs["p_value"][0]
print(f"unknown (p {p_value:.3f}); nearest class {name}" if outputs["is_ood"][0] else f"{name} (p {p_value:.3f})")
