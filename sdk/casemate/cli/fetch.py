"""``casemate attestation fetch``: a chip's certificates and the revocation list, into a folder, for use offline."""

from __future__ import annotations

from pathlib import Path

import click
from casemate_attestation.https import HttpsFetch
from casemate_attestation.kds import (
    AMD_KDS_URL,
    AMD_ROOTS_BY_PRODUCT,
    KdsClient,
    KdsLimits,
    Roots,
    crl_file,
    roots_of,
)
from casemate_attestation.policy_file import read_bounded
from casemate_attestation.report import REPORT_BYTES
from casemate_schemas.consortium import verify_chain
from casemate_schemas.errors import SetupError

from .reference import read_chain

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("report", type=_FILE)
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="The folder to fill.")
@click.option("--url", default=AMD_KDS_URL, show_default=True, help="AMD's key distribution service, or a mirror.")
@click.option("--manifest", type=_FILE, help="Trust the roots of this consortium's manifest instead of AMD's.")
@click.option("--interval-s", default=10.0, show_default=True, type=click.FloatRange(0, 3600), help="Between requests.")
@click.option("--crl/--no-crl", "with_crl", default=True, help="Fetch the revocation list as well.")
def fetch(report: Path, out: Path, url: str, manifest: Path | None, interval_s: float, with_crl: bool) -> None:
    """Fetch the certificates that REPORT verifies under, and its root's revocation list, into a folder.

    Workers and key brokers without a way to the service take that folder as their setting kds_cache_dir.
    """
    roots = _roots(manifest)
    client = KdsClient(out, roots, fetch=HttpsFetch(), base_url=url, limits=KdsLimits(interval_s=interval_s))
    click.echo("Asking the key distribution service; it takes a request every ten seconds.", err=True)
    certificates = client.certificates(read_bounded(report, REPORT_BYTES))
    if (product := client.product_of(certificates[2])) is None:
        raise SetupError("the certificates lead to no accepted root")
    if with_crl:
        client.refresh_crl(product)
    vek = next(path for path in sorted(out.glob("v[cl]ek_*.der")) if path.read_bytes() == certificates[0])
    crl = f" --crl {out / crl_file(product)}" if with_crl else ""
    click.echo(f"{out} holds what {report} needs. To verify it:")
    click.echo(f"casemate attestation verify {report} --vek {vek} --roots {out}{crl}")


def _roots(manifest: Path | None) -> Roots:
    if manifest is None:
        return AMD_ROOTS_BY_PRODUCT
    return roots_of(verify_chain(read_chain(manifest)).manifest.attestation)
