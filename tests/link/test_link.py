"""The link under mistakes and faults: a clear reason, nothing half-done, nobody else harmed."""

from __future__ import annotations

import gc
import socket
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import grpc
import pytest
import torch
from helpers import CountingProxy, gradients, served, visiting

from fedmm import tree
from fedmm.edge import frozen_modules
from fedmm.link import tls, wire
from fedmm.link.remote import RemoteLLM
from fedmm.link.session import HostGone, HostRefused, Session
from fedmm.model import SplitModel
from fedmm.serving.features import Features
from fedmm.serving.host import Host
from fedmm.serving.round import Traffic
from fedmm.types import FedmmError


@pytest.fixture
def link(llava, edge, local_llm):
    with served(llava, edge, local_llm) as (host, taken):
        yield host, taken


def send_update(session: Session, delta, **options):
    fisher = options.pop("fisher", None)
    tensors = {f"delta/{n}": t for n, t in delta.items()} | {f"fisher/{n}": t for n, t in (fisher or {}).items()}
    meta = {"num_examples": 5, "fisher": fisher is not None, "metrics": {"loss": 1.0}, **options}
    return session.call("update", tensors, **meta)


def test_a_client_needs_the_token_of_its_own_round(link):
    host, _ = link
    for token in ("", "x", host.token(1, 1), host.token(2, 0)):
        with (
            visiting(host, token=token) as session,
            pytest.raises(HostRefused, match="token is not the one of client '0'"),
        ):
            session.call("card")
    with visiting(host) as session:
        assert session.call("card").verb == "card"


@pytest.fixture
def secured(llava, edge, local_llm):
    with served(llava, edge, local_llm, authority=tls.Authority()) as (host, _):
        yield host


def test_a_tls_link_carries_what_a_plain_one_does(secured, edge):
    with visiting(secured, identity=secured.identity(0)) as session:
        assert tree.digest(dict(session.call("state").tensors)) == tree.digest(edge.state())


@pytest.mark.parametrize(
    ("identity", "says"),
    [
        (lambda host: None, "is gone"),  # plain against TLS
        (lambda host: tls.Authority().client(0), "is gone"),  # of another run: neither trusts the other
        (lambda host: host.identity(1), "the certificate is 'client-1.fedmm''s, not client 0's"),
    ],
)
def test_a_tls_link_opens_to_the_certificate_of_its_run_and_client_only(secured, identity, says):
    with (
        visiting(secured, identity=identity(secured)) as session,
        pytest.raises((HostGone, HostRefused), match=says),
    ):
        session.call("card")


def test_a_client_cannot_pose_as_the_host(llava, edge, local_llm):
    """Every client holds a certificate of the run's authority; none of them has the host's name."""
    authority = tls.Authority()

    class Posing(tls.Authority):
        def __init__(self):
            self._key, self._certificate = authority._key, authority._certificate

        def host(self):
            return authority.client(1)

    with served(llava, edge, local_llm, authority=Posing()) as (host, _):
        with visiting(host, identity=authority.client(0)) as session, pytest.raises(HostGone, match="is gone"):
            session.call("card")


def test_a_round_that_is_over_takes_nobody(link, edge):
    host, _ = link
    host.open_round(2, edge.state(), [0])
    with visiting(host) as session, pytest.raises(HostRefused, match="round 1 is over"):
        session.call("state")


def test_a_session_that_waits_holds_nothing_of_what_came(link, monkeypatch):
    """A frame is up to a gigabyte, and sessions wait most of the time."""
    host, _ = link
    seen: list[weakref.ref[wire.Frame]] = []
    decode = wire.decode

    def watched(*args):
        frame = decode(*args)
        if frame is not None:
            seen.append(weakref.ref(frame))
        return frame

    monkeypatch.setattr(wire, "decode", watched)
    with visiting(host) as session:
        assert session.call("echo", {"x": torch.ones(3)}).tensors["x"].tolist() == [1, 1, 1]
        deadline = time.monotonic() + 10
        while any(frame() is not None for frame in seen) and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.01)
        assert seen and not any(frame() is not None for frame in seen)


