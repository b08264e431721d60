"""Checkpoint files are untrusted. Every attack here is real: unprotected loading runs it, and leaves a marker."""

import contextlib
import io
import json
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grood_edge.errors import ClassifierError
from grood_edge.export.checkpoints import checked_pt2, state_dict
from grood_edge.export.classifier import load_classifier
from tests.export.networks import OPTIONS, Bomb, random_batch, saved_pt2, torch_network

Members = dict[str, bytes]
MODEL = "models/model.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Members:
    """The members of a good archive, without its root folder; exported with an open batch."""
    path = saved_pt2(torch_network("conv-bn-gap"), tmp_path_factory.mktemp("pt2") / "good.pt2", random_batch(3))
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def archive_of(members: Members, root: str = "good/") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(root + name, content)
    return buffer.getvalue()


def pickled(payload: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return buffer.getvalue()


def edited_json(members: Members, name: str, edit: Callable[[Any], None]) -> Members:
    document = json.loads(members[name])
    edit(document)
    return members | {name: json.dumps(document).encode()}


def code(marker: Path) -> str:
    """A Python expression that makes a folder, and is zero."""
    return f"__import__('os').mkdir({str(marker)!r}) or 0"


def in_sample_inputs(members: Members, marker: Path) -> Members:
    return members | {"data/sample_inputs/model.pt": pickled(((Bomb(marker),), {}))}


def in_weights(members: Members, marker: Path) -> Members:
    def edit(config: Any) -> None:
        next(iter(config["config"].values()))["use_pickle"] = True

    return edited_json(members, "data/weights/model_weights_config.json", edit) | {
        "data/weights/weight_0": pickled(Bomb(marker))
    }


def _constant(path: str) -> Callable[[Any], None]:
    def edit(config: Any) -> None:
        entry = {"path_name": path, "is_param": False, "use_pickle": True, "tensor_meta": None}
        config["config"]["hidden"] = entry

    return edit


def in_tensor_constants(members: Members, marker: Path) -> Members:
    return edited_json(members, "data/constants/model_constants_config.json", _constant("tensor_0")) | {
        "data/constants/tensor_0": pickled(Bomb(marker))
    }


def in_opaque_constants(members: Members, marker: Path) -> Members:
    return edited_json(members, "data/constants/model_constants_config.json", _constant("opaque_obj_0")) | {
        "data/constants/opaque_obj_0": pickle.dumps(Bomb(marker))
    }


def in_legacy_weights(members: Members, marker: Path) -> Members:
    return members | {"data/weights/model.pt": pickled({"weight": Bomb(marker)})}


def in_legacy_constants(members: Members, marker: Path) -> Members:
    return members | {"data/constants/model.pt": pickled({"constant": Bomb(marker)})}


def in_symbolic_shape(members: Members, marker: Path) -> Members:
    """torch reads symbolic sizes with sympy.sympify, which evaluates them as Python."""

    def edit(program: Any) -> None:
        sizes = next(
            value["sizes"]
            for value in program["graph_module"]["graph"]["tensor_values"].values()
            if value["sizes"] and "as_expr" in value["sizes"][0]
        )
        sizes[0]["as_expr"]["expr_str"] = f"({code(marker)}) or {sizes[0]['as_expr']['expr_str']}"

    return edited_json(members, MODEL, edit)


ATTACKS: dict[str, Callable[[Members, Path], Members]] = {
    "sample inputs": in_sample_inputs,
    "weights": in_weights,
    "tensor constants": in_tensor_constants,
    "opaque constants": in_opaque_constants,
    "legacy weights": in_legacy_weights,
    "legacy constants": in_legacy_constants,
    "symbolic shape": in_symbolic_shape,
}


def load_unprotected(data: bytes) -> None:
    """What a careless tool does; errors after the attack has run do not matter here."""
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        torch.export.load(io.BytesIO(data)).module()


@pytest.mark.parametrize("name", ATTACKS)
def test_hidden_code_is_refused_and_never_run(name: str, good: Members, tmp_path: Path) -> None:
    proof, marker = tmp_path / "proof", tmp_path / "marker"
    load_unprotected(archive_of(ATTACKS[name](good, proof)))
    assert proof.exists(), "the attack does not work at all: this test would prove nothing"
    path = tmp_path / "attack.pt2"
    path.write_bytes(archive_of(ATTACKS[name](good, marker)))
    with pytest.raises(ClassifierError, match=r"hides pickled objects in|hides Python code in|unexpected member"):
        load_classifier(path, OPTIONS)
    assert not marker.exists()


def test_guards_that_torch_would_compile_are_dropped(good: Members, tmp_path: Path) -> None:
    def attack(target: Path) -> bytes:
        return archive_of(edited_json(good, MODEL, lambda program: program.update(guards_code=[code(target)])))

    proof, marker = tmp_path / "proof", tmp_path / "marker"
    load_unprotected(attack(proof))  # compiled into the module, and run with it
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        torch.export.load(io.BytesIO(attack(proof))).module()(torch.from_numpy(random_batch(3)))
    assert proof.exists()
    path = tmp_path / "attack.pt2"
    path.write_bytes(attack(marker))
    assert load_classifier(path, OPTIONS).class_count == 5
    assert not marker.exists()


@pytest.mark.parametrize("where", ["argument", "input", "spec"])
def test_text_that_becomes_source_or_imports_is_refused(where: str, good: Members) -> None:
    def edit(program: Any) -> None:
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        if where == "argument":
            signature["forward_arg_names"] = ["x=__import__('os').getpid()"]
        elif where == "input":
            program["graph_module"]["graph"]["inputs"][0]["as_tensor"]["name"] = "p[__import__('os').getpid()]"
        else:
            context = json.dumps({"__enum__": True, "fqn": "antigravity:x", "name": "x"})
            signature["in_spec"] = json.dumps([1, {"type": "builtins.dict", "context": context, "children_spec": []}])

    with pytest.raises(ClassifierError, match=r"hides Python code in good/models/model.json"):
        checked_pt2(archive_of(edited_json(good, MODEL, edit)), "attack.pt2")


def test_members_of_the_oldest_format_are_refused(good: Members, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    members = {
        "version": b"8.2",
        "serialized_exported_program.json": good[MODEL],
        "serialized_state_dict.pt": pickled({"weight": Bomb(marker)}),
        "serialized_constants.pt": pickled({}),
        "serialized_example_inputs.pt": pickled(()),
    }
    load_unprotected(archive_of(members, root=""))
    assert marker.exists()
    marker.rmdir()
    for extra in ({}, {f"good/{name}": content for name, content in good.items()}):
        with pytest.raises(ClassifierError, match=r"unexpected member (version|serialized_)"):
            checked_pt2(archive_of(members | extra, root=""), "attack.pt2")
    assert not marker.exists()


@pytest.mark.parametrize("bad_first", [True, False])
def test_duplicate_members_are_refused(bad_first: bool, good: Members, tmp_path: Path) -> None:
    """Two zip readers may take different ones of them: one inspects the good, the other loads the bad."""
    name, marker = "good/data/sample_inputs/model.pt", tmp_path / "marker"
    bad = in_sample_inputs(good, marker)["data/sample_inputs/model.pt"]
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")  # zipfile's own "Duplicate name"
        contents = {f"good/{member}": content for member, content in good.items()}
        if bad_first:
            archive.writestr(name, bad)
        for member, content in contents.items():
            archive.writestr(member, content)
        if not bad_first:
            archive.writestr(name, bad)
    with pytest.raises(ClassifierError, match="duplicate members"):
        checked_pt2(buffer.getvalue(), "attack.pt2")
    assert not marker.exists()


def test_bytes_before_and_after_the_archive_are_not_passed_on(good: Members) -> None:
    whole = archive_of(good)
    clean = checked_pt2(b"#!/bin/sh\n" + whole, "prefixed.pt2")
    assert not clean.startswith(b"#!")
    with zipfile.ZipFile(io.BytesIO(clean)) as archive:
        assert {name.partition("/")[2] for name in archive.namelist()} == set(good)


def test_unexpected_member_is_named(good: Members) -> None:
    with pytest.raises(ClassifierError, match=r"unexpected member good/data/aotinductor/model/evil.so"):
        checked_pt2(archive_of(good | {"data/aotinductor/model/evil.so": b"\x7fELF"}), "attack.pt2")


def _cut(members: Members, name: str, content: bytes) -> Members:
    return members | {name: content}


def _packed_wrongly(archive: bytes) -> bytes:
    """Say of every member, in both of its headers, that it is packed with LZMA, which it is not."""
    for sign, at in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        first, *rest = archive.split(sign)
        archive = first + b"".join(sign + part[: at - 4] + b"\x0e\0" + part[at - 2 :] for part in rest)
    return archive


@pytest.mark.parametrize(
    "damage",
    [
        lambda good: archive_of(good)[:-100],
        lambda good: archive_of(good)[:200],
        lambda good: _packed_wrongly(archive_of(good)),
        lambda _: b"",
        lambda _: b"PK\x03\x04 not really",
        lambda _: pickle.dumps([1]),
        lambda good: archive_of(_cut(good, MODEL, b'{"graph_module": ')),
        lambda good: archive_of(_cut(good, MODEL, b"[1, 2]")),
        lambda good: archive_of(_cut(good, MODEL, b"\xff\xfe")),
        lambda good: archive_of(_cut(good, MODEL, b"{}")),
        lambda good: archive_of(_cut(good, "data/weights/model_weights_config.json", b'{"other": 1}')),
        lambda good: archive_of(_cut(good, "data/weights/model_weights_config.json", b'{"config": {"w": {}}}')),
        lambda good: archive_of(_cut(good, "data/weights/model_weights_config.json", b'{"config": [1]}')),
        lambda good: archive_of({name: content for name, content in good.items() if name != MODEL}),
        lambda good: archive_of(_cut(good, "data/weights/weight_0", b"short")),
    ],
)
def test_damaged_archives_are_refused(damage: Callable[[Members], bytes], good: Members, tmp_path: Path) -> None:
    path = tmp_path / "damaged.pt2"
    path.write_bytes(damage(good))
    with pytest.raises(ClassifierError, match=r"damaged\.pt2 (is not a|is a damaged|cannot be loaded|hides|has)"):
        load_classifier(path, OPTIONS)


def test_corrupt_member_is_refused(good: Members, tmp_path: Path) -> None:
    data = bytearray(archive_of(good))
    at = data.index(good["data/weights/weight_0"])
    data[at] ^= 0xFF  # the zip's checksum does not match any more
    path = tmp_path / "corrupt.pt2"
    path.write_bytes(bytes(data))
    with pytest.raises(ClassifierError, match=r"not a .pt2 archive of torch.export.save: Bad CRC-32"):
        load_classifier(path, OPTIONS)


def test_missing_pt2(tmp_path: Path) -> None:
    with pytest.raises(ClassifierError, match=r"cannot read .*gone\.pt2: No such file"):
        load_classifier(tmp_path / "gone.pt2", OPTIONS)


@pytest.mark.parametrize("open_batch", [True, False])
def test_good_archive_passes(open_batch: bool, tmp_path: Path) -> None:
    """With an open batch the program holds symbolic expressions; with a fixed one it is traced as it is."""
    images = random_batch(3, 2 if open_batch else 1)
    network = torch_network("conv-bn-gap")
    path = saved_pt2(network, tmp_path / "good.pt2", images, open_batch)
    has_symbols = b"expr_str" in archive_member(path, MODEL)
    assert has_symbols == open_batch
    graph = load_classifier(path, OPTIONS)
    assert (graph.source, graph.dynamic_batch, graph.dimension) == ("pt2", True, 8)


def test_archive_with_buffers_open_sides_and_expressions_passes(tmp_path: Path) -> None:
    path, images = tmp_path / "open.pt2", torch.from_numpy(random_batch(3, 2))
    shapes = {
        0: torch.export.Dim("N"),
        2: torch.export.Dim("H", min=8, max=64),
        3: torch.export.Dim("W", min=8, max=64),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, stride=2), torch_pool(), torch.nn.Linear(4, 5)).eval()
        torch.export.save(torch.export.export(network, (images,), dynamic_shapes=(shapes,)), path)
    assert b"FloorDiv(" in archive_member(path, MODEL)
    clean = checked_pt2(path.read_bytes(), "open.pt2")
    with torch.no_grad():
        expected, found = network(images), torch.export.load(io.BytesIO(clean)).module()(images)
    np.testing.assert_array_equal(found.numpy(), expected.numpy())


def torch_pool() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())


