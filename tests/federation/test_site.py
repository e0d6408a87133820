"""What a hostile server gets out of a real client: nothing is written, nothing read, no text of the site leaves."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from helpers import DATA, ROOT, SMALL, run, served, some_examples
from PIL import Image
from transformers import PreTrainedTokenizerFast

from fedmm.config import composition, targets
from fedmm.config.derived import privacy
from fedmm.edge import frozen_modules
from fedmm.edge.prepare import prepare
from fedmm.federation import build, reasons
from fedmm.federation import client as client_side
from fedmm.federation.client import Order, Report
from fedmm.federation.site import _below
from fedmm.flower import client_app, messages
from fedmm.flower.inprocess import InProcessGrid
from fedmm.link import tls
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
    assert messages.read_lost(reply) == reasons.describe("order", 1)


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
        "rule._target_=fedmm.storage.machine_cache.write",
        "rule._target_=fedmm.bench.memory._enter",
        "rule._target_=fedmm.aggregate.fisher.torch",
        "rule._target_=torch.optim.AdamW",  # listed, in another place
        "+evaluate.groups={_target_:fedmm.storage.machine_cache.home}",
        "dataset=../../../../tmp/evil",
        "+hydra.searchpath=[file:///tmp]",
        "+dataset@rule=scenes",
        "method.step._target_=${label}",
        "+captions.a=${label}${label}",
    ],
)
def test_an_order_names_only_targets_that_conf_lists_there(backbone, host, tmp_path, override):
    """Found in a review: functions of the package itself, chained, wrote a file at a site."""
    records, file = ROOT / "docs" / "RULES.jsonl", tmp_path / "owned.md"
    override = override.replace("RECORDS", str(records)).replace("FILE", str(file))
    sys.modules.pop("fedmm.bench.memory", None)
    reply = sent(order(host, [*asked(backbone), override, "label=os.system"]))
    assert messages.read_lost(reply) in {reasons.describe("settings", n) for n in (1, 2, 3)}
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
    assert messages.read_lost(reply) == reasons.describe("settings", 1)
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
            assert messages.read_lost(reply) == reasons.describe("site", 1), path
            assert SECRET not in everything(reply) and str(tmp_path) not in everything(reply)


def test_what_goes_wrong_with_data_leaves_as_a_reason_alone(backbone, host, monkeypatch, folder):
    """Found in a review: an error at a site brought its paths into the server's events."""
    monkeypatch.setenv("FEDMM_DATA", str(folder))
    reply = sent(order(host, of_folder(backbone, folder / "aqua")))
    assert messages.read_lost(reply) == reasons.describe("data", 1)
    assert SECRET not in everything(reply) and str(folder) not in everything(reply)


def test_a_node_without_a_number_says_so_by_its_reason():
    message = messages.ask_who(0)
    message.metadata.__dict__["_message_id"] = "1"
    reply = client_app.app(message, Context(1, 0, {"partition-id": SECRET}, RecordDict(), {}))
    assert messages.read_lost(reply) == reasons.describe("order", 1) and SECRET not in everything(reply)


@pytest.mark.parametrize(
    "changes", [{"round": "3"}, {"private_round": "0"}, {"overrides": (1,)}, {"run": 7}, {"client": True}]
)
def test_an_order_that_is_none_is_refused(backbone, host, changes):
    fake = Order(**{**vars(order(host, asked(backbone))), **changes})
    assert messages.read_lost(sent(fake)) == reasons.describe("order", 1)


def test_a_site_insists_on_settings(backbone, host, monkeypatch):
    monkeypatch.setenv("FEDMM_REQUIRE", "link.local=dense evaluate.predictions=false edge.ranks=[4] nothing=1")
    assert messages.read_lost(sent(order(host, asked(backbone)))) == reasons.describe("site", 4)
    monkeypatch.setenv("FEDMM_REQUIRE", "link.local=dense evaluate.predictions=false optimizer.lr=3e-3 edge.ranks=null")
    agreed = [*asked(backbone), "link.local=dense", "evaluate.predictions=false", "optimizer.lr=0.003"]
    assert report_of(sent(order(host, agreed, answers=False))).scores


