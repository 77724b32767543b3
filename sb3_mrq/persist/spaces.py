"""
Spaces in JSON types, to check whether a file was made for the same spaces.
"""

import base64
from typing import Any

import numpy as np
from gymnasium import spaces


def describe_space(space: spaces.Space) -> dict[str, Any]:
    """
    :param space: one of the supported spaces
    :return: description in JSON types; equal spaces have equal descriptions
    """
    if isinstance(space, spaces.Dict):
        return {"kind": "Dict", "spaces": [[key, describe_space(subspace)] for key, subspace in space.spaces.items()]}
    if isinstance(space, spaces.Box):
        kind = {"kind": "Box", "shape": list(space.shape), "dtype": space.dtype.str}
        return {**kind, "low": _encode_bounds(space.low), "high": _encode_bounds(space.high)}
    if isinstance(space, spaces.Discrete):
        return {"kind": "Discrete", "n": int(space.n), "start": int(space.start), "dtype": np.dtype(space.dtype).str}
    if isinstance(space, spaces.MultiDiscrete):
        dtype = np.dtype(space.dtype).str
        return {"kind": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": space.start.tolist(), "dtype": dtype}
    if isinstance(space, spaces.MultiBinary):
        return {"kind": "MultiBinary", "n": space.n if isinstance(space.n, int) else list(space.shape)}
    raise TypeError(f"{space} is not one of the supported spaces.")


def _encode_bounds(bounds: np.ndarray) -> Any:
    first = bounds.reshape(-1)[:1]
    # Equal bounds of all dimensions are common. For images, all bounds would take as much space as a frame.
    if (bounds == first).all():
        return first.tolist()[0]
    return base64.b64encode(bounds.astype(bounds.dtype.newbyteorder("<")).tobytes()).decode()


def show_space(description: dict[str, Any]) -> str:
    """
    :param description: result of ``describe_space``
    :return: text for an error message, similar to the representation in gymnasium
    """
    kind = description["kind"]
    if kind == "Dict":
        return f"Dict({', '.join(f'{key!r}: {show_space(part)}' for key, part in description['spaces'])})"
    if kind != "Box":
        return f"{kind}({', '.join(f'{name}={value}' for name, value in description.items() if name != 'kind')})"
    dtype = np.dtype(description["dtype"])
    bounds = []
    for bound in (description["low"], description["high"]):
        if isinstance(bound, str):
            values = np.frombuffer(base64.b64decode(bound), dtype=dtype.newbyteorder("<"))
            bound = f"[{', '.join(map(str, values))}]"
        bounds.append(bound)
    return f"Box({bounds[0]}, {bounds[1]}, {tuple(description['shape'])}, {dtype})"
