"""Whole runs in one process, through the real host and link, on a small random LLaVA loaded as a 7B one would be."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import DATA, PROMPT, SMALL, CountingProxy, in_tiers, rounds, run, some_examples

from fedmm import tree
from fedmm.adapters.privacy import Privacy
from fedmm.config.composition import load
from fedmm.config.settings import ConfigError
from fedmm.edge.prepare import collate, prepare
from fedmm.evaluate.answers import Answer
from fedmm.federation import build
from fedmm.federation import client as client_side
from fedmm.flower import exchange, inprocess
from fedmm.flower import rounds as server_side
from fedmm.flower.recorder import Recorder
from fedmm.flower.server_app import plan
from fedmm.link import wire
from fedmm.model import SplitModel
from fedmm.results import intervals
from fedmm.runs import records, summary
from fedmm.runs.events import RunBegan
from fedmm.runs.folder import RunFolder, latest_checkpoint, read_rows
from fedmm.serving.verbs import Verbs
from fedmm.storage import machine_cache
from fedmm.types import FedmmError

NANO = ["image.down", "image.up", "text.down", "text.up"]
BOTTLENECKS = [f"llm.layers.{i}.mlp.bottleneck_{factor}" for i in range(2) for factor in ("down", "up")]


@pytest.mark.run
def test_a_run_leaves_everything_it_says(backbone, tmp_path):
    path = run(backbone, tmp_path / "run", page=True)
    for name in (
        "config.yaml", "overrides.txt", "environment.json", "rounds.jsonl", "scores.jsonl", "ledger.jsonl",
        "events.jsonl", "predictions.jsonl", "summary.json", "report.html", "checkpoints/round_0002.safetensors",
    ):  # fmt: skip
        assert (path / name).stat().st_size > 0, name
    assert [row["round"] for row in rounds(path)] == [1, 2]
    assert all(row["clients"] == [0, 1, 2] and row["lost"] == {} for row in rounds(path))
    assert {row["round"] for row in read_rows(path / "scores.jsonl")} == {0, 1, 2}
    assert summary.scores(path)[2]["global"] is not None
    assert len(read_rows(path / "predictions.jsonl")) == 2 * 12, "every test example, before and after"
    kept = json.loads((path / "summary.json").read_text())
    assert kept["bytes"]["adapters"][0] > 0 and kept["bytes"]["fisher"][0] > 0 and kept["bytes"]["steps"][0] > 0


@pytest.mark.run
def test_the_same_seed_gives_the_same_bits_and_another_does_not(backbone, finished, tmp_path):
    first, again = finished(), run(backbone, tmp_path / "b")
    other = run(backbone, tmp_path / "c", "seed=1")
    assert (first / "rounds.jsonl").read_text() == (again / "rounds.jsonl").read_text()
    assert (first / "rounds.jsonl").read_text() != (other / "rounds.jsonl").read_text()


@pytest.mark.run
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_how_many_clients_run_at_once_changes_no_bit(backbone, tmp_path, dtype):
    counted = [["clients=6", f"llm.dtype={dtype}", f"run.at_once={count}"] for count in (1, 6)]
    one, three = (run(backbone, tmp_path / str(i), *overrides) for i, overrides in enumerate(counted))
    assert torch.get_default_dtype() == torch.float32
    assert (one / "rounds.jsonl").read_text() == (three / "rounds.jsonl").read_text()


@pytest.mark.run
def test_where_the_loss_is_computed_changes_no_bit(backbone, finished, tmp_path):
    at_host, at_client = finished(), run(backbone, tmp_path / "b", "link.loss=client")
    assert rounds(at_host) == rounds(at_client)


@pytest.mark.run
def test_clients_per_round_are_drawn_by_seed_and_round(backbone, tmp_path):
    path = run(backbone, tmp_path / "run", "clients_per_round=1", "rounds=5")
    drawn = [row["clients"] for row in rounds(path)]
    assert all(len(clients) == 1 for clients in drawn) and len({clients[0] for clients in drawn}) > 1
    assert summary.scores(path)[0]["global"] is not None, "everybody is scored before the first round"
    assert summary.scores(path)[5]["global"] is not None, "and after the last"


@pytest.mark.run
def test_two_arms_of_one_name_are_refused(backbone, tmp_path):
    with pytest.raises(ConfigError, match="two arms are called FedNano"):
        run(backbone, tmp_path / "run", "compare=[fednano]")


@pytest.mark.run
def test_another_prompt_is_another_run(backbone, tmp_path):
    """What a process remembers of its data depends on the prompt."""
    first = run(backbone, tmp_path / "a", "rounds=1")
    other = run(backbone, tmp_path / "b", "rounds=1", r'llm.prompt="<image> the {question}"')
    assert rounds(first) != rounds(other)


@pytest.mark.run
def test_the_ledger_on_disk_is_what_went_over_the_wire(backbone, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    proxy = CountingProxy(port)
    path = run(
        backbone, tmp_path / "run", f"link.bind=127.0.0.1:{port}", f"link.address={proxy.address}", "rounds=1",
        "batch_size=36", "clients=1", "epochs=10", "evaluate.batch_size=256",
    )  # fmt: skip
    proxy.close()
    ledger = [row for row in read_rows(path / "ledger.jsonl") if row["kind"] == "bytes" and row["channel"] != "control"]
    for way in ("up", "down"):
        assert sum(row[f"{way}_bytes"] for row in ledger) == pytest.approx(proxy.bytes[way], rel=0.01)


@pytest.mark.run
def test_two_local_rounds_lost_in_a_row_lose_nothing(backbone, tmp_path, monkeypatch):
    send = client_side._send

    def twice_lost(session, update):
        if update.client == 1 and session.round in (2, 3):
            raise FedmmError("cut off")
        send(session, update)

    monkeypatch.setattr(client_side, "_send", twice_lost)
    path = run(backbone, tmp_path / "run", "arm=local", "rounds=5")
    assert [1 in row["clients"] for row in rounds(path)] == [True, False, False, True, True]


@pytest.mark.run
def test_a_corrected_command_goes_on_in_the_same_folder(backbone, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        run(backbone, tmp_path / "run", "llm.path=/nowhere/at/all")
    assert not (tmp_path / "run").exists()
    run(backbone, tmp_path / "run", "rounds=1")
    run(backbone, tmp_path / "run", "rounds=1", "link.deadline_seconds=30")


@pytest.mark.run
def test_a_path_may_hold_any_character(backbone, tmp_path):
    folder = tmp_path / "a (1), b=c" / "it's"
    path = run(backbone, folder, "rounds=1", "compare=[fedavg]")
    assert path == folder and (folder / "arms" / "fedavg" / "summary.json").exists()


def test_a_client_that_ends_late_leaves_what_it_kept_since():
    """Given up in round 2, it trained on; round 3 of the same client was accepted in the meantime."""
    for round in (1, 2, 3):
        machine_cache.save_private("a-run", 0, round, {"local.up": torch.full((1,), round)}, needed=round - 1)
    machine_cache.save_private("a-run", 0, 2, {"local.up": torch.zeros(1)}, needed=1)
    assert machine_cache.load_private("a-run", 0, 3)["local.up"] == 3


@pytest.mark.run
def test_local_exchanges_nothing_and_goes_on_from_what_it_kept(backbone, tmp_path):
    path = run(backbone, tmp_path / "run", "arm=local", "rounds=3")
    ledger = [
        row for row in read_rows(path / "ledger.jsonl") if row["kind"] == "bytes" and row["channel"] == "adapters"
    ]
    assert sum(row["up_bytes"] + row["down_bytes"] for row in ledger) < 5000, "headers, and no tensor"
    run_id = json.loads((path / "environment.json").read_text())["run"]
    states = [machine_cache.load_private(run_id, client, 3) for client in range(3)]
    assert len({tree.digest(state) for state in states}) == 3, "every client has its own"
    assert machine_cache.load_private(run_id, 0, 1) is None and machine_cache.load_private(run_id, 0, 2) is not None, (
        "two rounds are kept"
    )
    losses = [row["loss"]["0"] for row in rounds(path)]
    assert losses[2] < losses[1] < losses[0]
    assert summary.scores(path)[3]["global"] is not None, "each personal model is scored on everybody's test part"
    assert summary.scores(path)[1]["global"] is None, "but not in between, and nothing else is passed off for it"


@pytest.mark.run
def test_centralised_is_one_client_with_everything(backbone, tmp_path):
    path = run(backbone, tmp_path / "run", "arm=centralised")
    assert [row["examples"] for row in rounds(path)] == [{"0": 36}] * 2
    assert set(summary.scores(path)[2]["own"]) == {0, 1, 2}, "scored on each client's own part too"


@pytest.mark.run
def test_arms_are_compared_in_one_run(backbone, finished, tmp_path):
    path = run(backbone, tmp_path / "run", "compare=[local,fedavg,centralised]", "rounds=1")
    labels = [row.label for row in intervals.rows(records.load([path]).runs)]
    assert labels[0] == "zero-shot" and set(labels[1:]) == {"FedNano", "local", "FedAvg", "centralised"}
    alone = finished("arm=fedavg", "rounds=1")
    assert rounds(path / "arms" / "fedavg") == rounds(alone), "an arm is what it would be alone"


@pytest.mark.deploy
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(backbone, tmp_path):
    whole = run(backbone, tmp_path / "whole", "rounds=6", "arm=fedavg")
    asked = [*backbone, *SMALL, *DATA, "rounds=6", "arm=fedavg", f"run.dir={tmp_path / 'killed'}"]
    for wanted_rounds in (2, 4):
        process = subprocess.Popen(
            [sys.executable, "-m", "fedmm.cli", "run", *asked], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 250
        while len(read_rows(tmp_path / "killed" / "rounds.jsonl")) < wanted_rounds:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    killed = inprocess.run(plan(asked), page=False)
    assert (killed / "rounds.jsonl").read_text() == (whole / "rounds.jsonl").read_text()
    assert summary.scores(killed)[6] == summary.scores(whole)[6]


@pytest.mark.run
def test_a_killed_server_does_not_ask_again_for_what_it_has(backbone, finished, tmp_path, monkeypatch):
    whole = finished("arm=fedavg")
    carry_out, trained = client_side.carry_out, []

    def dies_at_client_two(order):
        if order.train:
            trained.append((order.round, order.client))
            if (order.round, order.client) == (2, 2):
                raise SystemExit("killed")
        return carry_out(order)

    monkeypatch.setattr("fedmm.flower.client_app.carry_out", dies_at_client_two)
    with pytest.raises(SystemExit):
        run(backbone, tmp_path / "killed", "arm=fedavg")
    assert trained[-3:] == [(2, 0), (2, 1), (2, 2)]
    trained.clear()
    monkeypatch.setattr("fedmm.flower.client_app.carry_out", lambda order: (trained.append(order), carry_out(order))[1])
    again = run(backbone, tmp_path / "killed", "arm=fedavg")
    assert [(order.round, order.client) for order in trained if order.train] == [(2, 2)]
    assert rounds(again) == rounds(whole)
    assert {(r["round"], r["client"]) for r in read_rows(again / "scores.jsonl")} == {
        (round, client) for round in range(3) for client in range(3)
    }


@pytest.mark.run
@pytest.mark.parametrize("arm", ["feddat", "fedavg"])
def test_a_run_killed_inside_a_round_ends_with_the_same_table(backbone, tmp_path, monkeypatch, arm):
    """What a client had moved, scored and kept before the server was killed counts once, and is asked for once."""
    whole = run(backbone, tmp_path / "whole", f"arm={arm}", "rounds=3")
    carry_out = client_side.carry_out

    def dies_at_client_two(order):
        if order.train and (order.round, order.client) == (2, 2):
            raise SystemExit("killed")
        return carry_out(order)

    monkeypatch.setattr("fedmm.flower.client_app.carry_out", dies_at_client_two)
    with pytest.raises(SystemExit):
        run(backbone, tmp_path / "killed", f"arm={arm}", "rounds=3")
    assert len(list((tmp_path / "killed" / "journal").rglob("client_*.safetensors"))) == 2
    monkeypatch.setattr("fedmm.flower.client_app.carry_out", carry_out)
    killed = run(backbone, tmp_path / "killed", f"arm={arm}", "rounds=3")
    assert rounds(killed) == rounds(whole) and summary.scores(killed) == summary.scores(whole)
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (killed, whole))
    assert ours["llm_samples"] == theirs["llm_samples"] > 0 and ours["final"] == theirs["final"]
    for channel in ("steps", "answers"):
        assert ours["bytes"][channel] == pytest.approx(theirs["bytes"][channel], rel=1e-3), channel
    assert ours["bytes"]["adapters"][0] == pytest.approx(theirs["bytes"]["adapters"][0], rel=1e-2), "each change once"
    kept = [sorted((tmp_path / "home" / "kept").glob(f"{run_id(path)}/*/round_0003*")) for path in (killed, whole)]
    assert len(kept[0]) == len(kept[1]) == (3 if arm == "feddat" else 0)
    assert [file.read_bytes() for file in kept[0]] == [file.read_bytes() for file in kept[1]]


@pytest.mark.run
@pytest.mark.parametrize(("where", "every"), [("server", 0), ("client", 1)])
def test_a_run_killed_between_an_update_and_its_report_counts_both_once(backbone, tmp_path, monkeypatch, where, every):
    options = ["arm=fedavg", f"llm.where={where}", f"evaluate.every={every}"]
    whole = run(backbone, tmp_path / "whole", *options)
    carry_out = client_side.carry_out

    def is_not_heard(order):
        report = carry_out(order)
        if (order.round, order.client) == (2, 1):
            raise SystemExit("killed")
        return report

    monkeypatch.setattr("fedmm.flower.client_app.carry_out", is_not_heard)
    with pytest.raises(SystemExit):
        run(backbone, tmp_path / "killed", *options)
    monkeypatch.setattr("fedmm.flower.client_app.carry_out", carry_out)
    killed = run(backbone, tmp_path / "killed", *options, page=True)
    assert rounds(killed) == rounds(whole) and summary.scores(killed) == summary.scores(whole)
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (killed, whole))
    assert ours["llm_samples"] == theirs["llm_samples"] > 0 and ours["final"] == theirs["final"]
    assert (killed / "report.html").stat().st_size > 0


def run_id(path: Path) -> str:
    return json.loads((path / "environment.json").read_text())["run"]


@pytest.mark.run
@pytest.mark.parametrize("arm", ["local", "feddat"])
def test_a_client_that_sat_out_goes_on_from_what_it_last_kept(backbone, tmp_path, monkeypatch, arm):
    began: dict[tuple[int, int], str] = {}
    ended: dict[tuple[int, int], str] = {}
    load, save = client_side._load_sets, machine_cache.save_private

    def loaded(cfg, edge, order, arrived):
        load(cfg, edge, order, arrived)
        began[order.client, order.round] = tree.digest(edge.state("local"))

    def saved(run, client, round, state, needed):
        ended[client, round] = tree.digest({name.removeprefix("local."): tensor for name, tensor in state.items()})
        save(run, client, round, state, needed)

    monkeypatch.setattr(client_side, "_load_sets", loaded)
    monkeypatch.setattr(machine_cache, "save_private", saved)
    path = run(backbone, tmp_path / "run", f"arm={arm}", "clients_per_round=2", "rounds=6")
    took = {client: [row["round"] for row in rounds(path) if client in row["clients"]] for client in range(3)}
    pairs = [(client, pair) for client, own in took.items() for pair in itertools.pairwise(own)]
    assert any(later > earlier + 1 for _, (earlier, later) in pairs), "somebody sat out"
    for client, (earlier, later) in pairs:
        assert began[client, later] == ended[client, earlier]
    for client, own in took.items():
        assert began[client, 7] == ended[client, own[-1]], "and is scored with it"


@pytest.mark.run
def test_a_client_lost_in_the_last_scoring_is_asked_again_and_else_said_to_be_missing(backbone, tmp_path, monkeypatch):
    carry_out, asked = client_side.carry_out, []

    def away(times):
        def answer(order):
            if order.round == 3 and order.client == 1:
                asked.append(order)
                if len(asked) <= times:
                    raise FedmmError("away")
            return carry_out(order)

        return answer

    found = {}
    for times in (1, 2):
        asked.clear()
        monkeypatch.setattr("fedmm.flower.client_app.carry_out", away(times))
        found[times] = run(backbone, tmp_path / str(times), "arm=local", page=True)
        assert len(asked) == 2
    told = {times: json.loads((path / "summary.json").read_text()) for times, path in found.items()}
    assert told[1]["unscored"] == [] and set(told[1]["final"]["own"]) == {"0", "1", "2"}
    assert told[2]["unscored"] == [1] and told[2]["final"]["global"] is None
    last = [
        re.search(r"<td>final</td><td>1</td>\s*<td[^>]*>([^<]*)", (found[i] / "report.html").read_text())
        for i in (1, 2)
    ]
    assert last[0] is None and last[1][1] == "FedmmError: away"


@pytest.mark.run
def test_who_says_nothing_for_all_of_the_last_scoring_is_not_waited_for_again(backbone, tmp_path, monkeypatch):
    carry_out, record = client_side.carry_out, Recorder.report
    asked, recorded = [], []

    class Clock:
        """Jumps past every deadline when the other two have reported."""

        def __getattr__(self, name):
            return getattr(time, name)

        def monotonic(self):
            return time.monotonic() + 1e6 * (len(recorded) >= 2)

    def silent(order):
        if (order.round, order.client) == (2, 1):
            asked.append(order)
            while len(recorded) < 2:
                time.sleep(0.05)
            time.sleep(1)
        return carry_out(order)

    def recording(recorder, order, report):
        record(recorder, order, report)
        recorded.extend([order.client] * (order.round == 2))

    monkeypatch.setattr("fedmm.flower.client_app.carry_out", silent)
    monkeypatch.setattr(Recorder, "report", recording)
    for module in (server_side, exchange):
        monkeypatch.setattr(module, "time", Clock())
    path = run(backbone, tmp_path / "run", "arm=local", "rounds=1", "run.at_once=3", page=True)
    assert json.loads((path / "summary.json").read_text())["unscored"] == [1] and len(asked) == 1
    assert "did not report within run.round_seconds" in (path / "report.html").read_text()


@pytest.mark.run
def test_a_client_that_says_nothing_is_not_passed_over(backbone, tmp_path, monkeypatch):
    send = client_side._send
    monkeypatch.setattr(client_side, "_send", lambda session, update: update.client == 1 or send(session, update))
    path = run(backbone, tmp_path / "run", "arm=fedavg", "rounds=1")
    assert rounds(path)[0]["clients"] == [0, 2]
    assert rounds(path)[0]["lost"] == {"1": "reported, but sent no update"}


LIES = (
    ({"scores": {0: (999, 1)}}, "scores part 0 with 999 of 1"),
    ({"scores": {2: (1, 2)}}, "scores part 2"),
    ({"scores": {0: ("a", 1)}}, "cannot be read"),
    ({"answers": [(2, Answer("x", "a", "b"))]}, "has answers of part 2"),
    ({"metrics": {"loss": float("nan")}}, "not finite"),
    ({"round": 70}, "round 70"),
)


@pytest.mark.run
def test_a_report_that_cannot_be_is_not_believed(backbone, tmp_path, monkeypatch):
    """One lie in each round."""
    honest = client_side.carry_out

    def lying(order):
        report = honest(order)
        return replace(report, **LIES[order.round - 1][0]) if order.client == 0 and order.train else report

    monkeypatch.setattr("fedmm.flower.client_app.carry_out", lying)
    path = run(backbone, tmp_path / "run", "arm=fedavg", f"rounds={len(LIES)}", "evaluate.every=1")
    failed = {row["round"]: row["failed"] for row in read_rows(path / "events.jsonl") if row["event"] == "round"}
    for round, (_, says) in enumerate(LIES, start=1):
        assert says in failed[round]["0"]
    assert summary.scores(path)[len(LIES)]["global"] is not None


def poison(monkeypatch, clients):
    send = client_side._send

    def poisoned(session, update):
        if update.client in clients:
            update.delta["text.up"][0, 0] = float("nan")
        send(session, update)

    monkeypatch.setattr(client_side, "_send", poisoned)


@pytest.mark.run
def test_a_client_that_sends_nan_is_left_out_and_said_so(backbone, tmp_path, monkeypatch):
    poison(monkeypatch, {1})
    path = run(backbone, tmp_path / "run", "arm=fedavg", page=True)
    for row in rounds(path):
        assert row["clients"] == [0, 2]
        assert "not finite" in row["lost"]["1"]
    assert "not finite" in (path / "report.html").read_text()


@pytest.mark.run
def test_a_round_without_any_update_ends_the_run_with_every_reason(backbone, tmp_path, monkeypatch):
    poison(monkeypatch, {0, 1, 2})
    with pytest.raises(FedmmError, match=r"round 1: no client returned an update; client 0: .*not finite.*client 2"):
        run(backbone, tmp_path / "run")
    assert read_rows(tmp_path / "run" / "events.jsonl")[-1]["event"] == "failed"


@pytest.mark.run
@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["clients=40"], "clients=40"),
        (["llm.path=/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_what_cannot_be_is_refused_before_a_round_starts(backbone, tmp_path, overrides, says):
    with pytest.raises((ValueError, OSError), match=says):
        run(backbone, tmp_path / "run", *overrides)
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


@pytest.mark.run
def test_an_impossible_partition_leaves_nothing_behind(backbone, tmp_path):
    with pytest.raises(ValueError, match="clients"):
        run(backbone, tmp_path / "run", "clients=40")
    assert not (tmp_path / "run").exists()


@pytest.mark.run
def test_a_folder_of_another_run_is_not_touched(backbone, tmp_path):
    path = run(backbone, tmp_path / "run", "rounds=1")
    before = (path / "rounds.jsonl").read_text()
    with pytest.raises(ValueError, match="another configuration; set run.dir"):
        run(backbone, tmp_path / "run", "rounds=1", "seed=5")
    for bits in ("link.codec.h=int8", "link.merge_rows=8", "link.encoding=dense"):
        with pytest.raises(ValueError, match="another configuration"):
            run(backbone, tmp_path / "run", "rounds=1", bits)
    assert (path / "rounds.jsonl").read_text() == before


@pytest.mark.run
def test_lora_in_the_encoder_runs_end_to_end(backbone, tmp_path):
    path = run(backbone, tmp_path / "run", "edge.lora.rank=2", "rounds=1", "arm=fednano_ef")
    import safetensors.torch

    state = safetensors.torch.load_file(path / "checkpoints" / "round_0001.safetensors")
    moved = [name for name, tensor in state.items() if name.endswith("lora_B") and tensor.abs().sum() > 0]
    assert any("encoder" in name for name in moved)


@pytest.mark.run
def test_a_client_that_lost_what_it_kept_is_told(backbone, tmp_path, monkeypatch):
    load_private = machine_cache.load_private
    monkeypatch.setattr(
        machine_cache,
        "load_private",
        lambda run, client, round: None if client == 1 else load_private(run, client, round),
    )
    path = run(backbone, tmp_path / "run", "arm=local")
    assert "'s local adapters of round 1 are not under" in rounds(path)[1]["lost"]["1"]


def test_state_files_are_whole_or_not_there(tmp_path):
    folder = RunFolder(tmp_path / "run", "seed: 0\n", [])
    folder.append("rounds.jsonl", round=1, clients=[0])
    folder.save_checkpoint(1, {"w": torch.ones(2)}, {"m": torch.zeros(1)})
    folder.append("rounds.jsonl", round=2, clients=[0])
    for name in ("rounds.jsonl", "events.jsonl"):
        with (tmp_path / "run" / name).open("a") as file:
            file.write('{"round": 3, "cl')
    again = RunFolder(tmp_path / "run", "seed: 0\n", [])
    again.log(RunBegan(["FedNano"]))
    assert [row["event"] for row in again.rows("events.jsonl")] == ["run"]
    last, state, memory = again.resume()
    assert (last, state["w"].tolist(), memory["m"].tolist()) == (1, [1, 1], [0])
    assert [row["round"] for row in read_rows(tmp_path / "run" / "rounds.jsonl")] == [1]


def test_the_last_two_checkpoints_stay_by_their_number(tmp_path):
    folder = RunFolder(tmp_path / "run", "seed: 0\n", [])
    for round in (9998, 9999, 10000, 10001):
        folder.save_checkpoint(round, {"w": torch.full((1,), float(round))}, {})
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2
    last, state, _ = latest_checkpoint(tmp_path / "run")
    assert (last, state["w"].item()) == (10001, 10001)


def test_overrides_that_cannot_be_are_named_by_the_command_line(capsys):
    from fedmm.cli import main

    assert main(["run", "ronds=3"]) == 2
    assert "available options" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        load(["ronds=3"])


@pytest.mark.run
def test_a_run_ends_as_an_ordinary_checkpoint(backbone, tmp_path, capsys):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from fedmm.cli import main

    path = run(backbone, tmp_path / "run", "rounds=1", "optimizer.lr=0.05")
    assert main(["export", str(path), str(tmp_path / "tuned")]) == 0
    tuned = LlavaForConditionalGeneration.from_pretrained(tmp_path / "tuned")
    start = LlavaForConditionalGeneration.from_pretrained(backbone[1].removeprefix("llm.path="))
    changed = {n for n, p in tuned.named_parameters() if not torch.equal(p, start.get_parameter(n))}
    assert changed == {
        "model.multi_modal_projector.linear_2.weight",
        "model.multi_modal_projector.linear_2.bias",
        "model.language_model.embed_tokens.weight",
    }
    assert AutoProcessor.from_pretrained(tmp_path / "tuned").tokenizer is not None
    assert main(["export", str(tmp_path), str(tmp_path / "other")]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


@pytest.mark.run
def test_seeds_make_a_mean_with_an_interval_and_differences_are_paired(backbone, tmp_path, capsys):
    from fedmm.cli import main

    runs = [run(backbone, tmp_path / str(seed), f"seed={seed}", "rounds=1", "compare=[fedavg]") for seed in (0, 1)]
    assert main(["compare", *map(str, runs)]) == 0
    said = capsys.readouterr().out
    assert "| FedAvg | " in said and "±" in said and "own - FedAvg" in said
    assert intervals.interval([0.5, 0.7]) == pytest.approx(12.706 * 0.1414214 / 2**0.5, rel=1e-4)
    assert intervals.interval([0.5]) is None


@pytest.mark.run
def test_a_folder_is_one_process_at_a_time(backbone, tmp_path):
    from fedmm.runs.folder import alone

    with alone(tmp_path / "run"), pytest.raises(ValueError, match="another process is running in"):
        run(backbone, tmp_path / "run", "rounds=1")
    run(backbone, tmp_path / "run", "rounds=1")


@pytest.mark.run
def test_compare_takes_each_seed_once_and_names_the_arms(backbone, tmp_path, capsys):
    from fedmm.cli import main

    path = str(run(backbone, tmp_path / "run", "rounds=1", "compare=[fedavg]"))
    assert main(["compare", path, path]) == 0
    assert capsys.readouterr().out.count("| FedNano |") == 1, "named twice, it is one run"
    again = str(run(backbone, tmp_path / "again", "rounds=1"))
    assert main(["compare", path, again]) == 2
    assert "both have FedNano with seed 0" in capsys.readouterr().err
    assert main(["compare", path, "--against", "fedavg"]) == 2
    assert "'FedAvg'" in capsys.readouterr().err


@pytest.mark.run
@pytest.mark.parametrize(("arm", "rank", "names"), [("feddat", 4, NANO), ("feddat_llm", 0, BOTTLENECKS)])
def test_feddats_local_adapter_moves_in_every_round_and_stays_at_home(
    backbone, tmp_path, monkeypatch, arm, rank, names
):
    """The published code trains it in the first round only, and evaluates with a stale shared adapter."""
    evaluated = []
    sent: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    anchors: dict[int, dict[str, torch.Tensor]] = {}
    take, load = Verbs._take_update, client_side._load_sets

    def watched(self, caller, frame, traffic):
        sent[caller.client, caller.round] = tree.clone(frame.tensors)
        return take(self, caller, frame, traffic)

    def loaded(cfg, edge, order, anchor):
        load(cfg, edge, order, anchor)
        anchors[order.round] = tree.clone(anchor)
        evaluated.append((order.round, tree.digest(edge.state("frozen")), tree.digest(anchor)))

    monkeypatch.setattr(Verbs, "_take_update", watched)
    monkeypatch.setattr(client_side, "_load_sets", loaded)
    kept: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    save = machine_cache.save_private

    def saved(run, who, round, state, needed):
        kept[who, round] = tree.clone(state)
        save(run, who, round, state, needed)

    monkeypatch.setattr(machine_cache, "save_private", saved)
    run(backbone, tmp_path / "run", f"arm={arm}", f"edge.rank={rank}", "rounds=3", "schedule=constant")
    for who in range(3):
        assert len({tree.digest(kept[who, round]) for round in (1, 2, 3)}) == 3, "it moves in every round"
    assert len(sent) == 9 and {tuple(sorted(own)) for own in sent.values()} == {tuple(f"delta/{n}" for n in names)}
    for (who, round), own in sent.items():
        for name in names:
            private, delta = kept[who, round][f"local.{name}"], own[f"delta/{name}"]
            assert not torch.equal(delta, private) and not torch.equal(delta, private - anchors[round][name]), (
                "nor does it leave under the shared one's name"
            )
    assert all(frozen == newest for _, frozen, newest in evaluated)
    assert len({newest for _, _, newest in evaluated}) == 4, "the start, and the state after each of three rounds"


STEPS = {"forward", "backward", "loss", "squares", "generate"}


@pytest.mark.run
@pytest.mark.parametrize("arm", ["feddat", "fedsa_lora"])
def test_with_link_local_dense_nothing_of_what_is_kept_is_in_any_frame(backbone, tmp_path, monkeypatch, arm):
    """Not even its B, in training or in generation; the bits stay the same."""
    sent: list[tuple[str, frozenset[str]]] = []
    values: list[bytes] = []
    kept: list[bytes] = []
    encode, save = wire.encode, machine_cache.save_private

    def watched(frame):
        sent.append((frame.verb, frozenset(name.split(".")[0] for name in frame.tensors)))
        values.extend(tensor.detach().contiguous().numpy().tobytes() for tensor in frame.tensors.values())
        return encode(frame)

    def saved(run, who, round, state, needed):
        kept.extend(tensor.numpy().tobytes() for tensor in state.values() if tensor.any())
        save(run, who, round, state, needed)

    monkeypatch.setattr(wire, "encode", watched)
    monkeypatch.setattr(machine_cache, "save_private", saved)
    named: dict[str, set[str]] = {}
    seen: dict[str, int] = {}
    for local in ("factored", "dense"):
        for watch in (sent, values, kept):
            watch.clear()
        run(backbone, tmp_path / local, f"arm={arm}", f"link.local={local}")
        named[local] = {name for verb, names in sent if verb in STEPS for name in names}
        seen[local] = sum(any(own in value for value in values) for own in kept)
        assert {verb for verb, _ in sent} - STEPS <= {"open", "card", "edge", "state", "update", "known", "features"}
    assert kept and seen["dense"] == 0 < seen["factored"], "by their bits too"
    assert {"up", "h", "token_up", "token_down"} <= named["factored"]
    assert named["dense"] <= {"whole", "mask", "keep", "labels", "losses", "grad/whole", "logits"}
    assert [row["state"] for row in rounds(tmp_path / "dense")] == [
        row["state"] for row in rounds(tmp_path / "factored")
    ]
    assert summary.scores(tmp_path / "dense") == summary.scores(tmp_path / "factored")


def test_answers_driven_from_the_client_are_the_hosts(edge, local_llm, processor):
    batch = collate(prepare(some_examples(5), processor, PROMPT), answers=False)
    whole = SplitModel(edge, local_llm)
    stepwise = SplitModel(edge, local_llm, privacy=Privacy(frozenset({"shared"})), stop_tokens=local_llm.stop_tokens)
    with torch.no_grad():
        for use, tokens in ((("shared",), 6), (("shared",), 1)):
            assert torch.equal(stepwise.generate(batch, use, tokens), whole.generate(batch, use, tokens))


@pytest.mark.run
@pytest.mark.parametrize("arm", ["fednano", "feddat"])
def test_where_the_llm_runs_changes_no_bit(backbone, finished, tmp_path, arm):
    split = finished(f"arm={arm}")
    whole = run(backbone, tmp_path / "whole", f"arm={arm}", "llm.where=client")
    assert rounds(split) == rounds(whole)
    assert read_rows(split / "predictions.jsonl") == read_rows(whole / "predictions.jsonl")
    ledger = read_rows(whole / "ledger.jsonl")
    sent = {row["channel"]: row["up_bytes"] + row["down_bytes"] for row in ledger if row["kind"] == "bytes"}
    assert sent.keys() <= {"adapters", "fisher", "control", "edge"} and sent["edge"] < 2000, "the card, and no part"
    (card,) = (row["card"] for row in read_rows(whole / "events.jsonl") if row["event"] == "arm")
    stored = {row["edge_parameters"] for row in ledger if row["kind"] == "client"}
    assert stored == {card["model_parameters"]}, "a client that runs the whole model stores it too"


@pytest.mark.run
def test_a_client_whose_backbone_is_another_is_told(backbone, tmp_path, monkeypatch):
    whole = build.whole

    def other(cfg):
        held = whole(cfg)
        return replace(held, card=held.card | {"edge": "other"})

    monkeypatch.setattr(build, "whole", other)
    with pytest.raises(
        FedmmError, match=r"this client's backbone is not the server's: \['edge'\] differ; use the same"
    ):
        run(backbone, tmp_path / "run", "llm.where=client", "rounds=1")


@pytest.mark.parametrize(
    "arm", in_tiers(run=["fedavg", "fednano_ef"], nightly=["fedprox", "fednano", "local", "centralised"])
)
def test_every_arm_trains_inside_the_llm_too(backbone, tmp_path, arm):
    inside = ["llm.where=client", "inner=lora", "edge.rank=0", "rounds=3", "schedule=constant", "optimizer.lr=0.02"]
    path = run(backbone, tmp_path / "run", f"arm={arm}", *inside)
    losses = [sum(row["loss"].values()) for row in rounds(path)]
    assert losses[2] < losses[1] < losses[0]
    assert not any(row["lost"] for row in rounds(path))
    trained = {row["trained_parameters"] for row in read_rows(path / "ledger.jsonl") if row["kind"] == "client"}
    assert trained == {2 * 2 * 2 * 16 * 4}, "two factors of two projections in two layers, 16 wide, of rank 4"


@pytest.mark.run
def test_lora_inside_the_llm_ends_as_an_ordinary_checkpoint(backbone, tmp_path):
    from transformers import LlavaForConditionalGeneration

    from fedmm.cli import main

    path = run(backbone, tmp_path / "run", "rounds=1", "arm=fedavg", "llm.where=client", "inner=lora", "edge.rank=0")
    assert main(["export", str(path), str(tmp_path / "tuned")]) == 0
    tuned = LlavaForConditionalGeneration.from_pretrained(tmp_path / "tuned")
    start = LlavaForConditionalGeneration.from_pretrained(backbone[1].removeprefix("llm.path="))
    changed = {n for n, p in tuned.named_parameters() if not torch.equal(p, start.get_parameter(n))}
    layers = [f"model.language_model.layers.{i}.self_attn" for i in range(2)]
    assert changed == {f"{layer}.{name}_proj.weight" for layer in layers for name in "qv"}


@pytest.mark.run
def test_arms_with_the_llm_here_and_there_stand_in_one_table(backbone, finished, tmp_path):
    path = run(backbone, tmp_path / "run", "arm=fedavg", "compare=[feddat_llm]", "rounds=1")
    alone = finished("arm=fedavg", "rounds=1")
    assert rounds(path) == rounds(alone), "what is put into the LLM of one arm is in no other's"
    assert {row.label for row in intervals.rows(records.load([path]).runs)} == {
        "zero-shot",
        "FedAvg",
        "FedDAT in the LLM",
    }


@pytest.mark.run
def test_a_client_that_sends_garbage(backbone, tmp_path):
    """NaN is refused at the door and the round goes on; what is finite is the rule's to bear."""
    honest = run(backbone, tmp_path / "honest", "arm=median", "rounds=1")
    nan = run(backbone, tmp_path / "nan", "arm=median", "rounds=1", "fault=not_finite", "faulty=[1]")
    assert "not finite" in rounds(nan)[0]["lost"]["1"] and rounds(nan)[0]["clients"] == [0, 2]
    far, errors = {}, {}
    for arm in ("median", "fedavg"):
        path = run(backbone, tmp_path / arm, f"arm={arm}", "rounds=1", "fault=scaled", "faulty=[1]")
        found = latest_checkpoint(path)
        far[arm] = max(float(tensor.abs().max()) for tensor in found[1].values())
        errors[arm] = json.loads((path / "summary.json").read_text())["product_error"]
    near = max(float(tensor.abs().max()) for tensor in latest_checkpoint(honest)[1].values())
    assert far["median"] < 2 * near and far["fedavg"] > 5 * near
    assert errors["fedavg"] > 10 > errors["median"], "against the mean of those who send no garbage"


