"""Asking the Hugging Face Hub: within a deadline, quietly, and what its refusals mean.

Importing this imports huggingface_hub (0.2 s), so modules of light commands import it inside
the functions that ask. Token, cache and endpoint are the client's: `hf auth login` or
HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import errno
import json
import re
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import Literal, TypeVar

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from kscli.errors import KscliError
from kscli.secrets import without_secrets

Answer = TypeVar("Answer")
Sign = type[Exception] | int | str | Callable[[Exception], bool]

REQUEST_TIMEOUT = 4.0  # seconds to connect, and to wait for the first byte
DEADLINE = 5.0  # seconds until the Hub counts as out of reach; a command has 10 with its imports

_waited = 0.0  # seconds that answers have been waited for in vain

# httpx's or httpx2's, whichever the installed huggingface_hub is built on.
HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]

# What the client is known to raise; RuntimeError comes from hf_xet, which moves the bytes.
CLIENT_ERRORS = (OSError, HFValidationError, json.JSONDecodeError, RuntimeError, HTTPError)


@dataclass(frozen=True)
class Wanted:
    """What is wanted of the Hub, and how to tell the user that it cannot be had.

    `unreachable` and `offline` end the sentences that begin with the Hub out of reach and with
    HF_HUB_OFFLINE set; `hint` follows where the name may be wrong. `error` is what is raised.
    `doing` is what cannot be done: it is fetched, or written.
    """

    kind: Literal["model", "data set"]
    hub_id: str
    revision: str
    error: type[KscliError]
    unreachable: str
    offline: str
    hint: str = ""
    doing: Literal["fetched", "written"] = "fetched"


def ask(question: Callable[[float], Answer]) -> Answer:
    """What `question` gets from the Hub, or TimeoutError after `DEADLINE` seconds.

    It is called with the time-out to give to the client, which bounds neither the look-up of the
    host's name nor how many of its addresses are tried in turn: so a thread asks, and is left
    behind when it is late. Time that was waited in vain is taken off the next deadline, until
    the Hub answers again.
    """
    global _waited
    answer: Future[Answer] = Future()

    def put() -> None:
        try:
            answer.set_result(question(REQUEST_TIMEOUT))
        except BaseException as error:
            answer.set_exception(error)

    patience = max(DEADLINE - _waited, DEADLINE / 8)
    started = time.monotonic()
    Thread(target=put, daemon=True).start()
    wait([answer], patience)
    answered = answer.done() and not is_out_of_reach(answer.exception())
    _waited = 0.0 if answered else _waited + time.monotonic() - started
    if not answer.done():
        raise TimeoutError(f"no answer in {patience:.2g} seconds")
    return answer.result()


@contextmanager
def explained(
    wanted: Wanted, errors: tuple[type[Exception], ...] = CLIENT_ERRORS
) -> Iterator[None]:
    """Turn `errors` into the sentence of `explain`; a token that cannot be sent is one at once."""
    require_sound_token(wanted.error)
    try:
        yield
    except errors as error:
        raise explain(error, wanted) from error


def require_sound_token(error: type[KscliError]) -> None:
    """Raise `error` where the user's token cannot be sent, which is known without sending it.

    The client's own errors of such a token quote it.
    """
    try:
        token = get_token() or ""
    except UnicodeDecodeError:
        token = "\ufffd"
    if not re.fullmatch("[!-~]*", token):
        raise error(
            "The Hub's token, which is in HF_TOKEN or was written by `hf auth login`, has "
            "characters that no token has: others than letters, digits and signs of ASCII. Copy it "
            "again from the Hub's settings, or unset it."
        )


def explain(error: Exception, wanted: Wanted) -> KscliError:
    """The error that says what `error` means for what was wanted, and what to do about it."""
    wrapped = isinstance(error, LocalEntryNotFoundError | ConnectionError | RuntimeError)
    if wrapped and isinstance(error.__cause__, Exception):
        error = error.__cause__
    text = next(text for signs, text in _EXPLANATIONS if any(_has(error, sign) for sign in signs))
    reason = textwrap.shorten(without_secrets(str(error)), 300, placeholder=" ...").rstrip(".")
    folder = "datasets/" if wanted.kind == "data set" else ""
    explanation = text.format(
        **vars(wanted),
        reason=reason or type(error).__name__,
        endpoint=without_secrets(constants.ENDPOINT),
        page=f"{without_secrets(constants.ENDPOINT)}/{folder}{wanted.hub_id}",
        cache=constants.HF_HUB_CACHE,
    )
    return wanted.error(explanation)


def is_offline(error: BaseException | None) -> bool:
    """Whether HF_HUB_OFFLINE forbade to ask."""
    return isinstance(error, OfflineModeIsEnabled) or "OfflineModeIsEnabled" in str(error)


def is_out_of_reach(error: BaseException | None) -> bool:
    """Whether the Hub gave no answer of its own: no network, a proxy's page, or an outage."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    no_answer = (ConnectionError, TimeoutError, json.JSONDecodeError, LocalEntryNotFoundError)
    return isinstance(error, (*no_answer, HTTPError))


