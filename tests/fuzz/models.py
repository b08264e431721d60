"""Targets that read what comes with a model: contract, artifact, graph, probes, sidecar, classifier, checkpoint."""

import base64
import dataclasses
import io
import json
import pickle
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import torch
from rich.console import Console

from grood_edge.artifact import CONTRACT_KEY, graph_digest, read_artifact
from grood_edge.camera_part import camera_part
from grood_edge.contract_reader import contract_from_json
from grood_edge.errors import GroodEdgeError
from grood_edge.export.checkpoints import checked_pt2, state_dict
from grood_edge.export.classifier import ClassifierOptions, load_classifier
from grood_edge.export.normal_form import model_of
from grood_edge.export.preflight import preflight
from grood_edge.graph_check import refuse_external_data, require_agreement
from grood_edge.probes import decode_png, replay_probes
from grood_edge.runtime.build import BuildSettings
from grood_edge.runtime.engine_spec import Device, source_digest
from grood_edge.runtime.selftest import MODEL
from grood_edge.runtime.session import open_session
from grood_edge.runtime.sidecar import Sidecar, _document, parse_sidecar, signed_part
from grood_edge.stored_head import head_from_model, head_model
from grood_edge.tables import artifact_document, artifact_table
from tests.export.networks import ONNX_CASES, random_batch, saved_pt2, torch_network
from tests.fuzz.formats import mutate_artifact, mutate_message, mutate_zip
from tests.fuzz.guard import Target
from tests.fuzz.mutations import mutate_bytes, mutate_json, mutate_png
from tests.golden import camera_golden, golden, golden_contract, golden_model, other_golden

SILENT = Console(file=io.StringIO())


def artifacts(folder: Path) -> Sequence[bytes]:
    return [golden(), golden(), camera_golden(), other_golden(0), other_golden(3), MODEL.read_bytes()]


def contracts(folder: Path) -> Sequence[bytes]:
    return [_contract_text(data) for data in artifacts(folder)]


def _contract_text(data: bytes) -> bytes:
    entries = onnx.load_model_from_string(data).metadata_props
    return str(next(entry.value for entry in entries if entry.key == CONTRACT_KEY)).encode()


def read_contract(data: bytes) -> None:
    try:
        text = data.decode()
    except UnicodeDecodeError:  # the artifact's reader says so
        return
    contract, digests = contract_from_json(text)
    contract.to_json(digests)
    contract.digest()
    contract.calibration.rule(len(contract.classes))


def read_whole_artifact(data: bytes) -> None:
    """What `inspect` and `compile --check` do."""
    artifact = read_artifact(data)
    json.dumps(artifact_document(artifact), default=str)
    SILENT.print(artifact_table(artifact))
    head_from_model(artifact.model)
    head_model(artifact.model)
    preflight(model_of(artifact))


def open_and_run(data: bytes) -> None:
    """What `verify` and `score` do: onnxruntime runs the graph of an artifact that was accepted."""
    path = Path("artifact.onnx")
    path.write_bytes(data)
    with open_session(path, any_size=True) as session:
        replay_probes(session.contract, session.backend.run, session.backend.provider)
        session.predict(np.full((9, 8, 3), 90, np.uint8), explain=True)


def read_graph(data: bytes) -> None:
    """The checks of a graph, each alone: behind the others they would see few hostile ones."""
    checks: tuple[Callable[[], Any], ...] = (
        lambda: refuse_external_data(data),
        lambda: require_agreement(data, golden_contract()),
        lambda: camera_part(data),
        lambda: head_from_model(data),
        lambda: head_model(data),
        lambda: graph_digest(data),
        lambda: source_digest(data),
    )
    refused = None
    for check in checks:
        try:
            check()
        except GroodEdgeError as error:
            refused = error
    if refused is not None:
        raise refused


def probes(folder: Path) -> Sequence[bytes]:
    return [base64.b64decode(probe.png) for probe in golden_contract().probes]


def read_probe(data: bytes) -> None:
    decode_png(base64.b64encode(data).decode(), golden_contract().preprocessing)


def sidecars(folder: Path) -> Sequence[bytes]:
    contract = golden_contract()
    sidecar = Sidecar(
        "tensorrt-rtx", "1.1.1.26", "0" * 64, source_digest(golden_model()), "1" * 64, contract.digest(), "fp32",
        "2" * 64, 1000, (1, 1, 8), ("SM86",), None, BuildSettings(True, False, True, False, 3), {"FLOAT": 3}, None,
        ("a warning",), {"grood-edge": "0.1.0"},
    )  # fmt: skip
    built = dataclasses.replace(sidecar, backend="tensorrt", targets=(), device=Device("GPU", (8, 6), "580.1"))
    return [json.dumps(_document(one, contract) | {"hmac": "0" * 64}).encode() for one in (sidecar, built)]


def read_sidecar(data: bytes) -> None:
    try:
        signed_part(parse_sidecar(data)[2])
    except ValueError:  # as it says; `open_engine` makes a sentence of it
        return


def classifiers(folder: Path) -> Sequence[bytes]:
    return [case.build().SerializeToString() for case in ONNX_CASES.values()]


def read_classifier(data: bytes) -> None:
    Path("network.onnx").write_bytes(data)
    load_classifier("network.onnx", ClassifierOptions(input_size=(16, 16)))


def archives(folder: Path) -> Sequence[bytes]:
    return [saved_pt2(torch_network("conv-bn-gap"), folder / "good.pt2", random_batch(3)).read_bytes()]


def mutate_member(random: Random, name: str, data: bytes) -> bytes:
    return mutate_json(random, data) if name.endswith("json") else mutate_bytes(random, data)


def read_archive(data: bytes) -> None:
    checked_pt2(data, "network.pt2")


def weights(folder: Path) -> Sequence[bytes]:
    found, values = [], torch.zeros(12)
    for new in (True, False):
        out = io.BytesIO()
        torch.save({"w": values.view(3, 4), "b": values[:2]}, out, _use_new_zipfile_serialization=new)
        found.append(out.getvalue())
    address = str(values.untyped_storage()._cdata).encode()  # the older format names tensors by it: not the same twice
    found[1] = found[1].replace(struct.pack("<I", len(address)) + address, struct.pack("<I", 1) + b"7")
    return [*found, pickle.dumps({"w": 1})]


def read_weights(data: bytes) -> None:
    Path("weights.pth").write_bytes(data)
    state_dict(Path("weights.pth"))


TARGETS = (
    Target("contract", contracts, mutate_json, read_contract),
    Target("artifact", artifacts, mutate_artifact, read_whole_artifact, quick=60),
    Target(
        "graph", lambda folder: [golden_model(), *map(_bare, artifacts(folder))], mutate_message, read_graph, quick=80
    ),
    Target("session", artifacts, mutate_artifact, open_and_run, memory=256, seconds=20, quick=12),
    Target("probe", probes, mutate_png, read_probe, quick=200),
    Target("sidecar", sidecars, mutate_json, read_sidecar, quick=80),
    # 1 kB is enough for a network whose own intermediates take gigabytes, and it is run to see whether it can be used
    Target("classifier", classifiers, mutate_message, read_classifier, memory=4096, seconds=20, quick=20),
    Target("pt2", archives, mutate_zip(mutate_member), read_archive, quick=0),
    Target("weights", weights, mutate_zip(lambda random, _, data: mutate_bytes(random, data)), read_weights, quick=80),
)


def _bare(data: bytes) -> bytes:
    model = onnx.load_model_from_string(data)
    del model.metadata_props[:]
    return bytes(model.SerializeToString())
