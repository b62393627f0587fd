"""The key distribution service's client over real HTTPS on this machine, and servers that misbehave."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from casemate_attestation.https import HttpsFetch
from casemate_attestation.kds import KdsClient, KdsLimits
from casemate_attestation.products import Product
from casemate_attestation.simulated_chip import SimulatedAuthority, SimulatedKeys
from casemate_attestation.verify import verify
from casemate_schemas.attestation_policy import AcceptedProduct, AppraisalPolicy
from casemate_schemas.errors import NotFoundError, ParameterError, ThrottledError, TooLargeError, UnavailableError
from support.kds import Answer, Served, SimulatedKds, serve

PRODUCTS: tuple[Product, ...] = ("Milan", "Genoa", "Turin")


@pytest.fixture(scope="module")
def kds() -> SimulatedKds:
    keys = SimulatedKeys.generate()
    authorities = [SimulatedAuthority(keys, product) for product in PRODUCTS]
    return SimulatedKds(*((authority, authority.issue_chip()) for authority in authorities))


@pytest.fixture
def served(kds: SimulatedKds, tmp_path: Path) -> Iterator[Served]:
    kds.twist = lambda _, answer: answer
    with serve(kds, tmp_path) as served:
        yield served


def fetch(served: Served, *, timeout_s: float = 15.0) -> HttpsFetch:
    return HttpsFetch(timeout_s=timeout_s, context=served.context)


@pytest.mark.parametrize("product", PRODUCTS)
def test_certificates_and_list_of_each_product(
    kds: SimulatedKds, served: Served, tmp_path: Path, product: Product
) -> None:
    client = KdsClient(
        tmp_path / "folder",
        kds.roots,
        fetch=fetch(served),
        base_url=served.url,
        limits=KdsLimits(interval_s=0.0),
    )
    chip = next(chip for _, chip in kds.chips if chip.facts.product == product)
    report = chip.launch(bytes(48)).attest(bytes(64)).report
    certificates, crl = client.certificates(report), client.refresh_crl(product)
    accepted = AcceptedProduct(product=product, ark_sha256=tuple(kds.roots[product]))
    policy = AppraisalPolicy(simulation=True, products=(accepted,))
    verdict = verify(report, certificates, policy, datetime.now(UTC), crl)
    assert verdict.ok, str(verdict)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Answer(body=b"x" * 1001), TooLargeError),
        (Answer(body=b"x", headers={"Content-Length": str(1 << 40)}), TooLargeError),
        (Answer(302, headers={"Location": "https://127.0.0.1/"}), UnavailableError),
        (Answer(500), UnavailableError),
        (Answer(404), NotFoundError),
        (Answer(400), NotFoundError),
        (Answer(429, headers={"Retry-After": "77"}), ThrottledError),
        (Answer(503, headers={"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"}), ThrottledError),
    ],
)
def test_answers_that_are_none(kds: SimulatedKds, served: Served, answer: Answer, error: type[Exception]) -> None:
    kds.twist = lambda _, __: answer
    kds.requests.clear()
    with pytest.raises(error) as caught:
        fetch(served)(f"{served.url}/a", 1000)
    assert type(caught.value) is error
    assert kds.requests == ["/a"]  # and nothing was followed
    if isinstance(caught.value, ThrottledError):
        assert caught.value.retry_after_s == (77.0 if answer.status == 429 else 10.0)


def test_an_answer_of_exactly_the_bound_is_taken(kds: SimulatedKds, served: Served) -> None:
    kds.twist = lambda _, __: Answer(body=b"x" * 1000)
    assert fetch(served)(f"{served.url}/a?b=c", 1000) == b"x" * 1000


def test_a_server_that_never_finishes_meets_the_deadline(kds: SimulatedKds, served: Served) -> None:
    kds.twist = lambda _, __: Answer(body=b"x" * 100, stall=True)
    with pytest.raises(UnavailableError, match="TimeoutError"):
        fetch(served, timeout_s=0.3)(f"{served.url}/a", 1000)


def test_an_answer_that_ends_early_is_none(kds: SimulatedKds, served: Served) -> None:
    kds.twist = lambda _, __: Answer(body=b"x", headers={"Content-Length": "100"})
    with pytest.raises(UnavailableError):
        fetch(served)(f"{served.url}/a", 1000)


def test_a_server_that_the_authorities_do_not_vouch_for(kds: SimulatedKds, served: Served) -> None:
    kds.requests.clear()
    with pytest.raises(UnavailableError, match="SSLCertVerificationError"):
        HttpsFetch()(f"{served.url}/a", 1000)
    with pytest.raises(UnavailableError, match="SSLCertVerificationError"):  # right authority, another name
        fetch(served)(f"{served.url.replace('127.0.0.1', 'localhost')}/a", 1000)
    assert kds.requests == []


def test_nobody_there(served: Served) -> None:
    with pytest.raises(UnavailableError):
        HttpsFetch(context=ssl.create_default_context())("https://127.0.0.1:1/a", 1000)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1/a", "https:///a", "https://h/a b", "https://h/a\r\nX: y", "file:///a"]
)
def test_only_https_urls(url: str) -> None:
    with pytest.raises(ParameterError):
        HttpsFetch()(url, 1)
