#!/usr/bin/env bash
# A deployment, step by step; docs/DEPLOYMENT.md says which runs where, docs/SECURITY.md why; loopback.sh runs them all here.
#
#     bash scripts/deploy.sh PART ARGUMENT...
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
umask 077 # keys, and Flower's database, in which the link's keys are

# server-keys KEYS [NAME...]: an authority and the server's certificate for the names and addresses that sites dial.
server_keys() {
    aside "$1"
    new_key "$aside/ca.key"
    openssl req -x509 -new -key "$aside/ca.key" -days 3650 -subj "/CN=fedmm fleet" -out "$aside/ca.crt"
    certify "$aside" "$aside" "${@:2}"
    mv -T "$aside" "$1"
    say "$1/ca.crt is for every site; the rest of $1 stays here"
}

# server-cert KEYS NAME...: a new server's certificate of the same authority, for other names or another two years.
server_cert() {
    aside "$1/new"
    certify "$1" "$aside" "${@:2}"
    mv "$aside/server.key" "$aside/server.crt" "$1"
    rmdir "$aside"
    say "start superlink and gate again; sites need nothing new"
}

# site-keys KEYS: a site's node key, and a certificate for what its own processes say to each other.
site_keys() {
    aside "$1"
    node_key "$aside/node"
    new_key "$aside/own.key"
    openssl req -x509 -new -key "$aside/own.key" -days 3650 -subj "/CN=fedmm site" \
        -addext "subjectAltName=IP:127.0.0.1" -out "$aside/own.crt"
    mv -T "$aside" "$1"
    say "$1/node.pub is for the server's operator; put the server's ca.crt beside it; the rest stays here"
}

aside() { # FOLDER: makes $aside, beside it; what is in there goes when the script ends before all of it was made
    [ ! -e "$1" ] || { say "$1 is there already; choose another folder, or remove it" && return 1; }
    mkdir -p "$(dirname "$1")"
    aside=$(mktemp -d "${1%/}.XXXXXX")
    trap 'rm -rf "$aside"; end_all' EXIT
}

certify() { # AUTHORITY INTO NAME...: INTO/server.key and INTO/server.crt
    local authority=$1 into=$2 names="DNS:localhost,IP:127.0.0.1" name
    shift 2
    for name in "$@"; do
        [[ $name =~ ^[0-9.]+$|: ]] && names+=",IP:$name" || names+=",DNS:$name"
    done
    new_key "$into/server.key"
    openssl req -new -key "$into/server.key" -subj "/CN=fedmm server" -out "$into/asked"
    openssl x509 -req -in "$into/asked" -CA "$authority/ca.crt" -CAkey "$authority/ca.key" \
        -set_serial "0x$(openssl rand -hex 16)" -days 825 -extfile <(echo "subjectAltName=$names") -out "$into/server.crt"
    rm "$into/asked"
}

node_key() { # as `ssh-keygen -t ecdsa -b 384 -N ""` makes it, which not every machine has
    python - "$1" <<'PYTHON'
import sys
from pathlib import Path
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric import ec
key = ec.generate_private_key(ec.SECP384R1())
with Path(sys.argv[1]).open("xb") as file:
    file.write(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.OpenSSH, s.NoEncryption()))
Path(f"{sys.argv[1]}.pub").write_bytes(key.public_key().public_bytes(s.Encoding.OpenSSH, s.PublicFormat.OpenSSH))
PYTHON
}

new_key() { # NIST curves: Flower refuses others
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
    [ -d "${FEDMM_DATA:-.}" ] || { say "FEDMM_DATA=$FEDMM_DATA is no folder; it is where this site's data lie" && return 1; }
    exec flower-supernode --superlink "$2" --root-certificates "$1/ca.crt" --auth-supernode-private-key "$1/node" \
        --ssl-certfile "$1/own.crt" --ssl-keyfile "$1/own.key" --ssl-ca-certfile "$1/own.crt" \
        --host 127.0.0.1 --port "${4:-9094}" --node-config "partition-id=$3" ${5:+--trusted-entities "$5"}
}

# run KEYS SUPERLINK_PORT DIR [OVERRIDE...]: one run, watched; fails where it failed. Whoever ends this ends the run.
run() {
    local keys=$1 port=$2 dir
    dir=$(realpath -m "$3")
    shift 3
    hold "$dir"
    connect fleet "$port" "$keys/ca.crt"
    run_app fleet "$dir" "" link.tls=always "$@"
}

hold() { # DIR, for this script against another one; the run itself holds .lock, and may have outlived its script
    local lock busy=""
    mkdir -p "$1"
    exec 9>"$1/.watched"
    flock -n 9 || busy=1
    for lock in "$1/.lock" "$1"/arms/*/.lock; do
        [ ! -e "$lock" ] || flock -n "$lock" true || busy=1
    done
    [ -z "$busy" ] || { say "another run goes on in $1; wait for its end, end it, or choose another folder" && return 1; }
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    asks=$(sed -n "s/^# \(${1:-none} KEYS[^:]*\):.*/\1/p" "$0")
    read -ra needs <<<"${asks%%[*}"
    if [ -z "$asks" ] || (($# < ${#needs[@]})); then
        sed -n "s/^# \(${asks:+$1}[a-z-]* KEYS[^:]*\):.*/usage: bash scripts\/deploy.sh \1/p" "$0" >&2
        exit 2
    fi
    set_up
    "${1//-/_}" "${@:2}"
fi
