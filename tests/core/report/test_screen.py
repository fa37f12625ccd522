"""The progress bar and the estimate of the remaining time, with a clock that the test advances."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fedkd.core.communication.ledger import SerializedBytes
from fedkd.core.communication.replies import Reply
from fedkd.core.report import screen as screens
from fedkd.core.report.screen import Estimate, Screen, duration
from tests.conftest import tiny


class Clock:
    """Seconds that pass only where a test adds them."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def console(terminal: bool, width: int = 120) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=width), out


def shown(screen: Screen, width: int) -> str:
    """The bar as text."""
    target, out = console(True, width)
    target.print(screen._bar.get_renderable())
    return out.getvalue()


def row(number: int) -> dict:
    return {
        "round": number, "test_accuracy": 0.5, "test_loss": 1.0, "teacher_accuracy": 0.6, "client_accuracy": 0.4,
        "uplink_serialized_bytes": 1000, "downlink_serialized_bytes": 2000, "training_seconds": 12.0,
        "evaluation_seconds": 3.0, "failures": [], "evaluation_failures": [], "validation_accuracy": None,
        "algorithm": "fedmd", "seed": 0, "excluded": [],
    }  # fmt: skip


def exchange_of(clock: Clock, seconds: dict[str, float]):
    """Each client takes so many seconds for training and for evaluation."""

    def exchange(kind, number, messages, expected=None):
        for client in messages:
            clock.now += seconds[kind]
            yield Reply(client, None, "x", SerializedBytes())

    return exchange


def simulate(screen: Screen, clock: Clock, runs, seconds, sizes=(10, 10), server=0.0, after_reply=lambda: None):
    """All rounds of all runs, as the runner shows them."""
    with screen.progress(sum(run.rounds for run in runs)):
        for run in runs:
            watched = screen.watch(exchange_of(clock, seconds), run, sizes)
            for number in range(1, run.rounds + 1):
                for kind in ("train", "evaluate"):
                    for _ in watched(kind, number, {client: {} for client in range(len(sizes))}, {}):
                        after_reply()
                    clock.now += server
                screen.row(row(number), run.rounds)


def test_no_estimate_before_the_first_reply():
    estimate = Estimate(rounds=4, start=0.0)
    estimate.update("train", 0.0)
    assert estimate.remaining(now=50.0) is None
    estimate.update("train", 0.5)
    assert estimate.done == pytest.approx(0.5 * 0.75 / 4)
    assert estimate.remaining(now=30.0) == pytest.approx(30 * (1 - 0.09375) / 0.09375)


def test_the_measured_times_of_training_and_evaluation_replace_the_assumed_ones():
    estimate = Estimate(rounds=2, start=0.0)
    estimate.begin("train", 0.0)
    estimate.update("train", 1.0)
    estimate.begin("evaluate", 30.0)
    estimate.update("evaluate", 0.0)
    assert estimate.done == 0.75 / 2
    estimate.end_round(50.0)
    assert estimate.done == 1 / 2
    estimate.begin("train", 51.0)
    estimate.update("train", 0.5)
    assert estimate.done == pytest.approx((1 + 0.5 * 0.6) / 2)
    estimate.begin("evaluate", 81.0)
    estimate.update("evaluate", 0.5)
    assert estimate.done == pytest.approx((1 + 0.6 + 0.5 * 0.4) / 2)
    assert estimate.remaining(now=91.0) == pytest.approx(91 * 0.1 / 0.9)
    estimate.end_round(131.0)
    assert estimate.spent == {"train": 60.0, "evaluate": 70.0}


def test_rounds_without_evaluation_do_not_change_the_assumed_times():
    estimate = Estimate(rounds=4, start=0.0)
    for number in range(2):
        estimate.begin("train", 10.0 * number)
        estimate.update("train", 1.0)
        assert estimate.done == (number + 0.75) / 4
        estimate.end_round(10.0 * number + 10)
        assert estimate.done == (number + 1) / 4