def test_the_state_goes_down_and_one_update_comes_up(link, edge):
    host, taken = link
    with visiting(host) as session:
        state = session.call("state").tensors
        assert tree.digest(dict(state)) == tree.digest(edge.state())
        send_update(session, tree.zeros_like(edge.state()), fisher=tree.scale(edge.state(), 0.0))
        with pytest.raises(HostRefused, match="no update of client 0 is awaited"):
            send_update(session, tree.zeros_like(edge.state()))
    assert [update.client for update in taken] == [0]
    assert taken[0].num_examples == 5 and taken[0].fisher is not None


def spoil(state, how):
    state = tree.clone(state)
    name = sorted(state)[0]
    if how == "nan":
        state[name][0, 0] = float("nan")
    elif how == "huge":
        state[name][0, 0] = 3e38
    elif how == "shape":
        state[name] = state[name][:1]
    elif how == "dtype":
        state[name] = state[name].double()
    elif how == "missing":
        del state[name]
    elif how == "unknown":
        state["llm.weight"] = torch.zeros(2)
    return state


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("nan", "not finite"),
        ("huge", "no training makes"),
        ("shape", "has shape"),
        ("dtype", "float64"),
        ("missing", "lacks"),
        ("unknown", "does not know"),
    ],
)
def test_an_update_that_does_not_fit_is_left_out_and_said_so(link, edge, how, says):
    host, taken = link
    with visiting(host) as session:
        with pytest.raises(HostRefused, match=says):
            send_update(session, spoil(edge.state(), how))
        assert session.call("card").verb == "card", "the session lives on"
    refused, _ = host.close_round()
    assert taken == [] and says in refused[0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_examples": 0}, "at least 1"),
        ({"num_examples": -3}, "at least 1"),
        ({"num_examples": "many"}, "integer"),
        ({"num_examples": 10**40}, "below 2"),
        ({"metrics": {"loss": float("nan")}}, "metrics"),
        ({"metrics": {"loss": 10**400}}, "metrics"),
        ({"metrics": {"loss": "low"}}, "metrics"),
        ({"metrics": [1]}, "metrics"),
    ],
)
def test_an_update_with_a_wrong_count_is_refused(link, edge, options, says):
    host, taken = link
    with visiting(host) as session, pytest.raises(HostRefused, match=says):
        send_update(session, edge.state(), **options)
    assert taken == []


def test_a_negative_fisher_is_refused(link, edge):
    host, taken = link
    with visiting(host) as session, pytest.raises(HostRefused, match="negative"):
        send_update(session, edge.state(), fisher=tree.scale(edge.state(), -1.0))
    assert taken == []


def step_tensors(batch, edge, **changes):
    """A dense step."""
    embeds, mask_BT = edge(batch)
    tensors = {"whole.0": embeds.dense().detach(), "mask": mask_BT, "keep": batch.keep_BA, "labels": batch.labels_BA}
    return {name: t for name, t in (tensors | changes).items() if t is not None}


def ask(session, tensors, verb="loss", grad=True, **meta):
    return session.call(verb, tensors, **{"branches": 1, "grads": ["whole.0"] if grad else [], **meta}).tensors


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"whole.0": None}, "'whole.0' is missing"),
        ({"whole.0": torch.zeros(3, 5, 99)}, r"'whole.0' has shape \(3, 5, 99\), wanted \(3, 11, 16\)"),
        ({"whole.0": torch.zeros(3, 11, 16, dtype=torch.int64)}, "floating"),
        ({"mask": torch.ones(1, 1, dtype=torch.bool)}, r"wanted \(1, 1, 16\)"),
        ({"mask": torch.zeros(3, 11, dtype=torch.bool)}, "every row needs at least one position"),
        ({"mask": torch.ones(3, 12)}, "'mask'"),
        ({"keep": torch.full((3, 3), 10_000)}, r"'keep' must lie in \[0"),
        ({"keep": torch.full((3, 3), -1)}, r"'keep' must lie in \[0"),
        ({"labels": torch.full((3, 3), 10_000)}, r"'labels' must lie in \[0"),
        ({"labels": torch.full((3, 3), -100)}, "no answer token"),
        ({"mask": torch.ones(3, 65, dtype=torch.bool)}, "65 positions, the LLM has 64"),
        (dict.fromkeys(("keep", "labels"), torch.zeros(3, 50, dtype=torch.int64)), "'keep' names 50 positions"),
    ],
)
def test_a_step_with_a_wrong_tensor_is_refused_and_harms_nobody(link, edge, batch, changes, says):
    host, _ = link
    with visiting(host) as session, visiting(host, client=1) as other:
        with pytest.raises(HostRefused, match=says):
            ask(session, step_tensors(batch, edge, **changes))
        for healthy in (session, other):
            assert torch.isfinite(ask(healthy, step_tensors(batch, edge))["losses"])


