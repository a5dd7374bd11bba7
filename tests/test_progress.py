"""What a progress bar says: how much, the rate, and the time left."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from kscli.cli import console
from kscli.cli.console import ConsoleReporter, clock, progress_text
from kscli.corpus import CorpusSpec, open_corpus
from kscli.models.loading import load_tokenizer
from kscli.models.locating import ModelOptions, locate_model
from kscli.second_moment import token_stream
from kscli.second_moment.options import CovarianceOptions
from kscli.second_moment.token_stream import TokenStream, count_documents, expected_tokens


def test_documents_are_counted_where_that_is_soon_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a b"}\n' * 7)
    corpus = open_corpus(CorpusSpec(str(path)))
    assert [count_documents(corpus, most) for most in (None, 100, 5)] == [7, 7, 5]
    with monkeypatch.context() as patched:
        patched.setattr(token_stream, "COUNTING_SECONDS", -1)
        assert count_documents(corpus, 100) is None
    # A run says so where it comes to the bad record, if it does.
    path.write_text('{"text": "a b"}\n' * 7 + "{\n")
    assert count_documents(open_corpus(CorpusSpec(str(path))), 100) is None


def test_the_time_left_follows_from_the_rate() -> None:
    assert progress_text(30, 90, "facts", 30, 10) == "30/90 facts, 3/s, 0:20 left"
    assert progress_text(2500, 5000, "tokens", 500, 5) == "2,500/5,000 tokens, 100/s, 0:25 left"
    assert progress_text(7, None, "files", 7, 14) == "7 files, 0.5/s"
    assert progress_text(0, 90, "", 0, 3) == "0/90"
    assert (clock(42), clock(185), clock(3723)) == ("0:42", "3:05", "1:02:03")


@pytest.mark.parametrize("width", [80, 120])
def test_a_line_of_progress_has_a_bar_a_rate_and_a_time_left(width: int) -> None:
    stream = io.StringIO()
    reporter = ConsoleReporter()
    reporter.console = Console(
        file=stream, force_terminal=True, width=width, color_system=None, _environ={"TERM": "xterm"}
    )
    with reporter.task("C of tiny", 90_000.0, unit="tokens") as task:
        task.reach(45_000, 90_000, "5,634 documents · 2.3% padding · p ± 0.006")
    lines = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", stream.getvalue()).replace("\r", "\n").split("\n")
    (last,) = [line for line in lines if "45,000/90,000 tokens" in line][-1:]
    assert len(last) <= width
    assert "━━━" in last
    assert re.search(r"/s, \d+:\d\d left", last)


def test_without_a_terminal_a_long_task_says_a_line_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    for quiet in (False, True):
        reporter = ConsoleReporter(quiet=quiet)
        reporter.console = Console(file=stream, soft_wrap=True)
        with reporter.task("keys", 90.0, unit="facts") as task:
            for second in range(10, 100, 10):
                now[0] += 10
                task.reach(second / 2, 90, "at layer 3")
    assert stream.getvalue() == "keys: 30/90 facts, 0.5/s, 2:00 left, at layer 3\n"


def test_the_tokens_of_tiny_are_expected_rightly_from_a_tenth_on() -> None:
    """`--samples` asks for more documents than there are, and the corpus says how many."""
    tokenizer = load_tokenizer(locate_model(ModelOptions("tiny")), ModelOptions("tiny"))
    corpus = open_corpus(CorpusSpec("tiny"))
    options = CovarianceOptions(samples=100_000, max_length=256)
    stream = TokenStream(tokenizer, corpus, options, first=2048, most=4096)
    windows = list(stream)
    assert corpus.count == windows[-1].end.documents
    tokens = windows[-1].end.tokens
    expected = expected_tokens(tokenizer, corpus, options)
    assert expected.tokens is not None
    assert not expected.at_most
    assert tokens / 2 < expected.tokens < 2 * tokens
    for window in windows:
        if window.end.tokens > tokens / 10:
            guess = window.end.tokens * corpus.count / window.end.documents
            assert tokens / 2 < guess < 2 * tokens
