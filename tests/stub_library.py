"""An empty shared library, written byte by byte: the genuine bindings import against it where TensorRT is not."""

import platform
import struct

__all__ = ["TENSORRT_SYMBOLS", "stub_library"]

# the plain C functions that the bindings take from TensorRT's libraries; everything else is reached through objects
TENSORRT_SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
_MACHINES = {  # ELF's number, and the code of `return 0`
    "x86_64": (62, bytes.fromhex("31c0c3")),
    "aarch64": (183, bytes.fromhex("000080d2c0035fd6")),
}
_HEADER, _PROGRAM, _DYNAMIC, _SYMBOL = 64, 56, 16, 24


def stub_library(soname: str, symbols: tuple[str, ...] = TENSORRT_SYMBOLS) -> bytes:
    """Return an ELF shared library of this name whose functions all return 0.

    Raises:
        KeyError: neither x86-64 nor aarch64.
    """
    machine, code = _MACHINES[platform.machine()]
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in (soname, *symbols))
    offsets = [strings.index(b"\0" + name.encode() + b"\0") + 1 for name in (soname, *symbols)]
    dynamic_at = _HEADER + 2 * _PROGRAM
    symbols_at = dynamic_at + 7 * _DYNAMIC
    hash_at = symbols_at + _SYMBOL * (1 + len(symbols))
    code_at = hash_at + 4 * (4 + len(symbols))
    code_at += -code_at % 16
    strings_at = code_at + len(code)
    size = strings_at + len(strings)
    # DT_SONAME, DT_HASH, DT_STRTAB, DT_SYMTAB, DT_STRSZ, DT_SYMENT, DT_NULL
    entries = (14, offsets[0], 4, hash_at, 5, strings_at, 6, symbols_at, 10, len(strings), 11, _SYMBOL, 0, 0)
    table = bytes(_SYMBOL) + b"".join(
        struct.pack("<IBBHQQ", offset, 0x12, 0, 1, code_at, len(code)) for offset in offsets[1:]
    )
    chain = [*range(2, len(symbols) + 1), 0]  # one bucket: every symbol hangs in its chain
    hashes = struct.pack(f"<{4 + len(symbols)}I", 1, 1 + len(symbols), 1, 0, *chain)
    identity = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = identity + struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, _HEADER, 0, 0, _HEADER, _PROGRAM, 2, 64, 0, 0)
    programs = struct.pack("<IIQQQQQQ", 1, 7, 0, 0, 0, size, size, 0x10000)
    programs += struct.pack("<IIQQQQQQ", 2, 6, dynamic_at, dynamic_at, dynamic_at, 7 * _DYNAMIC, 7 * _DYNAMIC, 8)
    body = header + programs + struct.pack("<14Q", *entries) + table + hashes
    return body.ljust(code_at, b"\0") + code + strings
