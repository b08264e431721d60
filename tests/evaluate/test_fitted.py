"""The fitted images once more: exact class means, a bounded and fair sample, the digest of the contract."""

from pathlib import Path

import numpy as np
import pytest

from grood_edge.demo.images import DemoImages
from grood_edge.errors import DatasetError
from grood_edge.evaluate import fitted
from grood_edge.evaluate.fitted import collect_fit
from grood_edge.images import find_images, load_image
from grood_edge.runtime.session import Session


def test_rows_means_and_digest(session: Session, digits: DemoImages) -> None:
    rows = collect_fit(session, str(digits.train))
    assert rows.digest == session.contract.fit.data_digest
    assert rows.images == len(rows.features) == len(find_images(digits.train))
    outputs = session.infer([load_image(path) for path in find_images(digits.train / "4")])
    np.testing.assert_allclose(rows.class_means[4], outputs.features.mean(axis=0, dtype=np.float64), atol=1e-4)
    assert (rows.labels == 4).sum() == len(outputs)


def test_the_sample_is_bounded_seeded_and_spread_over_all_images(
    session: Session, digits: DemoImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = collect_fit(session, str(digits.train))
    monkeypatch.setattr(fitted, "MAX_ROWS", 50)
    some, again = (collect_fit(session, str(digits.train)) for _ in range(2))
    np.testing.assert_array_equal(some.features, again.features)
    np.testing.assert_allclose(some.class_means, whole.class_means)
    assert len(some.features) == len(some.logits) == len(some.labels) == 50
    places = [int(np.abs(whole.features - row).sum(axis=1).argmin()) for row in some.features]
    assert max(places) > 0.6 * whole.images, "not the first images alone"
    monkeypatch.setattr(fitted, "MAX_BYTES", 4 * whole.features.shape[1] * 7)
    assert len(collect_fit(session, str(digits.train)).features) == 7


def test_wrong_folders_are_refused(session: Session, digits: DemoImages, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"folders \['7', '8', '9'\]"):
        collect_fit(session, str(digits.near))
    with pytest.raises(DatasetError, match="does not exist"):
        collect_fit(session, str(tmp_path / "nowhere"))
