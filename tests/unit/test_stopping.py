"""What stops a training and what it warns of: at the right moment, once, with advice."""

import errno
import os
import re
import signal
import sys
import threading

import pytest

from diffusers_fair import __main__
from diffusers_fair.objective.statistics import BatchStatistics, ClassStatistics
from diffusers_fair.training.monitor import _PATIENCE, TrainingMonitor
from diffusers_fair.training.optimizer import NonFiniteGuard
from diffusers_fair.training.stopping import (
    SignalHandler,
    Terminated,
    TrainingStoppedError,
    exit_code,
    explain_full_disk,
    raise_on_sigterm,
)


def test_each_skipped_update_halves_the_rate_and_good_ones_bring_it_back():
    guard = NonFiniteGuard(limit=3)
    guard.record(True)
    assert guard.factor == 1
    guard.record(False)
    guard.record(False)
    assert (guard.factor, guard.in_a_row, guard.skipped) == (0.25, 2, 2)
    guard.record(True)
    assert guard.factor == pytest.approx(0.275)
    for _ in range(20):
        guard.record(True)
    assert (guard.factor, guard.in_a_row, guard.skipped) == (1.0, 0, 2)
    restored = NonFiniteGuard(limit=1)
    restored.load_state_dict(guard.state_dict())
    assert restored == guard


def test_too_many_in_a_row_stop_the_training_with_advice():
    guard = NonFiniteGuard(limit=3)
    for finite in (False, False, True, False, False):
        guard.record(finite)
    with pytest.raises(
        TrainingStoppedError,
        match=r"not finite in 3 iterations in a row \(train\.max_skipped\): .*base\.dtype.*lower",
    ) as stop:
        guard.record(False)
    assert stop.value.code == 1


def batch(faces: float, largest: float | None = None) -> BatchStatistics:
    """Statistics of a batch with a share of images with a face, and of the commonest class."""
    shares = (largest, 1 - largest) if largest else ()
    colour = ClassStatistics(classes=("red", "blue"), shares=shares, bias=0.0)
    return BatchStatistics(
        losses={}, face_rate=faces, attributes={"colour": colour} if largest else {}
    )


GOOD = batch(1.0, 0.6)


@pytest.mark.parametrize(
    ("bad", "advice"),
    [
        (batch(0.0), "no face was found in 20 iterations.*models.face_detector"),
        (batch(1.0, 1.0), "same class of 'colour' in 20.*its classifier"),
    ],
)
def test_a_persistent_problem_is_reported_once(bad, advice, caplog):
    monitor = TrainingMonitor()
    for statistics in [bad] * (_PATIENCE - 1) + [GOOD] + [bad] * (_PATIENCE - 1):
        monitor.check_batch(statistics)
    assert not caplog.messages
    for _ in range(2 * _PATIENCE):
        monitor.check_batch(bad)
    (message,) = caplog.messages
    assert re.search(advice, message)


def test_a_clip_t_below_the_minimum_is_reported_once(caplog):
    monitor = TrainingMonitor()
    for value in (0.2, 0.1):
        monitor.check_clip_t(value, 0.25)
    TrainingMonitor().check_clip_t(0.25, 0.25)
    (message,) = caplog.messages
    assert re.search(r"fell to 0\.200, below 0\.250.*raise losses\.semantics", message)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_deferred_and_its_handler_restored(number, code, capfd):
    before = signal.getsignal(number)
    deferred = Terminated if number == signal.SIGTERM else KeyboardInterrupt
    with pytest.raises(deferred), SignalHandler() as handler:  # noqa: PT012
        assert not handler.received
        os.kill(os.getpid(), number)
        assert exit_code(handler.received) == code
        os.kill(os.getpid(), number)  # as a launcher passes it on: still deferred
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err.count("Ctrl-C again stops at once") == 1


def test_a_second_ctrl_c_interrupts_at_once(monkeypatch):
    times = iter([0.0, 1.5, 1.6])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    with pytest.raises(ValueError, match="answer"), SignalHandler() as handler:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # only Ctrl-C does
        raise ValueError("an answer to the signal")
    assert handler.received == signal.SIGTERM


def test_an_ignored_signal_stays_ignored():
    """As that of Ctrl-C in what a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with SignalHandler() as handler:
            os.kill(os.getpid(), signal.SIGINT)
        assert not handler.received
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_command_is_terminated_as_it_is_interrupted():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), raise_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    assert issubclass(Terminated, KeyboardInterrupt)
    assert signal.getsignal(signal.SIGTERM) is before


def test_in_other_threads_signals_are_left_alone():
    found = []

    def enter():
        with SignalHandler() as handler:
            found.append((handler.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(0, signal.getsignal(signal.SIGTERM))]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_reported_clearly(tmp_path, number):
    with (
        pytest.raises(
            TrainingStoppedError,
            match=r"no room on the disk for .*free some space and give the same",
        ),
        explain_full_disk(tmp_path),
    ):
        raise OSError(number, os.strerror(number))


def test_other_errors_of_files_pass(tmp_path):
    with pytest.raises(PermissionError), explain_full_disk(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_another_ctrl_c_at_the_end_changes_nothing(monkeypatch):
    monkeypatch.setattr("diffusers_fair.cli.main", lambda: sys.exit(exit_code(signal.SIGINT)))
    previous = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit, match="130"):
            __main__.main()
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, previous)
