"""What this machine lets an order from the server do, and what of a report may leave it.

    FEDMM_DATA            the folder below which an order's data paths must lie; unset: an order reads no path
    FEDMM_ALLOW_TARGETS   functions of the site's own that an order may name (fedmm/runs/targets.py)
    FEDMM_ALLOW_TEXTS     1: answers, the truths beside them and examples' ids may go to the server
    FEDMM_REQUIRE         settings an order must have, separated by spaces: "link.local=dense link.loss=client"

An order can set none of these. A run in one process is its own site, and allows itself everything.
"""

from __future__ import annotations

import logging
import os
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from fedmm.runs import targets
from fedmm.runs.client import Order, Report
from fedmm.runs.config import load
from fedmm.runs.derived import at_client
from fedmm.runs.reasons import Lost, Reason, because
from fedmm.runs.settings import Config

log = logging.getLogger("fedmm.site")


@dataclass(frozen=True)
class Site:
    """The policy of one client's machine. `trusts_server`: server and client are one process, so nothing is refused."""

    client: int
    data: Path | None = None
    texts: bool = False
    required: tuple[str, ...] = ()
    trusts_server: bool = False

    @staticmethod
    def of(client: int, environment: Mapping[str, str] = os.environ) -> Site:
        """What this machine's environment says."""
        data = environment.get("FEDMM_DATA")
        required = tuple(environment.get("FEDMM_REQUIRE", "").split())
        return Site(client, Path(data) if data else None, environment.get("FEDMM_ALLOW_TEXTS") == "1", required)

    def admit(self, order: Order) -> None:
        """Let an order in. Raises Lost with the reason before any data are opened or any target is made."""
        if order.client != self.client:
            raise Lost(Reason.ORDER, f"this site is client {self.client}, the order is for client {order.client}")
        with because(Reason.SETTINGS):
            cfg = load(order.overrides)
        if mistakes := [] if self.trusts_server else list(self._mistakes(cfg)):
            raise Lost(Reason.SITE, "\n".join(mistakes), len(mistakes))

    def release(self, report: Report) -> Report:
        """The report without what may not leave."""
        if report.answers and not (self.texts or self.trusts_server):
            log.warning("%d answers stay here; FEDMM_ALLOW_TEXTS=1 sends them", len(report.answers))
            return replace(report, answers=[])
        return report

    def _mistakes(self, cfg: Config) -> Iterator[str]:
        for path, value in targets.paths_read(cfg, ("dataset", *(["llm"] if at_client(cfg) else []))):
            if self.data is None:
                yield f"{path}={value}: an order reads no path here; FEDMM_DATA names the folder that it may read from"
            elif not _below(Path(value), self.data):
                yield f"{path}={value} is not below FEDMM_DATA={self.data}, or not there"
        for setting in self.required:
            key, _, wanted = setting.partition("=")
            if (value := OmegaConf.select(typing.cast(DictConfig, cfg), key)) is None or str(value) != wanted:
                yield f"{key}={value}: this site requires {setting} (FEDMM_REQUIRE)"


def _below(path: Path, root: Path) -> bool:
    """Whether a path leads to something below `root`, links followed."""
    return path.exists() and path.resolve().is_relative_to(root.resolve())