def test_embeddings_that_are_not_finite_are_refused(link, edge, batch):
    host, _ = link
    tensors = step_tensors(batch, edge)
    tensors["whole.0"][0, 0, 0] = float("inf")
    with visiting(host) as session, pytest.raises(HostRefused, match="not finite; lower the learning rate"):
        ask(session, tensors, "forward", step=0, grad=False)


def test_a_backward_without_forward_and_of_a_wrong_shape(link, edge, batch):
    host, _ = link
    with visiting(host) as session:
        with pytest.raises(HostRefused, match="no forward of step 9"):
            session.call("backward", {"grad": torch.zeros(1)}, step=9)
        ask(session, step_tensors(batch, edge), "forward", step=1, grad=True)
        with pytest.raises(HostRefused, match="'grad' has shape"):
            session.call("backward", {"grad": torch.zeros(1)}, step=1)


def test_pending_steps_are_bounded_and_no_grad_keeps_none(llava, edge, local_llm, batch):
    with served(llava, edge, local_llm, pending=2) as (host, _), visiting(host) as session:
        model = SplitModel(edge, RemoteLLM(session))
        with torch.no_grad():
            for _ in range(5):
                model(batch)
        logits = [model(batch) for _ in range(2)]
        with pytest.raises(HostRefused, match="raise link.pending"):
            model(batch)
        logits[0].sum().backward()
        model(batch)


@pytest.mark.parametrize(("options", "steps"), [({"graph_bytes": 1}, 4), ({}, 2)])
def test_no_graph_outlives_its_session(llava, edge, local_llm, batch, options, steps):
    """Graphs over the bound, and graphs whose backward never came. Python's collector does not see a C++ cycle."""
    seen: list[weakref.ref[torch.Tensor]] = []
    layer = local_llm.decoder.layers[0]
    with served(llava, edge, local_llm, **options) as (host, _):
        hook = layer.register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))
        for _ in range(3):
            with visiting(host) as session:
                for step in range(steps):
                    ask(session, step_tensors(batch, edge), "forward", step=step)
        deadline = time.monotonic() + 10
        while any(output() is not None for output in seen) and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.01)
    hook.remove()
    assert len(seen) == 3 * steps and not any(output() is not None for output in seen)


def test_a_step_number_that_waits_for_its_backward_is_not_taken_again(llava, edge, local_llm, batch):
    """Or the bound of pending steps would never hold."""
    with served(llava, edge, local_llm, pending=2) as (host, _), visiting(host) as session:
        tensors = step_tensors(batch, edge)
        logits_BAV = ask(session, tensors, "forward", step=1)["logits"]
        with pytest.raises(HostRefused, match="step 1 already waits for its backward"):
            ask(session, tensors, "forward", step=1)
        grad = session.call("backward", {"grad": torch.ones_like(logits_BAV)}, step=1).tensors["grad/whole.0"]
        assert grad.abs().sum() > 0, "the first one is still there"
        ask(session, tensors, "forward", step=1)


