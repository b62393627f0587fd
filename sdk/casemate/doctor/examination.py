"""The whole examination: files first, then each program's way to NATS, then the gateways."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence

from casemate_messaging.accounts import User
from casemate_messaging.server import public_user_key
from casemate_schemas.errors import SetupError

from .findings import Finding
from .live import check_gateway, check_nats
from .nats_config import check_config, read_config, users_of
from .programs import Given, Program, load
from .settings_checks import check_program, check_shared


async def examine(given: Given, *, clock_ms: Callable[[], int], live: bool = True) -> AsyncIterator[Finding]:
    """Every finding, good and bad. Raises nothing for what is merely wrong.

    1. Each program's settings, and the files that they name; that no two share what is one's own.
    2. Each NATS configuration, and whether it knows the programs' keys by the programs' names.
    3. With ``live``: NATS as each program reaches it, and the gateways at their public addresses.
    """
    programs = list[Program]()
    for kind, path in given.settings:  # 1
        loaded = load(kind, path)
        if isinstance(loaded, Finding):
            yield loaded
            continue
        programs.append(loaded)
        for finding in check_program(loaded):
            yield finding
    for finding in check_shared(programs):
        yield finding
    for path in given.nats_configs:  # 2
        config = read_config(path)
        if isinstance(config, Finding):
            yield config
            continue
        for finding in check_config(path, config):
            yield finding
        for program in programs:
            yield check_known(program, users_of(config), str(config.get("server_name") or path))
    for program in programs if live else ():  # 3
        async for finding in check_nats(program, clock_ms):
            yield finding
        if program.kind == "gateway":
            async for finding in check_gateway(program, clock_ms):
                yield finding


def check_known(program: Program, users: Sequence[User], server: str) -> Finding:
    """That the configuration has the program's key, for the program's own name."""
    check = f"its key at {server}"
    try:
        key = public_user_key(program.settings.nats_seed_file)
    except SetupError:
        return Finding(program.about, check, "no seed to look for", "a seed", "put the program's seed there")
    role = "key_broker" if program.kind == "key-broker" else program.kind
    known = next((user for user in users if user.public_key == key), None)
    if known is None:
        fix = f"add its public key {key} to NATS' configuration, or take the seed that was made for it"
        return Finding(program.about, check, "a seed of no user there", f"the seed of {program.user}", fix)
    if (known.role, known.name) != (role, program.user):
        found = f"the seed of {known.role.replace('_', ' ')} {known.name}"
        fix = f"nats_seed_file = the seed that was made for {program.user}"
        return Finding(program.about, check, found, f"the seed of {program.user}", fix)
    return Finding(program.about, check, f"{known.role.replace('_', ' ')} {known.name}")
