"""What a hostile server gets out of a real client: nothing is written, nothing read, no text of the site leaves."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import DATA, SMALL, served, some_examples
from flwr.app import Context, Message, RecordDict
from PIL import Image

from fedmm.edge import parts
from fedmm.edge.prepare import prepare
from fedmm.flower import client_app, messages
from fedmm.flower.inprocess import InProcessGrid
from fedmm.llm import tls
from fedmm.runs import config, reasons, targets
from fedmm.runs.client import Order, Report
from fedmm.types import READ_PATH

SECRET = "sk-0123-secret"


@pytest.fixture
def host(llava, edge, local_llm):
    """A real host over TLS, in the round after the last, which only scores."""
    InProcessGrid(1)  # messages need an identity
    with served(llava, edge, local_llm, authority=tls.Authority()) as (host, _):
        host.open_round(3, edge.state(), [])
        yield host


def order(host, overrides, client=0, **changes) -> Order:
    made = Order(
        overrides=tuple(overrides),
        run="a" * 32,
        round=3,
        client=client,
        address=f"localhost:{host.port}",
        token=host.token(3, client),
        identity=host.identity(client),
        train=False,
        answers=True,
    )
    return Order(**{**vars(made), **changes})


def sent(order: Order, node: int = 0) -> Message:
    """What a SuperNode's client, number `node`, answers to an order."""
    message = messages.send_order(order, node)
    message.metadata.__dict__["_message_id"] = "1"  # the SuperLink gives it one
    config = {"partition-id": node, "num-partitions": 3}
    return client_app.app(message, Context(1, node, config, RecordDict(), {}))


def report_of(reply: Message) -> Report:
    return messages.read_report(reply, 1 << 20)


def everything(reply: Message) -> str:
    return str(reply.content if reply.has_content() else reply.error)


def asked(backbone) -> list[str]:
    return [*backbone, *SMALL, *DATA]


def test_an_honest_order_is_done_over_tls_and_its_texts_stay(backbone, host, monkeypatch):
    report = report_of(sent(order(host, asked(backbone))))
    assert report.scores[0][1] == 4 and report.answers == []
    monkeypatch.setenv("FEDMM_ALLOW_TEXTS", "1")
    assert len(report_of(sent(order(host, asked(backbone)))).answers) == 4


def test_an_order_for_another_client_is_refused(backbone, host):
    reply = sent(order(host, asked(backbone), client=1), node=0)
    assert messages.read_lost(reply) == reasons.told("order", 1)


CHAIN = "{_target_:fedmm.cli.main,argv:[compare,RECORDS,--into,FILE]}"  # each of fedmm's own functions, and all legal


@pytest.mark.parametrize(
    "override",
    [
        f"compact={CHAIN}",
        f"++compact={CHAIN}",
        f"+method.begin={CHAIN}",
        f"+optimizer.params=[{CHAIN}]",
        f"+rule.floor={CHAIN}",
        f"++inner={CHAIN}",
        "rule._target_=fedmm.runs.home.write",
        "rule._target_=fedmm.bench.memory._enter",
        "rule._target_=fedmm.aggregate.fisher.torch",
        "rule._target_=torch.optim.AdamW",  # listed, in another place
        "+evaluate.groups={_target_:fedmm.runs.home.home}",
        "dataset=../../../../tmp/evil",
        "+hydra.searchpath=[file:///tmp]",
        "+dataset@rule=scenes",
        "method.step._target_=${label}",
    ],
)
def test_an_order_names_only_targets_that_conf_lists_there(backbone, host, tmp_path, override):
    """Found in a review: functions of the package itself, chained, wrote a file at a site."""
    records, file = Path(__file__).parents[1] / "docs" / "RULES.jsonl", tmp_path / "owned.md"
    override = override.replace("RECORDS", str(records)).replace("FILE", str(file))
    sys.modules.pop("fedmm.bench.memory", None)
    reply = sent(order(host, [*asked(backbone), override, "label=os.system"]))
    assert messages.read_lost(reply) in {reasons.told("settings", n) for n in (1, 2, 3)}
    assert not list(tmp_path.glob("owned*")) and "fedmm.bench.memory" not in sys.modules


