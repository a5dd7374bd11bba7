from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors

from kscli.errors import FactsError
from kscli.hub import asking
from kscli.hub.asking import Wanted, ask, explain, explained, is_out_of_reach
from kscli.reporter import silenced

WANTED = Wanted("data set", "o/n", "v1", FactsError, ", so wait.", ", so unset it.", " Or m/n?")


@pytest.fixture(autouse=True)
def nothing_was_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_waited", 0.0)


def http_error(kind: type[Exception], status: int) -> Exception:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("refused", response=response)  # type: ignore[call-arg]


def failing(error: Exception) -> Callable[[float], None]:
    def question(timeout: float) -> None:
        raise error

    return question


# Asking


def test_the_answer_or_the_error_is_passed_on() -> None:
    assert ask(lambda timeout: timeout) == asking.REQUEST_TIMEOUT
    for error in (KeyError("x"), ConnectionError("no route")):
        with pytest.raises(type(error)) as caught:
            ask(failing(error))
        assert caught.value is error


def test_a_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    assert asking.REQUEST_TIMEOUT < asking.DEADLINE < 10
    monkeypatch.setattr(asking, "DEADLINE", 0.05)
    with pytest.raises(TimeoutError, match=r"no answer in 0\.05 seconds"):
        ask(lambda _: released.wait(60))
    released.set()


def test_two_that_never_answer_take_hardly_longer_than_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    released = threading.Event()
    monkeypatch.setattr(asking, "DEADLINE", 0.08)
    for patience in (r"0\.08", r"0\.01", r"0\.01"):
        with pytest.raises(TimeoutError, match=f"no answer in {patience} seconds"):
            ask(lambda _: released.wait(60))
    monkeypatch.setattr(asking, "DEADLINE", 6.0)
    assert ask(lambda _: "an answer") == "an answer"
    monkeypatch.setattr(asking, "DEADLINE", 0.08)
    with pytest.raises(TimeoutError, match=r"no answer in 0\.08 seconds"):
        ask(lambda _: released.wait(60))
    released.set()


@pytest.mark.parametrize(
    ("error", "out_of_reach"),
    [
        (ConnectionError("no route"), True),
        (asking.HTTPError("no route"), True),
        (hub_errors.OfflineModeIsEnabled("offline"), True),
        (http_error(hub_errors.HfHubHTTPError, 503), True),
        (http_error(hub_errors.HfHubHTTPError, 429), True),
        (http_error(hub_errors.RepositoryNotFoundError, 404), False),
        (http_error(hub_errors.HfHubHTTPError, 401), False),
        (hub_errors.HFValidationError("no id"), False),
        (PermissionError("cache"), False),
    ],
)
def test_a_refusal_is_an_answer(error: Exception, out_of_reach: bool) -> None:
    assert is_out_of_reach(error) is out_of_reach


# Silence


def test_the_clients_own_logging_and_warnings_are_silenced(
    capfd: pytest.CaptureFixture[str],
) -> None:
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    with silenced("huggingface_hub"):
        logging.getLogger("huggingface_hub.file_download").warning("loud")
        warnings.warn("loud", stacklevel=1)
    assert logger.level == level
    assert capfd.readouterr() == ("", "")


# Sentences


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            http_error(hub_errors.GatedRepoError, 403),
            "o/n is gated: ask for access at https://hub/datasets/o/n, then log in with "
            "`hf auth login` or set HF_TOKEN.",
        ),
        (
            http_error(hub_errors.RepositoryNotFoundError, 404),
            "The Hub has no data set o/n, or it is private and needs `hf auth login` or HF_TOKEN. "
            "Or m/n?",
        ),
        (
            http_error(hub_errors.RevisionNotFoundError, 404),
            "o/n has no revision v1 on the Hub.",
        ),
        (hub_errors.OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE is set, so unset it."),
        (
            ConnectionError("no\nroute."),
            "The Hub at https://hub cannot be reached (no route), so wait.",
        ),
        (ValueError("It has {braces}."), "o/n cannot be fetched: It has {braces}."),
        (ValueError(), "o/n cannot be fetched: ValueError."),
    ],
)
def test_the_sentence_speaks_of_what_was_wanted(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub")
    explanation = explain(error, WANTED)
    assert type(explanation) is FactsError
    assert str(explanation) == said


def test_what_datasets_wraps_is_explained_by_its_cause() -> None:
    error = ConnectionError("Server Disconnected")
    error.__cause__ = hub_errors.OfflineModeIsEnabled("x")
    assert str(explain(error, WANTED)) == "HF_HUB_OFFLINE is set, so unset it."


def test_only_the_clients_errors_are_explained() -> None:
    with pytest.raises(FactsError, match="o/n cannot be fetched: Is full"), explained(WANTED):
        raise RuntimeError("Is full")
    with pytest.raises(ZeroDivisionError), explained(WANTED):
        raise ZeroDivisionError
    with pytest.raises(FactsError, match="ZeroDivisionError"), explained(WANTED, (Exception,)):
        raise ZeroDivisionError
