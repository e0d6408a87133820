"""What this machine lets an order from the server do, and what of a report may leave it.

    FEDMM_DATA            the folder below which an order's data paths must lie; unset: an order reads no path.
                          Everything in it may become questions and answers of a run, so put nothing else there
    FEDMM_ALLOW_HUB       1: an order may name the public datasets and models that conf/ names; they are downloaded
    FEDMM_ALLOW_TARGETS   functions of the site's own that an order may name (fedmm/config/targets.py)
    FEDMM_CONF            folders of yaml files of the site's own, whose functions an order may name where they do
    FEDMM_ALLOW_TEXTS     1: answers, the truths beside them and examples' ids may go to the server
    FEDMM_REQUIRE         settings an order must have, separated by spaces: "link.local=dense link.tls=always"

An order can set none of these. A run in one process is its own site, and allows itself everything.
"""

from __future__ import annotations

import logging
import os
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from fedmm.config import targets
from fedmm.config.composition import load
from fedmm.config.derived import at_client, encrypted
from fedmm.config.settings import Config
from fedmm.federation.client import Order, Report
from fedmm.federation.reasons import Lost, Reason, because

log = logging.getLogger("fedmm.site")
_ADDRESS = re.compile(r"([\w.-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")  # gRPC would also take a socket's path, and more


@dataclass(frozen=True)
class Site:
    """The policy of one client's machine. `trusts_server`: server and client are one process, so nothing is refused."""

    client: int
    data: Path | None = None
    hub: bool = False
    texts: bool = False
    required: tuple[str, ...] = ()
    trusts_server: bool = False

    @staticmethod
    def of(client: int, environment: Mapping[str, str] = os.environ) -> Site:
        """What this machine's environment says."""
        data = environment.get("FEDMM_DATA")
        hub, texts = (environment.get(f"FEDMM_ALLOW_{what}") == "1" for what in ("HUB", "TEXTS"))
        return Site(
            client, Path(data) if data else None, hub, texts, tuple(environment.get("FEDMM_REQUIRE", "").split())
        )

    def admit(self, order: Order) -> None:
        """Let an order in. Raises Lost with the reason before any data are opened or any target is made."""
        with because(Reason.SETTINGS):
            cfg = load(order.overrides, of_client=True)
        if mistakes := list(self._misfits(order, cfg)):
            raise Lost(Reason.ORDER, "\n".join(mistakes), len(mistakes))
        if mistakes := [] if self.trusts_server else list(self._forbidden(cfg)):
            raise Lost(Reason.SITE, "\n".join(mistakes), len(mistakes))

    def release(self, report: Report) -> Report:
        """The report without what may not leave."""
        if report.answers and not (self.texts or self.trusts_server):
            log.warning("%d answers stay here; FEDMM_ALLOW_TEXTS=1 sends them", len(report.answers))
            return replace(report, answers=[])
        return report

    def _misfits(self, order: Order, cfg: Config) -> Iterator[str]:
        """Why the order is not one that a server of these settings sends to this client."""
        if order.client != self.client:
            yield f"this site is client {self.client}, the order is for client {order.client}"
        if not 0 <= order.private_round < order.round <= cfg.rounds + 1:
            yield f"round {order.round} after {order.private_round} is no round of rounds={cfg.rounds}"
        if not _ADDRESS.fullmatch(order.address) or order.address != (cfg.link.address or order.address):
            yield f"address {order.address!r} is not link.address={cfg.link.address}, or no host and port"
        if encrypted(cfg.link) and order.identity is None:
            yield "the settings ask for TLS, and the order has no certificate"
        if order.answers and not cfg.evaluate.predictions:
            yield "the order asks for answers, which evaluate.predictions=false leaves at the site"

    def _forbidden(self, cfg: Config) -> Iterator[str]:
        """What this site does not allow an order."""
        for path, value, public in targets.paths_read(cfg, ("dataset", *(["llm"] if at_client(cfg) else []))):
            if public:
                if not self.hub:
                    yield f"{path}={value}: this site downloads nothing for an order; FEDMM_ALLOW_HUB=1 allows it"
            elif self.data is None:
                yield f"{path}={value}: this site has no FEDMM_DATA, the folder that an order may read from"
            elif not _below(Path(value), self.data):
                yield f"{path}={value} does not exist, or lies outside FEDMM_DATA={self.data}"
        for setting in self.required:
            key, wanted = setting.partition("=")[0], OmegaConf.from_dotlist([setting])
            value = OmegaConf.select(typing.cast(DictConfig, cfg), key, default="nothing")
            if value != OmegaConf.select(wanted, key):
                yield f"the order has {key}={value}, this site wants {setting} (FEDMM_REQUIRE)"


def _below(path: Path, root: Path) -> bool:
    """Whether a path leads to something below `root`, links followed."""
    try:
        return path.exists() and path.resolve().is_relative_to(root.resolve())
    except (OSError, ValueError):  # no right to look, or no name that a file can have
        return False
