"""On a GPU that is not there, the package does what it does on the CPU, and faults are caught."""

import json
import subprocess
import sys

import pretend_cuda
import pretend_scenarios
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not pretend_cuda.is_possible(), reason="needs a CUDA build of torch and a C compiler"
    ),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Figures of all scenarios; one process for all, as it is long to start."""
    folder = tmp_path_factory.mktemp("pretend")
    command = [sys.executable, pretend_scenarios.__file__, str(folder / "results")]
    env = pretend_cuda.environment(folder)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", pretend_scenarios.SCENARIOS)
def test_figures_are_those_of_the_cpu(name, results):
    cpu, cuda = results["cpu"][name], results["cuda"][name]
    assert "error" not in cpu, cpu["trace"]
    assert "error" not in cuda, cuda["trace"]
    assert cuda == cpu


@pytest.mark.parametrize("name", pretend_scenarios.FAULTS)
def test_planted_faults_are_caught(name, results):
    assert pretend_scenarios.TWO_DEVICES in (results["faults"][name] or {"error": "none"})["error"]


@pytest.mark.parametrize("expression", pretend_scenarios.RULES)
def test_what_cuda_refuses_is_refused(expression, results):
    expected, found = pretend_scenarios.RULES[expression], results["rules"][expression]
    if expected is None:
        assert "error" not in found
    else:
        assert expected in found["error"]
