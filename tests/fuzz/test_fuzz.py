"""A small slice of the fuzzing, the same each time; and the fuzzing itself finds what it is there for."""

from __future__ import annotations

import random

import pytest

from tests.fuzz import run as runs
from tests.fuzz.mutate import changed_bytes, changed_json
from tests.fuzz.run import Fault, Target, run
from tests.fuzz.targets import NAMES, targets

SLOW = {"template": 10, "constraint": 40, "grpc": 120, "write-blob": 60, "http-bytes": 120, "http-json": 120}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "KEPT", tmp_path / "kept")


@pytest.fixture(scope="module")
def all_targets():
    with targets(NAMES) as made:
        yield {target.name: target for target in made}


@pytest.mark.parametrize("name", NAMES)
def test_no_input_breaks_a_surface(all_targets, name):
    target = all_targets[name]
    result = run(target, len(target.corpus[:10]) + SLOW.get(name, 150), seed=1)
    # A target that always says the same is not trying anything.
    assert len(result.outcomes) > 1


def faulty(data):
    if b"\xff" in data:
        raise KeyError("an error that nobody documented")
    return "taken"


def test_an_error_that_is_not_documented_is_a_fault_whose_input_is_kept(tmp_path):
    target = Target("faulty", [b"abc" * 9], faulty)
    with pytest.raises(Fault, match=r"KeyError.*\n.*input.*\n.*--target faulty --input") as fault:
        run(target, 10_000, seed=0)
    with pytest.raises(KeyError):
        faulty(fault.value.path.read_bytes())


def test_what_an_input_leaves_behind_is_a_fault(tmp_path):
    (tmp_path / "work").mkdir()

    def litter(data):
        (tmp_path / "work" / str(len(list((tmp_path / "work").iterdir())))).write_bytes(data)
        return "taken"

    with pytest.raises(Fault, match="left behind"):
        run(Target("litter", [b"a"], litter, folder=tmp_path / "work"), 300, seed=0)


def test_the_same_seed_makes_the_same_inputs_and_another_one_makes_others():
    target = Target("t", [b"abcdefgh" * 8], faulty)
    first, again, other = ([target.input(seed, n) for n in range(1, 60)] for seed in (0, 0, 1))
    assert first == again
    assert len(set(first) & set(other)) < 10


@pytest.mark.parametrize("mutate", [changed_bytes, changed_json])
def test_mutators_change_what_they_are_given(mutate):
    corpus = [b'{"a": [1, 2, {"b": "text"}], "c": null}']
    made = {mutate(random.Random(i), corpus) for i in range(300)}
    assert len(made) > 150
