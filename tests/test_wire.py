"""Frames: what goes in comes out, and what is no frame is refused before memory is taken for it."""

from __future__ import annotations

import struct

import pytest
import torch

from fedmm.llm import wire


def test_a_frame_survives_the_wire():
    tensors = {
        "float": torch.randn(3, 5),
        "half": torch.randn(7).bfloat16(),
        "bool": torch.tensor([True, False]),
        "int": torch.arange(4),
        "scalar": torch.tensor(2.5),
        "strided": torch.randn(4, 6).T,
    }
    chunks = wire.encode(wire.Frame("forward", {"step": 3, "grad": True}, tensors))
    frame = wire.decode(iter(chunks), 1 << 20)
    assert frame.verb == "forward" and frame.meta == {"step": 3, "grad": True}
    assert frame.wire_bytes == sum(map(len, chunks))
    for name, tensor in tensors.items():
        assert frame.tensors[name].dtype == tensor.dtype and torch.equal(frame.tensors[name], tensor)


@pytest.mark.parametrize("elements", [1, wire.CHUNK_BYTES // 4 - 50, wire.CHUNK_BYTES // 4, 3 * wire.CHUNK_BYTES // 4])
def test_frames_are_cut_at_a_mebibyte(elements):
    big = torch.arange(elements, dtype=torch.float32)
    chunks = wire.encode(wire.Frame("x", {}, {"big": big}))
    assert all(len(chunk) == wire.CHUNK_BYTES for chunk in chunks[:-1])
    assert 0 < len(chunks[-1]) <= wire.CHUNK_BYTES
    assert torch.equal(wire.decode(iter(chunks), 1 << 30).tensors["big"], big)


def test_frames_follow_each_other_on_one_stream():
    stream = iter([*wire.encode(wire.Frame("one")), *wire.encode(wire.Frame("two"))])
    assert [wire.decode(stream, 1024).verb for _ in range(2)] == ["one", "two"]
    assert wire.decode(stream, 1024) is None


def raw(
    header: bytes = b'{"verb": "x"}', body: bytes = b"", claim_header=None, claim_body=None, magic=wire.MAGIC
) -> bytes:
    claims = (len(header) if claim_header is None else claim_header, len(body) if claim_body is None else claim_body)
    return struct.pack("<4sIQ", magic, *claims) + header + body


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (b"short", "prefix"),
        (raw(magic=b"HTTP"), "same fedmm"),
        (raw(claim_header=1 << 31), "header of 2147483648 bytes"),
        (raw(claim_body=1 << 60), "link.frame_limit_mb"),
        (raw(claim_body=100), "ended after"),
        (raw(body=b"x" * 10, claim_body=4), "holds"),
        (raw(header=b"{not json}"), "no JSON"),
        (raw(header=b'["verb"]'), "no JSON object with a verb"),
        (raw(header=b'{"verb": 3}'), "no JSON object with a verb"),
        (raw(body=b"not safetensors at all"), "no safetensors"),
        (
            raw(body=struct.pack("<Q", 58) + b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,1]}}     ' + b"x"),
            "no safetensors",
        ),
        (raw(header=b"[" * 60_000), "no JSON"),
    ],
)
def test_what_is_no_frame_is_refused_with_its_reason(message, says):
    with pytest.raises(wire.WireError, match=says):
        wire.decode(iter([message]), 1 << 20)


def test_a_frame_that_never_ends_is_refused():
    with pytest.raises(wire.WireError, match="ended after"):
        wire.decode(iter([raw(claim_body=1 << 19), b""]), 1 << 20)


def test_a_header_too_long_to_send_says_so():
    with pytest.raises(wire.WireError, match="send it as a tensor"):
        wire.encode(wire.Frame("x", {"long": "x" * wire.HEADER_LIMIT_BYTES}))
