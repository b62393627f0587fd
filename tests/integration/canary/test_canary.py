"""Nothing that is secret lies where it should not: the whole road with canaries in data, labels, weights, keys and words.

Done by a search over everything that a gateway, NATS, a host or a passer-by could read, and a proof that the search sees:
the same search finds a leak planted in each kind of place, in every encoding.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import casemate as cm
import numpy as np
import pytest
import pytest_asyncio
import torch
from casemate.identity import load_keys
from casemate_key_broker.seed_shares import SeedSecrets
from casemate_messaging.blobs import BlobStore
from casemate_messaging.envelopes import EnvelopeStore
from casemate_schemas import subjects
from casemate_schemas.keyring import KeyRing
from casemate_schemas.result import Release
from casemate_schemas.sealing import SealingKey, unseal_content_key, unseal_key
from casemate_worker.key_schedule import resume_key
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from support.canaries import Canary, Place, RecordingProxy, files, leaks, processes
from support.dataset_keys import dataset_keys
from support.road import SCIENTIST, Road, ended, licence, running_road
from torch import nn

pytestmark = pytest.mark.asyncio(loop_scope="module")

OWNERS = ("north", "south")
ROWS, IMAGE = 40, 16
TARGET = "outcome"
_SAMPLE_S = 0.1
_WORDS = {what: f"canary-{secrets.token_hex(12)}" for what in ("column", "description", "licence", "purpose")}


@dataclass
class Trail:
    """What a run left behind: who could know what, and all that could be read."""

    road: Road
    proxy: RecordingProxy
    temporary_before: set[Path]
    canaries: list[Canary] = field(default_factory=list)
    seen: dict[tuple[str, bytes], Place] = field(default_factory=dict)

    def sample(self) -> None:
        """Keeps what can be read of the processes now."""
        stack = self.road.stack
        pids = [os.getpid(), stack.nats.pid, *(program.pid for program in stack.programs.values())]
        self.seen |= {(place.name, place.data): place for place in processes(pids)}

    def places(self) -> Iterator[Place]:
        """Everything, as it is now and as it was seen."""
        self.sample()
        yield from self.seen.values()
        yield from files(self.road.layout.folder)
        yield from self.proxy.places()
        yield from _temporary_files(self.temporary_before)


def _temporary_files(before: set[Path]) -> Iterator[Place]:
    """What has appeared since in the folder for temporary files; other tests' folders aside."""
    for path in set(Path(tempfile.gettempdir()).iterdir()) - before:
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("pytest-"):
            yield from (Place("temporary file", place.data) for place in files(path))
        with contextlib.suppress(OSError):
            if path.is_file() and path.stat().st_size < 1 << 24:
                yield Place("temporary file", path.read_bytes())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trail(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Trail]:
    """One job from founding to opened result, watched all the way."""
    temporary_before = set(Path(tempfile.gettempdir()).iterdir())
    async with RecordingProxy() as proxy:
        overrides = {"gateway": {"public_url": proxy.url}}
        folder = tmp_path_factory.mktemp("canary") / "stack"
        async with running_road(folder, members=(*OWNERS, "university"), overrides=overrides) as road:
            proxy.target_port = int(road.layout.read_facts().url.rpartition(":")[2])
            facts = road.layout.read_facts()
            road.layout.write_facts(type(facts)(**{**facts.__dict__, "url": proxy.url}))
            found = Trail(road, proxy, temporary_before)
            sampler = asyncio.create_task(_sampled(found))
            try:
                await _run(found)
            finally:
                sampler.cancel()
                await asyncio.gather(sampler, return_exceptions=True)
            yield found


async def _sampled(trail: Trail) -> None:
    while True:
        await asyncio.to_thread(trail.sample)
        await asyncio.sleep(_SAMPLE_S)