@pytest.mark.parametrize(
    "override",
    [
        "schedule=${oc.env:SECRET,cosine}",
        "schedule='${oc.env:SECRET}'",
        r"schedule=$\{oc.env:SECRET\}",
        r"schedule=\${oc.env:SECRET}",
        "schedule=${oc.${label}:SECRET}",
        "schedule=${${label}:SECRET}",
        "schedule=${oc.create:{a:1}}",
        "schedule=${oc.decode:SECRET}",
        "schedule=${hydra:runtime.cwd}",
        "+method.step.mu=${oc.env:SECRET}",
        "label=${oc.env:SECRET}",
    ],
)
def test_an_order_reads_no_environment(backbone, host, monkeypatch, override):
    """Found in a review: the variable came back inside the error that it made."""
    monkeypatch.setenv("SECRET", SECRET)
    reply = sent(order(host, [*asked(backbone), override]))
    assert messages.read_lost(reply) == reasons.told("settings", 1)
    assert SECRET not in everything(reply)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A site's folder of two questions a split, one of them with a broken image."""
    for split in ("train", "validation", "test"):
        (path := tmp_path / "data" / "aqua" / split).mkdir(parents=True)
        rows = [{"file_name": f"{SECRET}{i}.png", "question": f"{SECRET} ?", "answer": "one"} for i in range(3)]
        for row in rows:
            Image.new("RGB", (16, 16)).save(path / row["file_name"])
        (path / rows[0]["file_name"]).write_bytes(b"no image")
        (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


def of_folder(backbone, path) -> list[str]:
    gone = [f"~dataset.of.{name}" for name in ("coco_qa", "gqa", "vizwiz", "vqa_abstract")]
    kept = [o for o in asked(backbone) if not o.startswith("dataset.")]
    return [*kept, "scenario=feddat_domain", *gone, f"dataset.of.aqua.path={path}", "clients=1", "partition=iid"]


def test_an_order_reads_no_folder_but_below_the_sites_root(backbone, host, monkeypatch, folder, tmp_path):
    """Found in a review: any folder's texts came back in the answers."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(folder / "aqua")
    refused = [folder / "aqua", tmp_path / "root" / "link", tmp_path / "root" / ".." / "data", "imagefolder", "a/b"]
    for root in (None, tmp_path / "root"):
        if root:
            monkeypatch.setenv("FEDMM_DATA", str(root))
        for path in refused:
            reply = sent(order(host, of_folder(backbone, path)))
            assert messages.read_lost(reply) == reasons.told("site", 1), path
            assert SECRET not in everything(reply) and str(tmp_path) not in everything(reply)


def test_what_goes_wrong_with_data_leaves_as_a_reason_alone(backbone, host, monkeypatch, folder):
    """Found in a review: an error at a site brought its paths into the server's events."""
    monkeypatch.setenv("FEDMM_DATA", str(folder))
    reply = sent(order(host, of_folder(backbone, folder / "aqua")))
    assert messages.read_lost(reply) == reasons.told("data", 1)
    assert SECRET not in everything(reply) and str(folder) not in everything(reply)


def test_a_node_without_a_number_says_so_by_its_reason():
    message = messages.ask_who(0)
    message.metadata.__dict__["_message_id"] = "1"
    reply = client_app.app(message, Context(1, 0, {"partition-id": SECRET}, RecordDict(), {}))
    assert messages.read_lost(reply) == reasons.told("order", 1) and SECRET not in everything(reply)


@pytest.mark.parametrize(
    "changes", [{"round": "3"}, {"kept_round": "0"}, {"overrides": (1,)}, {"run": 7}, {"client": True}]
)
def test_an_order_that_is_none_is_refused(backbone, host, changes):
    fake = Order(**{**vars(order(host, asked(backbone))), **changes})
    try:
        reply = sent(fake)
    except TypeError:
        pytest.skip("Flower itself refuses to carry it")
    assert messages.read_lost(reply) == reasons.told("order", 1)


def test_a_site_insists_on_settings(backbone, host, monkeypatch):
    monkeypatch.setenv("FEDMM_REQUIRE", "link.local=dense evaluate.predictions=false nothing=1")
    assert messages.read_lost(sent(order(host, asked(backbone)))) == reasons.told("site", 3)
    monkeypatch.setenv("FEDMM_REQUIRE", "link.local=dense")
    agreed = [*asked(backbone), "link.local=dense"]
    assert report_of(sent(order(host, agreed))).scores


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "auto_map", {"AutoConfig": "evil/repo--config.Config"}),
        ("config.json", "vision_config", {"_attn_implementation": "evil/kernels"}),
        ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["evil/repo--t.T", None]}),
    ],
)
def test_a_client_loads_no_code_that_a_host_names(llava, file, key, value):
    frozen = parts.take(*llava)
    said = json.loads(frozen[f"file/{file}"].numpy().tobytes()) | {key: value}
    frozen[f"file/{file}"] = torch.tensor([*json.dumps(said).encode()], dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"the host's {file} names code to load"):
        parts.build(frozen)


def test_a_prompt_of_the_host_is_no_format_string(processor):
    (item,) = prepare(some_examples(1), processor, "<image> {question.__class__} {question:>99} {question}")
    assert len(item.prompt) < 40


def test_a_reason_that_is_not_on_the_list_is_refused():
    with pytest.raises(ValueError, match="not a valid Reason"):
        reasons.told(SECRET, 1)


@pytest.mark.parametrize("target", sorted(frozenset().union(*targets._listed().values())))
def test_every_listed_target_says_what_it_reads(target):
    """A parameter that names a file or folder has the type that the site's policy goes by."""
    hints = targets.hints_of(targets.locate(target))
    for name in hints.keys() & {"path", "folder", "file", "files", "dir", "root", "ids"}:
        assert hints[name] is Path or READ_PATH in str(hints[name]), f"{target}: {name} must be a ReadPath"


def test_a_reference_to_another_setting_stays_allowed():
    assert config.compose(["rule=stack", "rule.seed=${clients}"]).rule.seed == 5
