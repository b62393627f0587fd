"""What libraries log, in our form: they may quote requests, so the class of the error is kept and nothing else."""

from __future__ import annotations

import logging

from casemate_messaging.logs import ProgramLog


class ClassNames(logging.Handler):
    """Turns warnings and errors of libraries into events ``library``."""

    def __init__(self, log: ProgramLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """One event: which library, and which class of error."""
        cls = record.exc_info[0] if record.exc_info else None
        self._log.warning("library", op=record.name, error=cls.__name__ if cls else record.levelname)


def quiet_logger(log: ProgramLog) -> logging.Logger:
    """A logger for the HTTP server that tells no request's contents."""
    logger = logging.getLogger("casemate_gateway.http")
    logger.handlers, logger.propagate = [ClassNames(log)], False
    return logger