def test_the_estimate_never_decreases_and_never_reaches_one():
    estimate = Estimate(rounds=2, start=0.0)
    estimate.end_round(1.0)
    estimate.update("evaluate", 0.5)
    before = estimate.done
    estimate.update("train", 0.0)
    assert estimate.done == before
    estimate.update("evaluate", 1.0 + 1e-9)
    assert before < estimate.done == screens.ALMOST_DONE < 1
    estimate.end_round(2.0)
    estimate.end_round(3.0)
    assert estimate.done < 1
    one = Estimate(rounds=1, start=0.0)
    one.update("train", 3.0)
    assert one.done == 0.75, "replies of training do not count as evaluation"


def test_three_methods_and_two_seeds_are_one_bar(clock):
    """Clients of equal size, one second for training and a third for evaluation: every estimate is exact."""
    config = tiny(algorithm="ensemble", compare="fedavg local", seeds=2, rounds=2)
    runs = config.runs("digits")
    assert len(runs) == 6
    screen = Screen(console(True)[0], clock)
    start, in_all, completed = clock.now, 6 * 2 * 2 * (1 + 1 / 3), []

    def after_reply():
        task = screen._bar.tasks[0]
        completed.append(task.completed)
        elapsed = clock.now - start
        assert task.completed == pytest.approx(min(elapsed / in_all, screens.ALMOST_DONE))
        assert not task.finished
        assert task.elapsed == elapsed, "the clock does not stop"
        if task.completed < screens.ALMOST_DONE:
            assert task.fields["end"] == pytest.approx(start + in_all)

    simulate(screen, clock, runs, {"train": 1.0, "evaluate": 1 / 3}, after_reply=after_reply)
    assert len(completed) == 6 * 2 * 2 * 2
    assert completed == sorted(completed)
    assert clock.now - start == pytest.approx(in_all)
    assert screen._bar is None


def test_the_remaining_time_after_a_run_that_ends_early(clock):
    """The first of two runs ends after one of four rounds: five rounds in all, of which one is done."""
    screen = Screen(console(True)[0], clock)
    with screen.progress(8):
        for run, last in ((tiny(rounds=4), 1), (tiny(algorithm="local", rounds=4), 4)):
            watched = screen.watch(exchange_of(clock, {"train": 9.0, "evaluate": 3.0}), run, [10, 10])
            for number in range(1, last + 1):
                for kind in ("train", "evaluate"):
                    for _ in watched(kind, number, {0: {}, 1: {}}, {}):
                        task = screen._bar.tasks[0]
                        if run.algorithm == "local" and task.completed < screens.ALMOST_DONE:
                            assert task.fields["end"] == pytest.approx(1000 + 5 * 24)
                screen.row(row(number), run.rounds, number == last)
    assert clock.now == 1000 + 5 * 24


def test_the_clock_goes_on_after_the_last_reply(clock):
    """The student of the last round is evaluated and saved after it."""
    screen = Screen(console(True)[0], clock)
    with screen.progress(1):
        watched = screen.watch(exchange_of(clock, {"train": 5.0, "evaluate": 5.0}), tiny(rounds=1), [10, 10])
        for kind in ("train", "evaluate"):
            list(watched(kind, 1, {0: {}, 1: {}}, {}))
        screen.row(row(1), 1)
        task = screen._bar.tasks[0]
        for seconds in (20.0, 47.0):
            clock.now = 1000.0 + seconds
            assert task.elapsed == seconds
        assert (task.finished, task.completed) == (False, screens.ALMOST_DONE)


def test_clients_count_by_their_numbers_of_samples(clock):
    screen, seen = Screen(console(True)[0], clock), []
    with screen.progress(1):
        watched = screen.watch(exchange_of(clock, {"train": 1.0}), tiny(rounds=1), [99, 9, 89])
        for _ in watched("train", 1, {0: {}, 1: {}, 2: {}}, {}):
            seen.append(screen._bar.tasks[0].completed)
    assert seen == pytest.approx([0.75 * 100 / 200, 0.75 * 110 / 200, 0.75])


def test_the_description_names_what_runs(clock):
    screen, seen = Screen(console(True)[0], clock), []
    run = tiny(algorithm="dsfl", seed=3, rounds=4)
    with screen.progress(4):
        watched = screen.watch(exchange_of(clock, {"train": 1.0, "evaluate": 1.0}), run, [10, 10])
        for kind in ("train", "evaluate"):
            for _ in watched(kind, 2, {0: {}, 1: {}}, {}):
                seen.append(screen._bar.tasks[0].description)
    where = "dsfl, seed 3, round 2 of 4: "
    texts = ["training, 1 of 2 clients", "server update", "evaluation, 1 of 2 clients", "evaluation"]
    assert seen == [where + text for text in texts]