@pytest.mark.parametrize(
    ("extra", "changes"),
    [
        (["link.tls=always"], {"identity": None}),
        (["link.address=trusted.example:443"], {}),
        (["evaluate.predictions=false"], {}),  # and asks for answers
        ([], {"address": "unix:/run/some.sock"}),
        ([], {"address": "dns://1.1.1.1/host:1"}),
        ([], {"round": 4}),
        ([], {"round": 0}),
        ([], {"private_round": 3}),
        ([], {"private_round": -1}),
    ],
)
def test_an_order_says_what_its_settings_say(backbone, host, extra, changes):
    """Found in a review: a required setting held in the overrides, and the order's other fields did otherwise."""
    reply = sent(order(host, [*asked(backbone), *extra], **changes))
    assert messages.read_lost(reply) == reasons.describe("order", 1)


@pytest.mark.parametrize(
    "override",
    [
        "clients=1000000000",
        "rounds=1000000000",
        "edge.rank=1000000000",
        "link.deadline_seconds=1e12",
        "+captions.a=" + 200_000 * "x",
    ],
)
def test_an_order_beyond_all_bounds_is_refused_at_once(backbone, host, override):
    reply = sent(order(host, [*asked(backbone), override]))
    assert messages.read_lost(reply) == reasons.describe("settings", 1)


@pytest.mark.run
def test_an_order_cannot_have_what_a_client_keeps_sent(backbone, tmp_path, monkeypatch):
    """Found in a review: what one schema keeps, an order with another schema loaded into a set that travels."""
    here = run(backbone, tmp_path / "run", "arm=fedsa_lora", "rounds=1")
    id = json.loads((here / "environment.json").read_text())["run"]
    cfg = composition.compose([*asked(backbone), "rounds=3"])
    edge = build.server_edge(cfg, build.whole(cfg))
    asks = Order(overrides=(), run=id, round=2, client=0, address="", token="", private_round=1)
    with pytest.raises(reasons.Lost, match="local adapters of round 1 are not under"):
        client_side._kept(composition.compose([*asked(backbone), "schema=share_a"]), edge, replace(asks, run="b" * 32))
    kept = client_side._kept(composition.compose([*asked(backbone), "schema=share_a", "rounds=3"]), edge, asks)
    assert set(kept) == {"shared.image.up", "shared.text.up"}
    everything_travels = composition.compose([*asked(backbone), "schema=all", "rounds=3"])
    assert client_side._kept(everything_travels, edge, asks) == {}
    feddat = composition.compose([*asked(backbone), "arm=feddat", "rounds=3"])
    with pytest.raises(reasons.Lost, match="is kept by another schema"):
        client_side._kept(feddat, build.server_edge(feddat, build.whole(feddat)), asks)


def test_the_frozen_copy_of_what_a_client_keeps_is_private_too():
    cfg = composition.compose(["arm=feddat", "schema=share_a", "link.local=dense"])
    assert privacy(cfg).sets == {"local", "shared", "frozen"}


def test_an_order_downloads_nothing_unless_the_site_says_so(backbone, host, monkeypatch):
    kept = [o for o in asked(backbone) if not o.startswith("dataset.")]
    reply = sent(order(host, [*kept, "dataset=cifar10_lt"]))
    assert messages.read_lost(reply) == reasons.describe("site", 1)


def test_a_path_that_may_not_be_looked_at_is_not_below_the_root(monkeypatch, tmp_path):
    """Found in a review: the error came back as another reason, and so told which folders there are."""

    def refuses(self):
        raise PermissionError(SECRET)

    monkeypatch.setattr(Path, "exists", refuses)
    assert not _below(Path("/root/x"), tmp_path) and not _below(Path("x" * 300), tmp_path)


VISION = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, "projection_dim": 12}


