"""The deployment of docs/DEPLOYMENT.md, run by its script and attacked by a stranger who has only the public ca.crt."""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
import ssl
import stat
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from fleet_keys import new_key, signed
from flwr.proto.control_pb2 import ListRunsRequest, ListRunsResponse, StartRunRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from helpers import ROOT
from processes import SLOW, commands_about, env, wait_until

from fedmm.flower.gate import BODY_LIMIT_BYTES

pytestmark = pytest.mark.deploy
DEPLOY = ROOT / "scripts" / "deploy.sh"


def tried(state: Path, *words: object, **variables: str) -> subprocess.CompletedProcess:
    """Run a part of scripts/deploy.sh to its end, whatever that is."""
    command = ["bash", str(DEPLOY), *map(str, words)]
    surroundings = env(state) | variables
    return subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=SLOW, check=False)


def part(state: Path, *words: object) -> str:
    """Run a part of scripts/deploy.sh to its good end."""
    done = tried(state, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def started(state: Path, *words: object) -> Iterator[tuple[subprocess.Popen, Path]]:
    """Run a part of scripts/deploy.sh in the background; its process and its log."""
    log = state / f"{words[0]}_{time.monotonic_ns()}.log"
    with log.open("w") as out:
        process = subprocess.Popen(["bash", str(DEPLOY), *map(str, words)], env=env(state), stdout=out, stderr=out)
    try:
        yield process, log
    finally:
        process.terminate()
        process.wait(timeout=60)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


def answers(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def listening(port: int) -> set[str]:
    """The addresses at which somebody on this machine listens on this port."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, _, number = local.partition(":")
            if state == "0A" and int(number, 16) == port:
                family = socket.AF_INET if len(address) == 8 else socket.AF_INET6
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                found.add(socket.inet_ntop(family, b"".join(words)))
    return found


class Fleet:
    """A SuperLink on `port` behind a gate on `door`, its keys in `keys`, and app bundles to run on it."""

    def __init__(self, state: Path) -> None:
        self.state, self.keys = state, state / "keys"
        self.port, self.door = free_port(), free_port()
        self.signed, self.unsigned = (bundle(state, name) for name in ("reviewed", "other"))

    def stranger(self) -> httpx.Client:
        return httpx.Client(verify=ssl.create_default_context(cafile=str(self.keys / "ca.crt")), timeout=30)

    def post(self, port: int, path: str, request) -> httpx.Response:
        versions = dict(RuntimeVersionMetadata.from_local_component("SuperExec").as_metadata())
        headers = {"content-type": PROTOBUF_MEDIA_TYPE, "accept": PROTOBUF_MEDIA_TYPE, **versions}
        with self.stranger() as client:
            url = f"https://127.0.0.1:{port}{path}"
            return client.post(url, content=request.SerializeToString(deterministic=True), headers=headers)

    def start_run(self, port: int, fab: Path) -> httpx.Response:
        request = StartRunRequest()
        request.fab.content = fab.read_bytes()
        request.fab.hash_str = hashlib.sha256(fab.read_bytes()).hexdigest()
        return self.post(port, "/v1/control/start-run", request)

    def runs(self) -> list[str]:
        """What has become of each run."""
        reply = self.post(self.port, "/v1/control/list-runs", ListRunsRequest())
        found = ListRunsResponse.FromString(reply.content).run_dict.values()
        return [f"{run.status.status}:{run.status.sub_status}" for run in found]


def bundle(folder: Path, name: str) -> Path:
    """An app whose ServerApp asks every node, whose ClientApp writes a file, and which writes what came back."""
    app = folder / name
    (app / name).mkdir(parents=True)
    (app / name / "__init__.py").touch()
    (app / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        f'[project]\nname = "{name}"\nversion = "1.0.0"\nlicense = "Apache-2.0"\ndescription = "a test"\n'
        'dependencies = []\n[tool.flwr.app]\npublisher = "fedmm"\n'
        f'[tool.flwr.app.components]\nserverapp = "{name}.app:app"\nclientapp = "{name}.app:client"\n'
    )
    (app / name / "app.py").write_text(
        "import time\nfrom pathlib import Path\nfrom flwr.app import Message, RecordDict\n"
        "from flwr.clientapp import ClientApp\nfrom flwr.serverapp import ServerApp\n"
        "app = ServerApp()\nclient = ClientApp()\n\n\n"
        "@app.main()\ndef main(grid, context):\n"
        "    while not (nodes := list(grid.get_node_ids())):\n        time.sleep(0.5)\n"
        "    asked = [Message(RecordDict(), dst_node_id=node, message_type='query') for node in nodes]\n"
        "    said = ['error' if reply.has_error() else 'done' for reply in grid.send_and_receive(asked)]\n"
        f"    Path({str(folder / (name + '.replies'))!r}).write_text(' '.join(said))\n\n\n"
        "@client.query()\ndef query(message, context):\n"
        f"    Path({str(folder / (name + '.ran'))!r}).touch()\n"
        "    return Message(RecordDict(), reply_to=message)\n"
    )
    (folder / f"{name}.built").mkdir()
    build = ["flwr", "build", "--app", str(app)]
    subprocess.run(build, cwd=folder / f"{name}.built", env=env(folder) | path_first(), check=True, capture_output=True)
    (built,) = (folder / f"{name}.built").glob("*.fab")
    return built


def path_first() -> dict[str, str]:
    return {"PATH": f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def signing(bundle: Path, key: Path, out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fedmm.flower.signing", str(bundle), str(key), "--out", str(out)]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=SLOW)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory) -> Iterator[Fleet]:
    state = tmp_path_factory.mktemp("fleet")
    made = Fleet(state)
    part(state, "server-keys", made.keys)
    signer, signature = state / "signer", state / "reviewed.sig"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", signer], check=True)
    assert signing(made.signed, signer, signature).returncode == 0
    (state / "trusted.yaml").write_text(f'fpk_fedmm: "{(state / "signer.pub").read_text().strip()}"\n')
    with (
        started(state, "superlink", made.keys, made.port),
        started(state, "gate", made.keys, f"127.0.0.1:{made.door}", made.port, signature),
    ):
        assert wait_until(lambda: answers(made.port) and answers(made.door)), "see the logs in " + str(state)
        yield made


def site(fleet: Fleet, name: str) -> Path:
    """A site's keys, with the server's public certificate beside them."""
    keys = fleet.state / name
    part(fleet.state, "site-keys", keys)
    (keys / "ca.crt").write_bytes((fleet.keys / "ca.crt").read_bytes())
    return keys


def test_a_stranger_reaches_nothing_but_the_fleet_api(fleet):
    """Every route that the SuperLink has; none but the Fleet API's is there for whoever comes through the gate."""
    with fleet.stranger() as client:
        api = client.get(f"https://127.0.0.1:{fleet.port}/openapi.json").json()
        routes = [(method.upper(), path) for path, methods in api["paths"].items() for method in methods]
        routes += [("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/health")]
        others = [(method, path) for method, path in routes if not path.startswith("/v1/fleet/")]
        assert len(others) > 40, "the SuperLink's own list of its routes is no longer where it was"
        for method, path in others:
            assert client.request(method, f"https://127.0.0.1:{fleet.door}{path}").status_code == 404, path
        fleets = [path for _, path in routes if path.startswith("/v1/fleet/")]
        for headers in ([], signed(new_key())):  # and with the headers of a node, which nobody registered
            asked = {path: client.post(f"https://127.0.0.1:{fleet.door}{path}", headers=headers) for path in fleets}
            refused = {path: answer.status_code for path, answer in asked.items()}
            assert all(code in (400, 401, 415, 422) for code in refused.values()), refused


@pytest.mark.parametrize(
    "path",
    [
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet/get-run/../../control/list-runs",
        "//v1/control/list-runs",
        "/v1/fleet/get-run?x=/../../control/list-runs",
        "https://127.0.0.1/v1/control/list-runs",
    ],
)
def test_no_spelling_of_a_path_leads_around_the_gate(fleet, path):
    context = ssl.create_default_context(cafile=str(fleet.keys / "ca.crt"))
    line = http.client.HTTPSConnection("127.0.0.1", fleet.door, context=context, timeout=30)
    line.request("POST", path, body=b"", headers={"content-type": PROTOBUF_MEDIA_TYPE})
    assert line.getresponse().status in (400, 401, 404)
    line.close()


def test_a_stranger_starts_no_run_and_takes_no_task_through_the_gate(fleet):
    assert fleet.start_run(fleet.door, fleet.unsigned).status_code == 404
    task = AcquireTaskRequest(supported_task_types=["flwr-serverapp"])
    assert fleet.post(fleet.door, "/v1/runtime/acquire-task", task).status_code == 404
    assert fleet.runs() == [], "the same requests at the SuperLink's own port work; see the next test"


def test_the_superlinks_own_port_asks_for_no_login_and_is_on_loopback_alone(fleet):
    """What docs/SECURITY.md says stays open on the server itself; a Flower that asks for a login fails this."""
    task = AcquireTaskRequest(supported_task_types=["flwr-serverapp"])
    assert fleet.post(fleet.port, "/v1/control/list-runs", ListRunsRequest()).status_code == 200
    assert fleet.post(fleet.port, "/v1/runtime/acquire-task", task).status_code == 200
    assert listening(fleet.port) == {"127.0.0.1"}


def test_a_client_without_tls_is_refused(fleet):
    for port in (fleet.door, fleet.port):
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.post(f"http://127.0.0.1:{port}/v1/fleet/register-node", timeout=30)


def test_a_body_over_the_limit_is_refused(fleet):
    """Said beforehand or not; a whole body is sent, so the answer is there to be read."""
    size = BODY_LIMIT_BYTES + (2 << 20)
    with fleet.stranger() as client:
        for content in (bytes(size), (bytes(1 << 20) for _ in range(size >> 20))):
            url = f"https://127.0.0.1:{fleet.door}/v1/fleet/push-object"
            assert client.post(url, content=content, headers=signed(new_key())).status_code == 413


def test_headers_without_end_fill_no_memory(fleet):
    """Found in a review: 700 MB of headers from one connection, read before anything asks for a signature."""
    context = ssl.create_default_context(cafile=str(fleet.keys / "ca.crt"))
    with (
        socket.create_connection(("127.0.0.1", fleet.door), 30) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as stranger,
    ):
        stranger.sendall(b"POST /v1/fleet/pull-object HTTP/1.1\r\n")
        with pytest.raises(OSError):
            for number in range(1024):
                stranger.sendall(b"h%d: %s\r\n" % (number, b"x" * 65_000))


def test_connections_that_say_nothing_keep_no_client_out(tmp_path):
    """The gate may open 128 files at first; 300 connections come, none of which begins its handshake."""
    part(tmp_path, "server-keys", tmp_path / "keys")
    door, context = free_port(), ssl.create_default_context(cafile=str(tmp_path / "keys" / "ca.crt"))
    command = f"ulimit -Sn 128; exec bash {DEPLOY} gate {tmp_path / 'keys'} 127.0.0.1:{door} {free_port()}"
    gate = subprocess.Popen(["bash", "-c", command], env=env(tmp_path), stderr=subprocess.DEVNULL)
    try:
        assert wait_until(lambda: answers(door))
        silent = [socket.create_connection(("127.0.0.1", door), 30) for _ in range(300)]
        with httpx.Client(verify=context, timeout=30) as client:
            assert client.get(f"https://127.0.0.1:{door}/").status_code == 404
        assert {one.recv(1) for one in silent} == {b""}, "and the gate cuts each"
        for one in silent:
            one.close()
    finally:
        gate.terminate()
        gate.wait(timeout=60)


def test_a_node_key_that_nobody_registered_is_refused(fleet):
    keys = site(fleet, "stranger")
    words = ("supernode", keys, f"127.0.0.1:{fleet.door}", 0, free_port())
    with started(fleet.state, *words) as (process, log):
        assert process.wait(timeout=SLOW) != 0
        assert "Exit Code: 305" in log.read_text()


def test_keys_and_database_are_readable_by_their_owner_alone(fleet):
    keys = site(fleet, "careful")
    assert (fleet.keys / "state.db").exists()
    for folder in (fleet.keys, keys):
        for path in (folder, *(path for path in folder.iterdir() if path.name != "ca.crt")):
            assert not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO), path


def test_a_site_that_trusts_a_key_runs_what_it_signed_and_nothing_else(fleet):
    keys = site(fleet, "hospital")
    part(fleet.state, "register", fleet.keys, fleet.port, keys / "node.pub", "hospital")
    trusted = fleet.state / "trusted.yaml"
    with started(fleet.state, "supernode", keys, f"127.0.0.1:{fleet.door}", 0, free_port(), trusted) as (_, log):
        assert wait_until(lambda: "SuperNode ID" in log.read_text()), log.read_text()
        for fab, replies, ran in ((fleet.signed, "done", True), (fleet.unsigned, "error", False)):
            name = fab.parent.name.removesuffix(".built")
            assert fleet.start_run(fleet.port, fab).status_code == 200
            said = fleet.state / f"{name}.replies"
            assert wait_until(lambda said=said: said.exists() and said.read_text()), log.read_text()
            assert said.read_text() == replies
            assert (fleet.state / f"{name}.ran").exists() == ran


def test_keys_are_not_overwritten(fleet):
    before = (fleet.keys / "ca.key").read_bytes()
    with pytest.raises(AssertionError, match="is there already"):
        part(fleet.state, "server-keys", fleet.keys)
    assert (fleet.keys / "ca.key").read_bytes() == before


def test_what_is_not_whole_is_not_left_behind(tmp_path):
    done = tried(tmp_path, "server-keys", tmp_path / "keys", "1.2.3.4.5")
    assert done.returncode != 0
    assert "1.2.3.4.5" in done.stderr, "what openssl said"
    assert list(tmp_path.iterdir()) == []


def test_a_new_certificate_is_of_the_same_authority(tmp_path):
    keys = tmp_path / "keys"
    part(tmp_path, "server-keys", keys, "a.example.org")
    authority, before = (keys / "ca.crt").read_bytes(), (keys / "server.crt").read_bytes()
    part(tmp_path, "server-cert", keys, "b.example.org")
    assert (keys / "ca.crt").read_bytes() == authority
    assert (keys / "server.crt").read_bytes() != before
    check = ["openssl", "verify", "-CAfile", keys / "ca.crt", "-verify_hostname", "b.example.org", keys / "server.crt"]
    subprocess.run(check, check=True, capture_output=True)
    ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(keys / "server.crt", keys / "server.key")
    assert {path.name for path in keys.iterdir()} == {"ca.crt", "ca.key", "server.crt", "server.key"}


@pytest.mark.parametrize(
    "words", [["run"], ["gate", "keys"], ["server-cert", "keys"], ["supernode", "keys", "server:1"]]
)
def test_who_forgets_an_argument_is_told_the_parts_usage(tmp_path, words):
    done = tried(tmp_path, *words)
    assert done.returncode == 2
    assert done.stderr.startswith(f"usage: bash scripts/deploy.sh {words[0]} KEYS ")
    assert len(done.stderr.splitlines()) == 1


def test_a_site_whose_data_are_not_there_does_not_start(tmp_path):
    done = tried(tmp_path, "supernode", tmp_path, "127.0.0.1:1", 0, FEDMM_DATA="/no/such/folder")
    assert done.returncode == 1
    assert "FEDMM_DATA=/no/such/folder is no folder" in done.stdout


def test_overrides_reach_the_run_as_they_are(tmp_path):
    asked = """label="it'''s \\ a \"label\""  [ü]"""
    command = ["bash", "-c", 'source "$1"; toml "overrides=$2"', "-", str(ROOT / "scripts" / "common.sh"), asked]
    done = subprocess.run(command, env=env(tmp_path), capture_output=True, text=True, timeout=SLOW, check=True)
    assert tomllib.loads(done.stdout) == {"overrides": asked}


def test_what_cannot_be_signed_leaves_no_signature(tmp_path):
    fab, ours, locked, other = (tmp_path / name for name in ("a.fab", "ours", "locked", "other"))
    with zipfile.ZipFile(fab, "w") as file:
        file.writestr("pyproject.toml", "")
    for key, kind, passphrase in ((ours, "ed25519", ""), (locked, "ed25519", "secret"), (other, "ecdsa", "")):
        subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-f", key], check=True)
    before = set(tmp_path.iterdir())
    for bundle, key in ((fab, locked), (fab, other), (fab, fab), (fab, tmp_path / "none"), (ours, ours)):
        done = signing(bundle, key, tmp_path / "sig")
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert set(tmp_path.iterdir()) == before
    assert signing(fab, ours, tmp_path / "sig").returncode == 0
    assert set(tmp_path.iterdir()) - before == {tmp_path / "sig"}


def test_a_run_has_its_folder_alone_and_ends_with_its_script(fleet):
    """No site is there, so it waits for some until it is ended."""
    folder = fleet.state / "waits"
    words = ("run", fleet.keys, fleet.port, folder, "run.wait_seconds=600")
    earlier = len(fleet.runs())
    with started(fleet.state, *words) as (process, log):
        assert wait_until(lambda: "running:" in fleet.runs() or process.poll() is not None), log.read_text()
        again = tried(fleet.state, *words)
        assert again.returncode == 1
        assert f"another run goes on in {folder}" in again.stdout
        assert len(fleet.runs()) == earlier + 1
    assert wait_until(lambda: "running:" not in fleet.runs(), 30)
    assert fleet.runs().count("finished:stopped") == 1
    assert wait_until(lambda: not [line for line in commands_about(fleet.keys) if "deploy.sh run" in line], 30)


def test_a_run_that_fails_fails_the_script_which_ends_what_it_started(tmp_path):
    asked = ["rounds=1", "dataset.train=1", f"run.dir={tmp_path / 'run'}"]
    command = ["bash", str(ROOT / "scripts" / "loopback.sh"), *asked]
    done = subprocess.run(
        command, env=env(tmp_path / "state"), cwd="/", capture_output=True, text=True, timeout=SLOW, check=False
    )
    assert done.returncode != 0
    assert str(tmp_path / "state" / "log") in done.stdout, "where the logs are"
    assert wait_until(lambda: not commands_about(tmp_path / "state"), 30)


def test_no_script_of_a_deployment_says_insecure():
    for script in ("loopback.sh", "deploy.sh"):
        assert "insecure" not in (ROOT / "scripts" / script).read_text()