async def _run(trail: Trail) -> None:
    """Seal, train, open; every secret on the way becomes a canary."""
    road = trail.road
    datasets = []
    for owner in OWNERS:
        columns = _records()
        trail.canaries += _data_canaries(owner, columns, road.layout.member(owner))
        card = _card(owner)
        terms = licence(card.id, text=_WORDS["licence"], permissions=_permissions())
        async with road.connected(f"sam@{owner}") as consortium:
            datasets.append((await consortium.push(columns, card, licence=terms)).dataset)
    net = nn.Sequential(nn.Linear(1 + IMAGE, 1))
    trail.canaries += _weight_canaries("initial", net.state_dict(), road)
    async with road.connected(SCIENTIST) as consortium:
        job = await consortium.train(
            model=net,
            datasets=datasets,
            target=TARGET,
            privacy=cm.Privacy(epsilon=2.0, delta=1e-3),
            optimizer=cm.SGD(lr=0.1),
            batch_size=20,
            steps=6,
            checkpoint_every_steps=2,
            purpose=_WORDS["purpose"],
        )
        status = await ended(job)
        assert status.state == "sealed", status
        result = await job.result()
        told = [event.model_dump_json() async for event in job.events()]
    trail.seen["events", b""] = Place("events", "\n".join(told).encode())
    trail.canaries += _weight_canaries("trained", result.weights, road)
    trail.canaries += _key_canaries(road)
    trail.canaries += await _content_key_canaries(road, result)
    members = road.layout.folder / "members"
    trail.canaries += [Canary(f"word: {what}", word.encode(), (members,)) for what, word in _WORDS.items()]


def _records() -> dict[str, Any]:
    """Values with all their 52 random bits, and rows of random bytes."""
    random = np.random.default_rng(secrets.randbits(128))
    return {
        _WORDS["column"]: random.random(ROWS),
        "image": random.integers(0, 256, (ROWS, IMAGE), dtype=np.uint8),
        TARGET: random.random(ROWS),
    }


def _card(owner: str) -> cm.DatasetCard:
    return cm.DatasetCard(
        name="canaries",
        owner=owner,
        columns=(
            cm.Column(name=_WORDS["column"], dtype="float64", lower=0.0, upper=1.0),
            cm.Column(name="image", dtype="uint8", shape=(IMAGE,), lower=0.0, upper=255.0),
            cm.Column(name=TARGET, dtype="float64", lower=0.0, upper=1.0),
        ),
        row_bound=ROWS,
        description=_WORDS["description"],
    )


def _permissions() -> tuple[cm.Permission, ...]:
    university = cm.MemberIs(principal="submitter", member="university")
    return (
        cm.Permission(action="list", rule=university),
        cm.Permission(action="train", rule=cm.AllOf(rules=(university, cm.ForPurpose(purpose=_WORDS["purpose"])))),
        cm.Permission(action="read_result", rule=cm.MemberIs(principal="recipient", member="university")),
    )


def _data_canaries(owner: str, columns: dict[str, Any], home: Path) -> Iterator[Canary]:
    """Single values in their own bits and decimals, runs of rows, and what the pipeline makes of them."""
    for what, column in (("data", columns[_WORDS["column"]]), ("label", columns[TARGET])):
        for row in (0, 7, ROWS - 1):
            value = float(column[row])
            yield Canary(f"{what} of {owner}, row {row}", column[row].tobytes(), (home,), (repr(value)[:14],))
        scaled = (2 * column[:4] - 1).astype(np.float32)
        yield Canary(f"{what} of {owner}, rows 0 to 3", column[:4].tobytes(), (home,))
        yield Canary(f"{what} of {owner}, float32", column[:4].astype(np.float32).tobytes(), (home,))
        yield Canary(f"{what} of {owner}, scaled", scaled.tobytes(), (home,))
    for row in (0, 7, ROWS - 1):
        yield Canary(f"image of {owner}, row {row}", columns["image"][row].tobytes(), (home,))


