#!/usr/bin/env bash
# A deployment, part by part; README.md says which runs where, docs/SECURITY.md why, and loopback.sh runs them all here.
#
#     bash scripts/deploy.sh PART ARGUMENT...
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
umask 077 # keys, and Flower's database, in which the link's keys are

# server-keys KEYS NAME...: an authority and the server's certificate for the names and addresses that sites dial.
server_keys() {
    local keys=$1 names="DNS:localhost,IP:127.0.0.1" name
    shift
    for name in "$@"; do
        [[ $name =~ ^[0-9.]+$|: ]] && names+=",IP:$name" || names+=",DNS:$name"
    done
    mkdir -p "$keys"
    new_key "$keys/ca.key"
    openssl req -x509 -new -key "$keys/ca.key" -days 3650 -subj "/CN=fedmm fleet" -out "$keys/ca.crt"
    new_key "$keys/server.key"
    openssl req -new -key "$keys/server.key" -subj "/CN=fedmm server" |
        openssl x509 -req -CA "$keys/ca.crt" -CAkey "$keys/ca.key" -set_serial "0x$(openssl rand -hex 16)" -days 825 \
            -extfile <(echo "subjectAltName=$names") -out "$keys/server.crt" 2>/dev/null
    say "$keys/ca.crt is for every site; the rest of $keys stays here"
}

# site-keys KEYS: a site's node key, and a certificate for what its own processes say to each other.
site_keys() {
    mkdir -p "$1"
    node_key "$1/node"
    new_key "$1/own.key"
    openssl req -x509 -new -key "$1/own.key" -days 3650 -subj "/CN=fedmm site" \
        -addext "subjectAltName=IP:127.0.0.1" -out "$1/own.crt"
    say "$1/node.pub is for the server's operator; put the server's ca.crt beside it; the rest stays here"
}

absent() { [ ! -e "$1" ] || { say "$1 is there already; choose another folder, or remove it" && return 1; }; }

node_key() { # as `ssh-keygen -t ecdsa -b 384 -N ""` makes it, which not every machine has
    absent "$1"
    python - "$1" <<'END'
import sys
from pathlib import Path
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric import ec
key = ec.generate_private_key(ec.SECP384R1())
with Path(sys.argv[1]).open("xb") as file:
    file.write(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.OpenSSH, s.NoEncryption()))
Path(f"{sys.argv[1]}.pub").write_bytes(key.public_key().public_bytes(s.Encoding.OpenSSH, s.PublicFormat.OpenSSH))
END
}

new_key() { # NIST curves: Flower refuses others
    absent "$1"
    openssl ecparam -name prime256v1 -genkey -noout -out "$1"
}

# superlink KEYS PORT: Flower's server, all of whose APIs this machine alone can reach.
superlink() {
    exec flower-superlink --ssl-ca-certfile "$1/ca.crt" --ssl-certfile "$1/server.crt" --ssl-keyfile "$1/server.key" \
        --enable-supernode-auth --host 127.0.0.1 --port "$2" --database "$1/state.db"
}

# gate KEYS BIND SUPERLINK_PORT [SIGNATURE]: what of it sites can reach, at BIND (host:port).
gate() {
    exec python -m fedmm.flower.gate --keys "$1" --bind "$2" --superlink "127.0.0.1:$3" ${4:+--signature "$4"}
}

# register KEYS SUPERLINK_PORT NODE.pub NAME: let a site in.
register() {
    connect fleet "$2" "$1/ca.crt"
    flwr supernode register "$3" fleet --name "$4"
}

# supernode KEYS SERVER CLIENT [PORT] [TRUSTED]: a site, as client number CLIENT. PORT is for its own processes; TRUSTED
# names the keys whose signed bundles it runs, without it it runs whatever the server sends.
supernode() {
    exec flower-supernode --superlink "$2" --root-certificates "$1/ca.crt" --auth-supernode-private-key "$1/node" \
        --ssl-certfile "$1/own.crt" --ssl-keyfile "$1/own.key" --ssl-ca-certfile "$1/own.crt" \
        --host 127.0.0.1 --port "${4:-9094}" --node-config "partition-id=$3" ${5:+--trusted-entities "$5"}
}

# run KEYS SUPERLINK_PORT DIR OVERRIDE...: one run, watched; fails where it failed.
run() {
    local keys=$1 port=$2 dir
    dir=$(realpath -m "$3")
    shift 3
    connect fleet "$port" "$keys/ca.crt"
    run_app fleet "$dir" "" link.tls=always "$@"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set_up
    case ${1:-} in
    server-keys | site-keys | superlink | gate | register | supernode | run) "${1//-/_}" "${@:2}" ;;
    *) sed -n 's/^# \([a-z-]* KEYS\)/\1/p' "$0" && exit 2 ;;
    esac
fi
