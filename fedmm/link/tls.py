"""Certificates of one run: made by the host in memory, handed to each client in a Flower message, gone with the run.

Both ends show one. A client's holds its number, so that a certificate without its token, or a token without its
certificate, opens nothing. The host's name is not its address: clients reach it by whatever address works for them.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

HOST_NAME = "host.fedmm"
_BEFORE, _AFTER = datetime.timedelta(days=1), datetime.timedelta(days=90)  # clocks differ; runs are long


@dataclass(frozen=True)
class Identity:
    """What one end of a TLS link needs, as PEM: whom to trust, what to show, and the key to it, which is secret."""

    authority: str
    certificate: str
    key: str = field(repr=False)


class Authority:
    """Signs the certificates of one run. Its own key never leaves this object."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._certificate = self._sign("fedmm run", self._key.public_key(), None)

    def host(self) -> Identity:
        return self._issue(HOST_NAME, ExtendedKeyUsageOID.SERVER_AUTH)

    def client(self, client: int) -> Identity:
        return self._issue(client_name(client), ExtendedKeyUsageOID.CLIENT_AUTH)

    def _issue(self, name: str, usage: x509.ObjectIdentifier) -> Identity:
        key = ec.generate_private_key(ec.SECP256R1())
        secret = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return Identity(_pem(self._certificate), _pem(self._sign(name, key.public_key(), usage)), secret.decode())

    def _sign(self, name: str, key: ec.EllipticCurvePublicKey, usage: x509.ObjectIdentifier | None) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(_name("fedmm run"))
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BEFORE)
            .not_valid_after(now + _AFTER)
            .add_extension(x509.BasicConstraints(ca=usage is None, path_length=0 if usage is None else None), True)
        )
        if usage is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        return builder.sign(self._key, hashes.SHA256())


def client_name(client: int) -> str:
    return f"client-{client}.fedmm"


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()
