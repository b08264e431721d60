"""The GROOD score as it is computed without this project, from the equations in docs/method.md.

`autograd_scores` takes a backward pass a sample and OOD prototype, then searches the bank's gradients: the method as it
was published. `numpy_scores` knows the gradient in closed form and is otherwise the same: what one would write behind
onnxruntime today. Both search with FAISS (exact, `IndexFlatL2`), and with NumPy where FAISS is not installed. Without a
bank the score is the logarithm of the gradient's length.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from grood_edge.scoring import Head, OodHead

Search = Callable[[np.ndarray], np.ndarray]  # gradients float32 [n, d] -> distance to the nearest row, float32 [n]
Scores = Callable[[np.ndarray], np.ndarray]  # features float32 [n, d] -> ood_score, float64 [n]
Gradients = Callable[[np.ndarray], np.ndarray]  # features float32 [n, d] -> gradients float32 [n, d]


def search_name() -> str:
    """Say which search there is."""
    try:
        import faiss
    except ImportError:
        return "NumPy"
    faiss.omp_set_num_threads(1)
    return "FAISS"


def autograd_scores(head: Head, search: str) -> Scores:
    """Return the score by backward passes."""
    prototypes = torch.from_numpy(head.prototypes).float()

    def of(ood_head: OodHead) -> Gradients:
        p_ood = torch.from_numpy(ood_head.prototype).float()

        def gradients(features: np.ndarray) -> np.ndarray:
            rows = []
            for h in torch.from_numpy(features):
                position = p_ood.clone().requires_grad_()
                places = torch.cat([prototypes, position[None]])
                logits = -head.scale * torch.linalg.vector_norm(h - places, dim=1)
                loss = functional.cross_entropy(logits[None], logits[:-1].argmax()[None])
                rows.append(torch.autograd.grad(loss, position)[0])
            found: np.ndarray = torch.stack(rows).numpy() / np.float32(head.scale)
            return found

        return gradients

    return _summed(head, of, search)


def numpy_scores(head: Head, search: str) -> Scores:
    """Return the score from the closed form of the gradient."""
    prototypes = head.prototypes.astype(np.float32)

    def of(ood_head: OodHead) -> Gradients:
        p_ood = ood_head.prototype.astype(np.float32)
        places = np.concatenate([prototypes, p_ood[None]])

        def gradients(features: np.ndarray) -> np.ndarray:
            distances = np.linalg.norm(features[:, None] - places[None], axis=2)
            weights = np.exp(head.scale * (distances.min(axis=1, keepdims=True) - distances))
            s = weights[:, -1] / weights.sum(axis=1)
            found: np.ndarray = (s / distances[:, -1])[:, None] * (features - p_ood)
            return found

        return gradients

    return _summed(head, of, search)


def _summed(head: Head, of: Callable[[OodHead], Gradients], search: str) -> Scores:
    """Add the mapped log distances over the OOD prototypes."""
    parts = [(of(h), _nearest(_bank_gradients(head, h), search), h.score_map) for h in head.ood_heads]

    def scores(features: np.ndarray) -> np.ndarray:
        total = np.zeros(len(features))
        for gradients, nearest, score_map in parts:
            total += score_map(np.log(np.maximum(nearest(gradients(features)).astype(np.float64), 1e-300)))
        return total

    return scores


def _bank_gradients(head: Head, ood_head: OodHead) -> np.ndarray:
    """Return g_i = s_i u_i, float32 `[m, d]`: made once, before anything is timed."""
    away = head.bank - ood_head.prototype
    rows = np.exp(ood_head.bank_log_s)[:, None] * away / np.linalg.norm(away, axis=1, keepdims=True)
    return np.ascontiguousarray(rows, np.float32)


def _nearest(rows: np.ndarray, search: str) -> Search:
    if not len(rows):
        return lambda gradients: np.linalg.norm(gradients, axis=1)
    if search == "NumPy":
        return lambda gradients: np.array([np.sqrt(np.square(rows - g).sum(axis=1).min()) for g in gradients])
    import faiss

    index = faiss.IndexFlatL2(rows.shape[1])
    index.add(rows)
    return lambda gradients: np.sqrt(np.maximum(index.search(gradients, 1)[0][:, 0], 0))