def _weight_canaries(name: str, weights: dict[str, torch.Tensor], road: Road) -> Iterator[Canary]:
    array = weights["0.weight"].detach().numpy().ravel()
    home = road.layout.member("university")
    texts = tuple(repr(float(value))[:14] for value in array[:3])
    yield Canary(f"{name} weights", array[:8].tobytes(), (home,), texts)
    yield Canary(f"{name} weights, two", array[9:11].tobytes(), (home,))


def _key_canaries(road: Road) -> Iterator[Canary]:
    """Every private key in the stack's folder, as bytes and as it stands in its file."""
    layout, facts = road.layout, road.layout.read_facts()
    for member in facts.members:
        home = layout.member(member)
        for path in home.glob("*.key"):
            yield from _ring_canaries(f"{path.stem} of {member}", load_keys(path), path.read_text(), home)
        for number, key in enumerate(dataset_keys(home / "key-broker").values()):
            yield from _sealing_canaries(f"dataset version {number} of {member}", key, home)
        yield Canary(f"seed secret of {member}", (home / "key-broker" / "seed-secret-1").read_bytes(), (home,))
        yield Canary(f"NATS key of {member}", (home / "nats.seed").read_bytes().strip(), (home,))
    for program in ("gateway", *facts.workers):
        home = layout.program(program)
        yield Canary(f"NATS key of {program}", (home / "nats.seed").read_bytes().strip(), (home,))
    (chip,) = layout.chip.glob("*.pem")
    key: Any = load_pem_private_key(chip.read_bytes(), None)
    yield Canary("chip's key", key.private_numbers().private_value.to_bytes(48, "big"), (layout.chip,))


def _ring_canaries(name: str, ring: KeyRing, text: str, home: Path) -> Iterator[Canary]:
    yield Canary(f"signing key: {name}", ring.signing.to_bytes(), (home,))
    yield from _sealing_canaries(name, ring.sealing, home)
    secret_lines = [line for line in text.splitlines()[-4:-1] if len(line) == 64]  # the delegation stands before them
    for line in secret_lines:
        yield Canary(f"key file line: {name}", line.encode(), (home,))


def _sealing_canaries(name: str, key: SealingKey, home: Path) -> Iterator[Canary]:
    sealing = key.to_bytes()
    yield Canary(f"ML-KEM seed: {name}", sealing[:64], (home,))
    yield Canary(f"ML-KEM seed, half: {name}", sealing[:32], (home,))
    yield Canary(f"X25519 key: {name}", sealing[64:], (home,))


async def _content_key_canaries(road: Road, result: cm.Result) -> list[Canary]:
    """What no disk should ever hold in clear: each envelope's content key, the seed shares, and the resume key."""
    layout, terms = road.layout, result.manifest.terms.digest
    found = []
    async with road.nats("gateway") as client:
        store = EnvelopeStore(client, BlobStore(client))
        for use in result.terms.plan.datasets:
            head = (await store.head(use.envelope)).head
            version_key = dataset_keys(layout.member(use.owner) / "key-broker")[use.envelope]
            key = unseal_content_key(head, version_key)
            found.append(Canary(f"content key of {use.dataset}", key.to_bytes(), ()))
        release = result.bundle.release.peek(Release)
        head = (await store.head(release.result)).head
        key = unseal_key(release.sealed_keys[0], head.header, load_keys(layout.person_keys(SCIENTIST)).sealing)
        found.append(Canary("content key of the result", key.to_bytes(), ()))
    shares = []
    for name in result.terms.key_brokers:
        shares.append(SeedSecrets(layout.member(name) / "key-broker", needed=set()).share(1, terms))
        found.append(Canary(f"seed share of {name}", shares[-1], ()))
    resume = resume_key(shares, terms)
    assert unseal_content_key(head, resume).to_bytes() == key.to_bytes(), "the canary is not the worker's resume key"
    return [*found, Canary("resume key", resume, ())]


async def test_no_canary_is_found_outside_its_home(trail: Trail) -> None:
    places = await asyncio.to_thread(lambda: list(trail.places()))
    kinds = {place.name.partition(" ")[0] for place in places}
    assert {"file", "HTTP", "events", "cmdline", "environ"} <= kinds
    assert len(trail.canaries) > 60
    assert await asyncio.to_thread(leaks, trail.canaries, places) == []


