"""
Choice of the rendering library. Each test runs in its own process, because the choice is made once.
"""

import os
import subprocess
import sys
from ast import literal_eval

import pytest

pytest.importorskip("dm_control")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the choice is dm_control's on other systems")

VARIABLES = ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL", "PYOPENGL_PLATFORM")

PRELUDE = """
import os, sys
import gymnasium as gym
import sb3_mrq.envs
from sb3_mrq.envs import rendering

def step_of_the_state_task():
    env = gym.make("dmc/cartpole-swingup-v0", render_mode="rgb_array")
    env.reset(seed=0)
    env.step(env.action_space.sample())
    return env

def message_of(function):
    try:
        function()
    except RuntimeError as error:
        return str(error)
"""


def run(code, **variables):
    """
    :param code: expressions of Python
    :param variables: of the environment, in which nothing else tells MuJoCo how to render
    :return: their values
    """
    env = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    lines = "\n".join(f"values.append({line})" for line in code)
    code = f"{PRELUDE}\nvalues = []\n{lines}\nprint(repr(values))"
    result = subprocess.run([sys.executable, "-c", code], env={**env, **variables}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return literal_eval(result.stdout)


@pytest.fixture()
def nothing_works(tmp_path):
    """Variables with which there is neither a device for EGL nor an OSMesa that can be loaded."""
    for name in ("libOSMesa.so", "libOSMesa.so.6", "libOSMesa.so.8"):
        (tmp_path / name).write_bytes(b"not a library")
    return {"__EGL_VENDOR_LIBRARY_FILENAMES": os.devnull, "LD_LIBRARY_PATH": str(tmp_path)}


def test_without_display():
    """Whatever works is taken, and other processes inherit it."""
    set_to, frame, child = run(
        [
            "step_of_the_state_task() and os.environ['MUJOCO_GL']",
            "int(step_of_the_state_task().render().std())",
            "__import__('subprocess').check_output('echo $MUJOCO_GL', shell=True, text=True)",
        ]
    )
    assert set_to == child.strip()
    assert set_to in ("egl", "osmesa")
    assert frame > 10


def test_nothing_works(nothing_works):
    set_to, message, visual = run(
        [
            "step_of_the_state_task() and os.environ['MUJOCO_GL']",
            "message_of(step_of_the_state_task().render)",
            "message_of(lambda: gym.make('dmc-visual/cartpole-swingup-v0'))",
        ],
        **nothing_works,
    )
    assert set_to == "disable"
    assert message == visual
    for part in ("cannot render", "apt-get install libegl1 libgl1 libgl1-mesa-dri", "apt-get install libosmesa6"):
        assert part in message


def test_chosen_by_the_user(nothing_works):
    """It is kept, even if it cannot render. The error of the library is raised once."""
    set_to, message = run(
        ["step_of_the_state_task() and os.environ['MUJOCO_GL']", "message_of(step_of_the_state_task().render)"],
        MUJOCO_GL="glfw",
    )
    assert set_to == "glfw"
    assert "cannot render: MUJOCO_GL is glfw" in message
    messages = run(
        ["message_of(step_of_the_state_task)", "message_of(step_of_the_state_task)"], MUJOCO_GL="egl", **nothing_works
    )
    assert all("cannot render: MUJOCO_GL is egl" in message for message in messages)


@pytest.mark.parametrize("display", ["DISPLAY", "WAYLAND_DISPLAY"])
def test_with_display(display, nothing_works):
    """dm_control chooses."""
    code = ["rendering.choose_backend()", "os.environ.get('MUJOCO_GL')"]
    assert run(code, **{display: ":0"}, **nothing_works) == [None, None]


def test_display_that_cannot_be_used():
    (message,) = run(["message_of(step_of_the_state_task().render)"], DISPLAY=":99")
    assert "the display :99 cannot be used. Restart with MUJOCO_GL=egl" in message


def test_too_late(nothing_works):
    """dm_control has chosen."""
    code = ["bool(__import__('dm_control._render'))", "rendering.choose_backend()", "os.environ.get('MUJOCO_GL')"]
    assert run(code, **nothing_works) == [True, None, None]
