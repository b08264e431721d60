"""Class prototypes: the mean of the features of each class's images, misclassified ones too."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from grood_edge.arrays import Prototypes
from grood_edge.errors import DatasetError
from grood_edge.export.features import FeatureTable

__all__ = ["ClassPrototypes", "class_prototypes", "require_usable_classes"]


@dataclass(frozen=True)
class ClassPrototypes:
    """`prototypes` float64 `[k', d]` of the classes that have images, and their ids in the same order."""

    prototypes: Prototypes
    class_ids: tuple[int, ...]


def class_prototypes(table: FeatureTable) -> ClassPrototypes:
    """Return the mean feature of each class that has images."""
    ids = np.flatnonzero(table.class_counts)
    return ClassPrototypes(table.class_sums[ids] / table.class_counts[ids, None], tuple(int(i) for i in ids))


def require_usable_classes(table: FeatureTable, classes: tuple[str, ...], predicted: bool = False) -> None:
    """Check that every class with images can be modelled.

    Where the labels are the network's own predictions (`predicted`), a class may have one image: nobody chose it.

    Raises:
        DatasetError: fewer than two classes, a class with one image, or a class that is misclassified throughout.
    """
    present = [int(i) for i in np.flatnonzero(table.class_counts)]
    if len(present) < 2:
        raise DatasetError(f"the images cover {len(present)} of {len(classes)} classes; at least two are needed")
    lonely = [classes[i] for i in present if table.class_counts[i] == 1 and not predicted]
    if lonely:
        raise DatasetError(
            f"class {lonely[0]!r} has one image ({len(lonely)} such classes); a prototype needs at least two images. "
            "Add images, or leave the class's folder out"
        )
    for i in present:
        if table.confusion[(i, i)] == 0:
            others = Counter({classes[p]: n for (label, p), n in table.confusion.items() if label == i})
            raise DatasetError(
                f"all {table.class_counts[i]} images of class {classes[i]!r} are misclassified, most as "
                f"{others.most_common(1)[0][0]!r}. Check the order of the classes (--classes FILE), the preprocessing "
                "and the labels"
            )
