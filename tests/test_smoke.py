from pathlib import Path

import numpy as np

from grood_edge.demo.images import DemoImages
from grood_edge.evaluate.metrics import auroc
from grood_edge.images import find_images, load_image
from grood_edge.runtime import open_session


def test_artifact_separates(artifact_path: Path, digits: DemoImages) -> None:
    with open_session(artifact_path) as session:
        scores = {
            name: session.infer([load_image(p) for p in find_images(folder)]).ood_score
            for name, folder in (("id", digits.test), ("near", digits.near), ("photos", digits.far_photos), ("noise", digits.far_noise))
        }
    print(session.contract.fit, session.contract.calibration.n, session.contract.calibration.k, len(scores["id"]))
    print({n: auroc(scores["id"], s) for n, s in scores.items()})
    print({n: float((s > np.sort(session.contract.calibration.sorted_scores())[-session.contract.calibration.k]).mean()) for n, s in scores.items()})