@pytest.mark.parametrize("width", [60, 80, 160])
def test_a_narrow_terminal_cuts_the_description_and_not_the_times(clock, width):
    screen = Screen(console(True, width)[0], clock)
    with screen.progress(2):
        watched = screen.watch(exchange_of(clock, {"train": 75.0}), tiny(algorithm="[b]ensemble", rounds=2), [10, 10])
        for _ in watched("train", 1, {0: {}, 1: {}}, {}):
            text = shown(screen, width)
            assert "left" in text
            assert ("…" in text) is (width < 160)
    assert "0:02:30" in text
    assert "about 0:04:10 left" in text, "two rounds take 400 s"
    assert len(text.strip("\n").splitlines()) == 1
    assert width < 160 or "[b]ensemble, seed 0, round 1 of 2: server update" in text


def test_the_remaining_time_counts_down_between_replies(clock):
    screen = Screen(console(True)[0], clock)
    exchange = exchange_of(clock, {"train": 30.0})
    with screen.progress(1):
        replies = iter(screen.watch(exchange, tiny(rounds=1), [10, 10])("train", 1, {0: {}, 1: {}}, {}))
        next(replies)
        for later, left in ((0.0, "0:00:50"), (20.0, "0:00:30"), (49.0, "0:00:01"), (90.0, "0:00:00")):
            clock.now = 1030.0 + later
            assert f"about {left} left" in shown(screen, 120)


def test_plain_lines_with_the_remaining_time_without_a_terminal(clock):
    target, out = console(False)
    simulate(Screen(target, clock), clock, [tiny(rounds=2)], {"train": 15.0, "evaluate": 5.0}, server=2.0)
    lines = out.getvalue().splitlines()
    done = 0.5 * 0.75 / 2
    assert (
        lines[0].strip() == f"round 1: training, 1 of 2 clients; about {duration(15 * (1 - done) / done)} left in all"
    )
    assert lines[1].strip().startswith("round 1: server update; about 0:00:50 left in all")
    rows = [line for line in lines if "50.0%" in line]
    assert len(rows) == 2
    assert rows[0].split() == ["1/2", "50.0%", "1.000", "60.0%", "40.0%", "1", "kB", "2", "kB", "12.0", "s", "3.0", "s"]
    assert "\x1b" not in out.getvalue()


def test_no_line_inside_a_short_round(clock):
    target, out = console(False)
    simulate(Screen(target, clock), clock, [tiny(rounds=1)], {"train": 1.0, "evaluate": 1.0})
    assert len(out.getvalue().splitlines()) == 1


def test_the_bar_ends_with_the_block_also_after_an_error(clock):
    screen = Screen(console(True)[0], clock)
    with pytest.raises(ValueError, match="stop"), screen.progress(1):
        raise ValueError("stop")
    assert screen._bar is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3599, "0:59:59"), (90061, "25:01:01")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_failures_are_listed_by_cause_with_their_clients_and_each_kind_is_explained_once(clock):
    target, out = console(False)
    screen = Screen(target, clock)

    def failed(client: int, cause: str, reason: str) -> dict:
        return {"client": client, "cause": cause, "reason": reason}

    failures = [failed(client, "no reply", "no reply") for client in range(7)]
    failures += [failed(8, "refused", "sent no logits"), failed(9, "refused", "sent no logits")]
    screen.row({**row(1), "failures": failures, "excluded": [8]}, 2)
    screen.row({**row(2), "failures": failures[-1:], "excluded": [8, 9, 10]}, 2)
    lines = [line.strip() for line in out.getvalue().splitlines()]
    assert "updates missing: 7 no reply (clients 0, 1, 2, 3, 4, …), 2 refused (clients 8, 9)" in lines
    assert lines.count("client 8: sent no logits") == 1
    assert "client 9: sent no logits" not in lines
    assert "excluded from now on: client 8" in lines
    assert "updates missing: 1 refused (client 9)" in lines
    assert "excluded from now on: clients 9, 10" in lines
