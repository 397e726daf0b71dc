"""What stops a training and what it warns of: at the right moment, once, with advice."""

import errno
import os
import signal
import sys
import threading
import warnings

import pytest
import torch

from diffusers_fair.training import memory
from diffusers_fair.training.guards import (
    PATIENCE,
    TERMINATED,
    Caution,
    Termination,
    TrainingStoppedError,
    Watch,
    room_on_disk,
)

GB = 10**9


def test_each_skipped_update_halves_the_rate_and_good_ones_bring_it_back():
    caution = Caution(limit=3)
    caution.record(True)
    assert caution.factor == 1
    caution.record(False)
    caution.record(False)
    assert (caution.factor, caution.in_a_row, caution.skipped) == (0.25, 2, 2)
    caution.record(True)
    assert caution.factor == pytest.approx(0.275)
    for _ in range(20):
        caution.record(True)
    assert (caution.factor, caution.in_a_row, caution.skipped) == (1.0, 0, 2)
    assert Caution(**caution.state()) == caution


def test_too_many_in_a_row_stop_the_training_with_advice():
    caution = Caution(limit=3)
    for finite in (False, False, True, False, False):
        caution.record(finite)
    with pytest.raises(
        TrainingStoppedError,
        match=r"not finite in 3 iterations in a row \(train\.max_skipped\): .*base\.dtype.*lower",
    ) as stop:
        caution.record(False)
    assert stop.value.code == 1


GOOD = {"faces": 1.0, "largest/colour": 0.6}


@pytest.mark.parametrize(
    ("bad", "advice"),
    [
        ({"faces": 0.0}, "no face was found in 20 iterations.*models.face_detector"),
        ({"faces": 1.0, "largest/colour": 1.0}, "same class of 'colour' in 20.*its classifier"),
    ],
)
def test_a_fault_that_lasts_is_spoken_of_once(bad, advice):
    watch = Watch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figures in [bad] * (PATIENCE - 1) + [GOOD] + [bad] * (PATIENCE - 1):
            watch.look(figures)
    with pytest.warns(UserWarning, match=advice):
        watch.look(bad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2 * PATIENCE):
            watch.look(bad)
            watch.look({})  # of an iteration that was skipped


def test_a_clip_t_under_its_floor_is_spoken_of_once():
    watch = Watch()
    with pytest.warns(UserWarning, match=r"fell to 0\.200, below 0\.250.*raise losses.semantics"):
        watch.clip_t(0.2, 0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.clip_t(0.1, 0.25)
        Watch().clip_t(0.25, 0.25)


def test_a_sigterm_is_noted_and_afterwards_is_what_it_was():
    before = signal.getsignal(signal.SIGTERM)
    with Termination() as termination:
        assert not termination.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert termination.asked
    assert signal.getsignal(signal.SIGTERM) is before
    assert TERMINATED == 143


def test_in_other_threads_signals_are_left_alone():
    found = []

    def enter():
        with Termination() as termination:
            found.append((termination.asked, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(False, signal.getsignal(signal.SIGTERM))]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said_clearly(tmp_path, number):
    with (
        pytest.raises(
            TrainingStoppedError, match=r"no room on the disk for .*make room and give the same"
        ),
        room_on_disk(tmp_path),
    ):
        raise OSError(number, os.strerror(number))


def test_other_errors_of_files_pass(tmp_path):
    with pytest.raises(PermissionError), room_on_disk(tmp_path):
        raise PermissionError(errno.EACCES, "no")


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "most", "fits", "tried"),
    [
        (100, 24, 24, [1, 2, 4, 8, 16, 24]),
        (100, 1, 1, [1]),
        (9.5, 24, 4, [1, 2, 4]),  # 8 would need 10, and is not tried
        (6, 24, 4, [1, 2, 4]),
        (3, 24, 1, [1, 2]),
    ],
)
def test_the_most_images_that_fit_are_found_by_doubling(budget, most, fits, tried):
    """Two GB, and one for each image."""
    sizes = []
    measure = lambda n: sizes.append(n) or (2 + n) * GB  # noqa: E731
    assert memory.fitting(measure, most, budget) == fits
    assert sizes == tried


def test_a_budget_that_is_too_small_for_one_image_is_refused():
    with pytest.raises(
        ValueError, match=r"memory_budget is 2 GB, and one image at a time takes 3\.00: raise it"
    ):
        memory.fitting(lambda n: (2 + n) * GB, 8, 2)


def test_the_peak_is_what_was_taken_at_most():
    before = memory.peak(torch.device("cpu"))
    torch.ones(before // 4 + 2**26).sum()  # float32: more than there was in all
    assert memory.peak(torch.device("cpu")) >= before + 2**27


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets")
def test_the_peak_is_forgotten_when_asked():
    cpu = torch.device("cpu")
    torch.ones(memory.peak(cpu) // 4 + 2**26).sum()
    before = memory.peak(cpu)
    memory.forget_peak(cpu)
    assert memory.peak(cpu) <= before - 2**27