def test_several_steps_may_wait_and_return_in_any_order(llava, edge, local_llm, batch):
    local = SplitModel(edge, local_llm)
    local(batch).sum().backward()
    wanted = gradients(edge)
    with served(llava, edge, local_llm) as (host, _), visiting(host) as session:
        model = SplitModel(edge, RemoteLLM(session))
        first, second = model(batch), model(batch)
        second.sum().backward()
        edge.zero_grad()
        first.sum().backward()
    assert all(torch.equal(wanted[name], gradient) for name, gradient in gradients(edge).items())


@pytest.mark.parametrize("message", [b"garbage", b"FMM1" + b"\xff" * 12])
def test_garbage_ends_its_own_session_with_the_reason(link, message):
    host, _ = link
    with grpc.insecure_channel(f"127.0.0.1:{host.port}") as channel, visiting(host, client=1) as other:
        other.call("card")
        shown = wire.credentials(0, 1, host.token(1, 0))
        with pytest.raises(grpc.RpcError, match="no valid frame"):
            list(channel.stream_stream(wire.METHOD)(iter([message]), metadata=shown))
        assert other.call("card").verb == "card"


def test_a_frame_over_the_limit_is_refused(llava, edge, local_llm):
    with served(llava, edge, local_llm, frame_limit_bytes=1000) as (host, _), visiting(host) as session:
        with pytest.raises(HostRefused, match=r"at most 1000; raise link.frame_limit_mb"):
            session.call("loss", {"whole.0": torch.zeros(1000)})


def test_a_frame_of_many_tensors_ends_its_own_session_unless_the_state_has_as_many(link, edge, monkeypatch):
    host, taken = link
    many = {f"x{i}": torch.zeros(0) for i in range(wire.TENSORS_LIMIT + 1)}
    with visiting(host) as session, visiting(host, client=1) as other:
        with pytest.raises(HostRefused, match="513 tensors in a frame, at most 512; lower batch_size"):
            session.call("loss", many)
        assert other.call("card").verb == "card"
    host.open_round(1, {name: torch.zeros(1) for name in many}, [0])
    with visiting(host) as session:
        ones = {name: torch.ones(1) for name in many}
        send_update(session, ones, fisher=ones)
    assert len(taken[0].delta) == len(taken[0].fisher) == 513


def test_an_unknown_verb_names_the_known_ones(link):
    host, _ = link
    with visiting(host) as session, pytest.raises(HostRefused, match="'train'; this host knows card, edge"):
        session.call("train")


def test_what_a_client_sends_is_logged_in_few_and_short_lines(link, caplog, monkeypatch):
    """Found in a review: 65 MB of log in three seconds, and escapes that a terminal acts on."""
    monkeypatch.setattr("fedmm.serving.host.REFUSAL_PAUSE_SECONDS", 0.0)
    host, _ = link
    with visiting(host) as session:
        for i in range(40):
            with pytest.raises(HostRefused):
                session.call(f"\x1b]0;{i}\n" + "x" * 20, {}, step="y" * 60_000)
            with pytest.raises(HostRefused, match="step must be an integer"):
                session.call("backward", {}, step="\x1b[2J" + "y" * 60_000)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 20 and "no more of this session is logged" in lines[-1]
    assert all(len(line) < 500 and line.isprintable() for line in lines)


def test_no_more_tokens_are_generated_than_the_run_asks_for(llava, edge, local_llm, batch):
    with served(llava, edge, local_llm, answer_tokens=8) as (host, _), visiting(host) as session:
        with pytest.raises(HostRefused, match="max_tokens must be from 1 to evaluate.max_tokens=8, got 9"):
            ask(session, step_tensors(batch, edge), "generate", grad=False, max_tokens=9, scales=[])


def test_a_frame_that_does_not_go_on_ends_its_session(llava, edge, local_llm):
    """Found in a review: a frame without its last chunk was held for ever."""
    with served(llava, edge, local_llm, deadline_seconds=1.0) as (host, _), visiting(host, client=1) as other:
        chunks = list(wire.encode(wire.Frame("echo", {}, {"x": torch.ones(1 << 20)})))
        with grpc.insecure_channel(f"127.0.0.1:{host.port}") as channel:
            held = threading.Event()

            def stops():
                yield from chunks[:-1]
                held.wait(20)

            replies = channel.stream_stream(wire.METHOD)(stops(), metadata=wire.credentials(0, 1, host.token(1, 0)))
            with pytest.raises(grpc.RpcError):
                list(replies)
            held.set()
        assert other.call("card").verb == "card"


