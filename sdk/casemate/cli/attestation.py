"""``casemate attestation``: check SEV-SNP evidence offline, and know what it should say."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import click
from casemate_attestation.certificates import MAX_CERTIFICATE_BYTES, MAX_CRL_BYTES
from casemate_attestation.policy_file import MAX_POLICY_BYTES, PolicyFile, TrustedRoots, inspect_report, read_bounded
from casemate_attestation.report import REPORT_BYTES
from casemate_attestation.verdict import Verdict
from casemate_schemas.errors import CasemateError
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from rich.console import Console
from rich.text import Text

from .fetch import fetch
from .reference import measure, reference

_MAX_MANIFEST_BYTES = 16 << 20
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


class Case(BaseModel):
    """One labelled case of a manifest; paths are relative to the manifest's folder."""

    model_config = ConfigDict(frozen=True)

    id: str
    report: str
    vek: str
    roots: str
    crl: str | None = None
    now: datetime
    policy: PolicyFile
    expect: Literal["pass", "fail"]
    expect_error: str | None = None
    """Advice: what the author of the case would look at first."""


Cases = TypeAdapter(Annotated[tuple[Case, ...], Field(max_length=10_000)])


@click.group()
def attestation() -> None:
    """Check attestation evidence offline."""


for command in (fetch, measure, reference):
    attestation.add_command(command)


@attestation.command()
@click.argument("report", required=False, type=_FILE)
@click.option("--vek", type=_FILE, help="The VCEK or VLEK certificate, DER.")
@click.option("--roots", type=_FOLDER, help="A folder of ark_*.der, ask_*.der, asvk_*.der to trust.")
@click.option("--crl", type=_FILE, help="The ARK's revocation list, DER.")
@click.option("--policy", type=_FILE, help="What to appraise against, JSON; without it, only authenticity is checked.")
@click.option(
    "--now", metavar="ISO8601", help="The time to verify at; the present by default, UTC if it names no zone."
)
@click.option("--manifest", type=_FILE, help="Verify every case of a manifest instead of one report.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
@click.pass_context
def verify(
    context: click.Context,
    report: Path | None,
    vek: Path | None,
    roots: Path | None,
    crl: Path | None,
    policy: Path | None,
    now: str | None,
    manifest: Path | None,
    as_json: bool,
) -> None:
    """Verify an SEV-SNP attestation REPORT and appraise it against a policy.

    Exits 0 if the evidence is accepted, 1 if it is rejected, 2 on wrong usage. With --manifest, exits 1 if any verdict is
    not the expected one.
    """
    if manifest is not None:
        if report or vek or roots or crl or policy or now:
            raise click.UsageError("--manifest takes no other input")
        context.exit(0 if _verify_manifest(manifest, as_json=as_json) else 1)
    if report is None or vek is None or roots is None:
        raise click.UsageError("expected REPORT, --vek and --roots, or --manifest")
    try:
        trusted = TrustedRoots.load(roots)
        rules = PolicyFile.parse(read_bounded(policy, MAX_POLICY_BYTES)) if policy else PolicyFile()
    except CasemateError as error:
        raise click.UsageError(str(error)) from error
    verdict = _inspect(report, vek, trusted, rules, _time(now), crl)
    _print_verdict(verdict, trusted, rules, as_json=as_json, has_crl=crl is not None)
    context.exit(0 if verdict else 1)


def _inspect(
    report: Path, vek: Path, roots: TrustedRoots, policy: PolicyFile, now: datetime, crl: Path | None
) -> Verdict:
    return inspect_report(
        read_bounded(report, REPORT_BYTES),
        read_bounded(vek, MAX_CERTIFICATE_BYTES),
        roots,
        policy,
        now,
        read_bounded(crl, MAX_CRL_BYTES) if crl else None,
    )


def _time(text: str | None) -> datetime:
    if text is None:
        return datetime.now(UTC)
    try:
        return _zoned(datetime.fromisoformat(text))
    except ValueError as error:
        raise click.UsageError(f"expected an ISO 8601 time, got {text!r}") from error


def _zoned(time: datetime) -> datetime:
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _print_verdict(verdict: Verdict, roots: TrustedRoots, policy: PolicyFile, *, as_json: bool, has_crl: bool) -> None:
    warning = (
        None if roots.are_amds else "NOT AMD'S ROOTS: the ARK is none of AMD's; this proves nothing about hardware."
    )
    if as_json:
        if warning:
            click.echo(warning, err=True)
        click.echo(json.dumps(_as_json(verdict)))
        return
    console = Console(soft_wrap=True, highlight=False)
    if warning:
        console.print(Text(warning, style="bold yellow"))
    for check in verdict.checks:
        console.print(Text(str(check), style="green" if check.ok else "bold red"))
    if not has_crl:
        console.print(Text("· revocation: no list given, not checked", style="dim"))
    if policy.is_empty:
        console.print(Text("· policy: none given, authenticity only", style="dim"))
    console.print(Text("accepted" if verdict else "rejected", style="bold green" if verdict else "bold red"))


def _as_json(verdict: Verdict) -> dict[str, object]:
    return {"verdict": "accepted" if verdict else "rejected", "failed": list(verdict.failed)}


def _verify_manifest(manifest: Path, *, as_json: bool) -> bool:
    """Whether every case came out as expected."""
    try:
        cases = Cases.validate_json(read_bounded(manifest, _MAX_MANIFEST_BYTES))
        roots = {name: TrustedRoots.load(manifest.parent / name) for name in {case.roots for case in cases}}
        outcomes = [_run_case(case, manifest.parent, roots[case.roots], as_json=as_json) for case in cases]
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        raise click.UsageError(f"not a manifest: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (CasemateError, OSError) as error:
        raise click.UsageError(str(error)) from error
    return all(outcomes)


def _run_case(case: Case, folder: Path, roots: TrustedRoots, *, as_json: bool) -> bool:
    crl = folder / case.crl if case.crl else None
    verdict = _inspect(folder / case.report, folder / case.vek, roots, case.policy, _zoned(case.now), crl)
    expected = verdict.ok == (case.expect == "pass")
    if as_json:
        click.echo(json.dumps({"id": case.id} | _as_json(verdict)))
    else:
        result = _as_json(verdict)["verdict"]
        advice = f" (advice: {case.expect_error})" if case.expect_error else ""
        failed = f" {', '.join(verdict.failed)}" if verdict.failed else ""
        click.echo(f"{'✓' if expected else '✗'} {case.id}: {result}{failed}{advice}")
    return expected
