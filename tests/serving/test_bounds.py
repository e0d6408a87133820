"""What all clients together may take of a host: memory of frames, waiting steps, residuals, answers; time; its log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress

import grpc
import pytest
import torch
from helpers import served, visiting

from fedmm.link import wire
from fedmm.link.session import HostGone, HostRefused
from fedmm.serving.host import FREE_REFUSALS, Host

MIB = 1 << 20
D = 16  # width of the small LLaVA
CUT = r"its frame and steps take \d+ MB.*raise link.frames_mb"


def step(rows: int = 1, positions: int = 2, terms: int = 1, rank: int = 1, first: int = 0, **tensors):
    """A factored step of text alone; its terms have names from `first` on."""
    mask_BT = torch.ones(rows, positions, dtype=torch.bool)
    frame = {
        "mask": mask_BT,
        "image": ~mask_BT,
        "tokens": torch.ones(rows, positions, dtype=torch.int32),
        "keep": torch.zeros(rows, 1, dtype=torch.int64),
        "labels": torch.ones(rows, 1, dtype=torch.int64),
        **{f"h.{i}": torch.ones(rows * positions, rank) for i in range(terms)},
        **{f"up.{i}": torch.full((D, rank), 0.01) for i in range(terms)},
    }
    meta = {"terms": [["text", 1.0, f"name {first + i}"] for i in range(terms)], "branches": [terms], "grads": []}
    return frame | tensors, meta


@contextmanager
def streaming(host: Host, client: int, chunks) -> Iterator[grpc.Call]:
    """A stream on a connection of its own, which is read by nobody."""
    options = [*wire.GRPC_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"127.0.0.1:{host.port}", options=options) as channel:
        credentials = wire.credentials(client, 1, host.token(1, client))
        stream = channel.stream_stream(wire.METHOD)(
            chunks, metadata=credentials
        )  # would be cancelled if it were dropped
        yield stream


def ended(stream) -> grpc.StatusCode:
    with suppress(grpc.RpcError):
        list(stream)
    return stream.code()


def test_frames_that_hardly_move_are_cut_until_all_fit(llava, edge, local_llm):
    """Found in a review: each session held a frame's limit, and came back as soon as it was cut."""
    chunks = list(wire.encode(wire.Frame("echo", {}, {"x": torch.ones(MIB)})))  # 4 MiB

    def sent():
        yield from chunks[:3]
        for byte in chunks[3]:
            yield bytes([byte])
            time.sleep(0.2)

    with (
        served(llava, edge, local_llm, frame_limit_bytes=5 * MIB, frames_bytes=1) as (host, _),
        visiting(host, client=9) as other,
        ThreadPoolExecutor(4) as pool,
    ):

        def trickle(client: int) -> grpc.StatusCode:
            with streaming(host, client, sent()) as stream:
                return ended(stream)

        streams = {pool.submit(trickle, client) for client in range(4)}
        living, cut = streams, set()
        while len(living) > 1:
            done, living = wait(living, 30, return_when=FIRST_COMPLETED)
            assert done
            cut |= done
        assert {one.result() for one in cut} <= {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.CANCELLED}
        assert other.call("card").verb == "card"
        host.close_round()


def test_steps_that_wait_for_their_backward_count_with_their_terms(llava, edge, local_llm):
    frame, meta = step(rows=8, positions=32, terms=16, rank=64)  # a megabyte, and 16 KB of embeddings
    with (
        served(llava, edge, local_llm, pending=8, frame_limit_bytes=2 * MIB, frames_bytes=4 * MIB) as (host, _),
        visiting(host) as session,
        visiting(host, client=1) as other,
    ):
        with pytest.raises(HostRefused, match=CUT):
            for number in range(8):
                session.call("forward", frame, **meta | {"step": number, "grads": ["h.0"]})
        assert other.call("loss", step()[0], **step()[1]).verb == "loss"