def test_a_silent_session_gives_way_to_a_client_that_waits(llava, edge, local_llm, monkeypatch):
    monkeypatch.setattr("fedmm.serving.host.IDLE_DEADLINES", 1)
    with served(llava, edge, local_llm, sessions=1, deadline_seconds=1.0) as (host, _), visiting(host) as silent:
        silent.call("card")
        with visiting(host, client=1, turn_seconds=20.0) as waiting:
            assert waiting.call("card").verb == "card"
        with pytest.raises((HostGone, HostRefused)):
            silent.call("card")


def test_a_host_that_ends_is_named_at_once(llava, edge, local_llm):
    with served(llava, edge, local_llm) as (host, _), visiting(host) as session:
        session.call("card")
        host.close()
        began = time.monotonic()
        with pytest.raises(HostGone, match="is the server running"):
            session.call("card")
        assert time.monotonic() - began < 8


def test_a_host_that_was_never_there_is_named():
    with Session("127.0.0.1:1", client=0, round=1, token="x", deadline_seconds=5.0) as session:
        with pytest.raises(HostGone, match=r"127.0.0.1:1"):
            session.call("card")


def test_a_host_that_is_silent_is_named_within_the_deadline():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with Session(address, client=0, round=1, token="x", deadline_seconds=0.5) as session:
            with pytest.raises(HostGone, match=r"'card' within 0.5 s.*link.deadline_seconds"):
                session.call("card")


def test_a_host_that_sends_without_being_asked_fills_no_memory_of_a_client():
    """gRPC holds a few MB until they are read; a client reads one frame for each that it sent."""
    sent: list[bytes] = []

    def endless(chunks, context):
        context.send_initial_metadata(wire.protocol())
        yield from wire.encode(wire.Frame("open"))
        yield from wire.encode(wire.Frame("card"))
        for chunk in list(wire.encode(wire.Frame("echo", {}, {"x": torch.zeros(1 << 20)}))) * 100:
            sent.append(chunk)
            yield chunk

    server = grpc.server(ThreadPoolExecutor(1), options=wire.GRPC_OPTIONS)
    service, method = wire.METHOD.strip("/").split("/")
    handlers = {method: grpc.stream_stream_rpc_method_handler(endless)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Session(f"127.0.0.1:{port}", client=0, round=1, token="x", deadline_seconds=10.0) as session:
            assert session.call("card").verb == "card"
            before = -1
            while len(sent) > before:  # until it goes on no more
                before = len(sent)
                time.sleep(1.0)
            assert len(sent) < 200, "of 500 chunks of 1 MiB"
            with pytest.raises(HostGone, match="answered 'echo' to 'card'"):
                session.call("card")
    finally:
        server.stop(None).wait()


def test_the_end_of_a_round_cuts_its_sessions(link):
    host, _ = link
    with visiting(host) as session:
        session.call("card")
        host.close_round()
        with pytest.raises(HostGone):
            session.call("card")


def test_a_port_that_is_taken_names_the_knob(llava, edge, local_llm):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(FedmmError, match=r"link.bind"):
            with served(llava, edge, local_llm, bind=f"127.0.0.1:{taken.getsockname()[1]}"):
                pass


def test_both_ends_count_what_goes_over_the_wire(llava, local_llm):
    """Frames as large as real ones; gRPC's own framing is the difference, and less than 1%."""
    built, _ = frozen_modules.build(frozen_modules.take(*llava), rank=4)
    taken_along: dict[tuple[int, str], Traffic] = {}
    with served(llava, built, local_llm, traffic=taken_along) as (host, _):
        proxy = CountingProxy(host.port)
        with visiting(host, address=proxy.address) as session:
            for _ in range(10):
                tensors = {
                    "whole.0": torch.randn(64, 50, 16), "mask": torch.ones(64, 50, dtype=torch.bool),
                    "keep": torch.zeros(64, 3, dtype=torch.int64), "labels": torch.ones(64, 3, dtype=torch.int64),
                }  # fmt: skip
                ask(session, tensors)
            send_update(session, built.state())
            sent, received = sum(session.sent_bytes.values()), sum(session.received_bytes.values())
        _, traffic = host.close_round()
        proxy.close()
    rows = [*taken_along.values(), *traffic.values()]
    up, down = (sum(getattr(row, way) for row in rows) for way in ("up_bytes", "down_bytes"))
    assert taken_along.keys() == {(0, "loss"), (0, "update")} and traffic.keys() == {(0, "update")}
    assert (up, down) == (sent, received), "both ends count the same frames"
    assert up == pytest.approx(proxy.bytes["up"], rel=0.01)
    assert down == pytest.approx(proxy.bytes["down"], rel=0.01)


def test_a_stream_without_credentials_is_refused(link):
    host, _ = link
    with grpc.insecure_channel(f"127.0.0.1:{host.port}") as channel:
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.stream_stream(wire.METHOD)(iter(wire.encode(wire.Frame("card")))))
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_late_answer_is_not_taken_for_the_next_ones(llava, edge, local_llm, batch, monkeypatch):
    call = local_llm.__class__.__call__

    def slow(self, *args):
        time.sleep(1.0)
        return call(self, *args)

    monkeypatch.setattr(local_llm.__class__, "__call__", slow)
    with served(llava, edge, local_llm) as (host, _), visiting(host, deadline_seconds=0.3) as session:
        with pytest.raises(HostGone, match="'loss' within"):
            ask(session, step_tensors(batch, edge), grad=False)
        time.sleep(1.0)
        with pytest.raises(HostGone):
            session.call("card")


