"""``casemate``: the command line. Every command is loaded when it is run, and says how to install what it lacks.

Exit status: 0 done; 1 refused, or the job ended badly; 2 wrong usage, settings or a missing extra.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import click
from casemate_schemas.errors import CasemateError, SetupError

from casemate.entry import is_missing_extra, missing_extra_line

COMMANDS: dict[str, tuple[str, str, str]] = {
    "approvals": ("casemate.cli.approvals:approvals", "", "Show, approve or deny the jobs that wait for people."),
    "attestation": ("casemate.cli.attestation:attestation", "", "Verify attestation evidence."),
    "budget": ("casemate.cli.budget:budget", "", "Explain a dataset's privacy ledger, or renew it."),
    "consortium": ("casemate.cli.consortium:consortium", "", "Show what the members agreed on, or change it."),
    "datasets": ("casemate.cli.datasets:datasets", "", "List datasets, read a licence, or push one."),
    "demo": ("casemate.cli.demo:demo", "demo", "Run three hospitals and one scientist on this machine."),
    "doctor": ("casemate.cli.doctor:doctor", "gateway", "Find what is wrong with settings and servers, and its fix."),
    "down": ("casemate.cli.up:down", "local", "End the local stack."),
    "epsilon": ("casemate.cli.epsilon:epsilon", "", "Recompute privacy figures from recorded events."),
    "identity": ("casemate.cli.identity:identity", "", "End the delegations of a person whose key is lost."),
    "jobs": ("casemate.cli.jobs:jobs", "", "Submit, watch, list and cancel jobs."),
    "key-broker": ("casemate.cli.key_broker:key_broker", "", "Your key broker: its state, its evidence, its time."),
    "results": ("casemate.cli.results:results", "", "Get a result, or verify one offline."),
    "up": ("casemate.cli.up:up", "local", "Start everything on this machine."),
    "workers": ("casemate.cli.workers:workers", "", "List the workers and which pass the policy, or drain one."),
    "version": ("casemate.cli.version:version", "", "Show the installed version."),
}
"""Command: where it is (module and attribute), the extra that brings what it imports, and its line in the help."""


class LazyGroup(click.Group):
    """Loads a command's module only when the command is run. Listing commands imports none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        location, extra, _ = COMMANDS[cmd_name]
        module, _, attribute = location.partition(":")
        try:
            command: click.Command = getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            if not is_missing_extra(error):
                raise
            return _without_extra(cmd_name, extra or "all")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, _, summary) in sorted(COMMANDS.items())])


def _without_extra(name: str, extra: str) -> click.Command:
    """Stands in for a command whose packages are missing: says the one line that mends it, whatever its arguments."""

    def missing() -> None:
        raise SystemExit(_complain(missing_extra_line(extra), 2))

    settings = {"ignore_unknown_options": True, "allow_extra_args": True}
    return click.Command(name, callback=missing, context_settings=settings)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Parties who do not trust each other train one model on all their data, on machines that none of them trusts."""


def main() -> None:
    """The console script. Errors of the tree become one line on standard error."""
    sys.exit(run(lambda: cli.main(standalone_mode=False)))


def run(command: Callable[[], Any]) -> int:
    """The exit status of a command."""
    try:
        status = command()
        return status if isinstance(status, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return _complain("interrupted", 130)
    except ImportError as error:
        if not is_missing_extra(error):
            raise
        return _complain(missing_extra_line("all"), 2)
    except CasemateError as error:
        return _complain(f"{error} [{error.reason}]", 2 if isinstance(error, SetupError) else 1)


def _complain(message: str, status: int) -> int:
    click.echo(f"casemate: {message}", err=True)
    return status
