"""Simulated faults: drawn as asked, noticed by the server, survived, and the same bits again."""

from __future__ import annotations

import json

import pytest
import torch

from fedkd.algorithms.base import Algorithm, Update
from fedkd.core.communication.channel import Channel
from fedkd.core.communication.codecs import Float32
from fedkd.core.communication.ledger import SerializedBytes, Traffic
from fedkd.core.communication.replies import Reply
from fedkd.core.errors import RunError, UsageError
from fedkd.simulate import checks, faults, simulate
from fedkd.simulate.experiment import prepare
from fedkd.simulate.flower.client_app import _corrupted
from fedkd.simulate.rounds import run_rounds, sample
from tests.conftest import TINY, reasons, run, simulated, tiny
from tests.simulate.test_engines import left

PLAIN = Channel(Float32(), Float32())
QUICK = {"model": "cnn:width=4", "algorithm": "fedmd", "partitioner": "tests.simulate.partitions:sixteen"}


def test_faults_are_read_from_one_text():
    found = faults.parse("dropout=0.3,straggler=0.2:slowdown=4,crash=0.05,corrupt=0.05,late=use")
    assert found == faults.Faults(dropout=0.3, straggler=0.2, slowdown=4, crash=0.05, corrupt=0.05, late="use")
    assert faults.parse("") == faults.Faults()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("drop=0.1", "Did you mean 'dropout'"),
        ("dropout", "Cannot read 'dropout' in --faults"),
        ("dropout=1.5", "--faults dropout=1.5 is not usable"),
        ("dropout=nan", "--faults dropout=nan is not usable"),
        ("dropout=0.1,dropout=0.2", "Cannot read 'dropout=0.2'"),
        ("straggler=0.1:slowdown=0.5", "--faults slowdown=0.5 is not usable"),
        ("late=never", "--faults late=never is not usable"),
        ("dropout=0.6,crash=0.6", "sum to more than 1"),
    ],
)
def test_what_cannot_be_read_is_refused_before_the_run(text, expected):
    with pytest.raises(UsageError, match=expected):
        checks.check(tiny(faults=text))


def test_options_that_exclude_each_other_are_refused():
    with pytest.raises(UsageError, match="--min-clients 4 is more than the 3 clients of a round"):
        checks.check(tiny(min_clients=4))
    with pytest.raises(UsageError, match="leave out --proxy-samples"):
        checks.check(tiny(faults="late=use", round_timeout=2.0, proxy_samples=10))
    with pytest.raises(UsageError, match="scarlet asks for other proxy samples"):
        checks.check(tiny(faults="late=use", round_timeout=2.0, compare="scarlet"))


def test_what_has_no_effect_is_refused():
    with pytest.raises(UsageError, match="late=use needs --round-timeout"):
        checks.check(tiny(faults="straggler=0.2,late=use"))
    with pytest.raises(UsageError, match="slowdown in --faults needs stragglers"):
        checks.check(tiny(faults="slowdown=3"))


def test_faults_occur_as_often_as_asked_and_depend_on_seed_round_attempt_and_client_alone():
    asked = faults.Faults(dropout=0.3, straggler=0.2, crash=0.1, corrupt=0.2)
    drawn = [faults.draw(asked, 0, number, 0, range(100)) for number in range(50)]
    names = [name for one in drawn for name in one.values()]
    share = {name: names.count(name) / 5000 for name in ("dropout", "straggler", "crash")}
    corrupt = {name: names.count(name) / 5000 for name in faults.CORRUPT}
    assert share == pytest.approx({"dropout": 0.3, "straggler": 0.2, "crash": 0.1}, abs=0.03)  # 5 standard deviations
    assert corrupt == pytest.approx(dict.fromkeys(faults.CORRUPT, 0.2 / 6), abs=0.013)
    assert faults.draw(asked, 0, 7, 0, [3, 50]) == {c: name for c, name in drawn[7].items() if c in (3, 50)}
    assert faults.draw(asked, 0, 7, 1, range(100)) != drawn[7]
    assert faults.draw(asked, 1, 7, 0, range(100)) != drawn[7]


