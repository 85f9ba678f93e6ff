"""Peers in processes of their own: what they compute, and that one that fails loses no other."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
import torch

from bench import tables
from bench.__main__ import main
from bench.common.timing import ReportedError, Stopwatch
from bench.kernels import gate
from bench.kernels.inputs import load_inputs, make_inputs, save_inputs
from bench.kernels.local import Local
from bench.kernels.remote import hand_over, started
from bench.peers import PACKAGES, all_peers, peers_of
from bench.peers.peer import MODES

CPU = torch.device("cpu")
BY_NAME = {mode.name: mode for mode in MODES}
# What the adapter of prime-rl calls, with a right answer, or none where a file says so.
LM_HEAD = """
    import os, pathlib, torch

    class _SequenceChunkedLogProbEntropyFn:
        @staticmethod
        def apply(hidden, weight, targets, inverse_temperature, chunk):
            print("a line that is no answer")
            if pathlib.Path(__file__).with_name("crash").exists():
                print("out of luck", file=__import__("sys").stderr)
                os._exit(7)
            logits = (hidden @ weight.T).float() * inverse_temperature[:, None]
            scores = torch.log_softmax(logits, -1)
            entropy = -(scores.exp() * scores).sum(-1).detach()
            return scores.gather(1, targets[:, None])[:, 0], entropy
"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder of packages with a prime-rl that works and a TRL that cannot be imported."""
    layers = tmp_path / "packages" / "prime_rl" / "prime_rl" / "trainer" / "models" / "layers"
    layers.mkdir(parents=True)
    (layers / "lm_head.py").write_text(textwrap.dedent(LM_HEAD))
    broken = tmp_path / "packages" / "trl" / "trl"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('made for another torch')")
    return tmp_path / "packages"


def test_every_package_has_a_process_and_peers_of_its_own() -> None:
    names = [peer.name for package in PACKAGES for peer in peers_of(package)]
    assert len(set(names)) == len(names)
    assert {peer.name for peer in all_peers() if not peer.is_ours} == {
        *names,
        "torch eager",
        "torch.compile",
    }


def test_a_problem_is_the_same_after_a_file(tmp_path: Path) -> None:
    inputs = make_inputs(64, 16, 101, torch.bfloat16, CPU, seed=3)
    save_inputs(inputs, tmp_path / "inputs.pt")
    again = load_inputs(str(tmp_path / "inputs.pt"), CPU)
    assert again.hidden.requires_grad and again.weight.requires_grad and again.active is None
    for name in ("hidden", "weight", "targets", "old_logprob", "advantage", "aux_weight"):
        assert torch.equal(getattr(again, name), getattr(inputs, name))
    assert (again.num_sequences, again.temperature) == (inputs.num_sequences, inputs.temperature)


def test_a_peer_computes_the_same_in_its_process_and_a_crash_is_its_own(packages: Path) -> None:
    names = ["prime-rl", "TRL chunked"]
    inputs = make_inputs(64, 16, 101, torch.float32, CPU, seed=3)
    with started(names, packages, CPU, torch.float32) as (remotes, found):
        assert list(remotes) == ["prime-rl"] and found["prime-rl"]["reason"] is None
        assert "made for another torch" in str(found["TRL chunked"]["reason"])
        remote = remotes["prime-rl"]
        hand_over([remote], inputs)
        for name in ("two_temperatures", "training"):
            mode = BY_NAME[name]
            expected = gate.truth(inputs, mode, mode.loss)
            values = remote.values("prime-rl", mode)
            assert values.keys() == expected.keys()
            for key, value in values.items():
                torch.testing.assert_close(value.double(), expected[key], rtol=1e-4, atol=1e-5)
        assert remote.time_ms("prime-rl", mode) > 0
        peak = remote.peak("prime-rl", mode)
        assert peak is None or peak < 2**30

        mark = next(packages.glob("prime_rl/**/lm_head.py")).with_name("crash")
        mark.touch()
        with pytest.raises(ReportedError, match="exit code 7: out of luck"):
            remote.time_ms("prime-rl", mode)
        with pytest.raises(ReportedError, match="exit code 7"):  # and stays so for this problem
            remote.values("prime-rl", mode)
        mark.unlink()
        hand_over([remote], inputs)  # the next problem has a new process
        assert remote.values("prime-rl", mode).keys() == expected.keys()


def test_a_peer_s_error_is_its_message(packages: Path) -> None:
    module = next(packages.glob("prime_rl/**/lm_head.py"))
    module.write_text("class _SequenceChunkedLogProbEntropyFn: pass\n")
    with started(["prime-rl"], packages, CPU, torch.float32) as (remotes, _):
        (remote,) = remotes.values()
        hand_over([remote], make_inputs(32, 16, 101, torch.float32, CPU, seed=3))
        for _ in range(2):  # an error does not end the process
            with pytest.raises(ReportedError, match="^AttributeError: type object"):
                remote.values("prime-rl", BY_NAME["forward"])


def test_a_local_peer_leaves_gradients_until_they_are_cleared() -> None:
    inputs = make_inputs(64, 16, 101, torch.float32, CPU, seed=3)
    peer = next(peer for peer in all_peers() if peer.name == "torch eager")
    local = Local([peer], inputs, BY_NAME["training"], Stopwatch(CPU))
    assert local.time_ms(peer.name) > 0 and inputs.hidden.grad is not None
    local.clear()
    assert inputs.hidden.grad is None


def test_the_command_times_what_works_and_lists_what_does_not(
    packages: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    next(packages.glob("prime_rl/**/lm_head.py")).with_name("crash").touch()
    sizes = ["--shapes", "16x64", "--tokens", "32", "--rounds", "2", "--modes", "training", "ce"]
    names = ["ours (chunked)", "torch linear", "prime-rl", "TRL"]
    chosen = [word for name in names for word in ("--only", name)]
    places = ["--peers", str(packages), "--results", str(tmp_path)]
    words = ["bench", "kernels", *sizes, *chosen, "--dtype", "float32", *places]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    main()
    assert "made for another torch" in capsys.readouterr().out
    (path,) = (tmp_path / "cpu").glob("kernels-*.json")
    record = json.loads(path.read_text())
    assert str(tmp_path) not in record["command"]
    assert list(record["unavailable"]) == [
        *(["torch linear_cross_entropy"] * older()),
        "TRL chunked",
    ]
    modes = record["cases"][0]["modes"]
    for mode in modes.values():
        found = mode["candidates"]
        assert found["prime-rl"]["status"] == "failed"
        assert "exit code 7" in found["prime-rl"]["message"]
        timed = ["ours (chunked)", *(["torch linear_cross_entropy"] * (not older()))]
        for name in timed:
            assert found[name]["status"] == "ok" and len(found[name]["times_ms"]) == 2
            assert found[name]["ratio_to_floor"] > 0


def older() -> bool:
    """Whether this torch has no linear cross entropy of its own."""
    return not hasattr(torch.nn.functional, "linear_cross_entropy")