def test_residuals_of_error_feedback_count(llava, edge, local_llm):
    with (
        served(llava, edge, local_llm, frame_limit_bytes=200_000, frames_bytes=1) as (host, _),
        visiting(host) as session,
    ):
        with pytest.raises(HostRefused, match=CUT):
            for first in range(0, 64, 8):
                frame, meta = step(positions=1, terms=8, rank=64, first=first)
                meta |= {"grads": [f"up.{i}" for i in range(8)], "codecs": ["none", "none", "bf16", "none"]}
                session.call("loss", frame, **meta)


def test_an_answer_that_nobody_takes_counts_and_ends_its_session(llava, edge, local_llm, caplog):
    chunks = list(wire.encode(wire.Frame("echo", {}, {"x": torch.ones(2 * MIB)})))  # 8 MiB, and as much in reply

    def sent():
        yield from chunks
        time.sleep(20)

    with (
        served(llava, edge, local_llm, frame_limit_bytes=9 * MIB, frames_bytes=20 * MIB) as (host, _),
        visiting(host, client=9) as other,
        streaming(host, 0, sent()),
        streaming(host, 1, sent()),
    ):
        wait_for("take 16 MB", caplog)
        assert other.call("card").verb == "card"
    caplog.clear()
    with (
        served(llava, edge, local_llm, deadline_seconds=1.0) as (host, _),
        streaming(host, 0, sent()) as stream,
    ):
        wait_for("it holds a frame", caplog)
        assert ended(stream) == grpc.StatusCode.CANCELLED


def wait_for(text: str, caplog) -> None:
    """Until the host has logged that a session is cut; its client learns it after what lies on the connection."""
    deadline = time.monotonic() + 60
    while text not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.05)
    assert text in caplog.text


def test_token_terms_have_a_rank_of_any_term(llava, edge, local_llm):
    frame, meta = step(terms=0)
    wide = {"token_down.0": torch.ones(65, D), "token_up.0": torch.ones(D, 65)}
    with served(llava, edge, local_llm) as (host, _), visiting(host) as session:
        with pytest.raises(HostRefused, match="a term of rank 65, at most 64; lower edge.rank"):
            session.call("generate", frame | wide, **meta, scales=[1.0], max_tokens=2)


def test_a_term_in_another_precision_is_summed_in_single(llava, edge, local_llm):
    with served(llava, edge, local_llm) as (host, _), visiting(host) as session:
        frame, meta = step(rank=2)
        single = session.call("loss", frame, **meta).tensors["losses"]
        double = session.call("loss", frame | {"up.0": frame["up.0"].double()}, **meta).tensors["losses"]
        assert torch.equal(single, double)


def test_faults_of_the_host_fill_no_log_either(llava, edge, local_llm, monkeypatch, caplog):
    monkeypatch.setattr("fedmm.serving.host.REFUSAL_PAUSE_SECONDS", 0.0)
    with served(llava, edge, local_llm) as (host, _), visiting(host) as session:

        def fails(*args, **how):
            raise RuntimeError("a fault of the host's own")

        monkeypatch.setattr("fedmm.serving.requests.Reader.step", fails)
        for _ in range(30):
            with pytest.raises(HostRefused, match="loss failed at the host: RuntimeError: a fault of the host's own"):
                session.call("loss", step()[0], **step()[1])
    assert len(caplog.records) == 20


def test_who_is_refused_again_and_again_is_answered_late(llava, edge, local_llm, monkeypatch):
    """Steps that are refused cost the host as much as others, and stand in no queue."""
    monkeypatch.setattr("fedmm.serving.host.REFUSAL_PAUSE_SECONDS", 60.0)
    with served(llava, edge, local_llm) as (host, _), visiting(host, client=1) as other:
        for last in range(FREE_REFUSALS + 1):
            with visiting(host, deadline_seconds=10.0 if last < FREE_REFUSALS else 0.5) as session:
                with pytest.raises(HostRefused if last < FREE_REFUSALS else HostGone):
                    session.call("train")
        assert other.call("loss", step()[0], **step()[1]).verb == "loss"