def saying(frozen, file: str, **changes):
    said = json.loads(frozen[f"file/{file}"].numpy().tobytes()) | changes
    return frozen | {f"file/{file}": torch.tensor([*json.dumps(said).encode()], dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("config.json", {"model_type": "clip"}, "the host's model is"),
        ("config.json", {"vision_config": {"model_type": "timm_wrapper"}}, "the host's model is"),
        (
            "config.json",
            {"vision_config": VISION | {"hidden_size": 8_000_000, "num_attention_heads": 1}},
            "config says",
        ),
        ("config.json", {"text_config": {"model_type": "llama", "hidden_size": 10**9}}, "config says"),
        (
            "config.json",
            {"vision_config": VISION | {"num_hidden_layers": 10**9}},
            "layers, and it sent",
        ),
        ("config.json", {"auto_map": {"AutoConfig": "evil/repo--config.Config"}}, None),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil/repo--t.T", None]}}, None),
        ("tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "vocab": "SECRETS"}, None),
        ("tokenizer_config.json", {"gguf_file": "SECRETS", "vocab_file": "SECRETS"}, None),
        ("tokenizer_config.json", {"unk_token": ["SECRETS"]}, "as its unk_token, wanted a text"),
        (
            "processor_config.json",
            {"image_processor": {"image_processor_type": "OneFormerImageProcessor", "class_info_file": "SECRETS"}},
            "image processor is 'OneFormerImageProcessor'",
        ),
    ],
)
def test_a_client_builds_known_classes_and_opens_nothing_that_a_host_names(
    llava, tmp_path, monkeypatch, file, changes, says
):
    """Found in a review: a tokenizer of another class took a path, so the host learnt which lines a site's file has."""
    (secrets := tmp_path / "secrets.txt").write_text("550018\n")
    changes = json.loads(json.dumps(changes).replace("SECRETS", str(secrets)))
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    frozen = saying(frozen_modules.take(*llava), file, **changes)
    with pytest.raises(ValueError, match=says) if says else nullcontext():
        processor = frozen_modules.build(frozen)[1]
        processor.pixels([Image.new("RGB", (16, 16))])
        assert type(processor.tokenizer) is PreTrainedTokenizerFast
    assert not any(str(secrets) in path for path in opened)


def test_the_tokenizer_of_a_client_is_the_servers(llava):
    """It is built from tokenizer.json and the names of special tokens alone."""
    own, its = llava[1].tokenizer, frozen_modules.build(frozen_modules.take(*llava))[1].tokenizer
    texts = ["<image> which digit is red ?", "one two", "never seen", ""]
    assert own(texts)["input_ids"] == its(texts)["input_ids"]
    assert own(texts, add_special_tokens=False)["input_ids"] == its(texts, add_special_tokens=False)["input_ids"]
    ids = [[1, 5, 6, 2], [3, 4, 0]]
    assert own.batch_decode(ids, skip_special_tokens=True) == its.batch_decode(ids, skip_special_tokens=True)
    assert [own.eos_token_id, own.unk_token_id, own.pad_token_id] == [2, 3, 0]
    assert [its.eos_token_id, its.unk_token_id, its.pad_token_id] == [2, 3, 0]


def test_a_panic_in_a_library_leaves_as_a_reason(backbone, host, monkeypatch):
    """Rust's panics are no Exception: one in the host's tokenizer.json ended the client's process without a reply."""

    class Panic(BaseException):
        pass

    def panics(*_):
        raise Panic(SECRET)

    monkeypatch.setattr(frozen_modules, "_tokenizer", panics)
    reply = sent(order(host, asked(backbone)))
    assert messages.read_lost(reply) == reasons.describe("backbone", 1) and SECRET not in everything(reply)


def test_a_prompt_of_the_host_is_no_format_string(processor):
    (item,) = prepare(some_examples(1), processor, "<image> {question.__class__} {question:>99} {question}")
    assert len(item.prompt) < 40


def test_a_reason_that_is_not_on_the_list_is_refused():
    with pytest.raises(ValueError, match="not a valid Reason"):
        reasons.describe(SECRET, 1)


@pytest.mark.parametrize("target", sorted(frozenset().union(*targets.listed().values())))
def test_every_listed_target_says_what_it_reads(target):
    """A parameter that names a file or folder has the type that the site's policy goes by."""
    hints = targets.hints_of(targets.locate(target))
    for name in hints.keys() & {"path", "folder", "file", "files", "dir", "root", "ids"}:
        assert hints[name] is Path or READ_PATH in str(hints[name]), f"{target}: {name} must be a ReadPath"