def archive_member(path: Path, inner: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.partition("/")[2] == inner))


def test_state_dict_is_loaded_without_running_code(tmp_path: Path) -> None:
    network, path = torch_network("conv-bn-gap"), tmp_path / "weights.pt"
    torch.save(network.state_dict(), path)
    state = state_dict(path)
    assert set(state) == set(network.state_dict())
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, path)  # as training scripts write it
    assert set(state_dict(path)) == set(network.state_dict())


def test_state_dict_with_code_is_refused(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "weights.pt"
    torch.save({"weight": torch.zeros(2), "bomb": Bomb(marker)}, path)
    with pytest.raises(ClassifierError, match=r"holds more than tensors.*it was refused.*state_dict"):
        state_dict(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize(
    ("payload", "message"),
    [([torch.zeros(2)], "holds list; expected a state dict"), ({"a": 1}, "holds dict; expected a state dict")],
)
def test_other_contents_are_refused(payload: Any, message: str, tmp_path: Path) -> None:
    torch.save(payload, tmp_path / "weights.pt")
    with pytest.raises(ClassifierError, match=message):
        state_dict(tmp_path / "weights.pt")


@pytest.mark.parametrize(
    "content", [None, b"", b"garbage" * 100, b"PK\x03\x04" + bytes(100), b"\x80", b"\x80\x02u.", b"\x80\x02}(."]
)
def test_unreadable_state_dict(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ClassifierError, match=r"weights\.pt (cannot be read|holds more)"):
        state_dict(path)


def test_a_state_dict_that_unpacks_to_more_than_it_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, packed = tmp_path / "plain.pt", tmp_path / "packed.pt"
    torch.save({"weight": torch.zeros(100_000)}, plain)
    assert state_dict(plain)["weight"].shape == (100_000,)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
    assert torch.load(packed, weights_only=True)["weight"].shape == (100_000,)  # torch would take it
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(ClassifierError, match=r"members unpack to 40\d,\d+; expected a file of torch\.save"):
        state_dict(packed)


def test_container_that_imports_a_module_is_refused_even_when_its_name_is_escaped(
    good: Members, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spec is JSON inside JSON: what torch reads after decoding it twice must not hide behind an escape."""
    marker = tmp_path / "marker"
    (tmp_path / "evil_spec.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nboom = int\n")
    monkeypatch.syspath_prepend(tmp_path)
    context = {"default_factory_module": "evil_spec", "default_factory_name": "boom", "dict_context": []}
    evil = {"type": "collections.defaultdict", "context": context, "children_spec": []}

    def edit(program: Any) -> None:
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        version, root = json.loads(signature["in_spec"])
        root["children_spec"][1]["children_spec"].append(evil)
        signature["in_spec"] = json.dumps([version, root]).replace("default_factory", "\\u0064efault_factory")

    attack = archive_of(edited_json(good, MODEL, edit))
    load_unprotected(attack)
    assert marker.exists(), "the attack does not work at all: this test would prove nothing"
    marker.rmdir()
    monkeypatch.delitem(sys.modules, "evil_spec")
    with pytest.raises(ClassifierError, match="hides Python code"):
        checked_pt2(attack, "attack.pt2")
    assert not marker.exists()