def test_what_cannot_work_together_is_told_before_anything_starts_and_all_at_once():
    for asked, wanted in (
        (["arm=feddat", "method.sets=[shared,frozen]", "method.use=[shared]"], "needs local in method.sets"),
        (["arm=feddat", "method.step.teacher=[local,shared]"], "teacher=['local', 'shared'] and .* both train shared"),
        (
            ["arm=feddat", "method.step.teacher=[shared,frozen]", "method.sets=[shared,frozen]", "method.use=[shared]"],
            "both train shared, .*local in the one",
        ),
        (["arm=fedavg", "schema=private_head"], "sends nothing of the shared set, such as shared.image.down"),
        (["experiment=mllmfl_embedded", "schema=private_head"], "align tunes a whole model, and the schema leaves"),
        (["arm=krum", "clients=4"], "needs at least 5 clients"),
        (["faulty=[7]", "fault=scaled"], "below clients=5"),
        (["arm=hetlora", "rule=mean"], "edge.ranks=null"),
    ):
        with pytest.raises(ConfigError, match=wanted.replace("[", r"\[")):
            load([*asked, "seed=1"])
    with pytest.raises(ConfigError) as both:
        load(["arm=feddat", "method.sets=[shared,frozen]", "rounds=-1", "faulty=[7]", "rule=krum", "clients=3"])
    knobs = ("method.use", "local in method.sets", "rounds", "faulty", "at least 5 clients in a round, got 3")
    assert all(knob in str(both.value) for knob in knobs)


@pytest.mark.run
@pytest.mark.parametrize("arm", ["balanced_softmax", "logit_adjustment", "class_balanced"])
def test_a_long_tail_runs_end_to_end_and_ends_with_groups(backbone, tmp_path, arm):
    tail = ["dataset=digits_lt", "partition=equal", "dataset.largest=12", "dataset.imbalance=4"]
    sizes = ["dataset.of.train=120", "dataset.of.validation=0", "dataset.of.test=30", "evaluate.groups=thirds"]
    asked = [*backbone, *SMALL, *tail, *sizes, f"arm={arm}", "rounds=1", "run.at_once=1", f"run.dir={tmp_path / arm}"]
    path = inprocess.run(plan(asked), page=False)
    assert json.loads((path / summary.CLASSES).read_text()) == {
        "0": 12, "1": 10, "2": 8, "3": 7, "4": 6, "5": 5, "6": 4, "7": 4, "8": 3, "9": 3,
    }  # fmt: skip
    told = json.loads((path / "summary.json").read_text())
    for end in ("zero_shot", "final"):
        assert {name: count for name, (_, count) in told[end]["groups"].items()} == {"many": 9, "medium": 12, "few": 9}