@pytest.mark.parametrize("codec", ["float32", "float16", "bits:bits=2,coder=zstd,delta=true"])
@pytest.mark.parametrize("algorithm", ["ensemble", "fedavg", "selective-fd", "local", "fedproto"])
def test_every_corrupt_reply_is_refused(algorithm, codec, tmp_path):
    """By hand, then over the messages of a run in which all replies but the first client's are corrupt."""
    held = prepare(tiny(algorithm=algorithm, uplink_codec=codec))
    shapes = held.algorithm.upload_spec(held.setup, 0, 1)
    sent = {n: torch.full([abs(e) for e in shape], 0.1) for n, shape in shapes.items()}
    for fault in faults.CORRUPT:
        changed = _corrupted(dict(sent), fault)
        assert set(changed) != set(sent) or any(
            changed[n].shape != t.shape or changed[n].dtype != t.dtype or changed[n].isnan().any()
            for n, t in sent.items()
        )
    rows = simulated(
        tmp_path,
        algorithm=algorithm,
        uplink_codec=codec,
        faults="corrupt=0.7",
        clients=8,
        exclude_after=0,
        partitioner=QUICK["partitioner"],
    )
    found = [failure for row in rows for failure in row["failures"]]
    expected = [faults.draw(faults.Faults(corrupt=0.7), 0, number, 0, range(8)) for number in (1, 2)]
    assert [[failure["client"] for failure in row["failures"]] for row in rows] == [list(each) for each in expected]
    assert {failure["cause"] for failure in found} == {"refused"}
    result = json.loads((tmp_path / "result.json").read_text())["runs"][0]
    assert (result["failures"], result["failure_causes"]) == (len(found), {"refused": len(found)})


FAULTS = {"faults": "dropout=0.3,crash=0.1,corrupt=0.1", "clients": 20, "exclude_after": 2}
FAULTS |= {"client_test_samples": 20}  # evaluating 20 clients would take most of the time


@pytest.mark.slow
def test_twenty_rounds_with_faults_finish_with_the_same_bits(tmp_path):
    """On one worker and on two, where crashes end processes; none of these is left."""
    options = TINY | QUICK | FAULTS | {"algorithm": "fedavg", "rounds": 20}
    del options["workers"]
    flags = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)]
    rows = []
    for workers in (1, 2):
        process = run(*flags, "--workers", workers, "--out", tmp_path / str(workers))
        assert process.returncode == 0, process.stderr
        assert not left(tmp_path)
        lines = (tmp_path / str(workers) / "rounds.jsonl").read_text().splitlines()
        rows.append([{k: v for k, v in json.loads(line).items() if "seconds" not in k} for line in lines])
    assert rows[0] == rows[1]
    assert len(rows[0]) == 20
    students = [(tmp_path / workers / "student.safetensors").read_bytes() for workers in ("1", "2")]
    assert students[0] == students[1]
    causes = [failure["cause"] for row in rows[0] for failure in row["failures"]]
    assert {cause: causes.count(cause) / 400 for cause in set(causes)} == pytest.approx(
        {"no reply": 0.3, "died": 0.1, "refused": 0.1}, abs=0.08
    )


