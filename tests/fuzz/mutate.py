"""Damage files: flipped bytes, truncation, wrong values in JSON."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

HUGE_NUMBER, DEEP_LIST = "@huge@", "@deep@"  # values that `json.dumps` cannot write, inserted afterwards
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 10**9, 10**30, -(10**19), 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", " ", "x", "0", "1", "resid_post", "topk", "jumprelu", "gated", "groupmax", "layers.5", "blocks.1.hook_z",
    "../../etc", "/dev/null", "\ud800", "\u0000", "é" * 300, "a" * 70_000, [],
    [None], [1, 2], ["a"], [[]], {}, {"k": 1}, {"a": {}},
    HUGE_NUMBER, DEEP_LIST,
)  # fmt: skip
ODD_BYTES = (b"\x00", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"', b",", b"\n", b"\r", b"{", b"}", b"[", b"NaN",
             b"1e999", b"-", b"\\u0000", b"\\ud800", b"null", b"0", b"9" * 5000)  # fmt: skip


def damaged_bytes(content: bytes, random: random.Random, times: int | None = None) -> bytes:
    """Apply one to four damages: a flipped byte, a cut, a piece removed or repeated, or an unusual piece inserted."""
    data = bytearray(content)
    for _ in range(times or random.randint(1, 4)):
        start = random.randrange(len(data) + 1)
        stop = min(len(data), start + random.choice([1, 1, 2, 8, 64, 1000]))
        kind = random.randrange(6)
        if kind == 0 and start < len(data):
            data[start] ^= 1 << random.randrange(8)
        elif kind == 1:
            del data[start:]
        elif kind == 2:
            del data[start:stop]
        elif kind == 3:
            data[start:start] = data[start:stop]
        elif kind == 4:
            data[start:start] = random.choice(ODD_BYTES)
        else:
            data[start:stop] = random.randbytes(stop - start)
    return bytes(data)


def damaged_json(content: Any, random: random.Random) -> bytes:
    """Return the JSON with one to three values, keys or entries replaced, removed or added."""
    tree = json.loads(json.dumps(content))
    for _ in range(random.randint(1, 3)):
        if tree:
            _damage(tree, random)
    text = json.dumps(tree, indent=random.choice([None, 2]))
    text = text.replace(f'"{HUGE_NUMBER}"', "9" * 5000).replace(f'"{DEEP_LIST}"', "[" * 9000 + "]" * 9000)
    return text.encode("utf-8", "surrogatepass")


def damaged_safetensors(content: bytes, random: random.Random) -> bytes:
    """Return a safetensors file with damaged header or data, and a header length that matches it or not."""
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    kind = random.random()
    if kind < 0.5:
        header = damaged_json(json.loads(header), random)
    elif kind < 0.8:
        header = damaged_bytes(header, random)
    else:
        data = damaged_bytes(data, random)
    length = len(header) if random.random() < 0.9 else random.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(header) + 1])
    return length.to_bytes(8, "little") + header + data


def _damage(content: Any, random: random.Random) -> None:
    places = list(_places(content))
    parent, key = random.choice(places)
    kind = random.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[random.choice(["", "x", key + "_", key.upper(), "layer_x", "layer_1", "_run"])] = parent.pop(key)
    elif kind == 2 and isinstance(parent, dict):
        parent[random.choice(list(parent))] = copy.deepcopy(parent[key])
    elif kind == 3 and isinstance(parent[key], int | float):
        parent[key] = random.choice([parent[key] + 1, -parent[key], parent[key] * 2, parent[key] / 3, str(parent[key])])
    else:
        parent[key] = copy.deepcopy(random.choice(ODD_VALUES))


def _places(content: Any) -> Any:
    """Return every (container, key) of a tree."""
    for key in content if isinstance(content, dict) else range(len(content)):
        yield content, key
        if isinstance(content[key], dict | list) and content[key]:
            yield from _places(content[key])
