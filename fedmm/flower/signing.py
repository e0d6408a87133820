"""Signs an app bundle, so that sites run this bundle and no other, whoever runs the server.

A bundle is code that sites run. `flower-supernode --trusted-entities FILE` refuses each bundle without a signature of a
key in FILE. Flower 1.41 brings signatures from its Hub alone; ours are made here and handed on by `gate`:

    python -m fedmm.flower.signing BUNDLE.fab KEY --out fedmm.sig     # KEY: ssh-keygen -t ed25519, kept off the server

The form is Flower's: Ed25519 over the time (8 bytes, big-endian) and the bundle's SHA-256.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import time
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from flwr.supercore.primitives.asymmetric_ed25519 import create_message_to_sign, load_private_key, sign_message

from fedmm.storage import machine_cache
from fedmm.types import FedmmError

KEY_ID = "fpk_fedmm"  # what a site's file of trusted keys calls the key


@dataclass(frozen=True)
class Signature:
    """Of one bundle, by one key."""

    fab_sha256: str
    signed_at: int
    signature: str  # base64url

    def is_of(self, bundle: bytes) -> bool:
        return hashlib.sha256(bundle).hexdigest() == self.fab_sha256

    def records(self) -> dict[str, str]:
        """What a SuperNode looks for in `Fab.verifications`."""
        record = {"signed_at": self.signed_at, "signature": self.signature}
        return {"valid_license": "Valid", KEY_ID: json.dumps(record)}


def sign(bundle: bytes, key: Path) -> Signature:
    """Sign with an OpenSSH Ed25519 key without a passphrase. Raises ValueError on another kind of key."""
    try:
        private = load_private_key(key)
    except (TypeError, ValueError, UnsupportedAlgorithm) as error:  # TypeError: it has a passphrase
        raise ValueError(f"{key} is no OpenSSH Ed25519 private key without a passphrase: {error}") from error
    now, digest = int(time.time()), hashlib.sha256(bundle).digest()
    signed = sign_message(private, create_message_to_sign(digest, now))
    return Signature(digest.hex(), now, base64.urlsafe_b64encode(signed).decode())


def read(path: Path) -> Signature:
    try:
        return Signature(**json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no signature; make one by python -m fedmm.flower.signing") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="made by `flwr build`")
    parser.add_argument("key", type=Path, help="an OpenSSH Ed25519 key without a passphrase")
    parser.add_argument("--out", type=Path, required=True, help="where the signature goes; a file there is replaced")
    given = parser.parse_args()
    try:
        if not zipfile.is_zipfile(given.bundle):
            raise ValueError(f"{given.bundle} is no app bundle; make one by flwr build")
        made = sign(given.bundle.read_bytes(), given.key)
        machine_cache.write(given.out, json.dumps(asdict(made)).encode(), public=True)
    except (OSError, ValueError, FedmmError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