def test_a_run_with_faults_is_resumed_with_the_same_bits(tmp_path):
    """Late updates, refusals in a row and retries are part of a checkpoint."""
    options = {
        **QUICK,
        "algorithm": "fedavg",
        "clients": 6,
        "faults": "dropout=0.2,corrupt=0.3,straggler=0.3:slowdown=5,late=use",
        "round_timeout": 2.0,
        "min_clients": 2,
        "round_retries": 8,
        "exclude_after": 3,
    }
    whole = simulated(tmp_path / "whole", **options, rounds=6)
    simulated(tmp_path / "parts", **options, rounds=3)
    simulate(tiny(resume=str(tmp_path / "parts"), **options, rounds=6))
    parts = [json.loads(line) for line in (tmp_path / "parts" / "rounds.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if "seconds" not in k} for row in parts] == whole
    names = [tmp_path / name / "student.safetensors" for name in ("whole", "parts")]
    assert names[0].read_bytes() == names[1].read_bytes()
    causes = {failure["cause"] for row in whole for failure in row["failures"]}
    assert causes == {"no reply", "late", "refused"}
    assert any(row["attempts"] > 1 for row in whole)
    assert any(row["participants"] + len(row["failures"]) > 6 * row["attempts"] for row in whole), "late updates count"


# The round loop, by hand.


class Adding(Algorithm):
    def initial_state(self, setup):
        return {"sum": torch.zeros(1)}

    def local_update(self, setup, client, message):
        raise NotImplementedError

    def upload_spec(self, setup, client, number):
        return {"x": (1,)}

    def aggregate(self, setup, state, updates, seed):
        return {"sum": state["sum"] + sum(update.tensors["x"] for update in updates.values())}


def setup_with(**changes):
    class Setup:
        config = tiny(clients=4, **changes)

    return Setup


def answering(values):
    """An exchange whose client sends ``values(round, attempt, client)``: a number, or nothing."""
    attempts: dict[int, int] = {}

    def exchange(kind, number, messages, expected):
        attempts[number] = attempts.get(number, -1) + 1
        for client in messages:
            if (value := values(number, attempts[number], client)) is not None:
                yield Reply(client, Update({"x": torch.tensor([value])}, 1), "", SerializedBytes(1, 1, 1, 1))

    return exchange


def test_a_round_is_repeated_until_there_are_enough_updates():
    exchange = answering(lambda number, attempt, client: 1.0 if client < 2 + attempt else None)
    (round_,) = run_rounds(Adding(), setup_with(rounds=1, min_clients=4, round_retries=3), exchange, 4, PLAIN)
    assert (round_.attempts, list(round_.updates), round_.state["sum"].item()) == (3, [0, 1, 2, 3], 4.0)
    assert [failure.client for failure in round_.failures] == [2, 3, 3]
    assert round_.serialized == SerializedBytes(9, 9, 9, 9), "bytes are of all attempts"
    with pytest.raises(
        RunError, match=r"3 of 4 clients sent a usable update in the last of 2 attempts, fewer than --min"
    ):
        list(run_rounds(Adding(), setup_with(min_clients=4, round_retries=1), exchange, 4, PLAIN))


def test_a_late_update_of_a_repeated_round_counts_in_the_next_one():
    """In the first attempt only client 3 replies, too late; in the second the others do."""
    exchange = answering(lambda n, attempt, client: 10.0**client if (client == 3) == (n == 1 and not attempt) else None)
    run = setup_with(faults="late=use", rounds=2, round_timeout=2.0, round_retries=1, min_clients=2)
    first, second = run_rounds(Adding(), run, exchange, 4, PLAIN, samples=[10, 10, 10, 50])
    assert (first.attempts, list(first.updates), first.state["sum"].item()) == (2, [0, 1, 2], 111)
    assert (list(second.updates), second.state["sum"].item()) == ([0, 1, 2, 3], 1222)
    assert not second.late


def test_other_clients_are_sampled_when_a_round_is_repeated():
    draws = [sample(50, 0.2, 0, 1, (), attempt) for attempt in range(3)]
    assert draws[0] == sample(50, 0.2, 0, 1)
    assert len(set(map(tuple, draws))) == 3
    assert all(draw == sorted(set(draw)) and len(draw) == 10 for draw in draws)


def test_who_is_refused_three_times_in_a_row_is_excluded():
    bad = {1: (1, 2, 3, 4, 5), 2: (1, 2, 4, 5)}  # client -> the rounds in which it sends no number
    exchange = answering(lambda number, _, client: float("nan") if number in bad.get(client, ()) else 1.0)
    rounds = list(run_rounds(Adding(), setup_with(rounds=5), exchange, 4, PLAIN))
    assert [sorted(reasons(round_.failures)) for round_ in rounds] == [[1, 2], [1, 2], [1], [2], [2]]
    assert [list(round_.updates) for round_ in rounds] == [[0, 3], [0, 3], [0, 2, 3], [0, 3], [0, 3]]
    never = list(run_rounds(Adding(), setup_with(rounds=5, exclude_after=0), exchange, 4, PLAIN))
    assert sorted(reasons(never[-1].failures)) == [1, 2]
    assert 1 not in sample(4, 1.0, 0, 1, {1})
    assert {c for n in range(20) for c in sample(8, 0.5, 0, n, {1, 5})} == {0, 2, 3, 4, 6, 7}


def test_a_run_ends_when_all_clients_are_excluded():
    exchange = answering(lambda number, attempt, client: float("nan") if number > 1 else 1.0)
    rounds = run_rounds(Adding(), setup_with(rounds=9, round_retries=5, exclude_after=2), exchange, 4, PLAIN)
    next(rounds)
    with pytest.raises(RunError, match="Round 2: no clients are left; the others are excluded"):
        next(rounds)


def test_late_updates_are_dropped_or_used_in_the_next_round():
    """Of 4 clients with 10, 10, 10 and 50 samples the last takes 2.5 times as long as the mean one."""
    exchange = answering(lambda number, attempt, client: 10.0**client * number)
    samples, run = [10, 10, 10, 50], {"rounds": 3, "round_timeout": 2.0}
    drop, use = (
        list(run_rounds(Adding(), setup_with(faults=f"late={late}", **run), exchange, 4, PLAIN, samples=samples))
        for late in ("drop", "use")
    )
    assert [round_.state["sum"].item() for round_ in drop] == [111, 333, 666]
    assert [round_.state["sum"].item() for round_ in use] == [111, 1333, 3666]
    for round_ in (*drop, *use):
        assert reasons(round_.failures) == {3: "its local update took 2.5, and --round-timeout is 2"}
        assert round_.duration == 2.0
    assert [list(round_.updates) for round_ in use] == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    size = Traffic(4, 4, 4)
    assert [round_.uplink for round_ in drop] == [size + size + size] * 3
    four = size + size + size + size
    assert [round_.uplink for round_ in use] == [size + size + size, four, four], "bytes count with the update"
    in_time = next(run_rounds(Adding(), setup_with(round_timeout=3.0), exchange, 4, PLAIN, samples=samples))
    assert (in_time.failures, in_time.duration) == ([], 2.5)
    silent = answering(lambda number, attempt, client: 1.0 if attempt and not client else None)
    retried = setup_with(rounds=1, round_timeout=3.0, round_retries=1)
    (last,) = run_rounds(Adding(), retried, silent, 4, PLAIN, samples=samples)
    assert (last.attempts, last.duration) == (2, 6.0), "the server waits in both attempts"
    slow = setup_with(faults="straggler=1:slowdown=3")
    (first, *_) = run_rounds(Adding(), slow, exchange, 4, PLAIN, samples=samples)
    assert (first.failures, first.duration) == ([], 7.5)
    as_many = setup_with(faults="straggler=1:slowdown=3", local_steps=5)
    (first, *_) = run_rounds(Adding(), as_many, exchange, 4, PLAIN, samples=samples)
    assert first.duration == 3.0, "all train on as many batches"


def test_an_aggregate_that_is_not_finite_names_the_largest_update():
    class Overflowing(Adding):
        def aggregate(self, setup, state, updates, seed):
            return {"sum": super().aggregate(setup, state, updates, seed)["sum"] * 1e38}

    exchange = answering(lambda number, attempt, client: 9e8 if client == 2 else 0.5)
    with pytest.raises(
        RunError, match=r"not finite\. The largest number, 9e\+08, came from client 2; the median is 0\.5"
    ):
        list(run_rounds(Overflowing(), setup_with(), exchange, 4, PLAIN))


def test_more_examples_than_a_client_has_are_refused():
    def exchange(kind, number, messages, expected):
        for client, examples in ((0, 10), (1, 11), (2, 10**18), (3, 10**400)):
            yield Reply(client, Update({"x": torch.ones(1)}, examples), "", SerializedBytes())

    (known,) = run_rounds(Adding(), setup_with(rounds=1), exchange, 4, PLAIN, samples=[10] * 4)
    assert list(known.updates) == [0]
    assert reasons(known.failures)[1] == "sent a number of examples above 10, which is all that the client can have"
    (unknown,) = run_rounds(Adding(), setup_with(rounds=1), exchange, 4, PLAIN)
    assert list(unknown.updates) == [0, 1]
