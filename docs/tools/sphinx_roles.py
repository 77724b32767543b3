"""
What docstrings have for Sphinx and mkdocstrings does not know: roles such as ``:class:`~sb3_mrq.mrq.MRQ```, and named tuples
whose fields are documented as parameters.
"""

import re
from typing import Any

from griffe import Class, Extension, Object

ROLE = re.compile(r":(class|func|meth|mod|attr|data):`(~?)([\w.]+)`")


def convert(text: str) -> str:
    """
    :param text: of a docstring
    :return: the same with Markdown references in place of roles
    """

    def reference(match: re.Match[str]) -> str:
        role, short, name = match.groups()
        title = name.rsplit(".", 1)[-1] if short else name
        # Modules have no anchor, and neither have names without a path
        return f"`{title}`" if role == "mod" or "." not in name else f"[`{title}`][{name}]"

    return ROLE.sub(reference, text)


class SphinxRoles(Extension):
    """Converts each docstring before it is parsed."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """
        :param obj: a module, class, function or attribute
        """
        if obj.docstring is None:
            return
        obj.docstring.value = convert(obj.docstring.value)
        if isinstance(obj, Class) and any(str(base).endswith("NamedTuple") for base in obj.bases):
            obj.docstring.value = obj.docstring.value.replace(":param ", ":ivar ")
