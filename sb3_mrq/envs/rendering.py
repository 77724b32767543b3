"""
Choice of MuJoCo's OpenGL library without a display.

By default dm_control and gymnasium use the first library that can be imported, GLFW, which needs a display. dm_control cannot
switch to another library later.
"""

import os
import subprocess
import sys

VARIABLE = "MUJOCO_GL"

_PROBE = "import mujoco; mujoco.GLContext(64, 64).make_current()"


def choose_backend() -> None:
    """
    Set the environment variable ``MUJOCO_GL`` on Linux without a display: to ``egl``, else ``osmesa``, or to ``disable`` if
    neither works, so that tasks without rendering still run. Must be called before dm_control is imported.

    The variable does not change if it is already set, if there is a display, or if dm_control was imported before.
    """
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if os.environ.get(VARIABLE) or display or not sys.platform.startswith("linux") or "dm_control._render" in sys.modules:
        return
    os.environ[VARIABLE] = next((backend for backend in ("egl", "osmesa") if _works(backend)), "disable")
    if os.environ[VARIABLE] == "osmesa":
        # With dm_control's rendering thread, a program ends with a traceback if an environment is not closed
        os.environ.setdefault("DISABLE_RENDER_THREAD_OFFLOADING", "1")


def _works(backend: str) -> bool:
    # In a separate process, since PyOpenGL keeps the first library it tries, even if it does not work
    probe = subprocess.run([sys.executable, "-c", _PROBE], env={**os.environ, VARIABLE: backend}, capture_output=True)
    return probe.returncode == 0


def rendering_error() -> RuntimeError:
    """
    :return: the error to raise if MuJoCo cannot render
    """
    if os.environ.get("DISPLAY") and not os.environ.get(VARIABLE):
        return RuntimeError(
            f"MuJoCo cannot render: the display {os.environ['DISPLAY']} cannot be used. Restart with {VARIABLE}=egl, or with "
            "DISPLAY unset."
        )
    return RuntimeError(
        f"MuJoCo cannot render: {VARIABLE} is {os.environ.get(VARIABLE, 'not set')}. Without a display it needs EGL "
        "(apt-get install libegl1 libgl1 libgl1-mesa-dri, or the driver of the GPU) or OSMesa (apt-get install libosmesa6). "
        f"Install one and restart with {VARIABLE} unset. Tasks with observations of the state need neither, unless they "
        "are rendered."
    )
