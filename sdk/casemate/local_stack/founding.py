"""Founding a consortium in a folder: keys, simulated chip, signed manifest, NATS users, and each program's settings."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from casemate_attestation.simulated_chip import create_hierarchy, measure_key_broker_image, measure_worker_image
from casemate_messaging.accounts import User
from casemate_messaging.server import create_user_key, public_user_key
from casemate_schemas.attestation_policy import AttestationPolicy
from casemate_schemas.codec import encode
from casemate_schemas.consortium import ConsortiumManifest, KeyBroker, ManifestChain, Member, sign_manifest
from casemate_schemas.errors import SetupError
from casemate_schemas.identity import Role
from casemate_schemas.keyring import KeyRing

from casemate.identity import load_keys, new_person, now_ms, save_keys

from .layout import Facts, Layout

People = Mapping[str, tuple[Role, ...]]
"""``person@member`` to roles."""


def found(folder: Path, *, members: Sequence[str], people: People, workers: int, hosted: Sequence[str] = ()) -> Layout:
    """Everything a stack needs, in a new folder that only this user can read. Takes seconds (two RSA-4096 keys).

    1. Each member makes its own keys, and its key broker's.
    2. The simulated chip is made; the manifest names its root and the measurement of the installed worker program, and of
       the key broker program, if some members' key brokers are to be ``hosted`` in enclaves.
    3. All members sign the manifest; its digest is the consortium's id.
    4. Members sign delegations for their people.
    5. Each program gets a NATS key of its own and its settings.

    Raises :class:`SetupError` if the folder holds something already, or for a ``hosted`` one who is no member.
    """
    if strangers := sorted(set(hosted) - set(members)):
        raise SetupError(f"no member {strangers[0]}, whose key broker could be hosted; there are {', '.join(members)}")
    layout = Layout(folder)
    _new_folders(layout, members)
    keys = {member: _new_keys(layout.member_keys(member)) for member in members}  # 1
    key_brokers = {
        member: KeyRing.generate() if member in hosted else _new_keys(layout.member(member) / "key-broker.key")
        for member in members
    }
    chain = _manifest(layout, keys, key_brokers, hosted=bool(hosted))  # 2, 3
    consortium = chain.manifests[0].digest
    layout.manifest.write_bytes(encode(chain))
    for person, roles in people.items():  # 4
        name, _, member = person.partition("@")
        ring = new_person(keys[member], consortium=consortium, member=member, person=name, roles=roles)
        save_keys(layout.person_keys(person), ring)
    names = tuple(f"worker-{number + 1}" for number in range(workers))
    for program in (*map(layout.program, ("gateway", *names)), *(layout.key_broker(m, hosted=True) for m in hosted)):
        program.mkdir(mode=0o700)
    layout.write_facts(Facts(consortium.hex(), "", tuple(members), tuple(people), names, tuple(hosted)))
    for seed in _seed_files(layout).values():  # 5
        create_user_key(seed)
    return layout


def nats_users(layout: Layout) -> list[User]:
    """Who may connect to the stack's NATS server, by the public keys in the stack's folder."""
    facts = layout.read_facts()
    seeds = _seed_files(layout)
    return [
        User("gateway", "gateway", public_user_key(seeds["gateway"])),
        *(User("worker", name, public_user_key(seeds[name])) for name in facts.workers),
        *(User("key_broker", name, public_user_key(seeds[name])) for name in facts.members),
    ]


def write_settings(
    layout: Layout, nats_url: str, *, gateway_port: int, overrides: Mapping[str, Mapping[str, object]]
) -> dict[str, Path]:
    """Each program's settings file, by program name (``gateway``, a worker's, a member's for its key broker).

    ``overrides`` adds to or replaces settings, by program name. Files hold paths and public facts only.
    """
    facts = layout.read_facts()
    programs: dict[str, tuple[Path, dict[str, object]]] = {}
    gateway = layout.program("gateway")
    programs["gateway"] = (gateway, {"host": "127.0.0.1", "port": gateway_port, "state_dir": str(gateway / "state")})
    for name in facts.workers:
        home = layout.program(name)
        chip: dict[str, object] = {"guest": "simulated", "simulated_chip_socket": str(layout.chip_socket)}
        own = {"name": name, "scratch_dir": str(home), "state_dir": str(home / "state")}
        programs[name] = (home, {**own, **chip})
    for name in facts.members:
        home = layout.key_broker(name, hosted=name in facts.hosted)
        own = {"key_broker": name, "state_dir": str(home / "key-broker")}
        if name in facts.hosted:
            own |= {"guest": "simulated", "simulated_chip_socket": str(layout.key_broker_socket)}
        else:
            own["keys_file"] = str(home / "key-broker.key")
        programs[name] = (home, {**own})
    seeds = _seed_files(layout)
    common = {"nats_url": nats_url, "consortium": facts.consortium, "manifest_file": str(layout.manifest)}
    files = {}
    for name, (home, settings) in programs.items():
        settings = {**common, "nats_seed_file": str(seeds[name]), **settings, **overrides.get(name, {})}
        files[name] = home / "settings.toml"
        files[name].write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    return files


def _new_folders(layout: Layout, members: Sequence[str]) -> None:
    if layout.folder.exists() and any(layout.folder.iterdir()):
        raise SetupError(f"{layout.folder} is not empty: remove it, or choose another folder")
    layout.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chmod(layout.folder, 0o700)
    for folder in (layout.folder / "members", *map(layout.member, members), layout.logs):
        folder.mkdir(mode=0o700)


def _new_keys(path: Path) -> KeyRing:
    keys = KeyRing.generate()
    save_keys(path, keys)
    return load_keys(path)


def _manifest(
    layout: Layout, keys: Mapping[str, KeyRing], key_brokers: Mapping[str, KeyRing], *, hosted: bool
) -> ManifestChain:
    """The first manifest. Key brokers that are to be hosted stand in it with keys that nobody has: theirs come later."""
    root = create_hierarchy(layout.chip)
    manifest = ConsortiumManifest(
        number=1,
        previous=None,
        name="Local consortium (SIMULATED)",
        members=tuple(
            Member(id=name, name=name, signing_key=ring.signing.public, sealing_key=ring.sealing.public)
            for name, ring in keys.items()
        ),
        key_brokers=tuple(
            KeyBroker(id=name, serves=(name,), signing_key=ring.signing.public, sealing_key=ring.sealing.public)
            for name, ring in key_brokers.items()
        ),
        attestation=AttestationPolicy(
            simulation=True,
            products=(root.accepted(),),
            measurements=(measure_worker_image(),),
            key_broker_measurements=(measure_key_broker_image(),) if hosted else (),
        ),
        quorum=len(keys),
        created=now_ms(),
    )
    return ManifestChain(manifests=(sign_manifest(manifest, {name: ring.signing for name, ring in keys.items()}),))


def _seed_files(layout: Layout) -> dict[str, Path]:
    facts = layout.read_facts()
    programs = {name: layout.program(name) for name in ("gateway", *facts.workers)}
    members = {name: layout.key_broker(name, hosted=name in facts.hosted) for name in facts.members}
    return {name: home / "nats.seed" for name, home in {**programs, **members}.items()}