async def test_every_canary_is_found_where_it_is_at_home(trail: Trail) -> None:
    """What lies in a folder of its owner is seen there by the same search, as soon as nobody is at home."""
    stray = [Canary(canary.name, canary.secret, (), canary.texts) for canary in trail.canaries if canary.homes]
    found = {leak.canary for leak in leaks(stray, files(trail.road.layout.folder))}
    kept = {canary.name for canary in stray if canary.name.startswith(("key file", "seed secret", "NATS key", "word"))}
    assert kept <= found


PLANTED = {
    "program log": "file logs/gateway.log",
    "NATS store": "file nats/store/",
    "HTTP header": "HTTP requests",
    "HTTP answer": "HTTP answers",
    "command line": "cmdline of ",
    "environment": "environ of ",
    "open but deleted file": "open file of ",
    "worker's scratch": "file worker-1/leak",
    "another owner's folder": "file members/south/leak",
    "temporary file": "temporary file",
}


@pytest.mark.parametrize("kind", PLANTED)
async def test_the_same_search_finds_a_planted_leak(trail: Trail, kind: str) -> None:
    secret = bytes(secrets.choice(range(128, 256)) for _ in range(24))
    value = secrets.randbits(52) / 2**52
    canary = Canary("planted", secret, (trail.road.layout.member("north"),), (repr(value)[:14],))
    forms = canary.forms()
    if kind in ("command line", "environment"):  # neither can hold a NUL
        forms = {name: form for name, form in forms.items() if b"\0" not in form}
    async with contextlib.AsyncExitStack() as planted:
        await planted.enter_async_context(_plant(trail, kind, list(forms.values())))
        found = leaks([canary], trail.places())
    assert {leak.form for leak in found if leak.place.startswith(PLANTED[kind])} >= forms.keys()


@contextlib.asynccontextmanager
async def _plant(trail: Trail, kind: str, forms: list[bytes]) -> AsyncIterator[None]:
    """The forms in that kind of place, for as long as the block lasts where that can be."""
    layout, data = trail.road.layout, b"\r\nX-Leak: ".join((b"", *forms, b""))
    match kind:
        case "program log":
            with (layout.logs / "gateway.log").open("ab") as log:
                log.write(data)
            yield
        case "NATS store":
            async with trail.road.nats("gateway") as client:
                await client.jetstream().publish(subjects.event(secrets.token_hex(16)), data)
            yield
        case "HTTP header" | "HTTP answer":
            async with _echo(trail.proxy):
                await _send(trail.proxy.port, b"GET /livez HTTP/1.1" + data)
            yield
        case "command line" | "environment":
            arguments = forms if kind == "command line" else []
            environment = dict.fromkeys(map(str, range(len(forms)))) if kind == "environment" else {}
            variables = {name.encode(): form for name, form in zip(environment, forms, strict=False)}
            code = [sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.read()"]
            process = await asyncio.create_subprocess_exec(*code, *arguments, stdin=-1, env=variables)
            try:
                yield
            finally:
                await process.communicate(b"")
        case "open but deleted file":
            with tempfile.TemporaryFile() as file:
                file.write(data)
                file.flush()
                yield
        case "temporary file":
            with tempfile.NamedTemporaryFile() as file:
                file.write(data)
                file.flush()
                yield
        case _:
            path = layout.folder / PLANTED[kind].removeprefix("file ")
            path.write_bytes(data)
            yield
            path.unlink()


@contextlib.asynccontextmanager
async def _echo(proxy: RecordingProxy) -> AsyncIterator[None]:
    """Behind the proxy, for a moment, something that answers with what it was sent."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read())
        writer.close()

    gateway = proxy.target_port
    async with await asyncio.start_server(answer, "127.0.0.1", 0, limit=1 << 20) as server:
        proxy.target_port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            proxy.target_port = gateway


async def _send(port: int, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    return answer
