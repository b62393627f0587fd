"""Accounts and users of a NATS server, as its configuration file wants them: for the embedded server and an operator's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from casemate_schemas import subjects
from casemate_schemas.subjects import GATEWAY_ACCOUNT, SERVER_STATUS, SYSTEM_ACCOUNT, WORKER_ACCOUNT, Permissions


@dataclass(frozen=True)
class User:
    """One who may connect. ``name`` is what :func:`~casemate_messaging.connection.connect` calls ``user``; for a key
    broker it is the key broker's id. ``public_key`` is an nkey that starts with U.
    """

    role: Literal["gateway", "worker", "key_broker"]
    name: str
    public_key: str

    @property
    def account(self) -> str:
        """The account the user lives in."""
        if self.role == "key_broker":
            return subjects.key_broker_account(self.name)
        return GATEWAY_ACCOUNT if self.role == "gateway" else WORKER_ACCOUNT

    @property
    def permissions(self) -> Permissions:
        """What the user may do."""
        if self.role == "key_broker":
            return subjects.key_broker_permissions(self.name)
        if self.role == "gateway":
            return subjects.gateway_permissions(self.name)
        return subjects.worker_permissions(self.name)


def accounts(users: Sequence[User]) -> dict[str, Any]:
    """The ``accounts`` section: who lives where, and the only services that cross from one account to another.

    Workers reach :data:`~casemate_schemas.subjects.WORKER_SERVICES` of the gateway's account, and about themselves
    :data:`~casemate_schemas.subjects.PRESENCE_SERVICES`; key brokers
    :data:`~casemate_schemas.subjects.KEY_BROKER_SERVICES` and each its own ledger's head; gateway and workers reach each
    key broker's requests. The gateway's account alone has JetStream, and may ask every server how it keeps streams: for
    that the configuration's ``system_account`` must be :data:`~casemate_schemas.subjects.SYSTEM_ACCOUNT`.
    """
    key_brokers = sorted({user.name for user in users if user.role == "key_broker"})
    to_key_brokers = [_service(subjects.key_broker_account(k), f"{subjects.key_broker(k)}.*") for k in key_brokers]
    readers = tuple(map(subjects.key_broker_account, key_brokers))
    shared = dict.fromkeys((*subjects.WORKER_SERVICES, *subjects.KEY_BROKER_SERVICES))
    offered = [
        _offer(
            subject,
            *([WORKER_ACCOUNT] if subject in subjects.WORKER_SERVICES else []),
            *(readers if subject in subjects.KEY_BROKER_SERVICES else ()),
        )
        for subject in shared
    ]
    offered += [_offer(subject, WORKER_ACCOUNT) for subject in subjects.PRESENCE_SERVICES]
    for name in key_brokers:
        own = subjects.key_broker_account(name)
        offered += [_offer(subject, own) for subject in subjects.ledger_head_services(name)]
    manifests = [_service(GATEWAY_ACCOUNT, subject) for subject in subjects.KEY_BROKER_SERVICES]
    of_workers = (*subjects.WORKER_SERVICES, *subjects.PRESENCE_SERVICES)
    wanted = [_service(GATEWAY_ACCOUNT, subject) for subject in of_workers]
    of_servers = _service(SYSTEM_ACCOUNT, SERVER_STATUS)
    sections: dict[str, Any] = {
        SYSTEM_ACCOUNT: {"exports": [_offer(SERVER_STATUS, GATEWAY_ACCOUNT)]},
        GATEWAY_ACCOUNT: {"jetstream": "enabled", "exports": offered, "imports": [*to_key_brokers, of_servers]},
        WORKER_ACCOUNT: {"imports": [*wanted, *to_key_brokers]},
    }
    for name in key_brokers:
        offer = _offer(f"{subjects.key_broker(name)}.*", GATEWAY_ACCOUNT, WORKER_ACCOUNT)
        sections[subjects.key_broker_account(name)] = {
            "exports": [offer],
            "imports": [*manifests, *(_service(GATEWAY_ACCOUNT, s) for s in subjects.ledger_head_services(name))],
        }
    for account, section in sections.items():
        section["users"] = [_entry(user) for user in users if user.account == account]
    return sections


def _service(account: str, subject: str) -> dict[str, Any]:
    return {"service": {"account": account, "subject": subject}}


def _offer(subject: str, *to: str) -> dict[str, Any]:
    """An export to named accounts only; "stream" because one request may have several replies."""
    return {"service": subject, "response_type": "stream", "accounts": list(to)}


def _entry(user: User) -> dict[str, Any]:
    """One user. An empty list of subjects would mean "all": nothing allowed is written as "deny all"."""
    permissions: dict[str, Any] = {
        "publish": _rule(user.permissions.publish),
        "subscribe": _rule(user.permissions.subscribe),
    }
    if user.permissions.allow_responses:
        permissions["allow_responses"] = {"max": 1, "expires": "2m"}
    return {"nkey": user.public_key, "permissions": permissions}


def _rule(subjects: Sequence[str]) -> dict[str, list[str]]:
    return {"allow": list(subjects)} if subjects else {"deny": [">"]}