def test_a_session_of_an_old_round_can_do_nothing_more(link, edge, batch):
    host, _ = link
    with visiting(host) as session:
        session.call("card")
        host.open_round(2, edge.state(), [0])  # a round that follows without the old one's end
        with pytest.raises(HostRefused, match="round 1 is over, the run is in round 2"):
            ask(session, step_tensors(batch, edge), grad=True)
    host.close_round()
    with visiting(host) as session, pytest.raises(HostRefused, match="between rounds"):
        session.call("card")


def test_a_client_has_one_session_and_a_new_one_ends_the_old(link):
    host, _ = link
    with visiting(host) as old, visiting(host, client=1) as other:
        old.call("card")
        other.call("card")
        with visiting(host) as new:
            assert new.call("card").verb == "card"
            with pytest.raises(HostGone):
                old.call("card")
            assert new.call("card").verb == other.call("card").verb == "card"


def test_an_update_is_safe_before_its_round_can_close(llava, edge, local_llm):
    """An update that is being written when the round ends is in the round; the round waits for it."""
    writing, order = threading.Event(), []

    def slow_disk(round, update, moved):
        writing.set()
        time.sleep(0.5)
        order.append("safe")

    frozen = frozen_modules.take(*llava)
    with Host(
        local_llm, card={}, edge=frozen, features=Features(*frozen_modules.build_base(frozen)), on_update=slow_disk
    ) as host:
        host.open_round(1, edge.state(), [0])
        with visiting(host) as session:

            def send():
                with suppress(FedmmError):  # the round's end may cut the session before the answer is read
                    send_update(session, edge.state())

            sender = threading.Thread(target=send)
            sender.start()
            writing.wait(10)
            host.close_round()
            order.append("closed")
            sender.join()
    assert order == ["safe", "closed"]


def test_unknown_verbs_take_no_memory(link):
    host, _ = link
    with visiting(host) as session:
        for i in range(5):
            with pytest.raises(HostRefused):
                session.call(f"verb{i}" + "x" * 1000)
    _, traffic = host.close_round()
    assert [verb for _, verb in traffic] == ["refused"] and traffic[0, "refused"].frames == 5
