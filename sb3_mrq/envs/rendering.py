"""
Choice of the OpenGL library that MuJoCo renders with where there is no display.

Left alone, both dm_control and gymnasium take the first one that can be imported, GLFW, which needs a display, and dm_control
cannot change its mind later.
"""

import os
import subprocess
import sys

VARIABLE = "MUJOCO_GL"

_PROBE = "import mujoco; mujoco.GLContext(64, 64).make_current()"


def choose_backend() -> None:
    """
    Set the environment variable ``MUJOCO_GL`` on Linux without a display, to ``egl`` or else ``osmesa``, or to ``disable``
    where neither works, with which tasks that do not render can be run. To be called before dm_control is imported.

    It stays as it is where it is set, and unset where there is a display or dm_control has made its choice.
    """
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if os.environ.get(VARIABLE) or display or not sys.platform.startswith("linux") or "dm_control._render" in sys.modules:
        return
    os.environ[VARIABLE] = next((backend for backend in ("egl", "osmesa") if _works(backend)), "disable")
    if os.environ[VARIABLE] == "osmesa":
        # dm_control's thread for OSMesa, with which an environment that is not closed ends the program with a traceback
        os.environ.setdefault("DISABLE_RENDER_THREAD_OFFLOADING", "1")


def _works(backend: str) -> bool:
    # In a process of its own, since PyOpenGL keeps the first library it has tried, whether or not it works
    probe = subprocess.run([sys.executable, "-c", _PROBE], env={**os.environ, VARIABLE: backend}, capture_output=True)
    return probe.returncode == 0


def failure() -> RuntimeError:
    """
    :return: the error to be raised where MuJoCo cannot render
    """
    if os.environ.get("DISPLAY") and not os.environ.get(VARIABLE):
        return RuntimeError(
            f"MuJoCo cannot render: the display {os.environ['DISPLAY']} cannot be used. Start again with {VARIABLE}=egl, or "
            "with DISPLAY unset."
        )
    return RuntimeError(
        f"MuJoCo cannot render: {VARIABLE} is {os.environ.get(VARIABLE, 'not set')}. Without a display it needs EGL "
        "(apt-get install libegl1 libgl1 libgl1-mesa-dri, or the driver of the GPU) or OSMesa (apt-get install libosmesa6). "
        f"Install one and start again with {VARIABLE} unset. Tasks with observations of the state need neither, unless they "
        "are rendered."
    )