def _has_status(*codes: int) -> Callable[[Exception], bool]:
    """Whether the Hub answers with one of these codes of HTTP."""
    return lambda error: isinstance(error, HfHubHTTPError) and error.response.status_code in codes


def _has(error: Exception, sign: Sign) -> bool:
    if isinstance(sign, int):
        return isinstance(error, OSError) and error.errno == sign
    if isinstance(sign, str):
        return sign in str(error)
    return isinstance(error, sign) if isinstance(sign, type) else sign(error)


_FAILED = "{hub_id} cannot be {doing}: {reason}."

# The first row with a sign that an error has explains it; GatedRepoError is a
# RepositoryNotFoundError too. Strings are for what `datasets` and hf_xet say in any class.
_EXPLANATIONS: tuple[tuple[tuple[Sign, ...], str], ...] = (
    (
        (GatedRepoError, "is a gated"),
        "{hub_id} is gated: ask for access at {page}, then log in with `hf auth login` or set "
        "HF_TOKEN.",
    ),
    (
        (RepositoryNotFoundError,),
        "The Hub has no {kind} {hub_id}, or it is private and needs `hf auth login` or "
        "HF_TOKEN.{hint}",
    ),
    ((RevisionNotFoundError,), "{hub_id} has no revision {revision} on the Hub."),
    ((DisabledRepoError,), "{hub_id} has been disabled on the Hub."),
    (
        (HFValidationError,),
        "{hub_id} is neither an alias, nor a Hub id (OWNER/NAME), nor a path that exists.{hint}",
    ),
    (
        (errno.ENOSPC, errno.EDQUOT, "No space left on device"),
        "The disk is full: {hub_id} cannot be fetched into {cache}. Free some space, or set "
        "HF_HOME to a folder on another disk.",
    ),
    (
        (errno.EACCES, errno.EPERM, errno.EROFS),
        "The cache {cache} cannot be written; set HF_HOME to a folder that can.",
    ),
    ((_has_status(401),), "The Hub rejects your token; log in again with `hf auth login`."),
    ((_has_status(402, 403),), f"{_FAILED} Use a token that may."),
    ((_has_status(409, 412),), "{hub_id} changed meanwhile; run the command again."),
    ((is_offline,), "HF_HUB_OFFLINE is set{offline}"),
    ((is_out_of_reach,), "The Hub at {endpoint} cannot be reached ({reason}){unreachable}"),
    (
        ("scripts are no longer",),
        f"{_FAILED} kscli runs no code of a data set; name one that is data files.",
    ),
    (
        ("Config name is missing", "BuilderConfig"),
        f"{_FAILED} Write it as hf:OWNER/NAME:CONFIG.",
    ),
    (("Bad split",), f"{_FAILED} Write it as hf:OWNER/NAME:CONFIG:SPLIT."),
    ((Exception,), _FAILED),
)
